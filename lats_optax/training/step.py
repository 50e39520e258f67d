"""One training step and one evaluation step, as pure functions of state and batch.

How the batch lies on devices is not known here: the mean over replicas is an argument.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import lats_optax
from lats_optax.models import layers

Tree = TypeVar("Tree")
Reduce = Callable[[Tree], Tree]
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a run carries from step to step, the images' order aside."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    average: Any = ()
    """An `Average`; `()` where none is kept."""


class Average(NamedTuple):
    """Exponential moving averages over the steps so far; those of sparse weights are dense."""

    params: Any
    batch_stats: Any


def split_in_order(batch: Batch, count: int) -> Batch:
    """A batch in equal parts, one after another: arrays [n, …] -> [count, n / count, …].

    >>> split_in_order({"label": jnp.arange(4)}, 2)["label"].tolist()
    [[0, 1], [2, 3]]
    """
    return {name: x.reshape(count, -1, *x.shape[1:]) for name, x in batch.items()}


def create_state(
    model: nn.Module,
    transform: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
    average: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state before the first step.

    Args:
      model: takes images, and `train`.
      transform: what will update the parameters.
      image_shape: (height, width, channels).
      seed: of the initial parameters.
      average: whether averages are kept.
      variables: `params` and `batch_stats` to begin with; None: those that the seed gives.

    Returns:
      The state. A pure function: to be compiled, or asked for shapes alone.
    """
    if variables is None:
        begun = model.init(jax.random.key(seed), jnp.zeros((1, *image_shape)), train=False)
    else:
        begun = jax.tree.map(jnp.copy, dict(variables))
    params = begun["params"]
    stats = begun.get("batch_stats", {})
    # Copies: the state is donated, and a buffer can be given away once.
    averages = Average(*jax.tree.map(jnp.copy, (params, stats))) if average else ()
    return TrainState(jnp.zeros((), jnp.int32), params, stats, transform.init(params), averages)


def train_step(
    state: TrainState,
    batch: Batch,
    mean: Reduce[Any],
    *,
    apply: Callable[..., Any],
    transform: optax.GradientTransformation,
    label_smoothing: float,
    grad_accum_steps: int = 1,
    split: Callable[[Batch, int], Batch] = split_in_order,
    whole: Callable[[Any], Any] = lambda params: params,
    ema_decay: float | None = None,
    average_since: int = 0,
    skip_non_finite: bool = False,
) -> tuple[TrainState, Metrics]:
    """A step of the optimizer on the mean gradient of all replicas.

    With `grad_accum_steps` a replica's images go through the model in so many parts, one after
    another. The gradients of all parts are averaged before the one step of the optimizer: what is
    pruned, and when, stays as it is. Batch normalization sees one part at a time, and its running
    statistics move once a part. Gradients and metrics are averaged over replicas once.

    With `ema_decay` a the averages move after step t (from 0) as
    average ← d · average + (1 − d) · new, d = min(a, (1 + t) / (10 + t)).

    Args:
      state: the state before the step, equal on all replicas.
      batch: this replica's `image`, [n, height, width, channels], and `label`, int [n].
      mean: takes a tree to its mean over replicas.
      apply: of a Flax module; its running statistics, if any, are in `batch_stats`.
      transform: the optimizer.
      label_smoothing: mass spread evenly over all classes.
      grad_accum_steps: parts of the batch, a divisor of n.
      split: `(batch, count) -> parts`, the batch with a new first axis.
      whole: takes the parameters to how the model needs them on the devices.
      ema_decay: a, in [0, 1); None where the state has no averages.
      skip_non_finite: a step whose loss or gradients are not finite is taken with gradients of
        zero, and without its batch statistics. The optimizer counts it, so that a schedule or a
        named sparsity is where it would be.
      average_since: the step at which the averages began, and from which t is counted.

    Returns:
      The state after the step; the batch's mean `loss` and `accuracy` before it, and the global
      `gradient_norm`.
    """

    def loss_fn(params: Any, stats: Any, part: Batch) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, updated = apply(
            {"params": whole(params), "batch_stats": stats},
            part["image"],
            train=True,
            mutable=["batch_stats"],
        )
        loss = jnp.mean(cross_entropy(logits, part["label"], label_smoothing))
        accuracy = jnp.mean(_correct(logits, part["label"]))
        return loss, (accuracy, updated.get("batch_stats", stats))

    def gradient(stats: Any, part: Batch) -> tuple[Any, tuple[Any, Metrics]]:
        differentiate = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (accuracy, stats)), grads = differentiate(state.params, stats, part)
        return stats, (grads, {"loss": loss, "accuracy": accuracy})

    if grad_accum_steps == 1:
        stats, (grads, metrics) = gradient(state.batch_stats, batch)
    else:
        parts = split(batch, grad_accum_steps)
        stats, (grads, metrics) = _mean_over_parts(
            gradient, state.batch_stats, parts, grad_accum_steps
        )
    grads, metrics, stats = mean(grads), mean(metrics), mean(stats)
    metrics["gradient_norm"] = optax.tree.norm(grads)
    if skip_non_finite:
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        grads = jax.tree.map(lambda leaf: jnp.where(good, leaf, 0), grads)
        stats = jax.tree.map(partial(jnp.where, good), stats, state.batch_stats)
    updates, opt_state = transform.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.average
    if ema_decay is not None:
        new_weight = jnp.maximum(1 - ema_decay, 9 / (10 + state.step - average_since))
        average = optax.incremental_update(Average(params, stats), average, new_weight)
    return TrainState(state.step + 1, params, stats, opt_state, average), metrics


