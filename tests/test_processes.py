"""Two processes of two devices each train as one process of four does."""

import hashlib
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from lats_optax.training.checkpoint import load_variables
from lats_optax.training.config import PruneConfig
from lats_optax.training.export import load_model, save_model
from lats_optax.training.logging import read_metrics
from tests import tiny

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


@pytest.mark.slow
@pytest.mark.parametrize("mode", RUNS)
def test_two_processes_train_as_one(tmp_path, monkeypatch, mode):
    tiny.add_to_zoo(monkeypatch)
    save_model(tmp_path / "initial.safetensors", tiny.Model(), tiny.variables(), tiny.SHAPE)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(index), str(tmp_path / "two"), mode],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
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
