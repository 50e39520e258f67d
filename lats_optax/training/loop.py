"""The training loop, in one file that can be read in one go and forked.

`experiment.build_experiment` checks a config, `fit` runs it, `train` does both.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn

import lats_optax
from lats_optax import data, masks
from lats_optax.analysis import weight_summary
from lats_optax.analysis.weight_summary import Support, WeightSummary
from lats_optax.training import config_json, workdir
from lats_optax.training import experiment as experiments
from lats_optax.training.checkpoint import Checkpoints
from lats_optax.training.config import TrainConfig
from lats_optax.training.experiment import Experiment
from lats_optax.training.export import ModelFile, save_model
from lats_optax.training.finite import NonFiniteError, means, non_finite_paths
from lats_optax.training.logging import MetricsLog
from lats_optax.training.parallel import Engine, prefetch
from lats_optax.training.preemption import PreemptionHandler
from lats_optax.training.recalibration import recalibrated
from lats_optax.training.result import RunResult, result_of, write_models
from lats_optax.training.step import Batch, Metrics, TrainState, averaged


def train(
    config: TrainConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    dataset: data.Dataset | None = None,
    model: nn.Module | None = None,
) -> RunResult:
    """Runs a config from its beginning, or its last checkpoint, to its end.

    Args:
      config: the run.
      devices: what to run on; None: all there are.
      dataset: what to train on, in the place of the one that the config names.
      model: what to train, likewise: see `experiment.build_experiment`.

    Raises:
      ValueError: the config does not fit the data, the model or the devices.
      FileExistsError: there is a run in the work directory.
      NonFiniteError: training diverged.
      KeyboardInterrupt: on Ctrl-C, SIGTERM or SIGHUP, after a last checkpoint.
      Others: as `fit`.
    """
    return fit(experiments.build_experiment(config, devices, dataset=dataset, model=model))


def fit(experiment: Experiment) -> RunResult:
    """Trains: `train` after `build_experiment`.

    Ctrl-C, SIGTERM and SIGHUP are answered when the step is over and a checkpoint of it is written.
    In a run of several processes SIGTERM alone is, by all of them after the same step.

    Warns:
      DamagedCheckpointWarning: the run goes on from a checkpoint that is not the last.

    Raises:
      FileExistsError: since `build_experiment`, another run has begun in the work directory.
      WorkdirInUseError: another run is writing there.
      CheckpointError: no checkpoint to go on from is whole, or one cannot be written.
      OSError: another file cannot be written.
      PrimaryError: in the other processes, where one of these is true of process 0.
      NonFiniteError: training diverged.
      CorruptRecordError: a record cannot be read, without `config.data.skip_corrupt`.
      KeyboardInterrupt: after the checkpoint; after the last step, when all files are written.
      PreemptedError: likewise, in a run of several processes.
    """
    parallel = experiment.parallel
    with (
        parallel.watching("; the same command with --resume goes on"),
        workdir.prepared(experiment.config, parallel) as check,
    ):
        return _fit(experiment, check)


def _fit(experiment: Experiment, check: Callable[[], None]) -> RunResult:
    """`fit`, in a work directory that is the run's own, as `check` makes sure."""
    started = time.perf_counter()
    config, parallel, total = experiment.config, experiment.parallel, experiment.total_steps
    if (initial := experiment.initial) is not None:
        path = config.workdir / workdir.INITIAL
        parallel.on_primary(lambda: save_model(path, *initial))

    with contextlib.ExitStack() as stack:
        preemption = stack.enter_context(PreemptionHandler(enabled=parallel.process_count == 1))
        checkpoints = Checkpoints(config.workdir, parallel, config.keep_checkpoints)
        batches = stack.enter_context(contextlib.closing(experiment.train_batches()))
        state, step, support, skipped = _begin(experiment, checkpoints, batches)
        log = stack.enter_context(MetricsLog(config.workdir, step, total, parallel, check))

        run = _Run(experiment, checkpoints, log)
        evaluation = Evaluation({}, {}, support)
        window = _Window([], time.perf_counter())
        stream = prefetch(_send(batches, parallel))
        for phase, update in zip(experiment.optimizer.phases, experiment.updates):
            if step == phase.start > 0:
                state = parallel.place(experiment.begin(phase, state))
            for sent in itertools.islice(stream, max(phase.end - step, 0)):
                state, metrics = update(state, sent.batch)
                step += 1
                # Left on the device: fetching them here would wait for every step.
                window.metrics.append(metrics)
                log.advance()

                interrupted = preemption.requested or parallel.preempted(step)
                evaluates = _due(experiment, step, config.eval_every)
                saves = interrupted or _due(experiment, step, config.checkpoint_every)
                if not (step % config.log_every == 0 or evaluates or saves):
                    continue
                # A checkpoint is of all processes, and is written by one.
                position = sent.position | {"skipped": skipped + parallel.total(sent.skipped)}
                progress = _log(run, state, step, window, position["skipped"])
                if evaluates:
                    state, evaluation = _evaluate(run, state, evaluation.support, progress)
                if saves:
                    _save(run, state, step, position, evaluation.support)
                if interrupted and step < total:
                    raise preemption.error(
                        f"interrupted after step {step}; --resume goes on from there"
                    )
                window = _Window([], time.perf_counter())

        # The last step is followed by an evaluation, but a run may be resumed when it is over.
        if not evaluation.test:
            state, evaluation = _evaluate(run, state, evaluation.support)
        test, weights = evaluation.test, evaluation.weights
        host = parallel.to_host(state)
        files = dict[str, ModelFile]()
        parallel.on_primary(lambda: files.update(write_models(experiment, host, test)))

    if preemption.requested:
        raise KeyboardInterrupt(
            f"interrupted after the last step; the run is over, and its files are in "
            f"{config.workdir}; --resume shows what came of it"
        )
    seconds = time.perf_counter() - started
    return result_of(experiment, state, test, weights, files, log.records, seconds)


