"""Power thresholds that change during a run: what a named sparsity is reached with by default.

Here belong the power threshold itself, its exponent that grows, and the rescaling of what survives.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lats_optax.leaves import positive_zero
from lats_optax.operators import Elementwise
from lats_optax.thresholds import check_above, check_steps


@dataclass(frozen=True)
class PowerThreshold(Elementwise):
    """The operator that ``prox.prox_power`` makes.

    Attributes:
      p: a number in (1, inf], or a traced scalar in [1, inf).
    """

    p: Any

    def shrink(self, x: jax.Array, d: jax.Array) -> jax.Array:
        """``sign(x) (|x|^p - d^p)^(1/p)`` where ``|x| > d``, else 0."""
        size = jnp.abs(x)
        dead = size - d <= 0
        if self._is(math.inf):
            return jnp.where(dead, 0.0, jnp.where(jnp.isnan(size - d), jnp.nan, x))
        # With r = d / |x| the factor is (1 - r^p)^(1/p). Where r is near 1, 1 - r is taken from
        # the difference |x| - d, which is exact there; where |x| is infinite that has no value.
        safe = jnp.where(dead, 1.0, size)
        r = jnp.where(dead, 0.5, d / safe)
        excess = jnp.where(jnp.isinf(size), 1 - r, (size - d) / safe)
        excess = jnp.where(dead, 0.5, excess)
        if self._is(3):
            factor = jnp.cbrt(excess * (1 + r + r * r))
        else:
            p = jnp.asarray(self.p, x.dtype)
            factor = (-jnp.expm1(p * jnp.log1p(-excess))) ** (1 / p)
        # Where d is below the rounding of |x|, the factor comes out above 1 by as much.
        return jnp.where(dead, 0.0, x * jnp.minimum(factor, 1.0))

    def preimage(self, w: jax.Array, d: Any) -> jax.Array:
        """``sign(w) (|w|^p + d^p)^(1/p)``."""
        if self._is(math.inf):
            return jnp.where(w == 0, 0.0, jnp.sign(w) * jnp.maximum(jnp.abs(w), d))
        # Scaled by the larger of the two, so that no power of a small number underflows.
        p, larger = jnp.asarray(self.p, w.dtype), jnp.maximum(jnp.abs(w), d)
        safe = jnp.where(larger == 0, 1.0, larger)
        ratio = jnp.minimum(jnp.abs(w), d) / safe
        return jnp.sign(w) * larger * (1 + ratio**p) ** (1 / p)

    def _is(self, value: float) -> bool:
        """Whether p is a number, and this one."""
        return not isinstance(self.p, jax.Array) and bool(self.p == value)


@dataclass(frozen=True)
class AnnealedPower(Elementwise):
    """The operator that :func:`prox_annealed_power` makes."""

    first: float
    last: float
    steps: int

    def at(self, count: Any) -> PowerThreshold:
        """The power threshold after so many steps."""
        x = jnp.clip(jnp.asarray(count) / self.steps, 0.0, 1.0)
        return PowerThreshold(self.first + (self.last - self.first) * x)

    def shrink(self, x: jax.Array, d: jax.Array) -> jax.Array:
        """As at the last step."""
        return PowerThreshold(self.last).shrink(x, d)

    def preimage(self, w: jax.Array, d: Any) -> jax.Array:
        """As at the last step."""
        return PowerThreshold(self.last).preimage(w, d)


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

    def shrink(self, x: jax.Array, d: jax.Array) -> jax.Array:
        """``s P_d(x)``, with a factor of exactly 1 under a threshold of zero."""
        w = self.operator.shrink(x, d)
        squares = jnp.sum(w * w)
        shrunk = (squares > 0) & jnp.any(d != 0)
        factor = jnp.sum(x * w) / jnp.where(shrunk, squares, 1.0)
        return positive_zero(w * jnp.where(shrunk, jnp.minimum(factor, self.most), 1.0))

    def preimage(self, w: jax.Array, d: Any) -> jax.Array:
        """That of the operator: exact where a threshold begins at zero, with a factor of 1."""
        return self.operator.preimage(w, d)

    def least(self, x: jax.Array) -> jax.Array:
        """As that of the operator: what dies is the same."""
        return self.operator.least(x)

    def at(self, count: Any) -> "Rescaled":
        """The operator after so many steps, rescaled."""
        return Rescaled(self.operator.at(count), self.most)


def prox_annealed_power(steps: int, first: float = 1.0, last: float = 3.0) -> Elementwise:
    """A power threshold whose exponent grows during a run, from soft towards hard.

    ``p = first + (last - first) min(t / steps, 1)`` after t steps, in ``prox.prox_power``.

    A small exponent lets weights enter and leave the support gently, and shrinks the survivors. A
    large one leaves them as they are, and makes the support stiff. So a run begins with the first
    and ends with the second.

    Args:
      steps: number of optimizer steps over which the exponent grows.
      first: the exponent before the first step, >= 1 and finite.
      last: the exponent at the end, >= 1 and finite.

    Returns:
      An operator. Outside of a run, ``operator(x, d)`` is that of the last step.

    Raises:
      ValueError: ``steps`` < 1, or an exponent outside [1, inf).

    Example:
      >>> import jax.numpy as jnp
      >>> operator = prox_annealed_power(steps=100)
      >>> [round(float(operator.at(count)(jnp.array(1.2), 1.0)), 3) for count in (0, 50, 100)]
      [0.2, 0.663, 0.9]

    Source: this library; continuation from a convex problem to a non-convex one is the idea of
    Blake and Zisserman, "Visual Reconstruction" (1987).
    """
    exponents = {
        name: check_above(name, value, 1, inclusive=True)
        for name, value in (("first", first), ("last", last))
    }
    return AnnealedPower(**exponents, steps=check_steps(steps))
