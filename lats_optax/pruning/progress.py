"""What a state tells of how its run went: whether the target was met, and if not, why.

Here belong the sentences that `finalize` warns with, and that `sparsity` shows.
"""

from typing import Any

import jax
import numpy as np
import optax

from lats_optax import masks
from lats_optax.compatibility import get_all_with_path
from lats_optax.pruning.states import State, find, is_state, leaf_of

# Nobody trains on for so many times the run: an epoch was taken for a step.
_FAR_BEYOND = 10
# Of the steps: who stops a few of them early has trained on what was met.
_NEARLY_ALL = 0.9
# Where the latent weights are close together, a shortfall is that of a step between selections.
_TOLERANCE = 5e-4
# Optimizers keep these for each parameter.
_MOMENTS = ("mu", "nu", "trace")


def misgivings(params: Any, opt_state: Any) -> list[str]:
    """What went wrong in a run, as far as its state tells; nothing where all is well.

    Args:
      params: the parameters after the last update.
      opt_state: the state that came with them.

    Returns:
      Sentences: a target of ``target_sparsity`` that is not met, was met far too early, or is met
      by a state that has not seen all of the run; a mask that selects nothing, arrays that are
      wholly zero, an optimizer in ``soft_threshold`` and another one before it.

    Raises:
      ValueError: there is no state of ``soft_threshold``.

    Example:
      >>> import jax.numpy as jnp, lats_optax
      >>> target = lats_optax.target_sparsity(0.75, 0.1, steps=4)
      >>> tx = lats_optax.soft_threshold(target)
      >>> params = {"kernel": jnp.array([[0.1, -0.4], [0.3, 0.2]])}
      >>> misgivings(params, tx.init(params))[0]
      'opt_state: the run stopped at step 0 of 4: 0.00% zeros, of the 75.00% named. ...'
    """
    states, zeros = find(opt_state), _zeros(params)
    found = [_progress(state, zeros, opt_state) for state in states]
    if not any(state.latents for state in states):
        found.append(
            "opt_state: nothing was pruned: the mask of soft_threshold, or that of a transform "
            "around it, selects none of the parameters"
        )
    if dead := _dead(states, zeros):
        found.append(
            f"opt_state: every weight of {', '.join(dead)} is zero: nothing passes there, unless "
            "by a shortcut. Give layers a sparsity each, as by target_sparsity(erdos_renyi(0.95), "
            "learning_rate, steps), or leave these out of the mask"
        )
    if twice := _moved_twice(states, opt_state):
        found.append(
            f"opt_state: {', '.join(twice)} went through two optimizers: that which soft_threshold "
            "has as inner= took the updates of the one before it for gradients, and moves the "
            "other way. Chain the optimizer or give it as inner=, not both"
        )
    elif _plain_sgd_before(opt_state):
        found.append(
            "opt_state: what is chained before soft_threshold(inner=…) has the state of optax.sgd. "
            "If it is an optimizer, the one in soft_threshold takes its updates for gradients, and "
            "the weights go up the loss. Chain the optimizer or give it as inner=, not both"
        )
    return [sentence for sentence in found if sentence]


def summary(params: Any, opt_state: Any) -> tuple[str, ...]:
    """What a person wants to know of a run: each target that is met, and all that went wrong.

    Args:
      params: the parameters after the last update.
      opt_state: the state that came with them.

    Raises:
      ValueError: there is no state of ``soft_threshold``.
    """
    zeros = _zeros(params)
    met = [
        f"target met: {sum(state.zeros):,} of {_size(state):,} weights were to be zero, at step "
        f"{state.count:,} of {state.steps:,}"
        for state in find(opt_state)
        if state.zeros is not None and state.latents and not _progress(state, zeros, opt_state)
    ]
    return (*met, *misgivings(params, opt_state))


def _zeros(params: Any) -> dict[str, int]:
    """Path of a parameter -> how many of its weights are zero."""
    counts = (int((np.asarray(leaf) == 0).sum()) for leaf in jax.tree.leaves(params))
    return dict(zip(jax.tree.leaves(masks.paths(params)), counts))


def _size(state: State) -> int:
    return sum(leaf.size for leaf in state.latents.values())


