"""Two processes of two devices each train as one process of four does, by either engine."""

import contextlib
import json
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

from lats_optax.training.checkpoint import load_state, load_variables
from lats_optax.training.export import load_model, save_model
from lats_optax.training.logging import read_metrics
from tests import stores, tiny
from tests.one_of_two import RUNS, config
from tests.runs import at_step

COMMAND = """
import sys
import pytest
from lats_optax import cli
from lats_optax.training import plots
from tests import stores, tiny
_, port, index, *arguments = sys.argv
with pytest.MonkeyPatch.context() as patch:
    tiny.install(patch)
    patch.setattr(plots, "write_plots", lambda result: [])
    join = f"--distributed --coordinator 127.0.0.1:{port} --num-processes 2 --process-id {index}"
    sys.exit(cli.train(["digits", "--data.batch-size", "8", *join.split(), *arguments]))
"""

PROGRAM = "import sys; from tests import one_of_two; one_of_two.train(*sys.argv[1:])"


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


@pytest.mark.parametrize(
    ("mode", "engine"),
    [
        ("during-training", "jit over 4"),
        pytest.param("early", "jit over 2", marks=pytest.mark.slow),
        *(pytest.param(mode, "pmap", marks=pytest.mark.slow) for mode in RUNS),
    ],
)
def test_two_processes_train_as_one(tmp_path, monkeypatch, mode, engine):
    tiny.add_to_zoo(monkeypatch)
    save_model(tmp_path / "initial.safetensors", tiny.Model(), tiny.variables(), tiny.SHAPE)
    with two(PROGRAM, str(tmp_path / "two"), mode, engine) as processes:
        outputs = outputs_of(processes)
    assert "epoch" in outputs[0]
    ends = [json.loads(re.search("ended: (.*)", output)[1]) for output in outputs]
    assert ends[0]["digest"] == ends[1]["digest"]
    assert [end["labels"] for end in ends] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert [end["full"] for end in ends] == ["OSError", "PrimaryError"]
    for end in ends:
        assert (end["parts"], end["whole"]) == ((1, True) if engine == "pmap" else (2, False))
        assert end["evaluated"] == tiny.TEST
        assert re.search(r"after step 7 .*: bias on device \d+\. --resume", end["odd"])

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
    engine = ("--parallel.engine", "jit", "--parallel.fsdp", "4")
    with two(COMMAND, *arguments, "2000", *engine) as processes:
        # Both train; the one that does not write the checkpoints is told to stop.
        read_until(processes[0], "epoch ")
        processes[1].send_signal(signal.SIGTERM)
        outputs = outputs_of(processes, code=75)
    says = r"lats-train: error: interrupted after step (\d+); --resume goes on from there"
    steps = [int(re.search(says, output)[1]) for output in outputs]
    assert steps[0] == steps[1]
    *_, before, newest = sorted(int(p.name) for p in (run / "checkpoints").glob("[0-9]*"))
    assert newest == steps[0]

    # Both go back to the one before, and on with the other engine.
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


@pytest.mark.slow
def test_a_run_goes_on_in_other_processes_and_the_other_engine(tmp_path, monkeypatch):
    tiny.add_to_zoo(monkeypatch)
    run, epochs = tmp_path / "run", 8

    def in_two(engine, *more):
        arguments = (str(run), "during-training", engine)
        with two(PROGRAM, *arguments, *map(str, more)) as processes:
            return [re.search("ended: (.*)", output)[1] for output in outputs_of(processes)]

    def in_one(workdir, **changes):
        own = config(workdir, "during-training", epochs=epochs, **changes)
        return tiny.train(own, jax.devices()[:4])

    straight = in_one(tmp_path / "straight")
    says = in_two("jit over 4", 9, epochs)
    stopped = int(load_state(run).step)
    assert says == [f"interrupted after step {stopped}; --resume goes on from there"] * 2
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            in_one(run, resume=True)
    assert 9 <= stopped < load_state(run).step < 6 * epochs
    in_two("jit over 2", 0, epochs, "resume")

    found, expected = load_state(run), load_state(straight.config.workdir)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a == 0, b == 0), found.params, expected.params
    )
