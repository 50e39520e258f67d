"""From a config to an optax transform: the optimizer, its learning rate, and its pruning."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lats_optax
from lats_optax.control.controllers import as_controller
from lats_optax.control.schedules import tabulate
from lats_optax.masks import paths
from lats_optax.operators.n_of_m import NOfM
from lats_optax.operators.parts import TreeOperator
from lats_optax.operators.protocol import Elementwise, Groups
from lats_optax.target import default_operator
from lats_optax.training.config import PruneConfig, TrainConfig
from lats_optax.training.delayed import Delayed


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps of a run that one transform takes.

    Attributes:
      start: how many steps of the run are before it.
      steps: how many it takes.
      transform: what updates the parameters in it.
      learning_rate: `count -> rate`, of its own steps.
      from_scratch: whether it begins from the initial weights once more, and not from the last.
    """

    start: int
    steps: int
    transform: optax.GradientTransformation
    learning_rate: optax.Schedule
    from_scratch: bool = False

    @property
    def end(self) -> int:
        """How many steps of the run are over when it is."""
        return self.start + self.steps


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What updates the parameters, and what a log wants to know of it.

    Attributes:
      phases: one; or two, a search and what goes on after it on a fixed support, the zeros of the
        parameters that the second transform's `init` is given.
      mask: the weights that are (or, in a dense run, would be) pruned.
      operator: the operator that they are pruned by; None in a dense run.
      groups: the operator of a structured run, by whose groups they are; None: one by one.
    """

    phases: tuple[Phase, ...]
    mask: Callable[[Any], Any]
    operator: TreeOperator | None = None
    groups: Groups | None = None

    @functools.cached_property
    def learning_rate(self) -> optax.Schedule:
        """`step -> rate`, over the whole run."""
        starts = [phase.start for phase in self.phases[1:]]
        return optax.join_schedules([phase.learning_rate for phase in self.phases], starts)

    @functools.cached_property
    def learning_rate_sums(self) -> np.ndarray:
        """The sums of that rate over the first 0, 1, … steps."""
        rates = tabulate("learning_rate", self.learning_rate, self.phases[-1].end)
        return np.concatenate([[0.0], np.cumsum(rates)])


def make_optimizer(config: TrainConfig, steps_per_epoch: int) -> Optimizer:
    """What `config.optimizer` says, with soft threshold pruning where `config.prune` asks for it.

    Args:
      config: the run.
      steps_per_epoch: optimizer steps that make an epoch.

    >>> optimizer = make_optimizer(TrainConfig(epochs=2), steps_per_epoch=10)
    >>> [round(float(optimizer.learning_rate(step)), 3) for step in (0, 10, 20)]
    [0.3, 0.15, 0.0]
    """
    prune, mask = config.prune, pruned_mask(config.prune)
    rate, total = cosine(config, steps_per_epoch), config.total_epochs * steps_per_epoch
    # Of the parameters that its init is given: the zeros of these stay.
    keep = lats_optax.keep_support(lambda params: lats_optax.support(params, mask))
    kept = optax.chain(_descent(config, rate), keep)
    if not prune.has_threshold:
        transform = kept if prune.mode == "fine-tuning" else _descent(config, rate)
        return Optimizer((Phase(0, total, transform, rate),), mask)
    shrinkage = _shrinkage(prune, _operator_epochs(config) * steps_per_epoch)
    groups = group_operator(prune, shrinkage)
    operator = shrinkage if groups is None else groups

    def pruning(rate: optax.Schedule) -> optax.GradientTransformation:
        threshold = _threshold(config, rate, steps_per_epoch)
        descent = _descent(config, rate)
        if prune.weight_decay_on == "latent":
            return lats_optax.soft_threshold(threshold, inner=descent, mask=mask, operator=operator)
        return optax.chain(
            descent, lats_optax.soft_threshold(threshold, mask=mask, operator=operator)
        )

    if prune.search_epochs is None:
        return Optimizer((Phase(0, total, pruning(rate), rate),), mask, operator, groups)
    search = prune.search_epochs * steps_per_epoch
    if prune.mode == "at-initialization":
        quick = compressed_schedule(rate, config.epochs, prune.search_epochs)
        phases = (
            Phase(0, search, pruning(quick), quick),
            Phase(search, total - search, kept, rate, from_scratch=True),
        )
    else:
        phases = (
            Phase(0, search, pruning(rate), rate),
            Phase(search, total - search, kept, lambda count: rate(count + search)),
        )
    return Optimizer(phases, mask, operator, groups)


def _descent(config: TrainConfig, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer without pruning."""
    chosen = config.optimizer
    # Not the mask of what is pruned: a layer that stays dense is penalized all the same.
    penalized = None if chosen.decay_norm else lats_optax.prunable
    clip = (
        optax.identity()
        if chosen.clip_norm is None
        else optax.clip_by_global_norm(chosen.clip_norm)
    )
    if chosen.name == "adamw":
        step = optax.adamw(
            learning_rate,
            b1=chosen.momentum,
            b2=chosen.beta2,
            weight_decay=chosen.weight_decay,
            mask=penalized,
            nesterov=chosen.nesterov,
        )
        return optax.chain(clip, step)
    return optax.chain(
        clip,
        optax.add_decayed_weights(chosen.weight_decay, penalized),
        optax.sgd(learning_rate, momentum=chosen.momentum or None, nesterov=chosen.nesterov),
    )