def evaluate(experiment: Experiment, state: TrainState) -> dict[str, float]:
    """Mean `loss` and `accuracy` over the test images, each counted once.

    With `skip_corrupt`, over those that are not corrupt, and how many are `skipped`.

    Args:
      experiment: names the images and the model.
      state: on the run's devices.
    """
    parallel = experiment.parallel
    batches = experiment.dataset.eval_batches(
        parallel.host_batch_size(experiment.config.data.batch_size),
        shard_index=parallel.process_index,
        shard_count=parallel.process_count,
    )
    sums = parallel.sums(experiment.eval_sums, state, batches)
    totals = {name: math.fsum(batch[name] for batch in sums) for name in sums[0]}
    if not totals["weight"]:
        name = experiment.dataset.name
        raise data.CorruptRecordError(f"every record that {name!r} is evaluated on is corrupt")
    means = {name: totals[name] / totals["weight"] for name in ("loss", "accuracy")}
    if experiment.config.data.skip_corrupt:
        means["skipped"] = parallel.total(batches.skipped)
    return means


class Evaluation(NamedTuple):
    """What was found of the weights after a step.

    Attributes:
      test: what `evaluate` gives, by split: `test` for the weights, `test_average` for those
        averaged, if any; empty before the first evaluation.
      weights: by path, the layers that are pruned; empty in a dense run.
      support: of these weights, for the next evaluation; before the first, of the initial ones.
    """

    test: dict[str, dict[str, float]]
    weights: dict[str, WeightSummary]
    support: Support


class _Run(NamedTuple):
    """What the blocks of the loop share."""

    experiment: Experiment
    checkpoints: Checkpoints
    log: MetricsLog


class _Window(NamedTuple):
    """The metrics of the steps since the last record, on the device, and when they began."""

    metrics: list[Metrics]
    started: float


class _Sent(NamedTuple):
    """A batch on its way to the devices, and where the pipeline is once it is taken."""

    batch: Batch
    position: dict[str, int]
    skipped: int


def _send(batches: data.Batches, parallel: Engine) -> Iterator[_Sent]:
    for batch in batches:
        yield _Sent(parallel.shard(batch), batches.get_state(), batches.skipped)


def _begin(
    experiment: Experiment, checkpoints: Checkpoints, batches: data.Batches
) -> tuple[TrainState, int, Support, int]:
    """What a run begins or goes on from: state, step, support and skipped records so far."""
    state, step, skipped = experiment.initial_state(), 0, 0
    mask = experiment.pruned
    support = [] if mask is None else weight_summary.support_bits(state.params, mask)
    if experiment.config.resume:
        like = partial(experiment.state_like, state)
        saved = checkpoints.restore(like, support, experiment.check_state)
        if saved is not None:
            state, step, support = saved.state, int(saved.state.step), saved.support
            batches.set_state(saved.data_state)
            skipped = saved.data_state["skipped"]
    state, support = experiment.parallel.place((state, support))
    return state, step, support, skipped


