"""Batch statistics that are those of the weights as they are, estimated before an evaluation."""

import contextlib
import itertools

import jax

from lats_optax.training.experiment import Experiment
from lats_optax.training.parallel import ahead
from lats_optax.training.step import Batch, TrainState, averaged


def recalibrated(experiment: Experiment, state: TrainState) -> TrainState:
    """The state with batch statistics estimated anew, those of averaged weights too.

    Running statistics are of the weights of the last dozen steps. Where groups of weights are
    pruned these differ: the closer a group comes to the threshold, the faster it shrinks, relative
    to what is left of it. Normalisation undoes that in training, but not with statistics of before.

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
    mask = experiment.optimizer.mask if experiment.config.prune.enabled else None
    states = [state, averaged(state, mask)] if state.average else [state]
    stats = [_estimate(experiment, of, count) for of in states]
    state = state._replace(batch_stats=stats[0])
    if state.average:
        state = state._replace(average=state.average._replace(batch_stats=stats[1]))
    return state


def _estimate(experiment: Experiment, state: TrainState, count: int) -> dict[str, jax.Array]:
    config, parallel = experiment.config, experiment.parallel
    batches = experiment.dataset.train_batches(
        parallel.host_batch_size(config.data.batch_size),
        seed=config.seed,
        shard_index=parallel.process_index,
        shard_count=parallel.process_count,
    )
    with contextlib.closing(batches):
        sent = (parallel.shard(batch) for batch in itertools.islice(batches, count))
        found = [_sums(experiment, state, batch) for batch in ahead(sent)]
    total = jax.tree.map(lambda *leaves: sum(leaves), *found)
    means = jax.tree.map(lambda leaf: leaf / total["count"], total["batch_stats"])
    return parallel.replicate(means)


def _sums(experiment: Experiment, state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    # Fetched, so that no more batches wait for the devices than these have memory for.
    return jax.device_get(experiment.statistics_step(state, batch))