def compressed_schedule(
    schedule: optax.Schedule, epochs: int, search_epochs: int
) -> optax.Schedule:
    """A schedule of a whole run, passed through in the epochs of a search.

    >>> quick = compressed_schedule(lambda count: count / 100, epochs=10, search_epochs=1)
    >>> [round(float(quick(step)), 3) for step in range(3)]
    [0.0, 0.1, 0.2]
    """
    return lambda count: schedule(jnp.asarray(count) * epochs // search_epochs)


def cosine(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate: linear warm-up, then a cosine, moved every step or once an epoch.

    Counted in steps or in epochs, u of them done, W of warm-up, U in all:
    peak · (u + 1) / W while u < W, then
    least + (peak − least) · ½ · (1 + cos(π · (u − W) / (U − W))).

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
    unit = 1 if sgd.lr_update == "step" else steps_per_epoch
    warmup = sgd.warmup_epochs * steps_per_epoch // unit
    total = config.epochs * steps_per_epoch // unit

    def schedule(count: Any) -> Any:
        done = jnp.minimum(jnp.asarray(count) // unit, total)
        # Under x64 the ratio of int32 counts would still be float32.
        done = done.astype(jnp.result_type(float))
        falling = 0.5 * (1 + jnp.cos(jnp.pi * (done - warmup) / (total - warmup)))
        # Parts of the peak, so that without a minimum no rounding is added.
        least = sgd.minimum_learning_rate / sgd.learning_rate
        falling = least + (1 - least) * falling
        return sgd.learning_rate * jnp.where(done < warmup, (done + 1) / max(warmup, 1), falling)

    return schedule


def pruned_mask(prune: PruneConfig) -> Callable[[Any], Any]:
    """From parameters to a tree of bools: the leaves that are pruned, or would be."""
    chosen: Callable[[Any], Any] = lats_optax.prunable
    if prune.include or prune.exclude:
        chosen = lats_optax.select(prune.include or None, prune.exclude)
    if prune.include or prune.granularity in ("none", "blocks"):
        return chosen

    def has_groups(path: str, leaf: Any) -> bool:
        """Whether a layer can lose a group, and the network with it goes on."""
        match prune.granularity:
            case "output-channels":  # an output of the classifier is a class
                return not re.search("(^|/)classifier/", path)
            case "input-channels":  # one alone is the layer, as of a depth-wise convolution
                return bool(jnp.ndim(leaf) >= 2 and jnp.shape(leaf)[-2] > 1)
            case "n-of-m":
                return _pattern(prune, lats_optax.prox.prox_l1).divides(path, jnp.shape(leaf))
            case _:
                return jnp.ndim(leaf) >= 3

    def mask(params: Any) -> Any:
        return jax.tree.map(
            lambda masked, path, leaf: masked and has_groups(path, leaf),
            chosen(params),
            paths(params),
            params,
        )

    return mask


def _shrinkage(prune: PruneConfig, steps: int) -> Elementwise:
    """The operator that the config chooses, on single weights or on the size of a group."""
    match prune.chosen_operator:
        case "annealed":
            return default_operator(steps)
        case "power":
            return lats_optax.prox.prox_power(3)
        case "hard":
            return lats_optax.prox.prox_power(math.inf)
        case _:
            return lats_optax.prox.prox_l1


def group_operator(prune: PruneConfig, shrinkage: Elementwise) -> Groups | None:
    """The operator of `prune.granularity`; None: weights are zeroed one by one."""
    match prune.granularity:
        case "output-channels":
            return lats_optax.groups.output_channels(shrinkage=shrinkage)
        case "input-channels":
            return lats_optax.groups.input_channels(shrinkage=shrinkage)
        case "filters":
            return lats_optax.groups.filters(shrinkage=shrinkage)
        case "blocks":
            assert prune.block is not None
            return lats_optax.groups.blocks(*prune.block, shrinkage=shrinkage)
        case "n-of-m":
            return _pattern(prune, shrinkage)
        case _:
            return None


def _pattern(prune: PruneConfig, shrinkage: Elementwise) -> NOfM:
    assert prune.pattern is not None
    return lats_optax.groups.n_of_m(*prune.pattern, shrinkage=shrinkage)


def _threshold(config: TrainConfig, learning_rate: optax.Schedule, steps_per_epoch: int) -> Any:
    """The threshold of the run: 0 in its first epochs, then that of a run of the others."""
    delay = config.prune.first_epoch * steps_per_epoch
    if delay == 0:
        return _rising(config, learning_rate, steps_per_epoch)
    late = _rising(config, lambda count: learning_rate(count + delay), steps_per_epoch)
    return Delayed(as_controller(late), delay)


def _rising(config: TrainConfig, learning_rate: optax.Schedule, steps_per_epoch: int) -> Any:
    """The threshold from where it begins to rise, for the learning rate from there."""
    prune = config.prune
    if prune.target_sparsity is None:
        assert prune.final_threshold is not None
        return schedule_to(config, learning_rate, steps_per_epoch, prune.final_threshold)
    law = lats_optax.constant_l1()
    if prune.schedule != "lats":
        law = curve_law(schedule_to(config, learning_rate, steps_per_epoch, 1.0))
    return lats_optax.target_sparsity(
        target_of(prune),
        learning_rate,
        threshold_epochs(config) * steps_per_epoch,
        law=law,
        reach=prune.horizon,
        update_every=prune.update_every,
    )


def target_of(prune: PruneConfig) -> Any:
    """What `target_sparsity` is to reach: one sparsity for all weights, or one for each layer."""
    target = prune.target_sparsity
    assert target is not None
    match prune.distribution:
        case "global":
            return target
        case "uniform" if prune.layer_sparsity:
            return lats_optax.per_layer(dict(prune.layer_sparsity) | {"": target})
        case "uniform":
            return lats_optax.uniform(target)
        case kind:
            return lats_optax.erdos_renyi(target, kernel=kind == "erk")


def threshold_epochs(config: TrainConfig) -> int:
    """Epochs over which the threshold rises: those of the search, or all, but for the first."""
    return _operator_epochs(config) - config.prune.first_epoch


def _operator_epochs(config: TrainConfig) -> int:
    """Epochs in which there is a threshold: those of the search, or all."""
    return config.prune.search_epochs or config.epochs


def curve_law(threshold: lats_optax.ThresholdSchedule) -> lats_optax.Law:
    """The law by which a target is approached along the curve of a threshold."""
    # The closed forms end on differences of numbers near 1, of which rounding may make less than 0.
    rising = np.maximum.accumulate(threshold.table)
    x = np.linspace(0.0, 1.0, len(rising))
    return lats_optax.threshold_curve(lambda at: np.interp(at, x, rising))


def schedule_to(
    config: TrainConfig, learning_rate: optax.Schedule, steps_per_epoch: int, final: float
) -> Any:
    """The threshold of `prune.schedule` that ends at `final`."""
    epochs = threshold_epochs(config)
    steps = epochs * steps_per_epoch
    match config.prune.schedule:
        case "lats":
            return lats_optax.lats_threshold(learning_rate, steps, final)
        case "s-lats":
            return lats_optax.s_lats_threshold(steps, final)
        case "epoch-lats":
            return lats_optax.epoch_lats_threshold(epochs, steps_per_epoch, final)
        case "pgh":
            beta = config.prune.beta
            assert beta is not None
            if config.prune.mode == "early":
                # The closed form is for a learning rate that ends with the search.
                return lats_optax.lats_threshold(learning_rate, steps, final, l1=lambda x: beta**x)
            return lats_optax.pgh_threshold(steps, final, beta)
        case "constant":
            return final
