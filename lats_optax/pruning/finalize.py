"""The end of training: exactly sparse weights out of a state, and a check that they are its own."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lats_optax import masks
from lats_optax.array_types import Array
from lats_optax.operators.leaves import compute_dtype
from lats_optax.operators.parts import TreeOperator, as_operator, parts_of
from lats_optax.pruning.progress import misgivings
from lats_optax.pruning.states import Latent, latents


def finalize(
    params: Any, opt_state: Any, *, average: Any = None, operator: TreeOperator | Any = None
) -> Any:
    """Check a training state and return its exact sparse weights.

    ``w = P_d(theta)`` where a weight is pruned, and what ``params`` has elsewhere. With
    ``average``: the averaged weights, with the support of w applied.

    Adding an update to a parameter rounds, so ``params`` may be an ulp away from w; their zeros
    are those of w, and where they are not the weights were changed since the update: by another
    transform behind ``soft_threshold``, by a cast, by an average in their place.

    It warns where the state tells that the run went wrong: where it stopped short of the target of
    ``target_sparsity`` or of its steps, where nothing was pruned, where arrays died as a whole, or
    where the gradients went through two optimizers.

    Args:
      params: the parameters after the last update.
      opt_state: the optimizer state that came with them, with one :class:`SoftThresholdState` or
        more anywhere in it: in ``optax.chain``, ``masked``, ``partition``, ``MultiSteps``,
        ``inject_hyperparams``, ``flax.nnx.Optimizer``; or such a state as a checkpoint gives it
        back without its types, in dicts and lists.
      average: averaged parameters (EMA), a pytree like ``params``.
      operator: the proximal operator that ``soft_threshold`` was given. Default (None): the one
        that it takes by default, ``prox.Rescaled(prox.prox_annealed(steps))`` for a state of
        ``target_sparsity`` and :data:`lats_optax.prox.prox_l1` otherwise. Where several states have
        one each (``optax.partition``): a tree of operators like ``params``, or a prefix of it.

    Returns:
      A pytree like ``params``, or like ``average`` where that is given. Pruned entries are +0.0.

    Raises:
      ValueError: there is no state of ``soft_threshold``; it is that of other parameters; or
        their zeros differ from its zeros (the message lists the paths and counts), or their values
        from its values, as under another operator; or ``average`` or a tree of operators is of
        another structure or shape; or ``params`` or ``average`` are not finite somewhere; or
        devices have selected thresholds of their own, as within an unchecked ``jax.shard_map``.

    Example:
      >>> import jax.numpy as jnp, optax, lats_optax
      >>> tx = optax.chain(optax.sgd(0.1), lats_optax.soft_threshold(lambda count: 0.5 * count))
      >>> params = jnp.array([[0.3, -1.0]])
      >>> updates, state = tx.update(jnp.zeros((1, 2)), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> finalize(params, state)
      Array([[ 0. , -0.5]], dtype=float32)
      >>> finalize(params, state, average=jnp.array([[0.1, -0.7]]))
      Array([[ 0. , -0.7]], dtype=float32)
      >>> finalize(params + 1e-3, state)
      Traceback (most recent call last):
      ValueError: params: their zeros are not those of the state: params: 1 of 2 weights differ
      (0 zero in params alone, 1 in the state alone). ...
    """
    names: list[str] = jax.tree.leaves(masks.paths(params))
    structure: Any = jax.tree.structure(params)
    masks.check_arrays("params", params)
    _check_finite("params", names, jax.tree.leaves(params))
    known = latents(opt_state)
    given = dict(zip(names, jax.tree.leaves(params)))
    if unknown := sorted(known.keys() - set(names)):
        raise ValueError(
            f"opt_state: its latent weights have {', '.join(unknown)}; params has no such path, "
            f"but {', '.join(names)}"
        )
    for name, latent in known.items():
        if jnp.shape(latent.theta) != jnp.shape(given[name]):
            raise ValueError(
                f"opt_state: the latent weights {name} have shape {jnp.shape(latent.theta)}; "
                f"allowed is that of params, {jnp.shape(given[name])}"
            )
    found = {
        name: exact
        for own, latents_of_it in _by_operator(_operators(operator, params), known)
        for name, exact in _exact(own, latents_of_it, given).items()
    }
    weights, alive, differing, unequal = [], [], [], []
    for name, w in given.items():
        if name not in known:
            weights.append(w)
            alive.append(jnp.asarray(True))
            continue
        exact, only_params, only_state = found[name]
        weights.append(exact)
        alive.append(exact != 0)
        counts = int(only_params.sum()), int(only_state.sum())
        if any(counts):
            differing.append(_difference(name, jnp.size(w), *counts))
        elif not _is_close(w, exact):
            unequal.append(name)
    if differing:
        raise ValueError(
            f"params: their zeros are not those of the state: {'; '.join(differing)}. Pass the "
            "parameters as the last update left them, averaged ones as average=, and the operator "
            "of soft_threshold as operator=; and chain soft_threshold last, once, with nothing "
            "around it that averages parameters, such as optax.lookahead"
        )
    if unequal:
        raise ValueError(
            f"params: the values of {', '.join(unequal)} are not those of the state. Pass the "
            "operator of soft_threshold as operator=, and the parameters as the last update left "
            "them; and chain soft_threshold last"
        )
    for misgiving in misgivings(jax.tree.unflatten(structure, weights), opt_state):
        warnings.warn(misgiving, stacklevel=2)
    if average is None:
        return jax.tree.unflatten(structure, weights)
    other: Any = jax.tree.structure(average)
    if other != structure:
        raise ValueError(f"average: its structure {other} is not that of params, {structure}")
    for name, a, w in zip(names, jax.tree.leaves(average), weights):
        if jnp.shape(a) != jnp.shape(w):
            raise ValueError(
                f"average: {name} has shape {jnp.shape(a)}; allowed is that of params, "
                f"{jnp.shape(w)}"
            )
    masks.check_arrays("average", average)
    _check_finite("average", names, jax.tree.leaves(average))
    return masks.apply_support(average, jax.tree.unflatten(structure, alive))


def _operators(operator: TreeOperator | Any, params: Any) -> Mapping[str, TreeOperator | None]:
    """The operator of each parameter, by path; None: the default of its state."""
    names = jax.tree.leaves(masks.paths(params))
    if operator is None or callable(operator):
        return dict.fromkeys(names, operator)
    return dict(zip(names, jax.tree.leaves(masks.broadcast_prefix("operator", operator, params))))


def _by_operator(
    given: Mapping[str, TreeOperator | None], known: Mapping[str, Latent]
) -> list[tuple[TreeOperator, dict[str, Latent]]]:
    """The operators, as they are at their steps, and the latent weights of each.

    Groups may span leaves, so those of one operator and one state are taken together.
    """
    found: dict[Any, tuple[TreeOperator, dict[str, Latent]]] = {}
    for name, latent in known.items():
        own = given[name]
        key = latent.state, id(own)
        if key not in found:
            operator = latent.operator if own is None else as_operator(own)
            found[key] = operator.at(latent.step), {}
        found[key][1][name] = latent
    return list(found.values())


def _exact(
    operator: TreeOperator, latents_of_it: Mapping[str, Latent], params: Mapping[str, Any]
) -> dict[str, tuple[Array, Array, Array]]:
    """By path: P_d(theta) with the zeros of w, where w alone is zero, and where it alone is not."""
    thetas = {name: jnp.asarray(latent.theta) for name, latent in latents_of_it.items()}
    found = {}
    for part in parts_of(operator, thetas):
        theta = part.gather(thetas)
        dtype = compute_dtype(theta.dtype)
        theta, d = theta.astype(dtype), jnp.asarray(latents_of_it[part.names[0]].threshold, dtype)
        # Compiled elsewhere, the norm of a group may round otherwise: that near to the threshold a
        # weight is what the parameters say.
        ulps = 32 * jnp.finfo(dtype).eps  # type: ignore[no-untyped-call]
        values = (
            part.split(part.operator(theta, at)) for at in (d, d * (1 - ulps), d * (1 + ulps))
        )
        for name, *each in zip(part.names, *values):
            w = jnp.asarray(params[name])
            z, fewer, more = (value.astype(w.dtype) for value in each)
            exact = jnp.where(w == 0, jnp.zeros_like(z), jnp.where(z == 0, w, z))
            found[name] = exact, (w == 0) & (more != 0), (w != 0) & (fewer == 0)
    return found


def _is_close(w: Any, exact: Array) -> bool:
    """Whether values are alike, together and one by one, but for the rounding of updates."""
    w, exact = (jnp.asarray(x, compute_dtype(jnp.asarray(x).dtype)) for x in (w, exact))
    gap, size = jnp.abs(w - exact), jnp.abs(exact)
    # An update rounds to the grid of the weight before it, which may have been a larger one.
    each = jnp.all(gap <= 0.02 * (size + jnp.max(size, initial=0.0)))
    return bool(each & (jnp.sum(gap) <= 0.02 * jnp.sum(size)))


def _check_finite(argument: str, names: Iterable[str], leaves: Iterable[Any]) -> None:
    """Refuses a model that diverged, pruned or not."""
    wrong = []
    for name, leaf in zip(names, leaves):
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.inexact):
            count = int(jnp.sum(~jnp.isfinite(leaf)))
            if count:
                wrong.append(f"{name}: {count:,} of {jnp.size(leaf):,}")
    if wrong:
        raise ValueError(
            f"{argument}: not all values are finite: {'; '.join(wrong)}. Training diverged: try a "
            "smaller learning rate, chain soft_threshold last, and keep gradients finite, as by "
            "optax.apply_if_finite"
        )


def _difference(name: str, size: int, only_params: int, only_state: int) -> str:
    return (
        f"{name}: {only_params + only_state:,} of {size:,} weights differ ({only_params:,} zero in "
        f"params alone, {only_state:,} in the state alone)"
    )
