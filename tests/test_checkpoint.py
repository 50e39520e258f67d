"""Checkpoints: a run goes on as if it had not stopped, and nothing good is lost."""

import dataclasses
import json
import signal
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax import cli
from lats_optax.training import loop
from lats_optax.training.checkpoint import load_state, load_variables
from lats_optax.training.config import PruneConfig
from lats_optax.training.export import load_model
from lats_optax.training.logging import read_metrics
from tests import matrix, tiny
from tests.runs import KilledError, assert_equal_runs, at_step, die

SPARSE = PruneConfig(target_sparsity=0.75)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    tiny.install(monkeypatch)


@pytest.mark.slow
def test_a_work_directory_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny.config(Path("runs/here"), epochs=1)
    loop.train(config)
    assert (tmp_path / "runs/here/checkpoints/6/MANIFEST").is_file()
    again = loop.train(dataclasses.replace(config, resume=True))
    assert int(again.state.step) == 6
    assert load_variables("runs/here")["params"].keys() == again.state.params.keys()


def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, monkeypatch):
    watched = {"prune": SPARSE, "log_every": 1, "ema_decay": 0.9}
    straight = loop.train(tiny.config(tmp_path / "straight", **watched))

    config = tiny.config(tmp_path / "stopped", **watched)
    with monkeypatch.context() as context:
        at_step(context, 16, die)
        with pytest.raises(KilledError):
            loop.train(config)
    assert read_metrics(config.workdir / "metrics.jsonl")[-1]["step"] == 15
    resumed = loop.train(dataclasses.replace(config, resume=True))

    # The state is parameters and their average, latent weights, threshold, momentum and counts.
    assert_equal_runs(straight, resumed)
    assert float(optax.tree.get(resumed.state.opt_state, "threshold")) > 0
    steps = [r["step"] for r in resumed.metrics if r["split"] == "train"]
    assert steps == list(range(1, 19))
    assert read_metrics(config.workdir / "metrics.jsonl") == resumed.metrics


@pytest.mark.parametrize(
    "number", matrix.fast([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], [signal.SIGTERM])
)
def test_a_signal_is_answered_with_a_checkpoint(tmp_path, monkeypatch, number):
    config = tiny.config(tmp_path / "run", prune=SPARSE)
    # A shell may have told this process to ignore it, and then it is ignored.
    outside = signal.signal(number, signal.default_int_handler)
    try:
        with monkeypatch.context() as context:
            at_step(context, 10, lambda: signal.raise_signal(number))
            with pytest.raises(KeyboardInterrupt, match="after step 10"):
                loop.train(config)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, outside)
    assert (config.workdir / "checkpoints" / "10").is_dir()
    resumed = loop.train(dataclasses.replace(config, resume=True))
    straight = loop.train(tiny.config(tmp_path / "straight", prune=SPARSE))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((straight.state, resumed.state)))


@pytest.mark.parametrize("when", matrix.fast(["in the last step", "while the model is written"], 1))
def test_a_signal_after_the_last_step_still_leaves_the_model(tmp_path, monkeypatch, capfd, when):
    tiny.install(monkeypatch)
    stop = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    with monkeypatch.context() as context:
        if when == "in the last step":
            at_step(context, 6, stop)
        else:
            write = loop.write_models
            context.setattr(loop, "write_models", lambda *args: (stop(), write(*args))[1])
        workdir = tmp_path / "run"
        command = ["digits", "--workdir", str(workdir), "--epochs", "1", "--data.batch-size", "8"]
        assert cli.train(command) == 130
    assert "interrupted after the last step; the run is over" in capfd.readouterr().err
    assert load_model(workdir / "model.safetensors").image_shape == tiny.SHAPE
    assert (workdir / "checkpoints" / "6").is_dir()


@pytest.mark.slow
def test_a_run_may_be_resumed_when_it_is_over(tmp_path):
    config = tiny.config(tmp_path / "run", epochs=1)
    first = loop.train(config)
    second = loop.train(dataclasses.replace(config, resume=True))
    assert_equal_runs(first, second)


@pytest.mark.slow
def test_a_run_may_be_resumed_before_it_began(tmp_path):
    config = tiny.config(tmp_path / "run", epochs=1, resume=True)
    assert loop.train(config).metrics[-1]["step"] == 6


