"""Two processes of two devices each train as one process of four does."""

import contextlib
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys

import fsspec
import jax
import numpy as np
import pytest

from lats_optax.training.checkpoint import load_variables
from lats_optax.training.config import PruneConfig
from lats_optax.training.export import load_model, save_model
from lats_optax.training.logging import read_metrics
from tests import stores, tiny

COMMAND = """
import sys
import pytest
from lats_optax import cli
from lats_optax.training import pictures
from tests import stores, tiny
_, port, index, *arguments = sys.argv
with pytest.MonkeyPatch.context() as patch:
    tiny.install(patch)
    patch.setattr(pictures, "write", lambda result: [])
    join = f"--distributed --coordinator 127.0.0.1:{port} --process-count 2 --process-index {index}"
    sys.exit(cli.train(["digits", "--data.batch-size", "8", *join.split(), *arguments]))
"""

PROGRAM = """
import sys
from pathlib import Path
import jax, pytest
from tests import test_processes
_, port, index, workdir, mode = sys.argv
with pytest.MonkeyPatch.context() as patch:
    test_processes.tiny.add_to_zoo(patch)
    result = test_processes.tiny.train(
        test_processes.config(
            Path(workdir),
            mode,
            distributed=True,
            coordinator=f"127.0.0.1:{port}",
            process_count=2,
            process_index=int(index),
        )
    )
print(f"ended with {test_processes.digest(result.state)}.")
"""


RUNS = {
    "during-training": PruneConfig(target_sparsity=0.75),
    "early": PruneConfig(target_sparsity=0.75, mode="early", search_epochs=1),
    "at-initialization": PruneConfig(0.75, mode="at-initialization", search_epochs=1),
    "fine-tuning": PruneConfig(mode="fine-tuning"),
}


def config(workdir, mode, **changes):
    fine = mode == "fine-tuning"
    initial = workdir.parent / "initial.safetensors" if fine else None
    changes |= {"prune": RUNS[mode], "initial": initial, "average_decay": 0.9}
    return tiny.config(workdir, epochs=2, **changes)


def digest(state):
    """What a process ends with, in one word."""
    leaves = jax.tree.leaves(jax.device_get(state))
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


@contextlib.contextmanager
def two(program, *arguments):
    """Two processes of two devices each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(2):
            process = subprocess.Popen(
                [sys.executable, "-c", program, str(port), str(index), *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        yield processes


def outputs_of(processes, code=0):
    """What they write until both end with a code."""
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [code, code], "\n".join(outputs)
    return outputs


def read_until(process, word):
    """The next line of a process with a word in it."""
    lines = []
    for line in iter(process.stdout.readline, ""):
        lines.append(line)
        if word in line:
            return line
    pytest.fail("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("mode", RUNS)
def test_two_processes_train_as_one(tmp_path, monkeypatch, mode):
    tiny.add_to_zoo(monkeypatch)
    save_model(tmp_path / "initial.safetensors", tiny.Model(), tiny.variables(), tiny.SHAPE)
    with two(PROGRAM, str(tmp_path / "two"), mode) as processes:
        outputs = outputs_of(processes)
    assert "epoch" in outputs[0]
    ends = [re.search("ended with (.*)\\.", output)[1] for output in outputs]
    assert ends[0] == ends[1]

    one = tiny.train(config(tmp_path / "one", mode), jax.devices()[:4])
    saved = load_model(tmp_path / "two" / "model.safetensors")
    expected = load_model(one.model.path)
    for found in (load_variables(tmp_path / "two"), saved.variables):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected.variables
        )
        same = jax.tree.map(lambda a, b: ((a == 0) == (b == 0)).all(), found, expected.variables)
        assert all(jax.tree.leaves(same))
    metrics = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [(r["split"], r["step"]) for r in metrics] == [
        (r["split"], r["step"]) for r in one.metrics
    ]
    for a, b in zip(metrics, one.metrics):
        if a["split"] == "weights":
            assert a == b
            continue
        assert a["accuracy"] == pytest.approx(b["accuracy"])
        assert a.get("sparsity") == b.get("sparsity")
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_stop_and_go_on_at_one_step(tmp_path):
    run = tmp_path / "run"
    arguments = ("--workdir", str(run), "--checkpoint-every", "1", "--epochs")
    with two(COMMAND, *arguments, "2000") as processes:
        # Both train; the one that does not write the checkpoints is told to stop.
        read_until(processes[0], "epoch ")
        processes[1].send_signal(signal.SIGTERM)
        outputs = outputs_of(processes, code=75)
    says = r"lats-train: error: interrupted after step (\d+); --resume goes on from there"
    steps = [int(re.search(says, output)[1]) for output in outputs]
    assert steps[0] == steps[1]
    *_, before, newest = sorted(int(p.name) for p in (run / "checkpoints").glob("[0-9]*"))
    assert newest == steps[0]

    # Both go back to the one before.
    (run / "checkpoints" / str(newest) / "MANIFEST").unlink()
    with two(COMMAND, *arguments, "2000", "--resume") as processes:
        warning = read_until(processes[0], "warning: ")
        read_until(processes[0], "epoch ")
        processes[0].send_signal(signal.SIGTERM)
        outputs = outputs_of(processes, code=75)
    assert f"{newest} is damaged (MANIFEST is missing): the run goes on from the one" in warning
    assert "damaged" not in outputs[1]
    records = read_metrics(run / "metrics.jsonl")
    trained = [r["step"] for r in records if r["split"] == "train"]
    assert trained == sorted(set(trained))
    assert before < newest <= trained[-1]

    # And where process 0 alone fails, both end.
    for path in (run / "checkpoints").glob("[0-9]*"):
        (path / "MANIFEST").write_bytes(b"")
    with two(COMMAND, *arguments, "2000", "--resume") as processes:
        for output in outputs_of(processes, code=1):
            assert "lats-train: error: no checkpoint in " in output
    (run / ".lock").unlink()
    (run / ".lock").mkdir()
    with two(COMMAND, *arguments, "2000", "--overwrite") as processes:
        outputs = outputs_of(processes, code=1)
    assert "lats-train: error: [Errno 21] Is a directory" in outputs[0]
    assert "lats-train: error: process 0 has failed" in outputs[1]


@pytest.mark.slow
def test_two_processes_train_in_a_store(tmp_path, monkeypatch):
    with stores.google() as scheme:
        place = stores.new_bucket(scheme) / "run"
        for name, value in fsspec.config.conf[scheme].items():
            monkeypatch.setenv(f"FSSPEC_GS_{name.upper()}", value)
        ends = []
        for directory, more in ((tmp_path / "run", ()), (place, ()), (place, ("--resume",))):
            with two(COMMAND, "--epochs", "1", "--workdir", str(directory), *more) as processes:
                outputs_of(processes)
            ends.append(load_variables(directory))
        for end in ends[1:]:
            jax.tree.map(np.testing.assert_array_equal, ends[0], end)
        assert not (place / ".lock").exists()
