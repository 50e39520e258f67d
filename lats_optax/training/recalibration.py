"""Batch statistics that are those of the weights as they are, estimated before an evaluation."""

import contextlib
import itertools

import jax

from lats_optax.training.experiment import Experiment
from lats_optax.training.step import TrainState, averaged


def recalibrated(experiment: Experiment, state: TrainState) -> TrainState:
    """The state with batch statistics estimated again, those of averaged weights too.

    Running statistics are of the weights of the last dozen steps. Where groups of weights are
    pruned these differ: the closer a group comes to the threshold, the faster it shrinks, relative
    to what is left of it. Normalization undoes that in training, but not with statistics of before.

    ``mean = 1/n sum_i mean(batch_i)``, ``var = 1/n sum_i var(batch_i)``, over the first
    `config.recalibration_batches` batches of the run's training images.

    Args:
      experiment: names the images and the model.
      state: on the run's devices.

    Source: Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.
    """
    count = experiment.config.recalibration_batches
    if not count or not jax.tree.leaves(state.batch_stats):
        return state
    states = [state, averaged(state, experiment.pruned)] if state.average else [state]
    stats = [_estimate(experiment, of, count) for of in states]
    state = state._replace(batch_stats=stats[0])
    if state.average:
        state = state._replace(average=state.average._replace(batch_stats=stats[1]))
    return state


def _estimate(experiment: Experiment, state: TrainState, count: int) -> dict[str, jax.Array]:
    parallel = experiment.parallel
    with contextlib.closing(experiment.train_batches()) as batches:
        first = itertools.islice(batches, count)
        found = parallel.sums(experiment.statistics_sums, state, first)
    total = jax.tree.map(lambda *leaves: sum(leaves), *found)
    means = jax.tree.map(lambda leaf: leaf / total["count"], total["batch_stats"])
    return parallel.place(means)
