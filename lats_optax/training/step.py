"""One training step and one evaluation step, as pure functions of state and batch.

How the batch lies on devices is not known here: the mean over replicas is an argument.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

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


def create_state(
    model: nn.Module,
    transform: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    seed: int,
) -> TrainState:
    """The state before the first step.

    Args:
      model: takes images, and `train`.
      transform: what will update the parameters.
      image_shape: (height, width, channels).
      seed: of the initial parameters.

    Returns:
      The state, on the default device.
    """

    @jax.jit
    def create() -> TrainState:
        image = jnp.zeros((1, *image_shape))
        variables = model.init(jax.random.key(seed), image, train=False)
        params = variables["params"]
        stats = variables.get("batch_stats", {})
        return TrainState(jnp.zeros((), jnp.int32), params, stats, transform.init(params))

    return create()


def train_step(
    state: TrainState,
    batch: Batch,
    mean: Reduce[Any],
    *,
    apply: Callable[..., Any],
    transform: optax.GradientTransformation,
    label_smoothing: float,
) -> tuple[TrainState, Metrics]:
    """A step of the optimizer on the mean gradient of all replicas.

    Args:
      state: the state before the step, equal on all replicas.
      batch: this replica's `image`, [n, height, width, channels], and `label`, int [n].
      mean: takes a tree to its mean over replicas.
      apply: of a Flax module; its running statistics, if any, are in `batch_stats`.
      transform: the optimizer.
      label_smoothing: mass spread evenly over all classes.

    Returns:
      The state after the step, and the batch's mean `loss` and `accuracy` before it.
    """

    def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        logits, updated = apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        losses = cross_entropy(logits, batch["label"], label_smoothing)
        return jnp.mean(losses), (logits, updated)

    (loss, (logits, updated)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = transform.update(mean(grads), state.opt_state, state.params)
    metrics = mean({"loss": loss, "accuracy": jnp.mean(_correct(logits, batch["label"]))})
    stats = mean(updated.get("batch_stats", state.batch_stats))
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, stats, opt_state), metrics


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
    weight = batch["weight"].astype(jnp.float32)
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
      logits: [n, classes], any float type; the loss is computed in float32.
      labels: int [n].
      smoothing: in [0, 1).

    Returns:
      float32 [n].

    >>> cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), 0.1).round(4)
    Array([1.3863], dtype=float32)
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    hit = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return -(1 - smoothing) * hit - smoothing * jnp.mean(log_p, axis=1)


def _correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
