"""Runs that are killed: whenever that is, all that is complete is whole, and the run goes on."""

import random
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lats_optax.training import loop, manifest
from lats_optax.training.checkpoint import load_state
from lats_optax.training.logging import read_metrics
from tests import tiny
from tests.resumed_run import config


def start(workdir, epochs):
    # What is killed may leave half an entry in the compilation cache.
    half = "ignore:Error reading persistent compilation cache entry:UserWarning"
    command = [sys.executable, "-W", "error", "-W", half]
    command += ["-m", "tests.resumed_run", str(workdir), str(epochs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(workdir, epochs, *, in_save, seconds):
    """Kills a run some time after it begins to train, or after it begins to write a checkpoint."""
    checkpoints = workdir / "checkpoints"
    with start(workdir, epochs) as process:
        # A line is written at an evaluation, before the checkpoint.
        assert "epoch" in process.stdout.readline()
        deadline = time.monotonic() + 60
        while in_save and time.monotonic() < deadline:
            if process.poll() is not None or any(checkpoints.glob(".step.*.unfinished")):
                break
        time.sleep(seconds)
        process.kill()
    unfinished = [*checkpoints.glob(".step.*.unfinished")]
    for path in checkpoints.glob("[0-9]*"):
        manifest.check_files(path, manifest.read(path)["files"])
    return unfinished


def assert_ends_as(workdir, straight):
    jax.tree.map(np.testing.assert_array_equal, load_state(workdir), load_state(straight))
    steps = [
        [(r["split"], r["step"]) for r in read_metrics(directory / "metrics.jsonl")]
        for directory in (workdir, straight)
    ]
    assert steps[0] == steps[1]
    assert not list(workdir.rglob("*.unfinished"))


def test_a_run_that_is_killed_while_it_saves_goes_on(tmp_path, monkeypatch):
    tiny.install(monkeypatch)
    loop.train(config(tmp_path / "straight", 4))
    kill(tmp_path / "run", 4, in_save=True, seconds=0.01)
    resumed = loop.train(config(tmp_path / "run", 4, resume=True))
    assert resumed.state.step == 24
    assert_ends_as(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_goes_on(tmp_path):
    epochs, rng, caught = 200, random.Random(0), 0
    with start(tmp_path / "straight", epochs) as straight:
        output, _ = straight.communicate(timeout=300)
    assert straight.returncode == 0, output
    for index in range(20):
        in_save = index % 2 == 0
        seconds = rng.uniform(0, 0.1 if in_save else 1)
        caught += bool(kill(tmp_path / "run", epochs, in_save=in_save, seconds=seconds))
    assert caught
    with start(tmp_path / "run", epochs) as last:
        output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    assert_ends_as(tmp_path / "run", tmp_path / "straight")
