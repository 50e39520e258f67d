"""Exact selection of the k-th smallest magnitude, without a sort.

Here belongs the radix selection that the closed loop of `target.py` takes its quantile from.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from lats_optax.array_types import AnyArray, Array, Count, Float, Integer, Real
from lats_optax.operators.protocol import Operator
from lats_optax.prox import prox_l1

_DIGIT_BITS = 4

Ranks = Sequence[Count] | Integer[AnyArray, " lists"]
"""A rank for each list of arrays."""


def kth_smallest(
    arrays: Sequence[Real[AnyArray, "..."]],
    rank: Count,
    operator: Operator = prox_l1,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, ""]:
    """The ``rank``-th smallest magnitude over several arrays, exactly, in a few reads of them.

    A radix selection: non-negative floats are ordered as their bit patterns are, so the answer is
    built four bits at a time, from the top. A pass counts for each of the 15 candidates of the
    next digit how many patterns lie below it. It takes eight passes for float32, sixteen for
    float64. Each reads the arrays once and keeps only counts: nothing is sorted, copied or
    gathered, and arrays sharded over devices stay where they are.

    Args:
      arrays: real arrays of any shapes, fewer than 2**32 entries in all.
      rank: k in 0 … N, a number or a traced integer: the smallest magnitude is the first; for 0 the
        answer is 0.
      operator: the operator under which magnitudes are taken. The magnitude of a group is computed
        once, and counts for all of its weights.
      dtype: float32 or float64: the type in which magnitudes are compared.

    Returns:
      A scalar of type ``dtype``. NaN magnitudes count as larger than infinity.

    Raises:
      ValueError: there are 2**32 entries or more, or ``rank`` is a number that is not in 0 … N.

    Example:
      >>> import jax.numpy as jnp
      >>> kth_smallest([jnp.array([3.0, -1.0]), jnp.array([[2.0]])], 2)
      Array(2., dtype=float32)
    """
    return kth_smallest_of_each([arrays], [rank], operator, dtype=dtype)[0]


def kth_smallest_of_each(
    lists: Sequence[Sequence[Real[AnyArray, "..."]]],
    ranks: Ranks,
    operator: Operator = prox_l1,
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, " lists"]:
    """The ``ranks[i]``-th smallest magnitude over the arrays of each list, in one loop over all.

    Args:
      lists: real arrays of any shapes, fewer than 2**32 entries in each list.
      ranks: one for each list, numbers or a traced vector of integers.
      operator: as in :func:`kth_smallest`.
      dtype: as in :func:`kth_smallest`.

    Returns:
      An array of type ``dtype`` and shape (number of lists,).

    Raises:
      ValueError: as :func:`kth_smallest`.

    Example:
      >>> import jax.numpy as jnp
      >>> kth_smallest_of_each([[jnp.array([3.0, -1.0])], [jnp.array([[2.0]])]], [2, 1])
      Array([3., 2.], dtype=float32)
    """
    rows = [[Measured.of(array, operator) for array in arrays] for arrays in lists]
    return select(rows, ranks, dtype=dtype)


def select(rows: "Rows", ranks: Ranks, *, dtype: DTypeLike) -> Float[Array, " lists"]:
    """As :func:`kth_smallest_of_each`, of arrays that have an operator each."""
    _check_ranks(rows, ranks)
    pattern = _pattern_of(dtype)
    bits = pattern.itemsize * 8 - 1  # all but the sign
    passes = -(-bits // _DIGIT_BITS)
    digits = jnp.arange(1, 2**_DIGIT_BITS, dtype=pattern)
    wanted = jnp.asarray(ranks, jnp.uint32)[:, None]

    def one_digit(index: Count, found: Integer[Array, " lists"]) -> Integer[Array, " lists"]:
        # The last digit has fewer bits left; its surplus candidates lie above the answer.
        shift = jnp.maximum(bits - _DIGIT_BITS * (index + 1), 0).astype(pattern)
        # Without the barrier XLA hoists the magnitudes out of the loop, as a copy of all weights.
        arrays, found = _barrier(([[each.array for each in row] for row in rows], found))
        pivots = found[:, None] + (digits << shift)[None, :]
        below = jnp.stack(
            [
                _count_below([each._replace(array=a) for each, a in zip(row, leaves)], pivot, dtype)
                for row, leaves, pivot in zip(rows, arrays, pivots)
            ]
        )
        return found + (jnp.sum(below < wanted, axis=1, dtype=pattern) << shift)

    found = lax.fori_loop(0, passes, one_digit, jnp.zeros(len(rows), pattern))
    return lax.bitcast_convert_type(found, dtype)


def below_the_largest(rows: "Rows", found: Float[Array, " lists"]) -> Float[Array, " lists"]:
    """The quantiles as thresholds that leave something: finite, and below the largest magnitude.

    Args:
      rows: lists of measured arrays.
      found: a magnitude for each list, as :func:`select` finds it.

    Returns:
      ``found``; where it is not finite, or no magnitude is larger, the largest finite magnitude
      that is smaller, and 0 where there is none. The arrays are read once.

    Example:
      >>> import jax.numpy as jnp
      >>> arrays = jnp.array([1.0, 2.0, 2.0]), jnp.array([2.0, 2.0]), jnp.array([2.0, 3.0])
      >>> below_the_largest([[Measured.of(each, prox_l1)] for each in arrays], jnp.full(3, 2.0))
      Array([1., 0., 2.], dtype=float32)
    """
    dtype = found.dtype
    patterns = lax.bitcast_convert_type(found, _pattern_of(dtype))
    infinity = lax.bitcast_convert_type(jnp.asarray(jnp.inf, dtype), patterns.dtype)
    zero = np.zeros((), patterns.dtype)

    def one(row: "Sequence[Measured]", q: Integer[Array, ""]) -> Integer[Array, ""]:
        largest, lower = jnp.asarray(zero), jnp.asarray(zero)
        for array, magnitude, _ in row:
            each = _patterns(magnitude(array), dtype)
            top, below = lax.reduce(
                [each, jnp.where(each < jnp.minimum(q, infinity), each, zero)],
                [zero, zero],
                lambda left, right: [jnp.maximum(a, b) for a, b in zip(left, right)],
                tuple(range(array.ndim)),
            )
            largest, lower = jnp.maximum(largest, top), jnp.maximum(lower, below)
        return jnp.where((q < largest) & (q < infinity), q, lower)

    kept = jnp.stack([one(row, q) for row, q in zip(rows, patterns)])
    return lax.bitcast_convert_type(kept, dtype)


def _check_ranks(rows: "Rows", ranks: Ranks) -> None:
    for index, row in enumerate(rows):
        size = sum(each.weights for each in row)
        if size >= 2**32:
            raise ValueError(f"arrays: {size} entries are too many to count in 32 bits")
        rank = ranks[index]
        if not isinstance(rank, jax.Array) and not 0 <= rank <= size:
            raise ValueError(f"rank: {rank} is not allowed; allowed are 0 … {size}")


class Measured(NamedTuple):
    """An array, the map from it to magnitudes, and the number of weights behind each of them."""

    array: Real[AnyArray, "..."]
    magnitude: Callable[[AnyArray], Array]
    sizes: Integer[np.ndarray, "..."]

    @classmethod
    def of(cls, array: Real[AnyArray, "..."], operator: Operator) -> "Measured":
        """An array under an operator."""
        sizes = operator.group_sizes(array.shape)
        if np.any(sizes != 1):
            # The magnitudes of groups are few: they are computed once, and not in every pass.
            return cls(operator.magnitude(array), jnp.abs, sizes)
        return cls(array, operator.magnitude, sizes)

    @property
    def weights(self) -> int:
        """The number of weights."""
        return int(self.sizes.sum(dtype=np.int64)) * self.array.size // max(self.sizes.size, 1)


Rows = Sequence[Sequence[Measured]]


def _count_below(
    measured: Sequence[Measured], pivots: Integer[Array, " pivots"], dtype: DTypeLike
) -> Integer[Array, " pivots"]:
    """For each pivot the number of bit patterns below it, in one pass over the arrays."""
    total = jnp.zeros(pivots.shape, jnp.uint32)
    for array, magnitude, sizes in measured:
        patterns = _patterns(magnitude(array), dtype)
        # One reduction with fifteen results is one loop over the array, vectorized; fifteen
        # reductions would each read it again. Signed integers: unsigned ones are slower on CPUs.
        below = [(patterns < pivot).astype(jnp.int32) for pivot in pivots]
        if np.any(sizes != 1):
            below = [sizes * count for count in below]
        counts = lax.reduce(
            below,
            [np.int32(0)] * len(below),
            lambda left, right: [a + b for a, b in zip(left, right)],
            tuple(range(array.ndim)),
        )
        total += jnp.stack(counts).astype(jnp.uint32)
    return total


def _patterns(magnitudes: Float[Array, "*groups"], dtype: DTypeLike) -> Integer[Array, "*groups"]:
    """Integers in the order of the magnitudes."""
    # abs: the order of bit patterns holds for a clear sign bit, and a magnitude may be -0.0.
    return lax.bitcast_convert_type(jnp.abs(magnitudes.astype(dtype)), _pattern_of(dtype))


def _pattern_of(dtype: DTypeLike) -> np.dtype[Any]:
    return np.dtype(f"int{jnp.dtype(dtype).itemsize * 8}")


def _barrier(values: Any) -> Any:
    return lax.optimization_barrier(values)  # type: ignore[no-untyped-call]
