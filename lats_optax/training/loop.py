"""The training loop, in one file that can be read in one go and forked.

`build` finds out whatever is wrong with a config, `fit` runs it, `train` is both.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import lats_optax
from lats_optax import data, models
from lats_optax.training import config as configs
from lats_optax.training import workdir
from lats_optax.training.checkpoint import Checkpoints
from lats_optax.training.config import TrainConfig
from lats_optax.training.interruption import Interruption
from lats_optax.training.logging import MetricsLog, Record
from lats_optax.training.optimizer import Optimizer, make_optimizer
from lats_optax.training.parallel import AXIS, DataParallel, join_processes
from lats_optax.training.step import (
    Batch,
    Metrics,
    Reduce,
    TrainState,
    averaged,
    create_state,
    eval_step,
    train_step,
)

TrainStep = Callable[[TrainState, Batch, Reduce[Any]], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch, Reduce[Any]], Metrics]


class NonFiniteError(RuntimeError):
    """Training has left the numbers: a loss or a parameter is infinite or not a number."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that is ready to begin: everything that a config names, found and checked.

    Attributes:
      config: what is run.
      parallel: the devices.
      dataset: what is trained on.
      model: what is trained.
      optimizer: what trains it.
      steps_per_epoch: whole batches in the training images.
      train_step: `(state, sharded batch) -> (state, metrics)`, which uses up the state.
      eval_step: `(state, sharded batch) -> sums`.
    """

    config: TrainConfig
    parallel: DataParallel
    dataset: data.Dataset
    model: nn.Module
    optimizer: Optimizer
    steps_per_epoch: int
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[TrainState, Batch], Metrics]

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch


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


def train(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> RunResult:
    """Runs a config from its beginning, or its last checkpoint, to its end.

    Args:
      config: the run.
      devices: what to run on; None: all there are.

    Raises:
      ValueError: the config does not fit the data, the model or the devices.
      FileExistsError: there is a run in the work directory.
      NonFiniteError: training diverged.
      KeyboardInterrupt: on Ctrl-C or SIGTERM, after a last checkpoint.
    """
    return fit(build(config, devices))


def build(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Finds and checks everything that a config names; writes nothing in the work directory."""
    workdir.check(config)
    if config.distributed:
        join_processes()
    parallel = DataParallel(devices)
    parallel.host_batch_size(config.data.batch_size, config.optimizer.accumulate)
    dataset = data.load(config.data.name, config.data.data_dir)
    steps_per_epoch = dataset.num_train // config.data.batch_size
    if steps_per_epoch < 1:
        raise ValueError(
            f"data.batch_size is {config.data.batch_size}; allowed: at most {dataset.num_train}, "
            f"the training images of {dataset.name}."
        )
    model = make_model(config, dataset.num_classes)
    optimizer = make_optimizer(config, steps_per_epoch)
    if config.resume and (config.workdir / workdir.CHECKPOINTS).is_dir():
        with Checkpoints(config.workdir) as checkpoints:
            if (saved := checkpoints.config()) is not None:
                configs.check_resumable(saved, config)
    experiment = Experiment(
        config=config,
        parallel=parallel,
        dataset=dataset,
        model=model,
        optimizer=optimizer,
        steps_per_epoch=steps_per_epoch,
        train_step=parallel.train_step(make_train_step(config, model, optimizer)),
        eval_step=parallel.eval_step(make_eval_step(model)),
    )
    # Expressions that match no parameter are found when the mask meets the parameters.
    jax.eval_shape(lambda: initial_state(experiment))
    return experiment


def make_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """The model that a config names; its batch statistics are averaged over the replicas.

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
        axis_name=AXIS,
        **options,
    )


def make_train_step(config: TrainConfig, model: nn.Module, optimizer: Optimizer) -> TrainStep:
    """The training step of a config, a pure function that no data set or device is needed for.

    Args:
      config: the run.
      model: of `make_model`.
      optimizer: of `make_optimizer`.

    Returns:
      `(state, batch of a replica, mean over replicas) -> (state, metrics)`, for
      `DataParallel.train_step`: see `step.train_step`.
    """
    return partial(
        train_step,
        apply=model.apply,
        transform=optimizer.transform,
        label_smoothing=config.label_smoothing,
        accumulate=config.optimizer.accumulate,
        average_decay=config.average_decay,
    )


def make_eval_step(model: nn.Module) -> EvalStep:
    """The evaluation step of a model: `(state, batch of a replica, sum over replicas) -> sums`."""
    return partial(eval_step, apply=model.apply)


def make_state(
    config: TrainConfig, model: nn.Module, optimizer: Optimizer, image_shape: tuple[int, ...]
) -> TrainState:
    """The state before the first step; under `jax.eval_shape`, its shapes and dtypes alone.

    Args:
      config: the run.
      model: of `make_model`.
      optimizer: of `make_optimizer`.
      image_shape: (height, width, channels).
    """
    average = config.average_decay is not None
    return create_state(model, optimizer.transform, image_shape, config.seed, average)


def initial_state(experiment: Experiment) -> TrainState:
    """The state before the first step, not yet on the run's devices."""
    return make_state(
        experiment.config, experiment.model, experiment.optimizer, experiment.dataset.image_shape
    )


