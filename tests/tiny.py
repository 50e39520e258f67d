"""A data set and a model that train in no time, for the tests of the trainer."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lats_optax import data, models
from lats_optax.training import experiment, loop
from lats_optax.training.config import DataConfig, OptimizerConfig, TrainConfig
from lats_optax.training.experiment import Experiment
from lats_optax.training.parallel import JitEngine, PmapEngine
from lats_optax.training.result import RunResult

ENGINES = {"pmap": PmapEngine, "jit": JitEngine}
TRAIN, TEST, CLASSES, SHAPE = 53, 23, 3, (4, 4, 1)

_build = experiment.build_experiment


def make_dataset() -> data.Dataset:
    """Random images with a label that can be learned."""
    rng = np.random.default_rng(0)

    def examples(count: int) -> list[dict[str, Any]]:
        images = rng.normal(size=(count, *SHAPE)).astype(np.float32)
        labels = np.argmax(images[:, 0, :CLASSES, 0], axis=1).astype(np.int32)
        return [{"image": image, "label": label} for image, label in zip(images, labels)]

    return data.Dataset(
        name="tiny",
        image_shape=SHAPE,
        num_classes=CLASSES,
        sources={"train": examples(TRAIN), "test": examples(TEST)},
        train_example=lambda e, rng: {
            **e,
            "image": e["image"] + rng.normal(scale=0.1, size=SHAPE).astype(np.float32),
        },
        eval_example=dict,
    )


class Model(nn.Module):
    """A convolution, batch normalization, a classifier."""

    num_classes: int = CLASSES
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train=True):
        # Uniform: the default initializer alone takes XLA a second to compile.
        init = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")
        x = nn.Conv(8, (3, 3), use_bias=False, dtype=self.dtype, kernel_init=init)(images)
        x = nn.BatchNorm(
            use_running_average=not train, dtype=self.dtype, axis_name=self.axis_name, momentum=0.9
        )(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        return nn.Dense(self.num_classes, dtype=self.dtype, kernel_init=init)(x)


def variables(classes: int = CLASSES, seed: int = 0) -> dict[str, Any]:
    """Weights of the model, 60 % of the kernels zero, and statistics of no batch."""
    rng = np.random.default_rng(seed)
    model = Model(num_classes=classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))

    def draw(like: jax.ShapeDtypeStruct) -> np.ndarray:
        drawn = rng.uniform(0.1, 0.5, like.shape) * rng.choice([-1, 1], like.shape)
        return np.where(rng.random(like.shape) < 0.6 * (len(like.shape) > 1), 0, drawn)

    drawn = jax.tree.map(lambda like: draw(like).astype(np.float32), shapes)
    return {
        "params": drawn["params"],
        "batch_stats": jax.tree.map(np.abs, drawn["batch_stats"]),
    }


def build(
    config: TrainConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    dataset: data.Dataset | None = None,
    model: nn.Module | None = None,
) -> Experiment:
    """`experiment.build_experiment` with this data set and this model, unless others are given."""
    own = Model(
        dtype=jnp.dtype(config.model.dtype),
        axis_name=ENGINES[config.parallel.engine].axis_name,
    )
    return _build(config, devices, dataset=dataset or make_dataset(), model=model or own)


def train(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> RunResult:
    """`loop.train` with this data set and this model."""
    return loop.fit(build(config, devices))


def add_to_zoo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the model be described in files, and built again from them, under the name `tiny`."""
    monkeypatch.setitem(models._MODELS, "tiny", partial(Model))


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes these what a command trains, whatever names it is given."""
    add_to_zoo(monkeypatch)
    monkeypatch.setattr(experiment, "build_experiment", build)


def assert_refused(make: Callable[[], Any], words: Iterable[str]) -> None:
    """Making something is a ValueError of one line, with these words and what is allowed."""
    with pytest.raises(ValueError, match="allowed") as error:
        make()
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[int]:
    """A list that grows by one at every call of a module's function: of a step, at every trace."""
    calls, original = [], getattr(module, name)

    def counted(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        return original(*args, **keywords)

    monkeypatch.setattr(module, name, counted)
    return calls


def config(workdir: Path, **changes: Any) -> TrainConfig:
    """Three epochs of six steps."""
    plain = TrainConfig(
        data=DataConfig(name="tiny", batch_size=8),
        optimizer=OptimizerConfig(learning_rate=0.05, weight_decay=1e-3),
        epochs=3,
        eval_every=1,
        checkpoint_every=1,
        workdir=workdir,
        log_every=4,
        bn_recalibration_batches=0,  # so that batch statistics are those of a plain loop
    )
    return dataclasses.replace(plain, **changes)
