"""The gradient transformations: `soft_threshold`, `proximal_step` and `keep_support`.

Each returns the update w' - w, so that `optax.apply_updates` arrives at w'; where w' is zero this
is exact in every float type, because w + (0 - w) = 0. Nothing may rescale or add to an update
afterwards: chain these last.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from lats_optax import masks
from lats_optax.array_types import Array, Float, Integer
from lats_optax.checks.arguments import (
    check_beside,
    check_float_type,
    check_params,
    check_state,
    check_transform,
    checked_mask,
)
from lats_optax.checks.numbers import check_steps
from lats_optax.control.controllers import Controller, as_controller, as_schedule
from lats_optax.control.schedules import ScalarOrSchedule
from lats_optax.latent.arithmetic import difference, first_latent, living_difference, move, wider
from lats_optax.latent.pruned import PrunedUpdate, Scaled, as_pruned_update
from lats_optax.latent.trees import expand_threshold, is_latent, map_pruned, where_latent
from lats_optax.masks import MaskOrFunction
from lats_optax.operators.parts import TreeOperator, as_operator, by_path, map_parts, parts_of
from lats_optax.prox import prox_l1


class SoftThresholdState(NamedTuple):
    """What `soft_threshold` remembers between steps.

    Attributes:
      count: int32 scalar, the number of steps taken.
      threshold: the current d, in the units of the weights: a float scalar; or, where a closed
        loop gives each layer its own, float [layers], in the order of ``jax.tree.leaves(latent)``.
      latent: the latent weights theta, a tree like the parameters in which `optax.MaskedNode`
        stands for the leaves that are not pruned.
      control: the state of a closed-loop threshold, else ``()``.
      inner_state: the state of ``inner``, else ``()``.
    """

    count: Integer[Array, ""]  # type: ignore[assignment]  # tuple.count
    threshold: Float[Array, "*layers"]
    latent: Any
    control: Any
    inner_state: Any


class ProximalStepState(NamedTuple):
    """The number of steps taken, an int32 scalar."""

    count: Integer[Array, ""]  # type: ignore[assignment]  # tuple.count


class KeepSupportState(NamedTuple):
    """The support: bool arrays in a tree like the parameters; a scalar stands for a whole leaf."""

    support: Any


def soft_threshold(
    threshold: ScalarOrSchedule | Controller,
    *,
    inner: optax.GradientTransformation | None = None,
    mask: MaskOrFunction | None = None,
    operator: TreeOperator | None = None,
    latent_dtype: DTypeLike | None = None,
    pruned_scale: float | PrunedUpdate | None = None,
    freeze_after: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Threshold pruning: the model runs on P_d(theta), the optimizer moves theta.

    ``theta' = theta + update``, ``w' = P_{d(t+1)}(theta')``, where P_d is a threshold operator:
    soft thresholding, or one between soft and hard. Chained last, behind any optimizer; the
    parameters are then exactly sparse after every step::

        tx = optax.chain(optax.adamw(lr), soft_threshold(target_sparsity(0.95, lr, steps)))

    A method is a choice of ``operator``, of the law of ``threshold``, of ``pruned_scale`` and of
    what happens at the end (the law's ``reach``, ``freeze_after``). The defaults under
    ``target_sparsity`` are the recommended method; under a threshold schedule they are the paper's.

    ``optax.inject_hyperparams(soft_threshold)(threshold=0.1)`` lets a number be changed between
    steps. It takes every function for a schedule, calls schedules before a step and not after it,
    and has a hyperparameter called ``threshold`` too: name what is not that number in its
    ``static_args``, and read the threshold at ``state.inner_state.threshold``.

    Args:
      threshold: d in the units of the weights: a number, an optax schedule ``count -> d``, or a
        closed loop such as :func:`lats_optax.target_sparsity`. After step t (counted from 0) the
        threshold is ``threshold(t + 1)``; ``threshold(0)`` is the one before the first step, and
        where it is not zero the first latent weights are the operator's preimage of the
        parameters, ``theta = w + d sign(w)`` for soft thresholding, so that the given parameters
        are what the model starts from.
      inner: an optimizer that is given theta as its parameters; the updates that arrive are then
        gradients. Weight decay in it acts on theta, as in the published code. Without it the
        updates that arrive are applied to theta as they are, and weight decay chained before acts
        on w. Extra arguments of ``update`` reach it.
      mask: which leaves to prune: a pytree of bools that matches the parameters, or a function
        that makes one from them. Default (None): :func:`lats_optax.prunable`. The other leaves
        get the update as it comes and take no memory.
      operator: the proximal operator, or a plain function ``(x, d) -> z`` where no sparsity is
        named. Default (None): that of :func:`lats_optax.target_sparsity` under it, and
        :data:`lats_optax.prox.prox_l1` under a number or a schedule. For whole channels, filters or
        blocks: one of :mod:`lats_optax.groups`.
      latent_dtype: float type of theta. Default (None): that of each parameter. ``jnp.float32``
        under bfloat16 parameters is mixed precision.
      pruned_scale: factor in [0, 1] on the update of a weight that is pruned, w = 0. 1: it moves as
        all others do (straight-through). 0: it stays where it is, as in gradual magnitude pruning.
        Or a rule, such as :func:`lats_optax.bounded`. Default (None): ``bounded()`` under
        :func:`lats_optax.target_sparsity`, and 1 under a number or a schedule; for the weights of
        a group 0, because the gradient with respect to a dead channel behind which is a batch
        normalization is as large as that normalization's ``1 / sqrt(epsilon)``, and would revive
        it.
      freeze_after: number k of steps after which the support is frozen: zeros stay zero, and the
        survivors train on without shrinkage, under a threshold of zero (early pruning). Under a
        :func:`lats_optax.target_sparsity` k is at least ``reach * steps``, where its target is met.
        Under a schedule of this library k is at most its ``steps``. Of a number or any other
        schedule no end is known.

    Returns:
      A gradient transformation with state :class:`SoftThresholdState`; read the current threshold
      with ``optax.tree.get(opt_state, "threshold")``. Its ``update`` needs ``params``.

    Raises:
      ValueError: a threshold that is negative or not finite (a schedule is asked for count 0),
        ``freeze_after`` < 1 or not within the steps of the threshold, ``pruned_scale`` outside
        [0, 1]; ``target_sparsity`` with an operator of unknown magnitude; from ``init``, a mask of
        another structure, or one that selects integer or complex parameters, or parameters that
        lack the axes of the operator's groups; from ``update``, ``params=None``.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.array([[0.3, -1.0], [2.0, 0.1]]), "bias": jnp.zeros(2)}
      >>> tx = optax.chain(optax.sgd(0.1), soft_threshold(optax.linear_schedule(0.0, 0.5, 1)))
      >>> gradients = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(gradients, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"]
      Array([[ 0. , -0.5],
             [ 1.5,  0. ]], dtype=float32)
      >>> float(state[-1].threshold)
      0.5

    Source: Chen et al., "A Unified Framework for Soft Threshold Pruning" (ICLR 2023), algorithm 1;
    for other operators, Glentis Georgoulakis et al., "Feather" (BMVC 2023).
    """
    mask = masks.prunable if mask is None else mask
    if latent_dtype is not None:
        check_float_type("latent_dtype", latent_dtype)
    if inner is not None:
        check_transform("inner", inner)
        inner = optax.with_extra_args_support(inner)
    if freeze_after is not None:
        freeze_after = check_steps(freeze_after, "freeze_after")
    pruned_update = None if pruned_scale is None else as_pruned_update(pruned_scale)
    controller = as_controller(threshold)
    operator = controller.default_operator if operator is None else as_operator(operator)
    controller = controller.prepared(operator, freeze_after)

    def init(params: Any) -> SoftThresholdState:
        pruned = jax.tree.map(
            lambda chosen, leaf: _as_array(leaf) if chosen else optax.MaskedNode(),
            checked_mask(params, mask, operator),
            params,
        )
        first, control_state = controller.init(pruned, operator)
        latent = map_parts(
            lambda part, w, d: first_latent(w, d, part, latent_dtype),
            operator.at(0),
            pruned,
            expand_threshold(first, pruned),
        )
        inner_state = () if inner is None else inner.init(where_latent(latent, params))
        return SoftThresholdState(
            jnp.zeros((), jnp.int32), first, latent, control_state, inner_state
        )

    def rules(latent: Any) -> Any:
        """What becomes of the updates of pruned weights, for each leaf."""
        chosen = {
            name: controller.default_pruned_update if part.largest_group == 1 else Scaled(0.0)
            for part in parts_of(operator, by_path(latent))
            for name in part.names
        }
        return map_pruned(
            lambda name: chosen[name] if pruned_update is None else pruned_update,
            masks.paths(latent),
        )

    def update(
        updates: Any, state: SoftThresholdState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SoftThresholdState]:
        check_params("soft_threshold", params)
        check_state(state, SoftThresholdState)
        check_beside("state", state.latent, params)
        check_beside("updates", updates, params, needed=is_latent(state.latent, params))

        # Entering the frozen phase theta becomes w, and d becomes 0: w = S_d(theta) holds on.
        latent, frozen = state.latent, None
        if freeze_after is not None:
            frozen = state.count >= freeze_after
            latent = map_pruned(
                lambda theta, w: jnp.where(frozen, w, theta),
                latent,
                _pruned(operator.at(state.count), latent, state.threshold),
            )

        # theta' = theta + update
        inner_state = state.inner_state
        if inner is not None:
            updates, inner_state = inner.update(
                updates, inner_state, where_latent(latent, params), **extra_args
            )
        latent = map_pruned(
            lambda theta, u, w, rule: move(theta, rule(jnp.asarray(u), jnp.asarray(w)), frozen),
            latent,
            updates,
            params,
            rules(latent),
        )

        # d'
        after, control_state = controller.update(
            state.count, state.threshold, state.control, latent, operator
        )
        if frozen is not None:
            after = jnp.where(frozen, 0.0, after)

        # w' = P_{d'}(theta')
        count = optax.safe_increment(state.count)
        differences = map_pruned(
            lambda target, u, w: living_difference(target, jnp.asarray(w), jnp.asarray(u)),
            _pruned(operator.at(count), latent, after),
            updates,
            params,
        )
        return (
            where_latent(differences, updates),
            SoftThresholdState(count, after, latent, control_state, inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def proximal_step(
    strength: ScalarOrSchedule,
    *,
    operator: TreeOperator | None = None,
    mask: MaskOrFunction | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A proximal step behind any optimizer: ISTA proper, without latent weights.

    ``w' = prox_{strength(t)}(w + update)``

    With ``optax.sgd(lr)`` before it and ``strength(t) = lr(t) * mu`` its fixed points minimize
    ``loss + mu * penalty``. It forgets what a pruned weight's gradients were, so that gradient
    noise revives zeros; where the gradients are exact it is the plain method for Lasso problems.

    Args:
      strength: the strength of the operator, a number or a schedule ``count -> strength``.
      operator: the proximal operator. Default (None): :func:`lats_optax.prox.prox_l1`.
      mask: which leaves it acts on, as in :func:`soft_threshold`.

    Returns:
      A gradient transformation with state :class:`ProximalStepState`. Its ``update`` needs
      ``params``.

    Raises:
      ValueError: a strength that is negative or not finite (a schedule is asked for count 0);
        from ``init`` and ``update`` as :func:`soft_threshold`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.1), proximal_step(0.1 * 2.0))
      >>> params = jnp.array([[3.0, 0.1]])
      >>> updates, _ = tx.update(params, tx.init(params), params)  # the loss is 1/2 ||w||^2
      >>> optax.apply_updates(params, updates)
      Array([[2.5, 0. ]], dtype=float32)

    Source: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm" (2009).
    """
    operator = prox_l1 if operator is None else as_operator(operator)
    mask = masks.prunable if mask is None else mask
    schedule = as_schedule("strength", strength)

    def init(params: Any) -> ProximalStepState:
        checked_mask(params, mask, operator)
        return ProximalStepState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: ProximalStepState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ProximalStepState]:
        del extra_args
        check_params("proximal_step", params)
        check_state(state, ProximalStepState)
        pruned = masks.resolve(mask, params)
        check_beside("updates", updates, params, needed=pruned)
        current = schedule(state.count)
        count = optax.safe_increment(state.count)
        moved = jax.tree.map(
            lambda chosen, u, w: _moved(u, w) if chosen else optax.MaskedNode(),
            pruned,
            updates,
            params,
        )
        differences = map_pruned(
            lambda target, u, w: difference(target, jnp.asarray(w), jnp.asarray(u)),
            _pruned(operator.at(count), moved, current),
            updates,
            params,
        )
        return where_latent(differences, updates), ProximalStepState(count)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_support(support: Any) -> optax.GradientTransformationExtraArgs:
    """Hold given zeros at zero after any optimizer.

    ``w' = support * (w + update)``

    Args:
      support: bools in a tree like the parameters (or a prefix of it), as
        :func:`lats_optax.support` makes it: an array of the shape of its leaf, or a scalar for the
        whole leaf. Or a function that makes it from the parameters that ``init`` is given:
        ``keep_support(lats_optax.support)`` keeps the zeros that they have.

    Returns:
      A gradient transformation with state :class:`KeepSupportState`. Its ``update`` needs
      ``params``.

    Raises:
      ValueError: from ``init``, a support of another structure or shape, or not of bools; from
        ``update``, ``params=None``.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = jnp.array([[0.0, 1.0]])
      >>> tx = optax.chain(optax.sgd(0.5), keep_support(params != 0))
      >>> updates, _ = tx.update(jnp.ones((1, 2)), tx.init(params), params)
      >>> optax.apply_updates(params, updates)
      Array([[0. , 0.5]], dtype=float32)
    """

    def init(params: Any) -> KeepSupportState:
        if not jax.tree.leaves(params):
            return KeepSupportState(jax.tree.map(lambda leaf: leaf, params))
        kept = support(params) if masks.is_function(support) else support
        return KeepSupportState(masks.expand_support(kept, params))

    def update(
        updates: Any, state: KeepSupportState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, KeepSupportState]:
        del extra_args
        check_params("keep_support", params)
        check_state(state, KeepSupportState)
        jax.eval_shape(masks.expand_support, state.support, params)
        check_beside("updates", updates, params, needed=jax.tree.map(lambda w: True, params))
        kept = jax.tree.map(
            lambda alive, u, w: jnp.where(alive, u.astype(wider(u, w)), -w.astype(wider(u, w))),
            state.support,
            updates,
            params,
        )
        return kept, state

    return optax.GradientTransformationExtraArgs(init, update)


def _pruned(operator: TreeOperator, latent: Any, threshold: Float[Array, "*layers"]) -> Any:
    """``P_d(theta)``, a tree like the latent weights."""
    thresholds = expand_threshold(threshold, latent)
    return map_parts(lambda part, theta, d: part(theta, d), operator, latent, thresholds)


def _moved(update: Any, w: Any) -> Float[Array, "..."]:
    """``w + update``, in the dtype of w."""
    w = jnp.asarray(w)
    return w + jnp.asarray(update).astype(w.dtype)


def _as_array(leaf: Any) -> Any:
    """An array, of a Python float too; the shape of one is left as it is."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)
