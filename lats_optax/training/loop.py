"""The training loop, in one file that can be read in one go and forked.

`experiment.build` finds out whatever is wrong with a config, `fit` runs it, `train` is both.
"""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lats_optax
from lats_optax import data, models
from lats_optax.training import config as configs
from lats_optax.training import statistics, verdict, workdir
from lats_optax.training.checkpoint import Checkpoints
from lats_optax.training.config import TrainConfig
from lats_optax.training.experiment import (
    Experiment,
    build,
    check_state,
    fix_support,
    initial_state,
    state_like,
)
from lats_optax.training.export import ModelFile, save_model
from lats_optax.training.interruption import Interruption
from lats_optax.training.logging import MetricsLog, Record
from lats_optax.training.parallel import DataParallel, ahead
from lats_optax.training.recalibration import recalibrated
from lats_optax.training.statistics import LayerStatistics
from lats_optax.training.step import Batch, Metrics, TrainState, averaged


class NonFiniteError(RuntimeError):
    """Training has left the numbers: a loss or a parameter is infinite or not a number."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run has come to.

    Attributes:
      config: what was run.
      test_accuracy: fraction of the test images that are classified correctly, at the end.
      test_accuracy_averaged: that of the averaged weights; None where there are none.
      seconds: how long it took, compilation included; after a resume, since the resume.
      state: the last training state, on the run's devices.
      sparsity: the zeros of the weights that are pruned; in a dense run, that would be.
      checkpoint: the directory of the last checkpoint.
      metrics: all records of metrics.jsonl, those from before a resume included.
      is_primary: whether this is the process that speaks for the run.
      weights: by path, the layers that are pruned, at the end; empty in a dense run.
      model: the file of the weights, exactly as sparse as the state; None where `is_primary` is
        False.
      model_averaged: that of the averaged weights; None where there are none.
      target_line: whether the target sparsity was met; None in a run without one.
      problems: what looks wrong in the run, a sentence each; `lats-train` prints them as warnings.
    """

    config: TrainConfig
    test_accuracy: float
    seconds: float
    state: TrainState
    sparsity: lats_optax.SparsityReport
    checkpoint: Path
    metrics: list[Record]
    is_primary: bool = True
    test_accuracy_averaged: float | None = None
    weights: dict[str, LayerStatistics] = dataclasses.field(default_factory=dict)
    model: ModelFile | None = None
    model_averaged: ModelFile | None = None
    target_line: str | None = None
    problems: list[str] = dataclasses.field(default_factory=list)


