"""Runs of the trainer: what ends badly is said, and what has no effect is refused."""

import contextlib
import dataclasses
import functools
import io
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lats_optax import cli, epoch_lats_threshold
from lats_optax.training import experiment, loop, plots
from lats_optax.training.config import (
    DataConfig,
    OptimizerConfig,
    PruneConfig,
    TrainConfig,
)
from lats_optax.training.export import save_model
from lats_optax.training.optimizer import make_optimizer
from lats_optax.training.presets import PRESETS
from lats_optax.training.step import TrainState, train_step
from tests import tiny
from tests.misuse import Case, gives, raises, warns
from tests.runs import at_step

TINY = ["digits", "--data.batch-size", "8", "--epochs", "3", "--optimizer.learning-rate", "0.05"]
SPARSE = [*TINY, "--prune.target-sparsity", "0.75"]


class Done(NamedTuple):
    """What a command has come to, and which files it has left."""

    code: int
    out: str
    err: str
    files: set[str]


@contextlib.contextmanager
def _tiny_runs():
    """A directory for runs, in which the tiny data set and model are all there is."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        tiny.install(patch)
        # Drawing takes longer than training.
        patch.setattr(plots, "write_plots", lambda result: [])
        yield Path(name), patch


def _command(*commands: list[str], spoil: Callable[[Any], None] = lambda patch: None) -> Done:
    """The last of some `lats-train` commands, in the one work directory `run`."""
    with _tiny_runs() as (runs, patch):
        spoil(patch)
        for arguments in commands:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.train([*arguments, "--workdir", str(runs / "run")])
        files = {file.name for file in (runs / "run").glob("*")}
        return Done(code, out.getvalue(), err.getvalue(), files)


def _lag(patch: pytest.MonkeyPatch) -> None:
    """Batch statistics that lag: an evaluation with them is wrong wherever it can be."""

    def lagging(experiment, state, original=loop.evaluate):
        right = original(experiment, state)
        fresh = experiment.config.recalibration_batches
        return right if fresh else right | {"accuracy": 0.1}

    patch.setattr(loop, "evaluate", lagging)


def _interrupt(at: Callable[[pytest.MonkeyPatch, Callable[[], None]], None]):
    def spoil(patch: pytest.MonkeyPatch) -> None:
        # What a shell has started in the background ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        at(patch, lambda: signal.raise_signal(signal.SIGINT))

    return spoil


def _in_last_step(patch, act):
    at_step(patch, 18, act)


def _while_writing(patch, act, twice=False):
    def write(*arguments, original=loop.write_models):
        for _ in range(1 + twice):
            act()
        return original(*arguments)

    patch.setattr(loop, "write_models", write)


def _while_writing_twice(patch, act):
    _while_writing(patch, act, twice=True)


def _stopped_at_the_end(done: Done) -> bool:
    return (
        done.code == 130
        and "error: interrupted after the last step; the run is over" in done.err
        and "--resume" in done.err
        and "model.safetensors" in done.files
    )


def _build(prune: PruneConfig, initial: float | None = None) -> Any:
    """What is built of a tiny run: from a file of some sparsity, if any."""
    with _tiny_runs() as (runs, _):
        changes = {} if initial is None else {"init_from": runs / "initial"}
        config = tiny.config(runs / "run", prune=prune, **changes)
        if initial is not None:
            rng = np.random.default_rng(0)
            model = tiny.Model()
            zeros = jnp.zeros((1, *tiny.SHAPE))
            variables = jax.jit(model.init, static_argnames="train")(
                jax.random.key(0), zeros, train=False
            )
            variables["params"] = jax.tree.map(
                lambda w: np.where(rng.random(w.shape) < initial * (w.ndim > 1), 0, w),
                variables["params"],
            )
            save_model(runs / "initial", model, variables, tiny.SHAPE, {})
        return experiment.build_experiment(config)


def _steps(config: TrainConfig, count: int, steps_per_epoch: int = 3) -> tuple[list, list]:
    """Weights and thresholds after each of some steps on gradients of noise."""
    tx = make_optimizer(config, steps_per_epoch).phases[0].transform
    params = {
        "kernel": jax.random.normal(jax.random.key(1), (20, 10)),
        "scale": jnp.full(10, 2.0),
    }
    state, update = tx.init(params), jax.jit(tx.update)
    weights, thresholds = [], []
    for step in range(count):
        noise = jax.random.normal(jax.random.key(step), (20, 10))
        updates, state = update({"kernel": noise, "scale": jnp.ones(10)}, state, params)
        params = optax.apply_updates(params, updates)
        weights.append(params)
        thresholds.append(float(optax.tree.get(state, "threshold", 0.0)))
    return weights, thresholds


def _is_sgd(config: OptimizerConfig, oracle: optax.GradientTransformation) -> bool:
    """Whether three steps of a config are those of another transform."""
    weights, _ = _steps(TrainConfig(optimizer=config, epochs=1), 3)
    params = {"kernel": jax.random.normal(jax.random.key(1), (20, 10)), "scale": jnp.full(10, 2.0)}
    state = oracle.init(params)
    for step in range(3):
        noise = jax.random.normal(jax.random.key(step), (20, 10))
        updates, state = oracle.update({"kernel": noise, "scale": jnp.ones(10)}, state, params)
        params = optax.apply_updates(params, updates)
    same = jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-6), params, weights[-1])
    return all(jax.tree.leaves(same))


def _late(prune: PruneConfig) -> tuple[list, list]:
    """Two epochs of three steps, of which the first is dense."""
    sgd = OptimizerConfig(learning_rate=0.1, momentum=0.0, minimum_learning_rate=0.02)
    return _steps(TrainConfig(optimizer=sgd, prune=prune, epochs=2), 6)


def _late_threshold() -> list[float]:
    """The L1 coefficients that LATS implies, after an epoch without, with a minimal rate."""
    _, thresholds = _late(PruneConfig(final_threshold=0.3, first_epoch=1))
    rates = [0.02 + 0.08 * 0.5 * (1 + np.cos(np.pi * step / 6)) for step in range(6)]
    return list(np.diff([0.0, *thresholds]) / rates)


def _early(epochs: int, first: int) -> TrainConfig:
    prune = PruneConfig(0.5, first_epoch=first, mode="early", search_epochs=epochs)
    return TrainConfig(prune=prune, epochs=9)


def _x64() -> float:
    """How far compiled steps of a preset are from NumPy in float64, of a model of one kernel."""
    config = PRESETS["imagenet-mobilenet-v1-lats"].config
    prune = dataclasses.replace(config.prune, target_sparsity=None, final_threshold=0.2)
    config, each = dataclasses.replace(config, prune=prune, epochs=8), 2  # steps an epoch
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(6, 20)), rng.integers(0, 5, 6)
    theta, velocity = 0.3 * rng.normal(size=(20, 5)), np.zeros((20, 5))
    with jax.enable_x64(True):
        step_fn = jax.jit(
            functools.partial(
                train_step,
                mean=lambda tree: tree,
                apply=lambda variables, x, **_: (x @ variables["params"]["kernel"], {}),
                transform=(transform := make_optimizer(config, each).phases[0].transform),
                label_smoothing=config.label_smoothing,
            )
        )
        params = {"kernel": jnp.asarray(theta)}
        state = TrainState(jnp.zeros((), jnp.int32), params, {}, transform.init(params))
        losses = []
        for _ in range(8 * each):
            state, metrics = step_fn(state, {"image": jnp.asarray(images), "label": labels})
            losses.append(metrics["loss"])
        found = [np.asarray(x) for x in (optax.tree.get(state, "latent")["kernel"], losses)]
    sgd, threshold = config.optimizer, epoch_lats_threshold(8, each, 0.2)
    mass = config.label_smoothing / 5 + (1 - config.label_smoothing) * np.eye(5)[labels]
    expected = []
    for step in range(8 * each):
        w = np.sign(theta) * np.maximum(np.abs(theta) - threshold(step), 0)
        odds = np.exp(images @ w)
        p = odds / odds.sum(axis=1, keepdims=True)
        expected.append(-(mass * np.log(p)).sum(axis=1).mean())
        slope = images.T @ (p - mass) / 6 + sgd.weight_decay * theta
        velocity = sgd.momentum * velocity + slope
        epoch = step // each
        rate = (epoch + 1) / 5 if epoch < 5 else (1 + np.cos(np.pi * (epoch - 5) / 3)) / 2
        theta = theta - sgd.learning_rate * rate * velocity
    return max(np.abs(found[0] - theta).max(), np.abs(found[1] - expected).max())


SPARSE_RUNS = [
    PruneConfig(0.5, mode="early", search_epochs=1),
    PruneConfig(0.5, mode="at-initialization", search_epochs=1),
    PruneConfig(mode="fine-tuning"),
    PruneConfig(0.5),
    PruneConfig(final_threshold=0.1),
    PruneConfig(0.5, distribution="uniform", layer_sparsity=(("a", 0.1),)),
    PruneConfig(0.5, granularity="output-channels"),
]

CASES = [
    Case(
        "a sparse file to begin a dense run from",
        lambda: _build(PruneConfig(), initial=0.6),
        warns(r"weights \d+\.\d+% are zero: .* --prune.mode fine-tuning, without"),
    ),
    Case(
        "a sparse file to begin a run of less sparsity from",
        lambda: _build(PruneConfig(0.3), initial=0.6),
        warns("do not stay zero"),
    ),
    Case(
        "a sparse file to fine-tune",
        lambda: _build(PruneConfig(mode="fine-tuning"), initial=0.6),
        gives(lambda built: built.initial is not None),
    ),
    Case(
        "a mask that leaves nothing",
        lambda: _build(PruneConfig(0.5, include=("Conv",), exclude=("Conv",))),
        raises(ValueError, r"prune.include is \('Conv',\), prune.exclude .* nothing to prune"),
    ),
    Case(
        "a structure that leaves nothing",
        lambda: _build(PruneConfig(0.5, granularity="filters", exclude=("Conv",))),
        raises(ValueError, "prune.granularity 'filters', which leaves nothing to prune"),
    ),
    *(
        Case(f"an option without effect: {says}", make, raises(ValueError, says))
        for says, make in {
            "prune.schedule is 's-lats'; allowed: 'lats' without": lambda: PruneConfig(
                schedule="s-lats"
            ),
            "prune.schedule is 'pgh'": lambda: PruneConfig(mode="fine-tuning", schedule="pgh"),
            "prune.weight_decay_on is 'weights'; allowed: 'latent' without prune": (
                lambda: PruneConfig(weight_decay_on="weights")
            ),
            "prune.weight_decay_on is 'weights'; allowed: 'latent' without optimizer": (
                lambda: TrainConfig(prune=PruneConfig(0.5, weight_decay_on="weights"))
            ),
            "prune.first_epoch is 1; allowed: 0 without": lambda: PruneConfig(first_epoch=1),
            "ema_decay is 0.0": lambda: TrainConfig(ema_decay=0.0),
            "optimizer.nesterov is True; allowed: False without momentum": (
                lambda: OptimizerConfig(nesterov=True, momentum=0.0)
            ),
            "optimizer.decay_norm is False; allowed: True without weight_decay": (
                lambda: OptimizerConfig(decay_norm=False)
            ),
            "data.synthetic_classes is 10": lambda: DataConfig(synthetic_classes=10),
        }.items()
    ),
    Case(
        "a first epoch of pruning after the last",
        lambda: TrainConfig(prune=PruneConfig(0.5, first_epoch=20)),
        raises(ValueError, "prune.first_epoch is 20; allowed: less than .* 20"),
    ),
    Case(
        "a first epoch of pruning after an early search",
        lambda: _early(epochs=2, first=2),
        raises(ValueError, "prune.first_epoch is 2; allowed: less than .* 2"),
    ),
    Case(
        "a negative first epoch of pruning",
        lambda: PruneConfig(0.5, first_epoch=-1),
        raises(ValueError, "prune.first_epoch is -1; allowed: 0 or more"),
    ),
    Case(
        "a minimal learning rate above the peak",
        lambda: OptimizerConfig(learning_rate=0.1, minimum_learning_rate=0.2),
        raises(ValueError, "optimizer.minimum_learning_rate is 0.2; .* below learning_rate, 0.1"),
    ),
    Case(
        "Nesterov's momentum, and no decay of what normalizes, against optax",
        lambda: _is_sgd(
            OptimizerConfig(
                learning_rate=0.2,
                weight_decay=0.1,
                decay_norm=False,
                nesterov=True,
            ),
            optax.chain(
                optax.add_decayed_weights(0.1, {"kernel": True, "scale": False}),
                optax.sgd(optax.cosine_decay_schedule(0.2, 3), momentum=0.9, nesterov=True),
            ),
        ),
        gives(bool),
    ),
    Case(
        "a cosine that ends at a minimum, against optax",
        lambda: _is_sgd(
            OptimizerConfig(learning_rate=0.2, minimum_learning_rate=0.05),
            optax.sgd(optax.cosine_decay_schedule(0.2, 3, alpha=0.25), momentum=0.9),
        ),
        gives(bool),
    ),
    Case(
        "LATS with a late first epoch and a minimal rate implies one L1 coefficient",
        _late_threshold,
        gives(
            lambda l1: l1[:3] == [0, 0, 0] and l1[3] > 0 and np.allclose(l1[3:], l1[3], rtol=1e-4)
        ),
    ),
    *(
        Case(
            f"a target sparsity with a late first epoch and schedule {schedule}",
            lambda schedule=schedule: _late(PruneConfig(0.5, schedule=schedule, first_epoch=1)),
            gives(
                lambda found: (
                    found[1][:3] == [0, 0, 0]
                    and not any((np.asarray(w["kernel"]) == 0).any() for w in found[0][:3])
                    and (np.asarray(found[0][-1]["kernel"]) == 0).sum() == 100
                )
            ),
        )
        for schedule in ("lats", "s-lats", "epoch-lats")
    ),
    Case(
        "batch statistics are estimated again in every kind of sparse run",
        lambda: [
            TrainConfig(prune=prune, init_from=Path("some")).recalibration_batches
            for prune in SPARSE_RUNS
        ],
        gives(lambda batches: batches == [50] * len(SPARSE_RUNS)),
    ),
    Case(
        "x64 is kept by the compiled steps of a preset: loss, learning rate and threshold",
        _x64,
        gives(lambda error: error < 1e-13),
    ),
    Case(
        "a dense run whose batch statistics lag ends far below its training accuracy",
        lambda: _command([*TINY, "--bn-recalibration-batches", "0"], spoil=_lag),
        gives(
            lambda done: (
                done.code == 0
                and done.err.splitlines()[-1].startswith("lats-train: warning: the test accuracy, ")
                and "--resume --bn-recalibration-batches 50" in done.err
            )
        ),
    ),
    Case(
        "the same, resumed as the warning says, without training again",
        lambda: _command(
            [*TINY, "--bn-recalibration-batches", "0"],
            [*TINY, "--resume", "--bn-recalibration-batches", "50"],
            spoil=_lag,
        ),
        gives(lambda done: (done.code, done.err) == (0, "")),
    ),
    Case(
        "a run that meets its target says so",
        lambda: _command(SPARSE),
        gives(
            lambda done: re.fullmatch(
                r"target        sparsity 75.00% met: (\d+) weights are zero, and \1 were to be",
                done.out.splitlines()[-1],
            )
        ),
    ),
    Case(
        "Ctrl-C in the last step",
        lambda: _command(TINY, spoil=_interrupt(_in_last_step)),
        gives(_stopped_at_the_end),
    ),
    Case(
        "Ctrl-C while the model is written",
        lambda: _command(TINY, spoil=_interrupt(_while_writing)),
        gives(_stopped_at_the_end),
    ),
    Case(
        "Ctrl-C twice",
        lambda: _command(TINY, spoil=_interrupt(_while_writing_twice)),
        gives(
            lambda done: (
                done.code == 130
                and "error: interrupted at once; --resume goes on from the last" in done.err
            )
        ),
    ),
]