def _mean_over_parts(
    function: Callable[[Any, Batch], tuple[Any, Any]], carry: Any, parts: Batch, count: int
) -> tuple[Any, Any]:
    """Runs `(carry, part) -> (carry, tree)` over a first axis: the last carry, the mean tree.

    A loop whose memory is that of one part and one tree.
    """
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(function, carry, first)[1]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(carried: tuple[Any, Any], part: Batch) -> tuple[tuple[Any, Any], None]:
        carry, total = carried
        carry, tree = function(carry, part)
        return (carry, jax.tree.map(jnp.add, total, tree)), None

    (carry, total), _ = jax.lax.scan(add, (carry, nothing), parts)
    return carry, jax.tree.map(lambda leaf: leaf / count, total)


def averaged(state: TrainState, mask: Callable[[Any], Any] | None) -> TrainState:
    """The state with its averages for weights, zero where the weights are.

    Args:
      state: one that has averages.
      mask: what is pruned; None: nothing, and the averages are taken as they are.
    """
    average: Average = state.average
    params = average.params
    if mask is not None:
        params = lats_optax.apply_support(params, lats_optax.support(state.params, mask))
    return state._replace(params=params, batch_stats=average.batch_stats)


def statistics_step(
    state: TrainState, batch: Batch, total: Reduce[Any], *, apply: Callable[..., Any]
) -> Metrics:
    """The batch statistics of the state's weights themselves, not of those that led to them.

    Args:
      state: its parameters are looked at; its statistics give the tree.
      batch: as for `train_step`.
      total: takes a tree to its sum over replicas.
      apply: as for `train_step`.

    Returns:
      Sums of `batch_stats` over the replicas, and how many these are, `count`.
    """
    # Running statistics that begin at zero have taken a known share of the batch's.
    nothing = jax.tree.map(jnp.zeros_like, state.batch_stats)
    _, updated = apply(
        {"params": state.params, "batch_stats": nothing},
        batch["image"],
        train=True,
        mutable=["batch_stats"],
    )
    stats = updated.get("batch_stats", nothing)
    own = jax.tree.map(lambda leaf: leaf / (1 - layers.MOMENTUM), stats)
    return total({"batch_stats": own, "count": jnp.ones(())})


def eval_step(
    state: TrainState, batch: Batch, total: Reduce[Any], *, apply: Callable[..., Any]
) -> Metrics:
    """Sums over the examples of a batch, each times its weight.

    Args:
      state: the state to evaluate.
      batch: as for `train_step`, with `weight`, float [n]: 0 for padding, 1 for an example.
      total: takes a tree to its sum over replicas.
      apply: as for `train_step`.

    Returns:
      Sums of `loss` (cross-entropy without smoothing), `accuracy` (correct ones) and `weight`.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = apply(variables, batch["image"], train=False)
    weight = batch["weight"].astype(jnp.result_type(float))
    # A padding example may hold anything, so it is left out rather than multiplied by zero.
    losses = jnp.where(weight > 0, cross_entropy(logits, batch["label"], 0.0), 0.0)
    return total(
        {
            "loss": jnp.sum(weight * losses),
            "accuracy": jnp.sum(weight * _correct(logits, batch["label"])),
            "weight": jnp.sum(weight),
        }
    )


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """−Σ_c q_c log p_c an example, q = (1 − smoothing) · one-hot + smoothing / classes.

    Args:
      logits: [n, classes], any float type; the loss is computed in float32, or float64 under x64.
      labels: int [n].
      smoothing: in [0, 1).

    Returns:
      float32 [n], or float64.

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), 0.1).round(4)
    Array([1.3863], dtype=float32)
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.result_type(float)))
    hit = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return -(1 - smoothing) * hit - smoothing * jnp.mean(log_p, axis=1)


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.result_type(float))