def train(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> RunResult:
    """Runs a config from its beginning, or its last checkpoint, to its end.

    Args:
      config: the run.
      devices: what to run on; None: all there are.

    Raises:
      ValueError: the config does not fit the data, the model or the devices.
      FileExistsError: there is a run in the work directory.
      NonFiniteError: training diverged.
      KeyboardInterrupt: on Ctrl-C, SIGTERM or SIGHUP, after a last checkpoint.
      Others: as `fit`.
    """
    return fit(build(config, devices))


def fit(experiment: Experiment) -> RunResult:
    """Trains: `train` after `build`.

    Ctrl-C, SIGTERM and SIGHUP are answered when the step is over and a checkpoint of it is written.
    In a run of several processes SIGTERM alone is, by all of them after the same step.

    Warns:
      DamagedCheckpointWarning: the run goes on from a checkpoint that is not the last.

    Raises:
      FileExistsError: since `build`, another run has begun in the work directory.
      WorkdirInUseError: another run is writing there.
      CheckpointError: no checkpoint to go on from is whole, or one cannot be written.
      OSError: another file cannot be written.
      NonFiniteError: training diverged.
      CorruptRecordError: a record cannot be read, without `config.data.skip_corrupt`.
      KeyboardInterrupt: after the checkpoint; after the last step, when all files are written.
      PreemptedError: likewise, in a run of several processes.
    """
    with workdir.prepared(experiment.config, experiment.parallel):
        return _fit(experiment)


def _fit(experiment: Experiment) -> RunResult:
    """`fit`, in a work directory that is the run's own."""
    started = time.perf_counter()
    config, parallel = experiment.config, experiment.parallel
    if (initial := experiment.initial) is not None:
        path = config.workdir / workdir.INITIAL
        parallel.on_primary(lambda: save_model(path, *initial))

    batches = experiment.train_batches()
    state, step, skipped_before = initial_state(experiment), 0, 0
    mask = experiment.pruned
    # Of the weights at the last evaluation; before the first, of the initial ones.
    support = [] if mask is None else statistics.support_bits(state.params, mask)

    checkpoints = Checkpoints(config.workdir, parallel, config.keep_checkpoints)
    with Interruption(enabled=parallel.process_count == 1) as interruption:
        search_steps = experiment.optimizer.search_steps
        like = partial(state_like, experiment, state)
        check = partial(check_state, experiment)
        if config.resume and (saved := checkpoints.restore(like, support, check)) is not None:
            state, step, support = saved.state, int(saved.state.step), saved.support
            batches.set_state(saved.data_state)
            skipped_before = saved.data_state["skipped"]
        state, support = parallel.replicate((state, support))

        with (
            MetricsLog(config.workdir, step, experiment.total_steps, parallel.is_primary) as log,
            contextlib.closing(batches),
        ):
            test: dict[str, dict[str, float]] = {}
            weights: dict[str, LayerStatistics] = {}
            window: list[Metrics] = []
            window_started = time.perf_counter()
            remaining = experiment.total_steps - step
            for sent in itertools.islice(ahead(_send(batches, parallel)), remaining):
                if step == search_steps:
                    state = parallel.replicate(fix_support(experiment, state))
                state, metrics = experiment.step_after(step)(state, sent.batch)
                step += 1
                # Left on the device: fetching them here would wait for every step.
                window.append(metrics)
                log.advance()

                evaluation_due = _due(experiment, step, config.eval_every)
                interrupted = interruption.requested or parallel.preempted(step)
                checkpoint_due = interrupted or _due(experiment, step, config.checkpoint_every)
                if step % config.log_every == 0 or evaluation_due or checkpoint_due:
                    means = _means(window, step, config, checkpoints)
                    seconds = time.perf_counter() - window_started
                    rate = len(window) * config.data.batch_size / seconds
                    progress = _progress(experiment, state, step)
                    # A checkpoint is of all processes, and is written by one.
                    skipped = skipped_before + parallel.total(sent.skipped)
                    counted = {"skipped": skipped} if config.data.skip_corrupt else {}
                    rates = counted | {"images_per_second": rate}
                    log.write({"split": "train"} | progress | means | rates)
                    if evaluation_due and mask is not None:
                        weights, support = statistics.measure(
                            state.params, state.opt_state, mask, support
                        )
                        log.write_weights(step, progress["epoch"], weights)
                    if evaluation_due:
                        state = recalibrated(experiment, state)
                        test = evaluate_all(experiment, state)
                        for split, measured in test.items():
                            log.write({"split": split} | progress | measured)
                    if checkpoint_due:
                        _check_finite(state, step, config, checkpoints)
                        position = sent.position | {"skipped": skipped}
                        checkpoints.save(state, position, configs.to_json(config), support)
                    if interrupted and step < experiment.total_steps:
                        raise interruption.error(
                            f"interrupted after step {step}; --resume goes on from there"
                        )
                    window, window_started = [], time.perf_counter()

        # The last step is followed by an evaluation, but a run may be resumed when it is over.
        if not test:
            state = recalibrated(experiment, state)
            test = evaluate_all(experiment, state)
        if mask is not None and not weights:
            weights, _ = statistics.measure(state.params, state.opt_state, mask, support)
        files = _write_models(experiment, state, test) if parallel.is_primary else {}

    if interruption.requested:
        raise KeyboardInterrupt(
            f"interrupted after the last step; the run is over, and its files are in "
            f"{config.workdir}; --resume shows what came of it"
        )
    sparsity = lats_optax.sparsity(
        state.params, experiment.optimizer.mask, groups=experiment.optimizer.groups
    )
    wanted = verdict.wanted_zeros(config, state.params, experiment.optimizer)
    trained = [r["accuracy"] for r in log.records if r["split"] == "train" and "accuracy" in r]
    return RunResult(
        config=config,
        test_accuracy=test["test"]["accuracy"],
        test_accuracy_averaged=test.get("test_average", {}).get("accuracy"),
        seconds=time.perf_counter() - started,
        state=state,
        sparsity=sparsity,
        target_line=verdict.target_line(config, sparsity.zeros, wanted),
        problems=verdict.problems(
            config,
            experiment.optimizer,
            sparsity,
            {"train": trained[-1] if trained else None, "test": test["test"]["accuracy"]},
            wanted,
            normalized=bool(jax.tree.leaves(state.batch_stats)),
        ),
        checkpoint=workdir.checkpoint_path(config.workdir, step),
        metrics=log.records,
        is_primary=parallel.is_primary,
        weights=weights,
        model=files.get("test"),
        model_averaged=files.get("test_average"),
    )


def evaluate_all(experiment: Experiment, state: TrainState) -> dict[str, dict[str, float]]:
    """What `evaluate` gives: `test` for the weights, `test_average` for those averaged, if any."""
    found = {"test": evaluate(experiment, state)}
    if experiment.config.average_decay is not None:
        found["test_average"] = evaluate(experiment, averaged(state, experiment.pruned))
    return found


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
    sums = parallel.sums(experiment.eval_step, state, batches)
    totals = {name: math.fsum(batch[name] for batch in sums) for name in sums[0]}
    if not totals["weight"]:
        name = experiment.dataset.name
        raise data.CorruptRecordError(f"every record that {name!r} is evaluated on is corrupt")
    means = {name: totals[name] / totals["weight"] for name in ("loss", "accuracy")}
    if experiment.config.data.skip_corrupt:
        means["skipped"] = parallel.total(batches.skipped)
    return means


def _write_models(
    experiment: Experiment, state: TrainState, test: dict[str, dict[str, float]]
) -> dict[str, ModelFile]:
    """The model files of a run that is over, by the name of what `evaluate_all` says of them."""
    config, optimizer = experiment.config, experiment.optimizer
    state = jax.device_get(state)
    states = {"test": state}
    if config.prune.has_threshold and optimizer.frozen is None:
        # Adding an update rounds: without it the weights may be an ulp from those of the method.
        exact = lats_optax.finalize(state.params, state.opt_state, operator=optimizer.operator)
        states["test"] = state._replace(params=exact)
    if "test_average" in test:
        states["test_average"] = averaged(state, experiment.pruned)
    files = {}
    for split, of in states.items():
        path = config.workdir / (workdir.MODEL if split == "test" else workdir.AVERAGED)
        variables = {"params": of.params, "batch_stats": of.batch_stats}
        told = {
            "data": config.data.name,
            "step": str(int(of.step)),
            "test_accuracy": f"{test[split]['accuracy']:.4f}",
        }
        if models.in_zoo(experiment.model):
            save_model(path, experiment.model, variables, experiment.dataset.image_shape, told)
        else:  # which no description could build again
            lats_optax.save_sparse(path, variables, told)
        files[split] = ModelFile.written(path, variables)
    return files


class _Sent(NamedTuple):
    """A batch on its way to the devices, and where the pipeline is once it is taken."""

    batch: Batch
    position: dict[str, int]
    skipped: int


def _send(batches: data.Batches, parallel: DataParallel) -> Iterator[_Sent]:
    for batch in batches:
        yield _Sent(parallel.shard(batch), batches.get_state(), batches.skipped)


def _due(experiment: Experiment, step: int, every: int) -> bool:
    """Whether `every` epochs are over at this step, or all are."""
    return step % (every * experiment.steps_per_epoch) == 0 or step == experiment.total_steps


def _means(
    window: list[Metrics], step: int, config: TrainConfig, checkpoints: Checkpoints
) -> dict[str, float]:
    """Means of the metrics of the steps up to `step`; raises if a loss is not finite."""
    steps = jax.device_get(window)
    for offset, metrics in enumerate(steps):
        if not np.isfinite(metrics["loss"]):
            at = step - len(steps) + 1 + offset
            problem = f"the loss is {metrics['loss']} at step {at}"
            raise _diverged(problem, config, checkpoints)
    return {name: float(np.mean([m[name] for m in steps])) for name in steps[0]}


def _check_finite(
    state: TrainState, step: int, config: TrainConfig, checkpoints: Checkpoints
) -> None:
    """A gradient may overflow where the loss does not: the state itself is looked at too."""
    if not _all_finite(state):
        problem = f"the training state is not finite after step {step}"
        raise _diverged(problem, config, checkpoints)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite))


def _diverged(problem: str, config: TrainConfig, checkpoints: Checkpoints) -> NonFiniteError:
    kept = "no checkpoint was written before"
    if checkpoints.latest_step is not None:
        path = workdir.checkpoint_path(config.workdir, checkpoints.latest_step)
        kept = f"the last good checkpoint is {path}"
    rate = config.optimizer.learning_rate
    return NonFiniteError(f"{problem}; {kept}. Try an optimizer.learning_rate below {rate:g}.")


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
