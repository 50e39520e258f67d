"""N:M sparsity: of every m weights along the inputs of a layer, n are left.

Here belong the operator and what it counts. `lats_optax.groups` has it among the other structures.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from lats_optax import compatibility
from lats_optax.array_types import AnyArray, Array, Bool, Count, Float, Integer, Real, Scalar
from lats_optax.checks.numbers import check_steps, is_number
from lats_optax.operators import leaves
from lats_optax.operators.parts import Part, Shape
from lats_optax.operators.protocol import Elementwise
from lats_optax.prox import prox_l1

# These kernels have the shape (inputs, heads, features of a head).
_PROJECTIONS = re.compile(r"(^|[/._])(query|key|value|qkv)([/._]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class NOfM:
    """The operator that :func:`n_of_m` makes; its arguments are the attributes."""

    n: int
    m: int
    axis: int | None = None
    shrinkage: Elementwise = prox_l1

    def __repr__(self) -> str:
        """The call that makes it, with what differs from its defaults."""
        axis = "" if self.axis is None else f", axis={self.axis}"
        other = "" if self.shrinkage == prox_l1 else f", shrinkage={self.shrinkage!r}"
        return f"lats_optax.groups.n_of_m({self.n}, {self.m}{axis}{other})"

    @property
    def sparsity(self) -> float:
        """What it ends at, the target for ``target_sparsity``: (m - n) / m."""
        return (self.m - self.n) / self.m

    @property
    def counted(self) -> str:
        """What :meth:`count` counts, for the title of a column."""
        return f"{self.n}:{self.m} groups"

    def __call__(self, x: Any, strength: Any = 1.0) -> Any:
        """Apply the operator to an array or a pytree; errors are those of ``prox.prox_l1``."""
        return leaves.over_leaves(self._shrink, x, strength)

    def magnitude(self, x: Real[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
        """The least strength that zeroes each weight: infinity for the n largest of a group."""
        size = self.shrinkage.least(leaves.upcast(leaves.as_real(x)))
        return jnp.where(self._kept(size), jnp.inf, size)

    def group_sizes(self, shape: tuple[int, ...]) -> Integer[np.ndarray, "..."]:
        """Weights go to zero one by one."""
        return np.ones((1,) * len(shape), np.int32)

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """The n largest as they are, and the others a threshold larger, but not above these."""
        size = self.shrinkage.least(w)
        kept, within = self._kept(size), self._at(w.ndim) + 1

        def least_of_group(size: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
            least = jnp.min(self._grouped(size), axis=within, keepdims=True)
            return jnp.broadcast_to(least, self._grouped(size).shape).reshape(w.shape)

        least = self._by_group(least_of_group, jnp.where(kept, size, jnp.inf))
        # Just below them: of those that tie the first would be taken for the largest.
        bound = jnp.nextafter(least, jnp.zeros_like(least))
        raised = self.shrinkage.preimage(w, d)
        capped = jnp.sign(raised) * jnp.minimum(jnp.abs(raised), bound)
        return jnp.where(kept, w, capped)

    def at(self, count: Count) -> "NOfM":
        """The same pattern, with the shrinkage after so many steps."""
        return dataclasses.replace(self, shrinkage=self.shrinkage.at(count))

    def parts(self, shapes: Mapping[str, Shape]) -> tuple[Part, ...]:
        """Each leaf by itself, along the axis of its inputs: m - n of every m can be zero."""
        along = {axis: dataclasses.replace(self, axis=axis) for axis in {self.axis, -2, -3}}
        return tuple(
            Part.leaf(
                name,
                shape,
                along[self._axis_of(name, shape)],
                most=math.prod(shape) // self.m * (self.m - self.n),
            )
            for name, shape in shapes.items()
        )

    def divides(self, name: str, shape: Shape) -> bool:
        """Whether a leaf of that path and shape consists of whole groups."""
        axis = self._axis_of(name, shape)
        return -len(shape) <= axis < len(shape) and shape[axis] % self.m == 0

    def count(self, w: Real[Array, "..."]) -> tuple[int, Integer[Array, ""]]:
        """The number of groups of an array, and in how many of them n weights at most are left."""
        within = self._at(w.ndim) + 1
        alive = leaves.by_the_compiler(
            lambda alive: jnp.sum(self._grouped(alive), axis=within), (w != 0).astype(jnp.int32)
        )
        return alive.size, jnp.sum(alive <= self.n, dtype=jnp.int32)

    def _shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        return jnp.where(self._kept(self.shrinkage.least(x)), x, self.shrinkage.shrink(x, d))

    def _kept(self, size: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """Which are the n largest of their group; of those that tie, the first."""

        def kept(size: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
            grouped, within = self._grouped(size), self._at(size.ndim) + 1
            own, other = jnp.expand_dims(grouped, within + 1), jnp.expand_dims(grouped, within)
            first = np.tri(self.m, k=-1, dtype=bool)
            first = first.reshape(*first.shape, *(1,) * (grouped.ndim - within - 1))
            # Comparisons of all with all: a sort of so few takes longer.
            larger = (other > own) | ((other == own) & first)
            rank = jnp.sum(larger, axis=within + 1, dtype=jnp.int32)
            return (rank < self.n).reshape(size.shape)

        return self._by_group(kept, size)

    def _by_group(self, function: Callable[[Array], Array], x: Array) -> Array:
        """A function of an array that looks at its groups, laid out over devices as the array."""
        self._check(x.shape)
        sharding = compatibility.explicit_sharding(x)
        out = None if sharding is None else sharding.spec
        value: Array = leaves.by_the_compiler(function, x, out=out)
        return value

    def _grouped(self, x: Real[Array, "..."]) -> Real[Array, "..."]:
        """The axis of the inputs as two: groups, and the m within each."""
        self._check(x.shape)
        at = self._at(x.ndim)
        return x.reshape(*x.shape[:at], x.shape[at] // self.m, self.m, *x.shape[at + 1 :])

    def _at(self, ndim: int) -> int:
        return self._along % ndim

    def _check(self, shape: tuple[int, ...]) -> None:
        axis, m = self._along, self.m
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"{self!r} takes groups along axis {axis}, which {shape} has not")
        if shape[axis] % m:
            raise ValueError(
                f"{self!r} takes {m} weights along axis {axis}, and {shape[axis]} is no multiple "
                f"of {m}"
            )

    @property
    def _along(self) -> int:
        return -2 if self.axis is None else self.axis

    def _axis_of(self, name: str, shape: Shape) -> int:
        """The axis of a leaf's inputs, by its path where it is not given."""
        if self.axis is not None:
            return self.axis
        return -3 if len(shape) >= 3 and _PROJECTIONS.search(name) else -2


