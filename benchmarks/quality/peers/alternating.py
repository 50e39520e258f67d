"""Dense and compressed phases in turn; a global magnitude mask at the start of each compressed one.

With boundaries b_0 < b_1 < …, the weights w_t after t steps are dense for t < b_0, compressed for
b_0 <= t < b_1, dense for b_1 <= t < b_2, and so on:

    at the start of a compressed phase   w = top-k(w),  k = N - round(target * N), over all layers
    within it                            gradients of pruned weights are masked, zeros stay zero
    at the start of a dense phase        pruned weights train again, from zero; momentum is reset
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks.quality.peers.base import (
    Setting,
    check_params,
    full_support,
    global_support,
    masked,
    masked_updates,
    restart,
)


class AlternatingState(NamedTuple):
    """What `alternate` remembers.

    Attributes:
      count: int32 scalar, the number of steps taken.
      support: that of the latest compressed phase, bool arrays in a tree like the parameters; a
        scalar True where nothing is pruned.
      inner_state: the state of the optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    support: Any
    inner_state: Any


def alternate(
    optimizer: optax.GradientTransformation, setting: Setting, boundaries: Sequence[int]
) -> optax.GradientTransformationExtraArgs:
    """Train in dense and compressed phases.

    Args:
      optimizer: any optax optimizer.
      setting: the run.
      boundaries: the steps at which a phase ends and the next begins, ascending. The run begins
        dense.

    Returns:
      A gradient transformation with state :class:`AlternatingState`.
    """
    starts = np.asarray(boundaries, np.int32)
    if starts[0] < 1 or np.any(np.diff(starts) < 1):
        raise ValueError(
            f"boundaries: {starts.tolist()} are not allowed; allowed are ascending steps from 1: "
            "the run is too short for its phases"
        )
    inner = optax.with_extra_args_support(optimizer)

    def compressed(count: jax.Array) -> jax.Array:
        return jnp.sum(count >= starts) % 2 == 1

    def init(params: Any) -> AlternatingState:
        support = full_support(params, setting)
        return AlternatingState(jnp.zeros((), jnp.int32), support, inner.init(params))

    def update(
        gradients: Any, state: AlternatingState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AlternatingState]:
        check_params(params)
        before, after = compressed(state.count), compressed(state.count + 1)
        trained = jax.tree.map(lambda alive: alive | ~before, state.support)
        updates, inner_state = inner.update(
            masked(trained, gradients), state.inner_state, params, **extra_args
        )
        support = lax.cond(
            after & ~before,
            lambda: global_support(optax.apply_updates(params, updates), setting),
            lambda: state.support,
        )
        # The last step of a compressed phase still keeps the zeros.
        kept = jax.tree.map(lambda alive: alive | ~(before | after), support)
        updates = masked_updates(kept, updates, params)
        inner_state = lax.cond(
            before & ~after,
            lambda: restart(inner, inner_state, optax.apply_updates(params, updates)),
            lambda: inner_state,
        )
        return updates, AlternatingState(optax.safe_increment(state.count), support, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
