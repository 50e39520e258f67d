"""The closed-loop threshold: the user names the sparsity, the threshold follows.

Here belong the controller and the exact selection (k-th smallest magnitude) that it steers by.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lats_optax import masks
from lats_optax.distributions import check_sparsity
from lats_optax.groups import GroupMagnitude
from lats_optax.thresholds import ScalarOrSchedule, check_steps, is_number, learning_rates

Magnitude = Callable[[jax.Array], jax.Array]

_DIGIT_BITS = 4
# Of what is left of the learning rate, the part over which the late slope of the quantile is taken.
# The mean slope alone is too steep at the end: the threshold overshoots by 1 to 3 % (digits, 95 and
# 80 %), and falls back, reviving weights, when little is left to train them. The late one alone
# runs away where the threshold itself drives the quantile up (channels before normalization).
_WINDOW = 0.5


class ClosedLoop(NamedTuple):
    """A threshold that is steered by the latent weights: a pure function of its state.

    ``soft_threshold`` takes one wherever it takes a threshold schedule.

    Attributes:
      init: ``init(latent, magnitude) -> (threshold, state)``: the threshold before the first step.
      update: ``update(count, threshold, state, latent, magnitude) -> (threshold, state)``: the
        threshold after ``count + 1`` steps, given the one after ``count`` (int32 scalar) and the
        latent weights after the step.
      steps: the number of steps after which the threshold is where it is to be, which is when its
        zeros may be frozen; None: not known.

    The latent weights are a tree like the parameters in which `optax.MaskedNode` stands for the
    leaves that are not pruned. A threshold is a scalar, or a vector with an entry for each leaf.
    """

    init: Callable[[Any, Magnitude], tuple[jax.Array, Any]]
    update: Callable[[jax.Array, jax.Array, Any, Any, Magnitude], tuple[jax.Array, Any]]
    steps: int | None = None


class TargetSparsityState(NamedTuple):
    """What the loop remembers, in the shape and the units of the threshold.

    Attributes:
      quantile: the latest quantile of the latent magnitudes.
      first: the one after the first step.
      rise: how much it would rise until the end of the run, as it has of late.
    """

    quantile: jax.Array
    first: jax.Array
    rise: jax.Array


def target_sparsity(
    target: float | Any,
    learning_rate: ScalarOrSchedule,
    steps: int,
    *,
    update_every: int | None = None,
) -> ClosedLoop:
    """A threshold that ends exactly at a named sparsity, without a search for its final value.

    ``d_{t+1} = d_t + rho_t (a_{t+1} - d_t)``, ``rho_t = eta_t / R_t``, ``R_t = sum_{r>=t} eta_r``,
    ``a_t = q_t + R_t v_t``,
    where q is the ``target`` quantile of the latent magnitudes over all pruned weights and v how
    fast it rises, in proportion to the learning rate: the smaller of two slopes of q over the sum
    of these, the mean one since the first step and that over a stretch half as long as what is
    left. The aim a is where q will be at the end if it goes on like that: the living latent weights
    rise with the threshold, and a threshold that chased q itself would fall behind and have to
    prune most at the end. While q moves along a line, the implied L1 coefficient is constant, and
    where q stands still this is :func:`lats_optax.lats_threshold` with q as the final threshold.
    Towards the end q slows down, because fewer of the weights about it are alive; v follows, and
    with it the L1 coefficient. Where q leaps, v does not. At the last step a is q and rho is 1, so
    the last threshold *is* the quantile: ``round(target * N)`` of the N pruned weights are zero,
    more only where magnitudes tie; with a target for each layer, that many of each. After ``steps``
    steps the threshold stands still.

    Under an operator of groups, such as those of :mod:`lats_optax.groups`, the weights of a group
    tie, and the one that the quantile lies in goes as a whole: ``round(target * N)`` weights are
    zero or more, by less than the size of that group. One group survives however high the target
    is, of all together or, with a target for each layer, of each.

    Args:
      target: the sparsity to reach, the fraction of zeros among the pruned weights, in [0, 1). Or
        one for each layer, each of which then has a threshold of its own: a tree like the
        parameters (or a prefix of it), or a function that makes one from the pruned weights, such
        as ``lats_optax.erdos_renyi(0.9)`` or ``lats_optax.per_layer({"^stem": 0.5, "": 0.9})``.
      learning_rate: the optimizer's own, a number or an optax schedule ``count -> eta``. Only its
        proportions count: increments of another threshold schedule, ``d(t + 1) - d(t)``, in its
        place give a threshold that rises along that schedule's curve.
      steps: number of optimizer steps of the whole run.
      update_every: the quantile is selected anew every so many steps, and always at the last one.
        Default: a two-hundredth of the run, between 1 and 1000 steps. Each selection reads the
        latent weights eight times in float32, and does not sort them; under an operator of groups
        it reads them once, and eight times the magnitudes of the groups.

    Returns:
      A :class:`ClosedLoop` for ``soft_threshold``.

    Raises:
      ValueError: ``target`` outside [0, 1); ``steps`` or ``update_every`` < 1; a learning rate
        that is negative or not finite somewhere, or zero throughout. From ``init`` of the
        transform, a tree of targets of another structure, or with one outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, optax, lats_optax
      >>> tx = optax.chain(
      ...     optax.sgd(0.1), lats_optax.soft_threshold(target_sparsity(0.75, 0.1, steps=2)))
      >>> params = {"kernel": jnp.array([[0.1, -0.4], [0.3, 0.2]])}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"kernel": jnp.zeros((2, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> (params["kernel"] != 0).tolist()
      [[False, True], [False, False]]
    """
    target = _checked(target)
    steps = check_steps(steps)
    if update_every is None:
        update_every = default_update_every(steps)
    update_every = check_steps(update_every, "update_every")
    rates = learning_rates(learning_rate, steps)
    gains = _gains(rates)
    looks = np.unique(np.append(np.arange(0, steps, update_every), steps - 1))
    kept, weights, reaches = _forecast(rates, looks)

    def init(latent: Any, magnitude: Magnitude) -> tuple[jax.Array, TargetSparsityState]:
        ranks = _ranks(target, latent, magnitude)
        zero = jnp.zeros(np.shape(ranks), jnp.result_type(float))
        # Copies: the state is donated, and a buffer can be given away once.
        return zero, TargetSparsityState(zero.copy(), zero.copy(), zero.copy())

    def update(
        count: jax.Array,
        threshold: jax.Array,
        state: TargetSparsityState,
        latent: Any,
        magnitude: Magnitude,
    ) -> tuple[jax.Array, TargetSparsityState]:
        leaves = jax.tree.leaves(latent)
        if not sum(leaf.size for leaf in leaves):
            return threshold, state

        def at(table: np.ndarray, index: jax.Array) -> jax.Array:
            return jnp.asarray(table, threshold.dtype)[index]

        ranks = _ranks(target, latent, magnitude)
        select = kth_smallest if np.ndim(ranks) == 0 else kth_smallest_of_each
        due = ((count % update_every == 0) | (count == steps - 1)) & (count < steps)
        quantile = lax.cond(
            due,
            lambda: select(leaves, ranks, magnitude, dtype=threshold.dtype),
            lambda: state.quantile,
        )
        first = jnp.where(count == 0, quantile, state.first)
        look = jnp.where(count >= steps - 1, len(looks) - 1, count // update_every)
        change = jnp.where(count == 0, 0.0, quantile - state.quantile)
        of_late = at(kept, look) * state.rise + at(weights, look) * change
        rise = jnp.where(due, of_late, state.rise)
        gain = at(gains, jnp.minimum(count, steps - 1))
        aim = quantile + jnp.minimum(rise, at(reaches, look) * (quantile - first))
        # Written so that a gain of 1 gives the aim itself, which is then the quantile.
        moved = jnp.maximum((1 - gain) * threshold + gain * aim, 0.0)
        after = jnp.where(count < steps, moved, threshold)
        return after, TargetSparsityState(quantile, first, rise)

    return ClosedLoop(init, update, steps)


def default_update_every(steps: int) -> int:
    """Steps between two selections in a run of ``steps``: a two-hundredth of it, in 1 … 1000.

    >>> default_update_every(50), default_update_every(10_000), default_update_every(500_400)
    (1, 50, 1000)
    """
    return min(max(steps // 200, 1), 1000)


def kth_smallest(
    arrays: Sequence[jax.Array],
    rank: int,
    magnitude: Magnitude = jnp.abs,
    *,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The ``rank``-th smallest magnitude over several arrays, exactly, in a few reads of them.

    A radix selection: non-negative floats are ordered as their bit patterns are, so the answer is
    built four bits at a time, from the top; a pass counts for each of the 15 candidates of the
    next digit how many patterns lie below it. Eight passes for float32, sixteen for float64,
    each reading the arrays once and keeping only counts: nothing is sorted, copied or gathered,
    and arrays sharded over devices stay where they are.

    Args:
      arrays: real arrays of any shapes, fewer than 2**32 entries in all.
      rank: k in 0 … N: the smallest magnitude is the first; for 0 the answer is 0.
      magnitude: maps an array to non-negative numbers of the same shape. What ``prox.magnitude``
        gives for an operator of groups is computed once for each group, and counts for all of it.
      dtype: float32 or float64: the type in which magnitudes are compared.

    Returns:
      A scalar of type ``dtype``. NaN magnitudes count as larger than infinity.

    Raises:
      ValueError: there are 2**32 entries or more, or ``rank`` is not in 0 … N.

    Example:
      >>> import jax.numpy as jnp
      >>> kth_smallest([jnp.array([3.0, -1.0]), jnp.array([[2.0]])], 2)
      Array(2., dtype=float32)
    """
    if rank == 0:
        _check_rank(arrays, rank)
        return jnp.zeros((), dtype)
    return _select([arrays], [rank], magnitude, dtype)[0]


def kth_smallest_of_each(
    arrays: Sequence[jax.Array],
    ranks: Sequence[int],
    magnitude: Magnitude = jnp.abs,
    *,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """The ``ranks[i]``-th smallest magnitude of each array by itself, in one loop over them all.

    Args:
      arrays: real arrays of any shapes, fewer than 2**32 entries each.
      ranks: one for each array, as in :func:`kth_smallest`.
      magnitude: as in :func:`kth_smallest`.
      dtype: as in :func:`kth_smallest`.

    Returns:
      An array of type ``dtype`` and shape (number of arrays,).

    Raises:
      ValueError: as :func:`kth_smallest`.

    Example:
      >>> import jax.numpy as jnp
      >>> kth_smallest_of_each([jnp.array([3.0, -1.0]), jnp.array([[2.0]])], [2, 1])
      Array([3., 2.], dtype=float32)
    """
    return _select([[array] for array in arrays], ranks, magnitude, dtype)


def _select(
    lists: Sequence[Sequence[jax.Array]], ranks: Sequence[int], magnitude: Magnitude, dtype: Any
) -> jax.Array:
    """The ``ranks[i]``-th smallest magnitude over the arrays of each list."""
    for arrays, rank in zip(lists, ranks):
        _check_rank(arrays, rank)
    sizes: list[list[np.ndarray | None]] = [[None] * len(arrays) for arrays in lists]
    if isinstance(magnitude, GroupMagnitude):
        sizes = [[magnitude.operator.sizes(array.shape) for array in arrays] for arrays in lists]
        lists = [[magnitude.of_groups(array) for array in arrays] for arrays in lists]
        magnitude = jnp.abs
    pattern = np.dtype(f"int{jnp.dtype(dtype).itemsize * 8}")
    bits = pattern.itemsize * 8 - 1  # all but the sign
    passes = -(-bits // _DIGIT_BITS)
    digits = jnp.arange(1, 2**_DIGIT_BITS, dtype=pattern)
    wanted = np.asarray(ranks, np.uint32)[:, None]

    def one_digit(index: int | jax.Array, found: jax.Array) -> jax.Array:
        # The last digit has fewer bits left; its surplus candidates lie above the answer.
        shift = jnp.maximum(bits - _DIGIT_BITS * (index + 1), 0).astype(pattern)
        # Without the barrier XLA hoists the magnitudes out of the loop, as a copy of all weights.
        leaves, found = _barrier(([list(arrays) for arrays in lists], found))
        pivots = found[:, None] + (digits << shift)[None, :]
        below = jnp.stack(
            [
                _count_below(arrays, counts, row, magnitude, dtype)
                for arrays, counts, row in zip(leaves, sizes, pivots)
            ]
        )
        return found + (jnp.sum(below < wanted, axis=1, dtype=pattern) << shift)

    found = lax.fori_loop(0, passes, one_digit, jnp.zeros(len(lists), pattern))
    return lax.bitcast_convert_type(found, dtype)


def _check_rank(arrays: Sequence[jax.Array], rank: int) -> None:
    size = sum(array.size for array in arrays)
    if size >= 2**32:
        raise ValueError(f"arrays: {size} entries are too many to count in 32 bits")
    if not 0 <= rank <= size:
        raise ValueError(f"rank: {rank} is not allowed; allowed are 0 … {size}")


def _count_below(
    arrays: Sequence[jax.Array],
    sizes: Sequence[np.ndarray | None],
    pivots: jax.Array,
    magnitude: Magnitude,
    dtype: Any,
) -> jax.Array:
    """For each pivot the number of bit patterns below it, in one pass over the arrays.

    An entry counts as often as ``sizes`` says; None: once.
    """
    total = jnp.zeros(pivots.shape, jnp.uint32)
    for array, size in zip(arrays, sizes):
        # abs: the order of bit patterns holds for a clear sign bit, and a magnitude may be -0.0.
        patterns = lax.bitcast_convert_type(jnp.abs(magnitude(array).astype(dtype)), pivots.dtype)
        # One reduction with fifteen results is one loop over the array, vectorized; fifteen
        # reductions would each read it again. Signed integers: unsigned ones are slower on CPUs.
        below = [(patterns < pivot).astype(jnp.int32) for pivot in pivots]
        if size is not None:
            below = [size * count for count in below]
        counts = lax.reduce(
            below,
            [np.int32(0)] * len(below),
            lambda left, right: [a + b for a, b in zip(left, right)],
            tuple(range(array.ndim)),
        )
        total += jnp.stack(counts).astype(jnp.uint32)
    return total


def _checked(target: Any) -> Any:
    """A target as far as it can be checked before there are parameters."""
    if masks.is_function(target):
        return target
    for value in jax.tree.leaves(target) or [target]:
        check_sparsity("target", value)
    return float(target) if is_number(target) else target


def _ranks(target: Any, latent: Any, magnitude: Magnitude) -> Any:
    """How many weights shall be zero: of all together, or, as a list, of each layer.

    At least one weight, or one group, survives: a target below 1 never means none at all.
    """
    sizes = [leaf.size for leaf in jax.tree.leaves(latent)]
    largest = [_largest_group(magnitude, leaf.shape) for leaf in jax.tree.leaves(latent)]
    if isinstance(target, float):
        total = sum(sizes)
        return max(min(round(target * total), total - max(largest, default=1)), 0)
    tree = target(latent) if masks.is_function(target) else target
    targets = jax.tree.leaves(masks.spread("target", tree, latent)) if sizes else []
    names = jax.tree.leaves(masks.paths(latent))
    return [
        max(min(round(check_sparsity(f"target of {name}", value) * size), size - group), 0)
        for name, value, size, group in zip(names, targets, sizes, largest)
    ]


def _largest_group(magnitude: Magnitude, shape: tuple[int, ...]) -> int:
    """The most weights of which one cannot become zero alone."""
    if isinstance(magnitude, GroupMagnitude):
        return int(magnitude.operator.sizes(shape).max(initial=1))
    return 1


def _barrier(values: Any) -> Any:
    return lax.optimization_barrier(values)  # type: ignore[no-untyped-call]


def _gains(rates: np.ndarray) -> np.ndarray:
    """For each step rho_t, in float64; 1 at the last step, whatever its rate."""
    left = np.cumsum(rates[::-1])[::-1]
    gains = np.divide(rates, left, out=np.zeros_like(rates), where=left > 0)
    gains[-1] = 1.0
    return gains


def _forecast(rates: np.ndarray, looks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How the rise that is left follows from that of the look before, in float64.

    ``rise_n = kept_n * rise_{n-1} + weights_n * (q_n - q_{n-1})``, which is R times the mean slope
    of q over a window that forgets exponentially; ``reaches_n * (q_n - q_1)`` is R times that since
    the first step.

    Args:
      rates: learning rates, shape (steps,).
      looks: the steps after which the quantile is looked at, shape (n,), the last one included.

    Returns:
      kept, weights and reaches, shape (n,).
    """
    left = np.append(np.cumsum(rates[::-1])[::-1][1:], 0.0)[looks]
    spent = np.cumsum(rates)[looks] - rates[0]
    between = np.diff(spent, prepend=0.0)
    # Never longer than what there is to look back on, nor shorter than from look to look.
    window = np.maximum(between, np.minimum(spent, _WINDOW * left))
    share = np.divide(between, window, out=np.zeros_like(window), where=window > 0)
    before = np.append(0.0, left[:-1])
    kept = np.divide(left, before, out=np.zeros_like(left), where=before > 0) * (1 - share)
    weights = np.divide(left, window, out=np.zeros_like(left), where=between > 0)
    return kept, weights, np.divide(left, spent, out=np.zeros_like(left), where=spent > 0)
