"""The gradient transformations: `soft_threshold`, `proximal_step` and `keep_support`.

Each returns the update w' - w, so that `optax.apply_updates` arrives at w'; where w' is zero this
is exact in every float type, because w + (0 - w) = 0. Nothing may rescale or add to an update
afterwards: chain these last.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lats_optax import masks
from lats_optax.arguments import check_beside, check_state, check_transform
from lats_optax.controllers import Controller, as_controller, as_schedule
from lats_optax.leaves import check_fits, compute_dtype
from lats_optax.masks import MaskOrFunction, is_dense
from lats_optax.operators import Operator, as_operator
from lats_optax.prox import prox_l1
from lats_optax.pruned import PrunedUpdate, Scaled, as_pruned_update
from lats_optax.stacked import warn_of_stacked_layers
from lats_optax.thresholds import ScalarOrSchedule, check_steps


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

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    threshold: jax.Array
    latent: Any
    control: Any
    inner_state: Any


class ProximalStepState(NamedTuple):
    """The number of steps taken, an int32 scalar."""

    count: jax.Array  # type: ignore[assignment]  # tuple.count


class KeepSupportState(NamedTuple):
    """The support: bool arrays in a tree like the parameters; a scalar stands for a whole leaf."""

    support: Any


def soft_threshold(
    threshold: ScalarOrSchedule | Controller,
    *,
    inner: optax.GradientTransformation | None = None,
    mask: MaskOrFunction | None = None,
    operator: Operator | None = None,
    latent_dtype: Any = None,
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
      >>> float(optax.tree.get(state, "threshold"))
      0.5

    Source: Chen et al., "A Unified Framework for Soft Threshold Pruning" (ICLR 2023), algorithm 1;
    for other operators, Glentis Georgoulakis et al., "Feather" (BMVC 2023).
    """
    mask = masks.prunable if mask is None else mask
    if latent_dtype is not None and not _is_float_type(latent_dtype):
        raise ValueError(f"latent_dtype: {latent_dtype} is not a float type")
    if latent_dtype is not None and jnp.dtype(latent_dtype).itemsize < 2:
        raise ValueError(
            f"latent_dtype: {jnp.dtype(latent_dtype)} is not allowed; allowed are float types of "
            "16 bits or more"
        )
    if inner is not None:
        check_transform("inner", inner)
    if freeze_after is not None:
        freeze_after = check_steps(freeze_after, "freeze_after")
    pruned_update = None if pruned_scale is None else as_pruned_update(pruned_scale)
    controller = as_controller(threshold)
    operator = controller.default_operator if operator is None else as_operator(operator)
    controller = controller.prepared(operator, freeze_after)
    inner = None if inner is None else optax.with_extra_args_support(inner)

    def init(params: Any) -> SoftThresholdState:
        pruned = jax.tree.map(
            lambda chosen, leaf: _as_array(leaf) if chosen else optax.MaskedNode(),
            _pruned(params, mask, operator),
            params,
        )
        first, control_state = controller.init(pruned, operator)

        def latent_of(leaf: jax.Array, d: jax.Array) -> jax.Array:
            dtype = leaf.dtype if latent_dtype is None else latent_dtype
            wide = leaf.astype(compute_dtype(dtype))
            return operator.at(0).preimage(wide, d.astype(wide.dtype)).astype(dtype)

        def latent_or_shape(leaf: Any, d: jax.Array) -> Any:
            if not isinstance(leaf, jax.ShapeDtypeStruct):
                return latent_of(leaf, d)
            shape = jax.eval_shape(latent_of, leaf, d)
            return leaf.update(dtype=shape.dtype)  # type: ignore[no-untyped-call]

        latent = _map_pruned(latent_or_shape, pruned, expand_threshold(first, pruned))
        inner_state = () if inner is None else inner.init(_where_latent(latent, params))
        return SoftThresholdState(
            jnp.zeros((), jnp.int32), first, latent, control_state, inner_state
        )

    def restrained(update: Any, w: Any) -> jax.Array:
        """The update, with less of it where the weight is pruned."""
        update, w = jnp.asarray(update), jnp.asarray(w)
        if pruned_update is not None:
            return pruned_update(update, w)
        single = operator.group_sizes(w.shape).max(initial=1) == 1
        return (controller.default_pruned_update if single else Scaled(0.0))(update, w)

    def update(
        updates: Any, state: SoftThresholdState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SoftThresholdState]:
        _require("soft_threshold", params)
        check_state(state, SoftThresholdState)
        check_beside("state", state.latent, params)
        pruned = jax.tree.map(
            lambda theta, w: not is_dense(theta), state.latent, params, is_leaf=is_dense
        )
        check_beside("updates", updates, params, needed=pruned)
        latent, frozen = state.latent, None
        if freeze_after is not None:
            # Entering the frozen phase theta becomes w, and d becomes 0: w = S_d(theta) holds on.
            frozen = state.count >= freeze_after
            latent = _map_pruned(
                lambda theta, d: jnp.where(frozen, operator.at(state.count)(theta, d), theta),
                latent,
                expand_threshold(state.threshold, latent),
            )
        inner_state = state.inner_state
        if inner is not None:
            updates, inner_state = inner.update(
                updates, inner_state, _where_latent(latent, params), **extra_args
            )
        moved = _map_pruned(
            lambda theta, u, w: _move(theta, restrained(u, w), frozen),
            latent,
            updates,
            params,
        )
        after, control_state = controller.update(
            state.count, state.threshold, state.control, moved, operator
        )
        if frozen is not None:
            after = jnp.where(frozen, 0.0, after)
        count = optax.safe_increment(state.count)
        shrink = operator.at(count)
        new_updates = jax.tree.map(
            lambda theta, d, u, w: (
                u
                if is_dense(theta)
                else _living_difference(shrink(theta, d), jnp.asarray(w), jnp.asarray(u))
            ),
            moved,
            expand_threshold(after, moved),
            updates,
            params,
            is_leaf=is_dense,
        )
        return new_updates, SoftThresholdState(count, after, moved, control_state, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def proximal_step(
    strength: ScalarOrSchedule,
    *,
    operator: Operator | None = None,
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
        _pruned(params, mask, operator)
        return ProximalStepState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: ProximalStepState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ProximalStepState]:
        del extra_args
        _require("proximal_step", params)
        check_state(state, ProximalStepState)
        pruned = masks.resolve(mask, params)
        check_beside("updates", updates, params, needed=pruned)
        current = schedule(state.count)
        count = optax.safe_increment(state.count)
        shrink = operator.at(count)

        def step(chosen: bool, u: Any, w: jax.Array) -> Any:
            if not chosen:
                return u
            w, u = jnp.asarray(w), jnp.asarray(u)
            return _difference(shrink(w + u.astype(w.dtype), current), w, u)

        new_updates = jax.tree.map(step, pruned, updates, params)
        return new_updates, ProximalStepState(count)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_support(support: Any) -> optax.GradientTransformationExtraArgs:
    """Hold given zeros at zero, whatever the optimizer before it does.

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
        return KeepSupportState(masks.spread_support(kept, params))

    def update(
        updates: Any, state: KeepSupportState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, KeepSupportState]:
        del extra_args
        _require("keep_support", params)
        check_state(state, KeepSupportState)
        jax.eval_shape(masks.spread_support, state.support, params)
        check_beside("updates", updates, params, needed=jax.tree.map(lambda w: True, params))
        kept = jax.tree.map(
            lambda alive, u, w: jnp.where(alive, u.astype(_wider(u, w)), -w.astype(_wider(u, w))),
            state.support,
            updates,
            params,
        )
        return kept, state

    return optax.GradientTransformationExtraArgs(init, update)


# --- one leaf -----------------------------------------------------------------------------------


def _as_array(leaf: Any) -> Any:
    """An array, of a Python float too; the shape of one is left as it is."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.asarray(leaf)


def _is_float_type(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def _move(theta: jax.Array, update: Any, frozen: jax.Array | None) -> jax.Array:
    wide = compute_dtype(theta.dtype)
    moved = _rounded(theta.astype(wide) + jnp.asarray(update, wide), theta.dtype)
    if frozen is None:
        return moved
    # A survivor that lands on zero exactly would be taken for dead from then on.
    alive = jnp.where(moved == 0, _finfo(theta.dtype).tiny, moved)
    return jnp.where(frozen, jnp.where(theta == 0, 0.0, alive), moved)


def _difference(target: jax.Array, w: jax.Array, update: Any) -> jax.Array:
    """The update w' - w, such that w + (w' - w) is zero where w' is."""
    dtype = _wider(update, w)
    wide = compute_dtype(dtype)
    target = _alive(target.astype(wide), w.dtype).astype(wide)
    return _rounded(target - w.astype(wide), dtype)


def _living_difference(target: jax.Array, w: jax.Array, update: Any) -> jax.Array:
    """The update w' - w, such that w + (w' - w) is zero where w' is and nowhere else.

    Where w' is lost beside w, the rounded difference is -w and would prune a weight that is alive
    in the latent weights; the next float towards zero leaves one ulp of it.
    """
    difference = _difference(target, w, update)
    target = _alive(target.astype(compute_dtype(w.dtype)), w.dtype)
    lost = (difference == -w.astype(difference.dtype)) & (target != 0)
    return jnp.where(lost, difference * (1 - _finfo(difference.dtype).eps), difference)


def _wider(update: Any, w: jax.Array) -> Any:
    """The float type of the update, unless it is too narrow for w + (0 - w) to be zero."""
    return update.dtype if update.dtype.itemsize > w.dtype.itemsize else w.dtype


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """A float32 or float64 array in the given dtype, as every reader of it sees it.

    XLA may leave out a rounding to sixteen bits where arithmetic in float32 follows. What is
    compared with the threshold would then differ from what the state keeps.
    """
    info = _finfo(dtype)
    if info.bits <= 16:
        # reduce_precision takes subnormal numbers for zero, which in float16 are weights.
        small = jnp.abs(x) < info.tiny.astype(x.dtype)
        x = jnp.where(small, x, lax.reduce_precision(x, info.nexp, info.nmant))
    return x.astype(dtype)


def _alive(x: jax.Array, dtype: Any) -> jax.Array:
    """As :func:`_rounded`, but what is not zero stays so: float16 would lose small weights."""
    rounded = _rounded(x, dtype)
    if rounded.dtype == x.dtype:
        return rounded
    least = jnp.copysign(_finfo(dtype).smallest_subnormal.astype(x.dtype), x).astype(dtype)
    return jnp.where((rounded == 0) & (x != 0), least, rounded)


def _finfo(dtype: Any) -> Any:
    return jnp.finfo(dtype)  # type: ignore[no-untyped-call]


# --- trees --------------------------------------------------------------------------------------


def _map_pruned(function: Callable[..., Any], latent: Any, *rest: Any) -> Any:
    return jax.tree.map(
        lambda theta, *others: theta if is_dense(theta) else function(theta, *others),
        latent,
        *rest,
        is_leaf=is_dense,
    )


def expand_threshold(threshold: jax.Array, latent: Any) -> Any:
    """The threshold of each pruned leaf, in a tree like the latent weights.

    Args:
      threshold: of :class:`SoftThresholdState`: a scalar, or one for each pruned leaf.
      latent: the latent weights of that state.

    Returns:
      A pytree of scalars, with `optax.MaskedNode` where ``latent`` has it.

    Example:
      >>> expand_threshold(jnp.array([0.5, 2.0]), {"a": jnp.ones(3), "b": jnp.ones(4)})
      {'a': Array(0.5, dtype=float32), 'b': Array(2., dtype=float32)}
    """
    if jnp.ndim(threshold) == 0:
        return _map_pruned(lambda theta: threshold, latent)
    each = iter(range(len(threshold)))
    return _map_pruned(lambda theta: threshold[next(each)], latent)


def _where_latent(latent: Any, params: Any) -> Any:
    """The parameters with the latent weights in the place of the pruned ones."""
    return jax.tree.map(
        lambda theta, w: w if is_dense(theta) else theta, latent, params, is_leaf=is_dense
    )


def _pairs(params: Any, pruned: Any) -> list[tuple[Any, bool]]:
    return list(zip(jax.tree.leaves(params), jax.tree.leaves(pruned)))


def _pruned(params: Any, mask: MaskOrFunction, operator: Operator) -> Any:
    """The mask as a tree of bools, after a look at what it selects."""
    masks.check_arrays("params", params)
    pruned = masks.resolve(mask, params)
    names = jax.tree.leaves(masks.paths(params))
    selected: dict[str, Any] = {}
    for name, (leaf, chosen) in zip(names, _pairs(params, pruned)):
        dtype = jnp.result_type(leaf)
        if chosen and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"mask: it selects {name}, which is {dtype}; only float parameters can be pruned"
            )
        if chosen and dtype.itemsize < 2:
            # In eight bits a large weight becomes NaN, and w + (w' - w) is not w'.
            raise ValueError(
                f"mask: it selects {name}, which is {dtype}; allowed are float types of 16 bits or "
                "more: keep the parameters in bfloat16, and cast the pruned ones afterwards"
            )
        if chosen:
            selected[name] = leaf
    check_fits("operator", operator, selected)
    warn_of_stacked_layers(operator, params, selected, stacklevel=3)
    if names and not any(jax.tree.leaves(pruned)):
        warnings.warn(
            f"nothing is pruned: the mask selects none of {', '.join(names)}", stacklevel=3
        )
    # Parameters without leaves may also be optax's stand-ins (tree.map_params).
    if not names and jax.tree.leaves(params, is_leaf=is_dense):
        warnings.warn(
            "nothing is pruned: a transform around this one, such as optax.masked or "
            "optax.partition, masks every parameter",
            stacklevel=3,
        )
    return pruned


def _require(name: str, params: Any) -> None:
    if params is None:
        raise ValueError(
            f"{name}: params is None; call update(updates, state, params) with the current "
            "parameters"
        )