def n_of_m(n: int, m: int, *, axis: int | None = None, shrinkage: Elementwise = prox_l1) -> NOfM:
    """Of every m weights along the inputs of a layer, the n largest stay as they are.

    For each group g of m weights:
    ``argmin_z 1/2 ||z - x_g||^2 + d (the sum of the m - n smallest |z|)``, which leaves the n
    largest as they are and soft-thresholds the others by d

    The penalty is zero exactly where a group has n weights left, so survivors carry no bias, and a
    threshold that rises reaches N:M sparsity continuously. It is not convex. Matrix units of GPUs
    multiply with two of every four at twice the speed. Name the target by :attr:`NOfM.sparsity`::

        pattern = groups.n_of_m(2, 4)
        threshold = target_sparsity(pattern.sparsity, learning_rate, steps)
        tx = optax.chain(optax.adamw(learning_rate), soft_threshold(threshold, operator=pattern))

    Args:
      n: weights that are left, 1 <= n < m.
      m: weights in a group: consecutive ones along the axis, whose size is a multiple of m.
      axis: of the inputs, which a product contracts. Default (None): -2, as kernels of dense and
        convolutional layers and output projections of attention have it in Flax; and -3 for a
        kernel of three or more dimensions below ``query``, ``key``, ``value`` or ``qkv``, whose
        last two are heads and their features. -1 in the layouts of Equinox and PyTorch.
      shrinkage: what is applied to the m - n smallest. Default: :data:`lats_optax.prox.prox_l1`.
        ``prox_power(math.inf)`` is the hard variant, which masks them once they are below d.

    Returns:
      An operator for ``soft_threshold``, whose groups ``sparsity(params, groups=…)`` counts.

    Raises:
      ValueError: ``n`` or ``m`` are not whole numbers with 1 <= n < m, or ``axis`` is not a whole
        number. From ``init`` of the transform, a leaf whose axis m does not divide, and a target
        above (m - n) / m.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[4.0, 1.0], [-3.0, 2.0], [0.5, -1.5], [1.5, -0.5]])
      >>> n_of_m(2, 4)(kernel, 1.0)
      Array([[ 4. ,  0. ],
             [-3. ,  2. ],
             [ 0. , -1.5],
             [ 0.5,  0. ]], dtype=float32)

    Source: Mishra et al., "Accelerating sparse deep neural networks" (2021), for the structure; Hu
    et al., "S-STE: continuous pruning function for efficient 2:4 sparse pre-training" (NeurIPS
    2024), for a threshold that makes it continuous.
    """
    m = check_steps(m, "m")
    n = check_steps(n, "n")
    if n >= m:
        raise ValueError(f"n: {n} is not allowed; allowed are whole numbers from 1 to m - 1")
    if axis is not None and not (is_number(axis) and float(axis).is_integer()):
        raise ValueError(f"axis: {axis!r} is not allowed; allowed are whole numbers, and None")
    return NOfM(n, m, None if axis is None else int(axis), shrinkage)
