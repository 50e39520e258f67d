"""Spiking neurons: surrogate gradients, integrate-and-fire dynamics, and the Flax layer.

Here belongs what one population of neurons does over time, always the leading axis; networks of
them have files of their own.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from lats_optax.checks.options import check, check_choice

# Derivatives of steps from 0 to 1 that steepen with α; each has an integral of 1.
_SURROGATES: dict[str, Callable[[Array, float], Array]] = {
    "atan": lambda x, a: a / 2 / (1 + (math.pi / 2 * a * x) ** 2),
    "sigmoid": lambda x, a: a * jax.nn.sigmoid(a * x) * jax.nn.sigmoid(-a * x),
    "softsign": lambda x, a: a / 2 / (1 + a * jnp.abs(x)) ** 2,
    "triangle": lambda x, a: a * jnp.maximum(1 - a * jnp.abs(x), 0),
    "rectangle": lambda x, a: a * (a * jnp.abs(x) < 0.5).astype(x.dtype),
}


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """The derivative that a spike, a step of x = potential − threshold, is given.

    - ``"atan"``: ``α/2 / (1 + (π/2 · αx)²)``
    - ``"sigmoid"``: ``α · σ(αx) · σ(−αx)``
    - ``"softsign"``: ``α/2 / (1 + α|x|)²``
    - ``"triangle"``: ``α · max(1 − α|x|, 0)``
    - ``"rectangle"``: α where ``α|x| < 1/2``, else 0

    Attributes:
      name: one of these.
      alpha: α > 0, per unit of potential; the larger, the nearer to a step.

    Raises:
      ValueError: the name is not known, or ``alpha`` is not a positive number.

    Example:
      >>> float(Surrogate("triangle", alpha=2.0)(jnp.float32(0.25)))
      1.0

    Source: Fang et al., "Incorporating Learnable Membrane Time Constant" (ICCV 2021) for ATan;
    Neftci et al., "Surrogate Gradient Learning in Spiking Neural Networks" (2019).
    """

    name: str = "atan"
    alpha: float = 2.0

    def __post_init__(self) -> None:
        """Checks both."""
        check_choice("surrogate", self.name, _SURROGATES)
        check(0 < self.alpha < math.inf, "surrogate alpha", self.alpha, "a number above 0")

    def __call__(self, x: Array) -> Array:
        """The derivative at x, elementwise: float, any shape -> the same shape and dtype."""
        return _SURROGATES[self.name](x, self.alpha)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def fire(x: Array, surrogate: Surrogate) -> Array:
    """Spikes, 1 where x ≥ 0 and else 0; differentiated as the surrogate says.

    Args:
      x: potential − threshold, float, any shape.
      surrogate: the derivative.

    Returns:
      Zeros and ones, of the shape and dtype of ``x``.

    Example:
      >>> x = jnp.array([-0.5, 0.0, 0.5])
      >>> fire(x, Surrogate("rectangle", alpha=1.5))
      Array([0., 1., 1.], dtype=float32)
      >>> jax.grad(lambda x: fire(x, Surrogate("rectangle", alpha=1.5)).sum())(x)
      Array([0. , 1.5, 0. ], dtype=float32)
    """
    del surrogate
    return (x >= 0).astype(x.dtype)


@fire.defjvp
def _fire_jvp(
    surrogate: Surrogate, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    return fire(x, surrogate), surrogate(x) * dx


@dataclasses.dataclass(frozen=True)
class Neuron:
    """An integrate-and-fire neuron: how it charges, fires and resets.

    At each step, for an input x and a potential v that begins at ``rest``::

        charge  h = v + x                        "if": integrate-and-fire
                h = v + (x − (v − rest)) / τ     "lif": leaky; "plif": leaky with a trained τ
        fire    s = 1 if h ≥ threshold else 0
        reset   v = rest where s = 1, else h     "hard"
                v = h − s · threshold            "soft"

    Attributes:
      kind: ``"if"``, ``"lif"`` or ``"plif"``.
      threshold: potential at which it fires, above ``rest``.
      reset: ``"hard"`` or ``"soft"``.
      rest: potential at the start, after a hard reset, and to which a leaky neuron decays.
      detach_reset: whether the spike is a constant in the reset, so that no gradient goes through
        it to earlier steps.
      tau: τ > 1 in steps, of a leaky neuron; of ``"plif"`` the initial one.
      surrogate: derivative of the spike.

    Raises:
      ValueError: an attribute is not one of these.

    Example:
      >>> inputs = jnp.array([[0.6], [0.6], [0.6]])
      >>> spikes, potential = Neuron()(inputs)
      >>> spikes.ravel(), potential
      (Array([0., 1., 0.], dtype=float32), Array([0.6], dtype=float32))

    Source: Gerstner et al., "Neuronal Dynamics" (2014), section 1.3; the trained τ is from Fang et
    al., "Incorporating Learnable Membrane Time Constant" (ICCV 2021).
    """

    kind: str = "if"
    threshold: float = 1.0
    reset: str = "hard"
    rest: float = 0.0
    detach_reset: bool = True
    tau: float = 2.0
    surrogate: Surrogate = Surrogate()

    def __post_init__(self) -> None:
        """Checks every attribute."""
        check_choice("neuron kind", self.kind, ("if", "lif", "plif"))
        check_choice("neuron reset", self.reset, ("hard", "soft"))
        check(math.isfinite(self.rest), "neuron rest", self.rest, "a finite number")
        above = self.rest < self.threshold < math.inf
        check(above, "neuron threshold", self.threshold, f"a number above rest, {self.rest}")
        check(1 < self.tau < math.inf, "neuron tau", self.tau, "a number of steps above 1")
        known = isinstance(self.surrogate, Surrogate)
        check(known, "neuron surrogate", self.surrogate, "a Surrogate, such as Surrogate('atan')")

    def __call__(self, inputs: Array, rate: Array | float | None = None) -> tuple[Array, Array]:
        """Runs a population over all steps.

        Args:
          inputs: (steps, …), float: what each neuron is charged with at each step.
          rate: 1/τ of a leaky neuron, a scalar; ``None``: that of ``tau``.

        Returns:
          Spikes, zeros and ones of the shape and dtype of ``inputs``, and the potentials after the
          last step, (…): in float32 or, where the inputs are float64, in that.
        """
        # In bfloat16 a sum of inputs would stop growing at 256 times the smallest of them.
        charges = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
        if rate is None:
            rate = 1 / self.tau

        def step(v: Array, x: Array) -> tuple[Array, Array]:
            h = v + x if self.kind == "if" else v + (x - (v - self.rest)) * rate
            spikes = fire(h - self.threshold, self.surrogate)
            fired = jax.lax.stop_gradient(spikes) if self.detach_reset else spikes
            if self.reset == "hard":
                v = (1 - fired) * h + fired * self.rest
            else:
                v = h - fired * self.threshold
            return v, spikes.astype(inputs.dtype)

        start = jnp.full_like(charges[0], self.rest)
        # Unrolled, the few steps of a spiking network are one pass over memory instead of many.
        potential, spikes = jax.lax.scan(step, start, charges, unroll=min(len(inputs), 8))
        return spikes, potential


class SpikingLayer(nn.Module):
    """A layer of neurons; one of kind ``"plif"`` trains a τ that all its neurons share.

    It is trained as ``tau_logit``, a float32 scalar u with 1/τ = σ(u), so that τ stays above 1.
    The fraction of spikes is sown as ``firing_rate``, a float32 scalar, into ``intermediates``.

    Attributes:
      neuron: what the neurons do.

    Example:
      >>> layer = SpikingLayer(Neuron())
      >>> spikes, state = layer.apply({}, jnp.full((4, 2, 3), 0.5), mutable=["intermediates"])
      >>> spikes.shape, state["intermediates"]["firing_rate"]
      ((4, 2, 3), (Array(0.5, dtype=float32),))
    """

    neuron: Neuron = Neuron()

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps inputs (steps, …) to spikes of the same shape and dtype."""
        rate: Any = None
        if self.neuron.kind == "plif":
            start = nn.initializers.constant(-math.log(self.neuron.tau - 1))
            rate = jax.nn.sigmoid(self.param("tau_logit", start, (), jnp.float32))
        spikes, _ = self.neuron(inputs, rate)
        self.sow("intermediates", "firing_rate", spikes.mean(dtype=jnp.float32))
        return spikes