def _due(experiment: Experiment, step: int, every: int) -> bool:
    """Whether `every` epochs are over at this step, or all are."""
    return step % (every * experiment.steps_per_epoch) == 0 or step == experiment.total_steps


def _log(
    run: _Run, state: TrainState, step: int, window: _Window, skipped: int
) -> dict[str, float]:
    """Writes the record of the steps up to this one; returns where the run is."""
    config = run.experiment.config
    try:
        measured = means(window.metrics, step, skips=config.non_finite == "skip")
    except NonFiniteError as error:
        raise _diverged(run, state, str(error)) from error
    seconds = time.perf_counter() - window.started
    rates = {"images_per_second": len(window.metrics) * config.data.batch_size / seconds}
    progress = _progress(run.experiment, state, step)
    counted = {"skipped": skipped} if config.data.skip_corrupt else {}
    run.log.write({"split": "train"} | progress | measured | counted | rates)
    return progress


def _evaluate(
    run: _Run, state: TrainState, before: Support, progress: dict[str, float] | None = None
) -> tuple[TrainState, Evaluation]:
    """Measures the weights; writes the records if `progress` is given.

    Returns:
      The state, its batch statistics estimated on its weights where the config asks for that, and
      what was found.
    """
    experiment, log = run.experiment, run.log
    weights, support = dict[str, WeightSummary](), before
    if (mask := experiment.pruned) is not None:
        weights, support = weight_summary.measure(state.params, state.opt_state, mask, before)
    if progress is not None and mask is not None:
        log.write_weights(int(progress["step"]), progress["epoch"], weights)
    state = recalibrated(experiment, state)
    test = {"test": evaluate(experiment, state)}
    if experiment.config.ema_decay is not None:
        test["test_average"] = evaluate(experiment, averaged(state, mask))
    if progress is not None:
        for split, measured in test.items():
            log.write({"split": split} | progress | measured)
    return state, Evaluation(test, weights, support)


def _save(
    run: _Run, state: TrainState, step: int, position: dict[str, int], support: Support
) -> None:
    """Writes a checkpoint of a state that is finite."""
    experiment = run.experiment
    if non_finite_paths(state):
        raise _diverged(run, state, f"the training state is not finite after step {step}")
    experiment.parallel.check_replicas(state, step)
    host, support = experiment.parallel.to_host((state, support))
    # First: a run that goes on from the checkpoint has all records of the steps before it.
    experiment.parallel.on_primary(run.log.sync)
    run.checkpoints.save(host, position, config_json.to_json(experiment.config), support)


def _diverged(run: _Run, state: TrainState, problem: str) -> NonFiniteError:
    """What ends a run, with the arrays of its state that are not finite."""
    config, latest = run.experiment.config, run.checkpoints.latest_step
    kept = "no checkpoint was written before"
    if latest is not None:
        kept = f"the last good checkpoint is {workdir.checkpoint_path(config.workdir, latest)}"
    paths = non_finite_paths({"params": state.params, "batch_stats": state.batch_stats})
    where = f" ({masks.some(paths)})" if paths else ""
    rate = config.optimizer.learning_rate
    return NonFiniteError(
        f"{problem}{where}; {kept}. Try an optimizer.learning_rate below {rate:g}."
    )


def _progress(experiment: Experiment, state: TrainState, step: int) -> dict[str, float]:
    """Where the run is: the learning rate of this step, the threshold and zeros after it."""
    progress = {
        "step": step,
        "epoch": step / experiment.steps_per_epoch,
        "learning_rate": float(experiment.optimizer.learning_rate(step - 1)),
        "learning_rate_sum": float(experiment.optimizer.learning_rate_sums[step]),
    }
    if experiment.config.prune.enabled:
        threshold = optax.tree.get(state.opt_state, "threshold")
        # Of layers with a threshold of their own, the mean; of a frozen support, none.
        if threshold is not None:
            progress["threshold"] = float(np.mean(jax.device_get(threshold)))
        report = lats_optax.sparsity(state.params, experiment.optimizer.mask)
        progress["sparsity"] = float(report.sparsity)
    return progress
