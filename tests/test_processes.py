"""Two processes of two devices each train as one process of four does."""

import os
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from lats_optax.training import loop
from lats_optax.training.checkpoint import load_variables
from lats_optax.training.config import PruneConfig
from lats_optax.training.logging import read_metrics
from tests import tiny

PROGRAM = """
import sys
from pathlib import Path
import jax, pytest
from tests import test_processes
_, port, index, workdir = sys.argv
with pytest.MonkeyPatch.context() as patch:
    test_processes.tiny.install(patch)
    test_processes.loop.train(
        test_processes.config(
            Path(workdir),
            distributed=True,
            coordinator=f"127.0.0.1:{port}",
            process_count=2,
            process_index=int(index),
        )
    )
"""


def config(workdir, **changes):
    prune = PruneConfig(target_sparsity=0.75)
    return tiny.config(workdir, prune=prune, epochs=2, average_decay=0.9, **changes)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path, monkeypatch):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(port), str(index), str(tmp_path / "two")],
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

    tiny.install(monkeypatch)
    one = loop.train(config(tmp_path / "one"), jax.devices()[:4])
    params = load_variables(tmp_path / "two")["params"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        params,
        jax.device_get(one.state.params),
    )
    metrics = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [(r["split"], r["step"]) for r in metrics] == [
        (r["split"], r["step"]) for r in one.metrics
    ]
    for a, b in zip(metrics, one.metrics):
        if a["split"] == "weights":
            assert a == b
        else:
            assert a["accuracy"] == pytest.approx(b["accuracy"])
