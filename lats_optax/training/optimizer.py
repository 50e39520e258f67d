"""From a config to an optax transform: SGD, its learning rate, and soft threshold pruning."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax

import lats_optax
from lats_optax.thresholds import tabulate
from lats_optax.training.config import PruneConfig, TrainConfig


class Optimizer(NamedTuple):
    """What updates the parameters, and what a log wants to know of it."""

    transform: optax.GradientTransformation
    learning_rate: optax.Schedule
    learning_rate_sums: np.ndarray
    mask: Callable[[Any], Any]


def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> Optimizer:
    """SGD as `config.optimizer` says, with soft threshold pruning where `config.prune` asks for it.

    Args:
      config: the run.
      steps_per_epoch: optimizer steps that make an epoch.

    Returns:
      The transform, its learning rate `step -> rate`, the sums of that rate over the first 0, 1, …
      steps, and the mask of the weights that are (or, in a dense run, would be) pruned.

    >>> optimizer = make_optimizer(TrainConfig(epochs=2), steps_per_epoch=10)
    >>> [round(float(optimizer.learning_rate(step)), 3) for step in (0, 10, 20)]
    [0.3, 0.15, 0.0]
    """
    learning_rate = cosine(config, steps_per_epoch)
    rates = tabulate(learning_rate, config.epochs * steps_per_epoch)
    sums = np.concatenate([[0.0], np.cumsum(rates)])
    sgd = optax.chain(
        optax.add_decayed_weights(config.optimizer.weight_decay),
        optax.sgd(learning_rate, momentum=config.optimizer.momentum or None),
    )
    mask = pruned_mask(config.prune)
    if not config.prune.enabled:
        return Optimizer(sgd, learning_rate, sums, mask)
    threshold = _threshold(config, learning_rate, steps_per_epoch)
    if config.prune.weight_decay_on == "latent":
        transform = lats_optax.soft_threshold(threshold, inner=sgd, mask=mask)
    else:
        transform = optax.chain(sgd, lats_optax.soft_threshold(threshold, mask=mask))
    return Optimizer(transform, learning_rate, sums, mask)


def cosine(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate: linear warm-up, then a cosine to zero, moved every step or once an epoch.

    Counted in steps or in epochs, u of them done, W of warm-up, U in all:
    peak · (u + 1) / W while u < W, then peak · ½ · (1 + cos(π · (u − W) / (U − W))).

    Args:
      config: the run.
      steps_per_epoch: optimizer steps that make an epoch.

    Returns:
      The schedule, `step -> rate`.

    >>> schedule = cosine(TrainConfig(epochs=3), steps_per_epoch=2)
    >>> [round(float(schedule(step)), 3) for step in range(6)]
    [0.3, 0.28, 0.225, 0.15, 0.075, 0.02]
    """
    sgd = config.optimizer
    unit = 1 if sgd.decay == "step" else steps_per_epoch
    warmup = sgd.warmup_epochs * steps_per_epoch // unit
    total = config.epochs * steps_per_epoch // unit

    def schedule(count: Any) -> Any:
        done = jnp.minimum(jnp.asarray(count) // unit, total)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * (done - warmup) / (total - warmup)))
        return sgd.learning_rate * jnp.where(done < warmup, (done + 1) / max(warmup, 1), falling)

    return schedule


def pruned_mask(prune: PruneConfig) -> Callable[[Any], Any]:
    """From parameters to a tree of bools: the leaves that are pruned, or would be."""
    if prune.include or prune.exclude:
        return lats_optax.select(prune.include or None, prune.exclude)
    return lats_optax.prunable


def _threshold(config: TrainConfig, learning_rate: optax.Schedule, steps_per_epoch: int) -> Any:
    prune = config.prune
    if prune.target_sparsity is None:
        assert prune.final_threshold is not None
        return schedule_to(config, learning_rate, steps_per_epoch, prune.final_threshold)
    if prune.schedule == "lats":
        weights = learning_rate
    else:
        weights = increments(schedule_to(config, learning_rate, steps_per_epoch, 1.0))
    return lats_optax.target_sparsity(
        prune.target_sparsity,
        weights,
        config.epochs * steps_per_epoch,
        update_every=prune.update_every,
    )


def increments(threshold: lats_optax.ThresholdSchedule) -> optax.Schedule:
    """What `target_sparsity` takes for a learning rate to follow the curve of a threshold."""
    # The closed forms end on differences of numbers near 1, of which rounding may make less than 0.
    increments = np.maximum(threshold.increments, 0.0)
    return lambda count: jnp.asarray(increments)[count]


def schedule_to(
    config: TrainConfig, learning_rate: optax.Schedule, steps_per_epoch: int, final: float
) -> Any:
    """The threshold of `prune.schedule` that ends at `final`."""
    steps = config.epochs * steps_per_epoch
    match config.prune.schedule:
        case "lats":
            return lats_optax.lats_threshold(learning_rate, steps, final)
        case "s-lats":
            return lats_optax.s_lats_threshold(steps, final)
        case "epoch-lats":
            return lats_optax.epoch_lats_threshold(config.epochs, steps_per_epoch, final)
        case "pgh":
            assert config.prune.beta is not None
            return lats_optax.pgh_threshold(steps, final, config.prune.beta)
        case "constant":
            return final
