"""Proximal operators of single weights: ``operator(x, strength) -> z`` on arrays and pytrees.

An operator maps ``x`` to ``argmin_z 1/2 ||z - x||^2 + strength * penalty(z)``. Here belong the
operators between soft and hard thresholding, and the group lasso over axes of an array; groups in
the terms of a layer are in `groups.py`. What pruning asks of an operator is in
`operators/protocol.py`. The power thresholds, among them what `target_sparsity` takes by default,
are in `operators/power.py`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax.array_types import Array, Float, Integer, Num, Scalar, Shaped
from lats_optax.checks.numbers import check_above, check_threshold
from lats_optax.operators.leaves import positive_zero
from lats_optax.operators.power import PowerThreshold, Rescaled, prox_annealed
from lats_optax.operators.protocol import Elementwise, GroupOperator, Operator

__all__ = [
    "Axes",
    "ElasticNet",
    "Operator",
    "Rescaled",
    "prox_annealed",
    "prox_elastic_net",
    "prox_firm",
    "prox_group_lasso",
    "prox_l0",
    "prox_l1",
    "prox_non_negative_l1",
    "prox_power",
    "prox_scad",
]


@dataclass(frozen=True)
class SoftThreshold(Elementwise):
    """Soft thresholding, ``prox_l1(x, strength=1.0)``, the proximal operator of the L1 norm.

    ``S_d(x) = argmin_z 1/2 (z - x)^2 + d |z| = sign(x) max(|x| - d, 0)``

    Args:
      x: a real array, or a pytree of them.
      strength: d >= 0: a scalar, an array that broadcasts against each leaf, or a pytree of these
        that matches ``x`` (or is a prefix of it). In the units of ``x``.

    Returns:
      What ``x`` is, with its shapes and dtypes. Zeros are +0.0; NaN and infinity propagate as
      IEEE arithmetic has it (``inf - inf`` is NaN).

    Raises:
      ValueError: a strength given as a number is negative, or its structure or shape does not
        match.
      TypeError: ``x`` is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> prox_l1(jnp.array([-3.0, -0.5, 0.5, 2.0]), 1.0)
      Array([-2.,  0.,  0.,  1.], dtype=float32)

    Source: Parikh and Boyd, "Proximal Algorithms" (2014), section 6.5.2.
    """

    def shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """``sign(x) max(|x| - d, 0)``."""
        # A comparison, not max(): NaN fails it and passes on. Two selections are cheaper than
        # sign().
        return jnp.where(jnp.abs(x) - d <= 0, 0.0, jnp.where(x > 0, x - d, x + d))

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """``w + d sign(w)``."""
        return w + d * jnp.sign(w)


@dataclass(frozen=True)
class NonNegative(Elementwise):
    """The proximal operator of the L1 norm restricted to the non-negative numbers.

    ``prox_non_negative_l1(x, d) = argmin_{z >= 0} 1/2 (z - x)^2 + d z = max(x - d, 0)``

    Arguments and errors are those of :data:`prox_l1`; no entry of the result is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> prox_non_negative_l1(jnp.array([-3.0, 0.5, 2.0]), 1.0)
      Array([0., 0., 1.], dtype=float32)

    Source: Parikh and Boyd, "Proximal Algorithms" (2014), section 6.5.2.
    """

    def shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """``max(x - d, 0)``."""
        return jnp.where(x - d <= 0, 0.0, x - d)

    def least(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """``max(x, 0)``: a negative number goes to zero at once."""
        return jnp.maximum(x, 0)

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """``w + d`` where w is positive."""
        return w + jnp.where(w > 0, d, jnp.zeros_like(d))


@dataclass(frozen=True)
class ElasticNet(Elementwise):
    """The operator of :func:`prox_elastic_net` with its ``l2``, for ``soft_threshold``.

    Attributes:
      l2: weight of the quadratic part relative to the L1 part, >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> ElasticNet(l2=3.0).preimage(jnp.array([2.0]), 1.0)
      Array([9.], dtype=float32)
    """

    l2: Scalar = 1.0

    def __post_init__(self) -> None:
        """Refuse what is not a finite number >= 0, unless it is on a device."""
        if not isinstance(self.l2, jax.Array):
            check_threshold("l2", self.l2)

    def shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """``S_d(x) / (1 + d l2)``."""
        shrunk = prox_l1.shrink(x, d)
        # An infinite d times an l2 of zero has no value; a zero needs no division.
        return jnp.where(shrunk == 0, 0.0, positive_zero(shrunk / (1 + d * self.l2)))

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """``w (1 + d l2) + d sign(w)``."""
        return w * (1 + d * self.l2) + d * jnp.sign(w)


@dataclass(frozen=True)
class HardThreshold(Elementwise):
    """Hard thresholding, ``prox_l0(x, d)``, the proximal operator of the number of non-zeros.

    ``argmin_z 1/2 (z - x)^2 + d [z != 0] = x where |x| > sqrt(2 d), else 0``

    The penalty is not convex. Arguments and errors are those of :data:`prox_l1`, with the strength
    in the units of ``x`` squared. Of the two minimizers at ``|x| = sqrt(2 d)`` it gives the sparse
    one. ``prox_power(math.inf)`` is the same operator with a threshold in the units of ``x``.

    Example:
      >>> import jax.numpy as jnp
      >>> prox_l0(jnp.array([-3.0, 1.0, 2.0]), 0.5)
      Array([-3.,  0.,  2.], dtype=float32)

    Source: Blumensath and Davies, "Iterative thresholding for sparse approximations" (2008).
    """

    def shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """``x`` where ``x^2 / 2 > d``, else 0."""
        kept = jnp.where(jnp.isnan(d), d, x)
        return jnp.where(self.least(x) <= d, 0.0, kept)

    def least(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """``x^2 / 2``."""
        # A square that underflows is still that of a weight which a strength of zero leaves alone.
        tiny = jnp.finfo(x.dtype).tiny  # type: ignore[no-untyped-call]
        return jnp.where(x == 0, 0.0, jnp.maximum(jnp.square(x) / 2, tiny))

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """The weights themselves."""
        del d
        return jnp.array(w)


@dataclass(frozen=True)
class FirmThreshold(Elementwise):
    """The operator that :func:`prox_firm` makes."""

    gamma: float

    def shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """0 up to d, the identity from ``gamma d`` on, linear in between."""
        steep = prox_l1.shrink(x, d) * (self.gamma / (self.gamma - 1))
        # NaN, as of inf - inf, passes on; a zero is taken from here, because it has no sign.
        inside = (jnp.abs(x) < self.gamma * d) | (steep == 0) | jnp.isnan(steep)
        return jnp.where(inside, steep, x)

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """The one point in between that the operator sends to w, or w itself."""
        between = w * ((self.gamma - 1) / self.gamma) + d * jnp.sign(w)
        return jnp.where(jnp.abs(w) < self.gamma * d, between, w)


@dataclass(frozen=True)
class ScadThreshold(Elementwise):
    """The operator that :func:`prox_scad` makes."""

    a: float

    def shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """Soft up to ``2 d``, the identity from ``a d`` on, linear in between."""
        size = jnp.abs(x)
        between = ((self.a - 1) * x - jnp.sign(x) * (self.a * d)) / (self.a - 2)
        outer = jnp.where(size < self.a * d, between, x)
        soft = prox_l1.shrink(x, d)
        return jnp.where((size <= 2 * d) | jnp.isnan(soft), soft, outer)

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """The point that the operator sends to w."""
        size = jnp.abs(w)
        between = ((self.a - 2) * w + jnp.sign(w) * (self.a * d)) / (self.a - 1)
        outer = jnp.where(size < self.a * d, between, w)
        return jnp.where(size <= d, w + d * jnp.sign(w), outer)


@dataclass(frozen=True)
class Axes(GroupOperator):
    """The operator of :func:`prox_group_lasso` with its ``axes``, for ``soft_threshold``.

    Attributes:
      shrinkage: what is applied to the root mean square of a group. Default: :data:`prox_l1`.
      axes: the axes of a leaf that lie within one group; None: all but the last.

    Example:
      >>> import jax.numpy as jnp
      >>> Axes(axes=0).magnitude(jnp.array([[8.0, 1.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]))
      Array([[4., 1.]], dtype=float32)
    """

    shrinkage: Elementwise = SoftThreshold()
    axes: int | Sequence[int] | None = None

    def sums(self, x: Num[Array, "..."]) -> Num[Array, "..."]:
        """The sum over the axes, which are kept."""
        return jnp.sum(x, axis=self._within(x.ndim), keepdims=True)

    def group_sizes(self, shape: tuple[int, ...]) -> Integer[np.ndarray, "..."]:
        """One size for all groups."""
        size = math.prod(shape[axis] for axis in self._within(len(shape)))
        return np.full((1,) * len(shape), size, np.int32)

    def expand(
        self, each: Shaped[Array, "*groups"], shape: tuple[int, ...]
    ) -> Shaped[Array, "..."]:
        """The axes are kept, so the values broadcast as they are."""
        del shape
        return each

    def _within(self, ndim: int) -> tuple[int, ...]:
        if self.axes is None:
            return tuple(range(ndim - 1))
        axes = tuple(np.atleast_1d(self.axes).tolist())
        for axis in axes:
            if not (isinstance(axis, int) and -ndim <= axis < ndim):
                raise ValueError(f"axes: {axis} is not an axis of a leaf with {ndim} dimensions")
        if len({axis % ndim for axis in axes}) != len(axes):
            raise ValueError(f"axes: {axes} names an axis of a leaf with {ndim} dimensions twice")
        return tuple(axis % ndim for axis in axes)


prox_l1 = SoftThreshold()
prox_non_negative_l1 = NonNegative()
prox_l0 = HardThreshold()


def prox_elastic_net(x: Any, strength: Any = 1.0, *, l2: Scalar = 1.0) -> Any:
    """The proximal operator of the elastic net.

    ``argmin_z 1/2 (z - x)^2 + d (|z| + l2/2 z^2) = S_d(x) / (1 + d l2)``

    Args:
      x: a real array, or a pytree of them.
      strength: d >= 0, as in :data:`prox_l1`.
      l2: weight of the quadratic part relative to the L1 part, >= 0. With scikit-learn's
        ``alpha`` and ``l1_ratio``: ``d = alpha * l1_ratio``, ``l2 = (1 - l1_ratio) / l1_ratio``.

    Returns:
      What ``x`` is, with its shapes and dtypes. For ``soft_threshold``, write
      ``operator=prox.ElasticNet(l2)``.

    Raises:
      ValueError: as :data:`prox_l1`, and if ``l2`` is a number that is negative or not finite.
      TypeError: as :data:`prox_l1`.

    Example:
      >>> import jax.numpy as jnp
      >>> prox_elastic_net(jnp.array([-3.0, 0.5, 2.0]), 1.0, l2=1.0)
      Array([-1. ,  0. ,  0.5], dtype=float32)

    Source: Zou and Hastie, "Regularization and variable selection via the elastic net" (2005).
    """
    return ElasticNet(l2)(x, strength)


def prox_group_lasso(
    x: Any, strength: Any = 1.0, *, axes: int | Sequence[int] | None = None
) -> Any:
    """The proximal operator of the group lasso, block soft thresholding.

    For each group g of ``|g|`` weights:
    ``argmin_z 1/2 ||z - x_g||^2 + d sqrt|g| ||z|| = x_g max(1 - d sqrt|g| / ||x_g||, 0)``

    Args:
      x: a real array, or a pytree of them; each leaf has groups of its own.
      strength: d >= 0: a scalar, or an array that broadcasts against the leaf reduced over
        ``axes`` with these axes kept, or a pytree of these that matches ``x``.
      axes: the axes of a leaf that lie within one group; the remaining ones number the groups.
        Default: all but the last, which in Flax's layouts makes every output channel or unit a
        group.

    Returns:
      What ``x`` is, with its shapes and dtypes; whole groups are zero. Squares are summed as they
      are: in float32 a group whose norm is below about 1e-19 counts as zero. For
      ``soft_threshold``, write ``operator=prox.Axes(axes=axes)``.

    Raises:
      ValueError: as :data:`prox_l1`, and if a leaf lacks one of ``axes``.
      TypeError: as :data:`prox_l1`.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[8.0, 0.5], [0.0, 0.5], [0.0, 0.5], [0.0, 0.5]])
      >>> prox_group_lasso(kernel, 1.0, axes=0)
      Array([[6., 0.],
             [0., 0.],
             [0., 0.],
             [0., 0.]], dtype=float32)

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables"
    (2006), equation 2.4.
    """
    return Axes(axes=axes)(x, strength)


def prox_power(p: float) -> Elementwise:
    """The power threshold: between soft thresholding (p = 1) and hard (p = inf).

    ``P_d(x) = sign(x) (|x|^p - d^p)^(1/p)`` where ``|x| > d``, else 0.

    It is the proximal operator of the penalty phi with ``phi'(z) = (z^p + d^p)^(1/p) - z`` for
    z > 0. The slope is d at zero, as that of ``d |z|``, and falls to zero: a large weight is hardly
    shrunk. For p > 1 phi is concave in ``|z|``, so it is not convex. With p = 3 it is the operator
    of Feather.

    Args:
      p: 1 <= p <= inf.

    Returns:
      An operator: ``prox_power(3)(x, d)`` on arrays and pytrees, as :data:`prox_l1`.

    Raises:
      ValueError: ``p`` is not a number in [1, inf].

    Example:
      >>> import jax.numpy as jnp
      >>> [round(float(z), 3) for z in prox_power(3)(jnp.array([-3.0, 1.0, 1.5]), 1.0)]
      [-2.962, 0.0, 1.334]

    Source: Glentis Georgoulakis et al., "Feather: An elegant solution to effective DNN
    sparsification" (BMVC 2023).
    """
    p = check_above("p", p, 1, inclusive=True, infinite=True)
    return prox_l1 if p == 1 else PowerThreshold(p)


def prox_firm(gamma: float = 3.0) -> Elementwise:
    """The firm threshold, the proximal operator of the minimax concave penalty (MCP).

    0 where ``|x| <= d``; ``sign(x) (|x| - d) gamma / (gamma - 1)`` where ``|x| < gamma d``; else x.

    The penalty has ``phi'(z) = max(d - z / gamma, 0)`` for z > 0: its slope falls from d to zero at
    ``gamma d``. It is not convex; its sum with ``1/2 (z - x)^2`` is, because ``gamma > 1``.

    Args:
      gamma: where shrinkage ends, in thresholds, > 1. Near 1 it is hard, far above it soft.

    Returns:
      An operator, as :func:`prox_power`.

    Raises:
      ValueError: ``gamma`` is not a finite number > 1.

    Example:
      >>> import jax.numpy as jnp
      >>> prox_firm(3.0)(jnp.array([-3.0, 1.0, 2.0]), 1.0)
      Array([-3. ,  0. ,  1.5], dtype=float32)

    Source: Zhang, "Nearly unbiased variable selection under minimax concave penalty" (2010).
    """
    return FirmThreshold(check_above("gamma", gamma, 1))


def prox_scad(a: float = 3.7) -> Elementwise:
    """The proximal operator of the smoothly clipped absolute deviation penalty (SCAD).

    ``S_d(x)`` where ``|x| <= 2 d``; ``((a - 1) x - sign(x) a d) / (a - 2)`` where ``|x| < a d``;
    else x.

    The penalty has the slope d up to ``z = d``, then ``(a d - z) / (a - 1)``, and zero from
    ``a d`` on. It is not convex; its sum with ``1/2 (z - x)^2`` is, because ``a > 2``.

    Args:
      a: where shrinkage ends, in thresholds, > 2.

    Returns:
      An operator, as :func:`prox_power`.

    Raises:
      ValueError: ``a`` is not a finite number > 2.

    Example:
      >>> import jax.numpy as jnp
      >>> prox_scad(3.0)(jnp.array([-4.0, 1.0, 2.0, 2.5]), 1.0)
      Array([-4.,  0.,  1.,  2.], dtype=float32)

    Source: Fan and Li, "Variable selection via nonconcave penalized likelihood and its oracle
    properties" (2001).
    """
    return ScadThreshold(check_above("a", a, 2))