def fit(experiment: Experiment) -> RunResult:
    """Trains: `train` after `build`.

    Ctrl-C and SIGTERM are answered when the step is over and a checkpoint of it is written.

    Raises:
      FileExistsError: since `build`, another run has begun in the work directory.
      NonFiniteError: training diverged.
      KeyboardInterrupt: after the checkpoint.
    """
    started = time.perf_counter()
    config, parallel, dataset = experiment.config, experiment.parallel, experiment.dataset
    parallel.barrier("all have looked into the work directory")
    if parallel.is_primary:
        workdir.prepare(config)
    parallel.barrier("the work directory is ready")

    batches = dataset.train_batches(
        parallel.host_batch_size(config.data.batch_size),
        seed=config.seed,
        shard_index=parallel.process_index,
        shard_count=parallel.process_count,
    )
    state, step = initial_state(experiment), 0

    with Checkpoints(config.workdir, config.keep_checkpoints) as checkpoints:
        if config.resume and (saved := checkpoints.restore(like=state)) is not None:
            state, step = saved.state, int(saved.state.step)
            batches.set_state(saved.data_state)
        state = parallel.replicate(state)

        with (
            MetricsLog(config.workdir, step, experiment.total_steps, parallel.is_primary) as log,
            Interruption(enabled=parallel.process_count == 1) as interruption,
        ):
            test: dict[str, dict[str, float]] = {}
            window: list[Metrics] = []
            window_started = time.perf_counter()
            while step < experiment.total_steps:
                state, metrics = experiment.train_step(state, parallel.shard(next(batches)))
                step += 1
                # Left on the device: fetching them here would wait for every step.
                window.append(metrics)
                log.advance()

                evaluation_due = _due(experiment, step, config.eval_every)
                interrupted = interruption.requested
                checkpoint_due = interrupted or _due(experiment, step, config.checkpoint_every)
                if step % config.log_every == 0 or evaluation_due or checkpoint_due:
                    means = _means(window, step, config, checkpoints)
                    seconds = time.perf_counter() - window_started
                    rate = len(window) * config.data.batch_size / seconds
                    progress = _progress(experiment, state, step)
                    log.write({"split": "train"} | progress | means | {"images_per_second": rate})
                    if evaluation_due:
                        test = evaluate_all(experiment, state)
                        for split, measured in test.items():
                            log.write({"split": split} | progress | measured)
                    if checkpoint_due:
                        _check_finite(state, step, config, checkpoints)
                        checkpoints.save(state, batches.get_state(), configs.to_json(config))
                    if interrupted and step < experiment.total_steps:
                        raise KeyboardInterrupt(
                            f"interrupted after step {step}; --resume goes on from there"
                        )
                    window, window_started = [], time.perf_counter()

    # The last step is followed by an evaluation, but a run may be resumed when it is over.
    test = test or evaluate_all(experiment, state)
    return RunResult(
        config=config,
        test_accuracy=test["test"]["accuracy"],
        test_accuracy_averaged=test.get("test_average", {}).get("accuracy"),
        seconds=time.perf_counter() - started,
        state=state,
        sparsity=lats_optax.sparsity(state.params, experiment.optimizer.mask),
        checkpoint=workdir.checkpoint_path(config.workdir, step),
        metrics=log.records,
        is_primary=parallel.is_primary,
    )


def evaluate_all(experiment: Experiment, state: TrainState) -> dict[str, dict[str, float]]:
    """What `evaluate` gives: `test` for the weights, `test_average` for those averaged, if any."""
    found = {"test": evaluate(experiment, state)}
    if experiment.config.average_decay is not None:
        mask = experiment.optimizer.mask if experiment.config.prune.enabled else None
        found["test_average"] = evaluate(experiment, averaged(state, mask))
    return found


def evaluate(experiment: Experiment, state: TrainState) -> dict[str, float]:
    """Mean `loss` and `accuracy` over the test images, each counted once.

    Args:
      experiment: names the images and the model.
      state: on the run's devices.
    """
    parallel = experiment.parallel
    batches = experiment.dataset.eval_batches(
        parallel.host_batch_size(experiment.config.data.batch_size),
        split="test",
        shard_index=parallel.process_index,
        shard_count=parallel.process_count,
    )
    # Fetched one by one: batches that wait for the devices would fill their memory.
    sums = [jax.device_get(experiment.eval_step(state, parallel.shard(b))) for b in batches]
    totals = {name: math.fsum(batch[name] for batch in sums) for name in sums[0]}
    return {name: totals[name] / totals["weight"] for name in ("loss", "accuracy")}


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
        progress["threshold"] = float(optax.tree.get(state.opt_state, "threshold"))
        report = lats_optax.sparsity(state.params, experiment.optimizer.mask)
        progress["sparsity"] = float(report.sparsity)
    return progress
