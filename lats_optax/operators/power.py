"""Between soft and hard: the power threshold, one that changes during a run, and rescaling.

Here belongs what a named sparsity is reached with by default. Other operators are in `prox.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp

from lats_optax.array_types import Array, Count, Float, Scalar
from lats_optax.checks.numbers import check_above, check_steps
from lats_optax.operators.leaves import positive_zero
from lats_optax.operators.protocol import Elementwise


@dataclass(frozen=True)
class PowerThreshold(Elementwise):
    """The operator that ``prox.prox_power`` makes.

    Attributes:
      p: a number in (1, inf].
    """

    p: float

    def shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """``sign(x) (|x|^p - d^p)^(1/p)`` where ``|x| > d``, else 0."""
        p = self.p
        if p == math.inf:
            excess = jnp.abs(x) - d
            return jnp.where(excess <= 0, 0.0, jnp.where(jnp.isnan(excess), jnp.nan, x))
        if p == 2:
            return _shrunk(x, d, lambda r, excess: jnp.sqrt(excess * (1 + r)))
        if p == 3:
            return _shrunk(x, d, lambda r, excess: _cube_root(excess * (1 + r + r * r)))
        return _shrunk(x, d, lambda r, excess: (-jnp.expm1(p * jnp.log1p(-excess))) ** (1 / p))

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """``sign(w) (|w|^p + d^p)^(1/p)``."""
        if self.p == math.inf:
            return jnp.where(w == 0, 0.0, jnp.sign(w) * jnp.maximum(jnp.abs(w), d))
        # Scaled by the larger of the two, so that no power of a small number underflows.
        larger = jnp.maximum(jnp.abs(w), d)
        safe = jnp.where(larger == 0, 1.0, larger)
        ratio = jnp.minimum(jnp.abs(w), d) / safe
        return jnp.sign(w) * larger * (1 + ratio**self.p) ** (1 / self.p)


@dataclass(frozen=True)
class AnnealedThreshold(Elementwise):
    """The operator that :func:`prox_annealed` makes, after so many steps.

    Attributes:
      steps: number of steps after which it no longer changes.
      c: the zero of the second factor, a scalar in [-1, 1], perhaps traced.
    """

    steps: int
    c: Scalar = -1.0

    def at(self, count: Count) -> "AnnealedThreshold":
        """The threshold after so many steps."""
        x = jnp.clip(jnp.asarray(count) / self.steps, 0.0, 1.0)
        return AnnealedThreshold(self.steps, 1 - 2 * x)

    def shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """``sign(x) sqrt((|x| - d) (|x| - c d))`` where ``|x| > d``, else 0."""
        c = jnp.asarray(self.c, x.dtype)
        return _shrunk(x, d, lambda r, excess: jnp.sqrt(excess * (1 - c * r)))

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """``sign(w) ((1 + c) d + hypot(2 w, (1 - c) d)) / 2``."""
        c = jnp.asarray(self.c, w.dtype)
        return jnp.sign(w) * ((1 + c) * d + jnp.hypot(2 * w, (1 - c) * d)) / 2


def _shrunk(
    x: Float[Array, "*shape"], d: Float[Array, "*#shape"], factor: Callable[[Array, Array], Array]
) -> Float[Array, "*shape"]:
    """``x factor(r, 1 - r)`` with ``r = d / |x|`` where that is below 1, else 0."""
    size = jnp.abs(x)
    dead = size - d <= 0
    safe = jnp.where(dead, 1.0, size)
    r = jnp.where(dead, 0.5, d / safe)
    # Where r is near 1, 1 - r is taken from the difference |x| - d, which is exact there; where |x|
    # is infinite that has no value.
    excess = jnp.where(jnp.isinf(size), 1 - r, (size - d) / safe)
    excess = jnp.where(dead, 0.5, excess)
    # Where d is below the rounding of |x|, the factor may come out above 1 by as much.
    return jnp.where(dead, 0.0, x * jnp.minimum(factor(r, excess), 1.0))


def _cube_root(x: Array) -> Array:
    """The cube root of positive numbers, to about an epsilon in float32 and float64.

    On CPUs XLA computes `jnp.cbrt` number by number, and exponentials and logarithms in vectors.
    """
    root = jnp.exp(jnp.log(x) / 3)
    return root - (root - x / (root * root)) / 3  # a step of Newton's method


@dataclass(frozen=True)
class Rescaled(Elementwise):
    """An operator times the one factor that brings its value nearest to its argument.

    ``R_d(x) = s P_d(x)``, ``s = min(<x, P_d(x)> / ||P_d(x)||^2, most)``

    The first number is ``argmin_s ||x - s P_d(x)||^2``. There is a factor for each array. Survivors
    keep the proportions that P gives them, so that one which is about to die is small; but together
    they are no longer too small by as much as P shrinks them. That matters where an optimizer can
    hardly move a weight beyond the threshold within the run, as lion with a small learning rate.
    The factor is continuous: a weight that comes or goes has no part in it. It is bounded, because
    the weights could not be small otherwise: their norm would be at least that of as many
    thresholds. Squares are summed as they are: in float32 weights below about 1e-19 are not
    rescaled.

    Attributes:
      operator: P, which acts on each weight by itself.
      most: the largest factor, >= 1.

    Raises:
      ValueError: ``most`` is not a number >= 1.

    Example:
      >>> from lats_optax import prox
      >>> Rescaled(prox.prox_l1)(jnp.array([3.0, -2.0, 0.5]), 1.0)
      Array([ 3.2, -1.6,  0. ], dtype=float32)

    Source: this library. Factors of another kind, one for each output, are those of Vanderschueren
    and De Vleeschouwer, "Are straight-through gradients and soft-thresholding all you need for
    sparse training?" (WACV 2023).
    """

    operator: Elementwise
    most: float = 2.0

    def __post_init__(self) -> None:
        """Refuse a bound below 1."""
        check_above("most", self.most, 1, inclusive=True, infinite=True)

    def shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """``s P_d(x)``, with a factor of exactly 1 under a threshold of zero."""
        w = self.operator.shrink(x, d)
        squares = jnp.sum(w * w)
        shrunk = (squares > 0) & jnp.any(d != 0)
        factor = jnp.sum(x * w) / jnp.where(shrunk, squares, 1.0)
        return positive_zero(w * jnp.where(shrunk, jnp.minimum(factor, self.most), 1.0))

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """That of the operator: exact where a threshold begins at zero, with a factor of 1."""
        return self.operator.preimage(w, d)

    def least(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """As that of the operator: what dies is the same."""
        return self.operator.least(x)

    def at(self, count: Count) -> "Rescaled":
        """The operator after so many steps, rescaled."""
        return Rescaled(self.operator.at(count), self.most)


def prox_annealed(steps: int) -> Elementwise:
    """A threshold that changes during a run, from soft to ``prox_power(2)``.

    ``A_d(x) = sign(x) sqrt((|x| - d) (|x| - c d))`` where ``|x| > d``, else 0, with
    ``c = 1 - 2 min(t / steps, 1)`` after t steps

    It is the geometric mean of two lines. With c = 1 they are the same, and it is the soft
    threshold; c = -1 gives ``sqrt(x^2 - d^2)``. The first lets weights enter and leave the support
    gently, and shrinks the survivors. The last leaves the larger ones nearly as they are, and makes
    the support stiff. It costs products and a square root, where other powers take logarithms.

    Args:
      steps: number of optimizer steps over which the threshold changes.

    Returns:
      An operator. Outside of a run, ``operator(x, d)`` is that of the last step. The penalty is
      not convex where c < 1.

    Raises:
      ValueError: ``steps`` < 1.

    Example:
      >>> operator = prox_annealed(steps=100)
      >>> [round(float(operator.at(count)(jnp.array(1.25), 1.0)), 3) for count in (0, 50, 100)]
      [0.25, 0.559, 0.75]

    Source: this library; continuation from a convex problem to a non-convex one is the idea of
    Blake and Zisserman, "Visual Reconstruction" (1987).
    """
    return AnnealedThreshold(check_steps(steps))
