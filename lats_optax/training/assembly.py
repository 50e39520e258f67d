"""The pure parts of a run, from its config alone: model, training step, initial state.

Here belongs what needs no data set, no file and no device, and of libraries JAX, Flax and optax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from lats_optax import models
from lats_optax.training.config import TrainConfig
from lats_optax.training.optimizer import Phase
from lats_optax.training.step import (
    Batch,
    Metrics,
    Reduce,
    TrainState,
    create_state,
    split_in_order,
    train_step,
)

TrainStep = Callable[[TrainState, Batch, Reduce[Any]], tuple[TrainState, Metrics]]
Split = Callable[[Batch, int], Batch]


def make_model(config: TrainConfig, num_classes: int, axis_name: str | None = None) -> nn.Module:
    """The model that a config names; its batch statistics are averaged over the axis of an engine.

    Raises:
      ValueError: there is no such model, it has no such option, or a value is not allowed.
    """
    options = config.model.options
    if "neuron" in options:
        options["neuron"] = models.Neuron(options["neuron"])
    return models.create(
        config.model.name,
        num_classes=num_classes,
        dtype=jnp.dtype(config.model.dtype),
        axis_name=axis_name,
        **options,
    )


def bind_step(
    config: TrainConfig,
    model: nn.Module,
    phase: Phase,
    split: Split = split_in_order,
    whole: Callable[[Any], Any] = lambda params: params,
) -> TrainStep:
    """The training step of a phase, a pure function that no data set or device is needed for.

    Args:
      config: the run.
      model: of `make_model`.
      phase: of `make_optimizer`.
      split: that of the engine.
      whole: that of the engine.

    Returns:
      `(state, batch, mean over replicas) -> (state, metrics)`, for `Engine.compile_update`: see
      `step.train_step`.
    """
    return partial(
        train_step,
        apply=model.apply,
        transform=phase.transform,
        label_smoothing=config.label_smoothing,
        grad_accum_steps=config.grad_accum_steps,
        split=split,
        whole=whole,
        ema_decay=config.ema_decay,
        average_since=phase.start if phase.from_scratch else 0,
        skip_non_finite=config.non_finite == "skip",
    )


def bind_state(
    config: TrainConfig, model: nn.Module, phase: Phase, image_shape: tuple[int, ...]
) -> Callable[..., TrainState]:
    """What makes the state before a phase's first step, a pure function.

    Args:
      config: the run.
      model: of `make_model`.
      phase: of `make_optimizer`.
      image_shape: (height, width, channels).

    Returns:
      `(variables=None) -> state`: see `step.create_state`.
    """
    average = config.ema_decay is not None
    return partial(create_state, model, phase.transform, image_shape, config.seed, average)
