"""One of two processes that train together: what it runs, and what it says in the end."""

import hashlib
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from lats_optax.training import loop
from lats_optax.training.config import ParallelConfig, PruneConfig
from lats_optax.training.logging import MetricsLog
from lats_optax.training.parallel import PrimaryError
from lats_optax.training.preemption import PreemptedError
from lats_optax.training.replicas import ReplicaError
from tests import tiny
from tests.runs import at_step

RUNS = {
    "during-training": PruneConfig(target_sparsity=0.75),
    "early": PruneConfig(target_sparsity=0.75, mode="early", search_epochs=1),
    "at-initialization": PruneConfig(0.75, mode="at-initialization", search_epochs=1),
    "fine-tuning": PruneConfig(mode="fine-tuning"),
}
# Of two processes with two devices each: within each process, and across both.
ENGINES = {
    "pmap": ParallelConfig(),
    "jit over 2": ParallelConfig("jit", fsdp=2),
    "jit over 4": ParallelConfig("jit", fsdp=4),
}


def config(workdir, mode, engine="pmap", **changes):
    fine = mode == "fine-tuning"
    initial = workdir.parent / "initial.safetensors" if fine else None
    changes = {"prune": RUNS[mode], "init_from": initial, "epochs": 2} | changes
    return tiny.config(
        workdir, parallel=ENGINES[engine], ema_decay=0.9, bn_recalibration_batches=2, **changes
    )


def train(port, index, workdir, mode, engine, stop_at=0, epochs=2, resume=""):
    """What each of two processes does: trains, looks at what it has, and says so in a line."""
    own = config(
        Path(workdir),
        mode,
        engine,
        epochs=int(epochs),
        resume=bool(resume),
        distributed=True,
        coordinator=f"127.0.0.1:{port}",
        num_processes=2,
        process_id=int(index),
    )
    kind = tiny.ENGINES[own.parallel.engine]
    with pytest.MonkeyPatch.context() as patch:
        tiny.add_to_zoo(patch)
        patch.setattr("lats_optax.training.parallel._DIVIDED_FROM", 16)
        if index == "1":  # which does not write the checkpoints
            at_step(patch, int(stop_at), lambda: os.kill(os.getpid(), signal.SIGTERM), kind)
        experiment = tiny.build(own)
        try:
            result = loop.fit(experiment)
        except PreemptedError as error:
            print(f"ended: {error}")
            return
    engine, state = experiment.parallel, result.state
    kernel = state.params["Conv_0"]["kernel"]
    sums = engine.sums(experiment.eval_sums, state, eval_batches(experiment))
    found = {
        "digest": digest(engine.to_host(state)),
        "parts": len({str(shard.index) for shard in kernel.addressable_shards}),
        "whole": kernel.is_fully_addressable,
        "labels": labels_by_device(engine),
        "evaluated": sum(float(one["weight"]) for one in sums),
        "odd": odd_replica(engine, state.params),
        "full": full_disk(engine, Path(workdir).parent / "full"),
    }
    print(f"ended: {json.dumps(found)}")


def eval_batches(experiment):
    engine = experiment.parallel
    return experiment.dataset.eval_batches(
        8 // 2, shard_index=engine.process_index, shard_count=engine.process_count
    )


def labels_by_device(engine):
    """What each device of this process gets of a batch 0 … 7, of which the process has a half."""
    own = np.arange(4) + 4 * engine.process_index
    found = {s.device: s.data for s in engine.shard({"label": own})["label"].addressable_shards}
    return [found[device].ravel().tolist() for device in engine.local_devices]


def odd_replica(engine, params):
    """What is said where one device of process 1 has another bias than the three others."""
    bias = engine.place({"bias": np.zeros(3, np.float32)})["bias"]
    own = [shard.data for shard in bias.addressable_shards]
    if engine.process_index == 1:
        own[1] = own[1].at[0].set(1)
    odd = jax.make_array_from_single_device_arrays(bias.shape, bias.sharding, own)
    engine.check_replicas(params, 7)
    try:
        engine.check_replicas({"bias": odd}, 7)
    except ReplicaError as error:
        return str(error)


def full_disk(engine, workdir):
    """What is raised where process 0 cannot write the log."""
    workdir.mkdir(exist_ok=True)
    try:
        with MetricsLog(workdir, 0, 1, engine) as log:
            if engine.is_primary:
                with open("/dev/full", "w") as full:
                    os.dup2(full.fileno(), log._file.fileno())
            log.write({"split": "test", "step": 1, "epoch": 1.0, "loss": 0.5, "accuracy": 0.5})
    except (OSError, PrimaryError) as error:
        return type(error).__name__


def digest(state):
    """What a process ends with, in one word."""
    leaves = jax.tree.leaves(state)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