def _progress(state: State, zeros: dict[str, int], opt_state: Any) -> str:
    """Whether the target of a state is met by the zeros of its parameters."""
    if state.steps is None or state.zeros is None or not state.latents:
        return ""
    names = list(state.latents)
    # One target for all, or one for each layer.
    parts = [names] if len(state.zeros) == 1 else [[name] for name in names]
    short = []
    for part, named in zip(parts, state.zeros):
        size = sum(state.latents[name].size for name in part)
        have = sum(zeros[name] for name in part)
        if named - have > _TOLERANCE * size:
            told = f"{have / size:.2%} zeros, of the {named / size:.2%} named"
            short.append(told if len(parts) == 1 else f"{part[0]} has {told}")
    if short:
        at = f"stopped at step {state.count:,} of {state.steps:,}"
        if state.count >= state.steps:
            at = f"is over, at step {state.count:,} of {state.steps:,}"
        return f"opt_state: the run {at}: {'; '.join(short)}. {_cause(state, opt_state)}"
    if state.count < _NEARLY_ALL * state.steps:
        return (
            f"opt_state: the run stopped at step {state.count:,} of {state.steps:,}: the target is "
            "met, and the weights were to be trained at it for the steps that remain. "
            f"{_cause(state, opt_state)}"
        )
    if state.count >= _FAR_BEYOND * state.steps:
        return (
            f"opt_state: the run went on to step {state.count:,} of {state.steps:,}: the target "
            f"was met in the first {state.steps / state.count:.1%} of it. The steps of "
            "target_sparsity are those of the optimizer, not epochs"
        )
    return ""


def _cause(state: State, opt_state: Any) -> str:
    """Why a run may have fallen short."""
    if skipped := _sum(opt_state, "total_notfinite"):
        return (
            f"optax.apply_if_finite skipped {skipped:,} updates, which do not count: train for "
            "that many more, or find why gradients were not finite"
        )
    if get_all_with_path(opt_state, "mini_step"):
        return (
            "Under optax.MultiSteps a step is what changes the parameters: the steps of "
            "target_sparsity are its gradient_step, not its calls"
        )
    return (
        "The steps of target_sparsity are those of the optimizer in the whole run; a state that is "
        "initialized again on the way counts from 0"
    )


def _sum(opt_state: Any, field: str) -> int:
    return sum(int(leaf_of(value)) for _, value in get_all_with_path(opt_state, field))


def _dead(states: list[State], zeros: dict[str, int]) -> list[str]:
    """Paths of pruned arrays that are wholly zero, where others are not."""
    sizes = {
        name: node.size for state in states if state.count for name, node in state.latents.items()
    }
    dead = [name for name, size in sizes.items() if size > 1 and zeros[name] == size]
    return dead if len(dead) < len(sizes) else []


def _moved_twice(states: list[State], opt_state: Any) -> list[str]:
    """Paths of what `soft_threshold` moves by an optimizer in it, and another one before it."""
    within = {name for state in states if state.has_inner for name in state.latents}
    outside = jax.tree.map(
        lambda node: None if is_state(node) else node, opt_state, is_leaf=is_state
    )
    before = {
        name
        for field in _MOMENTS
        for _, moments in get_all_with_path(outside, field)
        for name in jax.tree.leaves(masks.paths(moments))
    }
    return sorted(within & before)


def _plain_sgd_before(node: Any) -> bool:
    """Whether `optax.sgd` without momentum is chained before an optimizer in `soft_threshold`.

    It keeps nothing for any parameter, so the place of its state in a chain tells it.
    """
    if is_state(node):
        return False
    children = jax.tree.leaves(node, is_leaf=lambda child: child is not node)
    first = next((place for place, child in enumerate(children) if _has_inner(child)), None)
    if first is None:
        return False
    chained = type(node) is tuple and any(_has_plain_sgd(child) for child in children[:first])
    return chained or any(_plain_sgd_before(child) for child in children)


def _has_inner(node: Any) -> bool:
    within = [child for child in jax.tree.leaves(node, is_leaf=is_state) if is_state(child)]
    return bool(within) and any(state.has_inner for state in find(within))


def _has_plain_sgd(node: Any) -> bool:
    """Whether there is a scale by a schedule in it, or a chain of two states that hold nothing."""

    def is_plain_sgd(child: Any) -> bool:
        empty = type(child) is tuple and len(child) == 2 and not jax.tree.leaves(child)
        return empty or isinstance(child, optax.ScaleByScheduleState)

    return any(is_plain_sgd(child) for child in jax.tree.leaves(node, is_leaf=is_plain_sgd))
