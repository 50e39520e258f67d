"""Dynamic sparse training: fixed sparsity, and a topology that changes every ``every`` steps.

Each layer has a fixed number of living weights n. At step t, a multiple of ``every``, and before
the end of the changes T_end = stop * steps:

    k = floor(n * fraction / 2 * (1 + cos(pi t / T_end)))
    drop the k living weights of smallest |w|
    grow the k weights of highest score among those that are then dead

Such a step changes the topology in place of the weights, as in algorithm 1 of the RigL paper. A
grown weight starts at zero, and so do its moments. A weight that is dropped and grown in one step
has never been dead: it keeps its value and its moments. At every other step the gradients of dead
weights are masked.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import lats_optax
from benchmarks.quality.peers.base import (
    Setting,
    check_params,
    full_support,
    leaves_of,
    masked,
    masked_updates,
    only_counts,
    smallest_of_each,
    with_leaves,
    zero_moments,
)
from lats_optax import masks
from lats_optax.checks.numbers import check_fraction

# The gradients of the prunable leaves, and a random key -> a score for each of their weights.
Growth = Callable[[list[jax.Array], jax.Array], list[jax.Array]]


class DynamicState(NamedTuple):
    """What `dynamic` remembers.

    Attributes:
      count: int32 scalar, the number of steps taken.
      support: bool arrays in a tree like the parameters; a scalar True where nothing is pruned.
      inner_state: the state of the optimizer.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    support: Any
    inner_state: Any


def dynamic(
    optimizer: optax.GradientTransformation,
    setting: Setting,
    *,
    growth: Growth,
    every: int = 100,
    fraction: float = 0.3,
    stop: float = 0.75,
) -> optax.GradientTransformationExtraArgs:
    """Train a sparse topology that moves; its layers' sparsities are Erdős–Rényi-kernel ones.

    The first topology is random. The first step only applies it, so that every gradient that is
    used was taken at sparse parameters.

    Args:
      optimizer: any optax optimizer.
      setting: the run.
      growth: the score of each weight, from the gradients and a random key.
      every: steps between two changes of the topology. The default is RigL's for ImageNet.
      fraction: the part of the living weights that a change at step 0 would drop: RigL's alpha and
        SET's zeta, of which this is the default.
      stop: the part of the run after which the topology stays. In the RigL paper 25,000 of 32,000
        steps.

    Returns:
      A gradient transformation with state :class:`DynamicState`.
    """
    if every < 1:
        raise ValueError(f"every: {every!r} is not allowed; allowed are whole numbers from 1")
    check_fraction("fraction", fraction)
    last = check_fraction("stop", stop) * setting.steps
    inner = optax.with_extra_args_support(optimizer)
    changes = np.arange(0, last, every)
    fractions = fraction / 2 * (1 + np.cos(np.pi * changes / last))

    def alive_in_each(layers: list[Any]) -> np.ndarray:
        sparsities = lats_optax.erdos_renyi(setting.target)(layers)
        sizes = [math.prod(w.shape) for w in layers]
        return np.array([size - round(s * size) for s, size in zip(sparsities, sizes)])

    def init(params: Any) -> DynamicState:
        chosen = masks.resolve(setting.mask, params)
        layers = leaves_of(chosen, params)
        rng = np.random.default_rng(setting.seed)
        first = [
            jnp.asarray(rng.permutation(math.prod(w.shape)).reshape(w.shape) < alive)
            for w, alive in zip(layers, alive_in_each(layers))
        ]
        support = with_leaves(chosen, full_support(params, setting), first)
        return DynamicState(jnp.zeros((), jnp.int32), support, inner.init(params))

    def changed(count: jax.Array, gradients: Any, support: Any, params: Any) -> Any:
        chosen = masks.resolve(setting.mask, params)
        layers, dense, living = (leaves_of(chosen, x) for x in (params, gradients, support))
        moved = np.floor(np.outer(fractions, alive_in_each(layers))).astype(np.int32)
        k = jnp.asarray(moved)[count // every]
        magnitudes = [jnp.where(alive, jnp.abs(w), jnp.inf) for alive, w in zip(living, layers)]
        dropped = smallest_of_each(magnitudes, k)
        kept = [alive & ~x for alive, x in zip(living, dropped)]
        scores = growth(dense, jax.random.fold_in(jax.random.key(setting.seed), count))
        # The highest scores; inf: what is alive already.
        grown = smallest_of_each([jnp.where(x, jnp.inf, -y) for x, y in zip(kept, scores)], k)
        return with_leaves(chosen, support, [x | y for x, y in zip(kept, grown)])

    def update(
        gradients: Any, state: DynamicState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, DynamicState]:
        check_params(params)
        count, support = state.count, state.support
        first = count == 0
        due = ~first & (count % every == 0) & (count < last)
        updates, trained = inner.update(
            masked(support, gradients), state.inner_state, params, **extra_args
        )

        def change_topology() -> tuple[Any, Any]:
            after = changed(count, gradients, support, params)
            grown = jax.tree.map(lambda new, old: new & ~old, after, support)
            held = only_counts(optimizer, state.inner_state, trained)
            return after, zero_moments(optimizer, held, grown)

        def keep_topology() -> tuple[Any, Any]:
            held = only_counts(optimizer, state.inner_state, trained)
            return support, jax.tree.map(lambda h, t: jnp.where(first, h, t), held, trained)

        support, inner_state = lax.cond(due, change_topology, keep_topology)
        updates = jax.tree.map(lambda u: jnp.where(first | due, 0, u), updates)
        return (
            masked_updates(support, updates, params),
            DynamicState(optax.safe_increment(count), support, inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)
