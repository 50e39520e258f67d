"""Early pruning and pruning at initialization: a search for a support, then training on it."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lats_optax import masks
from lats_optax.checks.arguments import check_transform
from lats_optax.checks.numbers import check_steps
from lats_optax.masks import MaskOrFunction
from lats_optax.target import TargetSparsityState
from lats_optax.transforms import KeepSupportState, ProximalStepState, SoftThresholdState


def freeze(state: Any, frozen: optax.GradientTransformation, params: Any) -> Any:
    """Continue from a search with its support frozen (early pruning).

    ``soft_threshold(..., freeze_after=k)`` does the same in one transform, which moves latent
    weights to the end. Here ``keep_support`` takes the place of ``soft_threshold`` after k steps: a
    step then costs what the optimizer's does and the reading of one bool a weight, and the memory
    of the latent weights is given back. Everything else, momentum and step counts, is carried over.

    Args:
      state: the optimizer state of the search after its last step. Where ``soft_threshold`` was
        given an ``inner`` optimizer, that one's state goes first.
      frozen: the transform to go on with: that of the search with :func:`lats_optax.keep_support`
        in the place of ``soft_threshold`` (or ``proximal_step``), and
        ``optax.chain(inner, keep_support(...))`` for ``soft_threshold(..., inner=inner)``.
        ``keep_support(lats_optax.support)`` keeps the zeros of ``params``.
      params: the parameters after the last step of the search.

    Returns:
      The state for ``frozen.update``. A pure function; it can be jitted and exported.

    Raises:
      ValueError: the two transforms differ in more than that; the state is not that of such
        parameters.

    Example:
      >>> import jax.numpy as jnp, optax, lats_optax
      >>> sgd = optax.sgd(optax.cosine_decay_schedule(0.5, 100), momentum=0.9)
      >>> target = lats_optax.target_sparsity(0.5, 0.5, steps=2)
      >>> search = optax.chain(sgd, lats_optax.soft_threshold(target))
      >>> frozen = optax.chain(sgd, lats_optax.keep_support(lats_optax.support))
      >>> params = jnp.array([[0.1, -0.2, 3.0, 4.0]])
      >>> tx, state = search, search.init(params)
      >>> for step in range(4):
      ...     if step == 2:
      ...         tx, state = frozen, freeze(state, frozen, params)
      ...     updates, state = tx.update(0.1 * jnp.ones((1, 4)), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> (params != 0).tolist()
      [[False, False, True, True]]
    """
    check_transform("frozen", frozen)
    masks.check_arrays("params", params)
    fresh = frozen.init(params)
    searched = jax.tree.map(
        lambda node: _beside_inner(node) if _is_search(node) else node, state, is_leaf=_is_search
    )
    if not any(map(_is_kept, jax.tree.leaves(fresh, is_leaf=_is_kept))):
        raise ValueError("frozen: there is no keep_support in it, so nothing would stay zero")

    def carry(new: Any, old: Any) -> Any:
        if _is_kept(new) != _is_search(old):
            raise ValueError(_DIFFERS)
        if not _is_kept(new) and jnp.shape(new) != jnp.shape(old):
            raise ValueError(
                f"state: it has an array of shape {jnp.shape(old)} where params give "
                f"{jnp.shape(new)}; it is not that of these parameters"
            )
        return new if _is_kept(new) else old

    new, structure = jax.tree.flatten(fresh, is_leaf=_is_kept)
    old, before = jax.tree.flatten(searched, is_leaf=_is_search)
    if structure != before:  # type: ignore[operator]  # jaxlib's stubs
        raise ValueError(f"{_DIFFERS}. The states are {before} and {structure}")
    return jax.tree.unflatten(structure, list(map(carry, new, old)))


def prune_at_initialization(
    loss: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    transform: optax.GradientTransformation,
    steps: int,
    *,
    mask: MaskOrFunction | None = None,
) -> Any:
    """Find a support before training, by a short search.

    The search trains a copy of the parameters for a few steps. What it leaves at zero is then left
    out of the initial parameters, which are trained from scratch in anyone's loop::

        support = prune_at_initialization(loss, params, batches, search, steps=100)
        params = lats_optax.apply_support(params, support)
        tx = optax.chain(optax.sgd(lr, momentum=0.9), lats_optax.keep_support(support))

    Args:
      loss: ``loss(params, batch)``, a float scalar that can be differentiated. Batches may be on
        several devices, as in any jitted program.
      params: the initial parameters. They are left as they are.
      batches: pytrees of arrays of one structure and shape; ``steps`` of them are taken.
      transform: what the search moves the parameters with, such as
        ``optax.chain(optax.sgd(lr), soft_threshold(target_sparsity(0.95, lr, steps)))``.
      steps: number of steps of the search, >= 1.
      mask: the weights that are subject to pruning: those that ``transform`` prunes. Default
        (None): :func:`lats_optax.prunable`.

    Returns:
      The support, as :func:`lats_optax.support` gives it.

    Raises:
      ValueError: ``steps`` < 1; ``batches`` ends before them; a mask of another structure than the
        parameters; the search diverged, so that its weights are not finite.

    Example:
      >>> import itertools, jax.numpy as jnp, optax, lats_optax
      >>> wanted = jnp.array([[3.0, 0.0, -2.0, 0.1]])
      >>> loss = lambda w, batch: jnp.sum((w - batch) ** 2)
      >>> target = lats_optax.target_sparsity(0.5, 0.1, steps=20)
      >>> search = optax.chain(optax.sgd(0.1), lats_optax.soft_threshold(target))
      >>> initial = jnp.array([[0.1, 0.5, -0.1, 0.6]])
      >>> found = prune_at_initialization(loss, initial, itertools.repeat(wanted), search, 20)
      >>> lats_optax.apply_support(initial, found)
      Array([[ 0.1,  0. , -0.1,  0. ]], dtype=float32)

    Source: Chen et al., "A Unified Framework for Soft Threshold Pruning" (ICLR 2023), pruning at
    initialization.
    """
    steps = check_steps(steps)
    if not callable(loss):
        raise ValueError(f"loss: {loss!r} is not allowed; allowed are functions (params, batch)")
    check_transform("transform", transform)
    masks.check_arrays("params", params)
    mask = masks.prunable if mask is None else mask
    masks.resolve(mask, params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(weights: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = transform.update(jax.grad(loss)(weights, batch), state, weights)
        return optax.apply_updates(weights, updates), state

    try:
        source = iter(batches)
    except TypeError as error:
        raise ValueError(
            f"batches: {batches!r} is not allowed; allowed are iterables of pytrees"
        ) from error
    # A copy, because a step uses up what it is given.
    weights = jax.tree.map(jnp.copy, params)
    state = transform.init(weights)
    _check_length(state, steps)
    for taken in range(steps):
        try:
            batch = next(source)
        except StopIteration:
            raise ValueError(f"batches: they end after {taken} of the {steps} steps") from None
        if taken == 0:
            _check_loss(loss, weights, batch)
        weights, state = step(weights, state, batch)
    if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(weights)):
        raise ValueError(
            f"transform: after {steps} steps of it there are weights that are not finite; try a "
            "lower learning rate"
        )
    return masks.support(weights, mask)


def _check_length(state: Any, steps: int) -> None:
    """Refuses a search of another length than its target's, which it would miss."""
    for node in jax.tree.leaves(state, is_leaf=_is_target):
        if _is_target(node) and int(node.steps) != steps:
            raise ValueError(
                f"steps: {steps} is not allowed; the target_sparsity of the transform is for "
                f"{int(node.steps)} steps, and so must the search be"
            )


def _check_loss(loss: Callable[[Any, Any], Any], params: Any, batch: Any) -> None:
    masks.check_arrays("batches", batch)
    value = jax.eval_shape(loss, params, batch)
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"loss: its value is {value!r}; allowed are float scalars")


_DIFFERS = (
    "frozen: it is not the transform of the search with keep_support in the place of "
    "soft_threshold; for soft_threshold(..., inner=inner) that is optax.chain(inner, keep_support)"
)


def _is_target(node: Any) -> bool:
    return isinstance(node, TargetSparsityState)


def _is_search(node: Any) -> bool:
    return isinstance(node, SoftThresholdState | ProximalStepState)


def _is_kept(node: Any) -> bool:
    return isinstance(node, KeepSupportState)


def _beside_inner(node: Any) -> Any:
    """The state of a search, after that of an inner optimizer, as a chain of the two has them."""
    inner = getattr(node, "inner_state", ())
    return node if type(inner) is tuple and not inner else (inner, node)