@pytest.mark.slow
def test_a_run_may_be_resumed_on_other_devices(tmp_path, monkeypatch):
    config = tiny.config(tmp_path / "run", prune=SPARSE)
    with monkeypatch.context() as context:
        at_step(context, 10, die)
        with pytest.raises(KilledError):
            loop.train(config, jax.devices()[:8])
    resumed = loop.train(dataclasses.replace(config, resume=True), jax.devices()[:2])
    straight = loop.train(tiny.config(tmp_path / "straight", prune=SPARSE), jax.devices()[:2])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        jax.device_get(resumed.state.params),
        jax.device_get(straight.state.params),
    )


def test_the_last_checkpoints_are_kept(tmp_path):
    result = loop.train(tiny.config(tmp_path / "run", keep_checkpoints=2))
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "18"
    assert sorted(p.name for p in result.checkpoint.parent.iterdir()) == ["12", "18"]


@pytest.mark.slow
def test_what_a_killed_run_left_unfinished_is_removed(tmp_path):
    config = tiny.config(tmp_path / "run", prune=SPARSE)
    straight = loop.train(config)
    # As if the run had been killed while it wrote its last checkpoint, and other files.
    checkpoints = straight.checkpoint.parent
    straight.checkpoint.rename(checkpoints / f".step.{'0f' * 8}.unfinished")
    for name in (".checkpoints", ".metrics.jsonl", ".model.safetensors"):
        (config.workdir / f"{name}.{'0f' * 8}.unfinished").touch()
    resumed = loop.train(dataclasses.replace(config, resume=True))
    assert_equal_runs(straight, resumed)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["12", "18"]
    assert not list(config.workdir.glob("*.unfinished"))


@pytest.mark.slow
def test_the_weights_can_be_loaded(tmp_path):
    result = loop.train(tiny.config(tmp_path / "run", epochs=1, prune=SPARSE))
    variables = load_variables(tmp_path / "run")
    jax.tree.map(
        np.testing.assert_array_equal, variables["params"], jax.device_get(result.state.params)
    )
    logits = tiny.Model().apply(variables, np.zeros((2, *tiny.SHAPE), np.float32), train=False)
    assert logits.shape == (2, tiny.CLASSES)
    for load in (load_variables, load_state):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            load(tmp_path / "nowhere")


@pytest.mark.slow
def test_sparse_weights_from_the_latent_ones_of_a_checkpoint(tmp_path):
    loop.train(tiny.config(tmp_path / "run", epochs=1, prune=SPARSE, ema_decay=0.9))
    state = load_state(tmp_path / "run")
    params = lats_optax.finalize(state.params, state.opt_state)
    assert lats_optax.sparsity(params).sparsity == pytest.approx(0.75, abs=0.01)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, state.params)
    average = lats_optax.finalize(state.params, state.opt_state, average=state.average.params)
    expected = load_variables(tmp_path / "run", averaged=True)["params"]
    jax.tree.map(np.testing.assert_array_equal, average, expected)
    with pytest.raises(ValueError, match="params: their zeros are not those of the state"):
        lats_optax.finalize(state.average.params, state.opt_state)


# The work directory


def test_a_run_is_not_overwritten(tmp_path):
    config = tiny.config(tmp_path / "run", epochs=1)
    loop.train(config)
    before = (config.workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"--resume .* --overwrite"):
        loop.train(config)
    assert (config.workdir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_run_is_not_begun_twice(tmp_path):
    experiment = tiny.build(tiny.config(tmp_path / "run", epochs=1))
    loop.fit(experiment)
    with pytest.raises(FileExistsError, match="is not empty"):
        loop.fit(experiment)


@pytest.mark.slow
def test_overwrite_removes_the_run_and_nothing_else(tmp_path):
    config = tiny.config(tmp_path / "run", epochs=1)
    loop.train(config)
    (config.workdir / "notes.txt").write_text("mine")
    for plot in ("report.png", "weights.png"):
        (config.workdir / plot).write_text("of the run before")
    shorter = dataclasses.replace(config, overwrite=True, seed=1)
    result = loop.train(shorter)
    assert (config.workdir / "notes.txt").read_text() == "mine"
    assert not list(config.workdir.glob("*.png"))
    lines = (config.workdir / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == [r["step"] for r in result.metrics] == [4, 6, 6]
    assert len(list(config.workdir.glob("events.out.tfevents.*"))) == 1


@pytest.mark.slow
def test_resuming_with_another_config_is_refused(tmp_path):
    config = tiny.config(tmp_path / "run", epochs=1)
    loop.train(config)
    with pytest.raises(ValueError, match=r"seed is 1 and was 0"):
        tiny.build(dataclasses.replace(config, resume=True, seed=1))
