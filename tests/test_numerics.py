"""Numbers that are not: stopped at, or skipped; copies that differ; the same run twice."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lats_optax.training.config import ParallelConfig, PruneConfig
from lats_optax.training.finite import NonFiniteError
from lats_optax.training.parallel import JitEngine, PmapEngine
from lats_optax.training.replicas import ReplicaError
from tests import matrix, tiny
from tests.runs import assert_equal_runs

SPARSE = PruneConfig(target_sparsity=0.75)


def spoilt(value):
    """The tiny data set, one of whose training images has a pixel that is no number."""
    dataset = tiny.make_dataset()
    dataset.sources["train"][7]["image"][0, 0, 0] = value
    return dataset


def run(workdir, dataset=None, **changes):
    config = tiny.config(workdir, prune=SPARSE, **changes)
    return tiny.loop.fit(tiny.build(config, jax.devices()[:2], dataset=dataset))


@pytest.mark.slow
def test_a_run_stops_and_names_step_and_arrays(tmp_path):
    with pytest.raises(NonFiniteError) as error:
        run(tmp_path / "run", spoilt(np.nan), log_every=3)
    message = str(error.value)
    assert "the loss is nan at step " in message
    assert "params/Conv_0/kernel" in message
    assert re.search(r"checkpoint (was written before|is .*run/checkpoints/6)", message)


@pytest.mark.parametrize("value", matrix.fast([np.nan, np.inf], [np.inf]))
def test_a_skipped_step_does_not_lose_the_target(tmp_path, value):
    result = run(tmp_path / "run", spoilt(value), non_finite="skip", log_every=3)
    assert result.target_line.startswith("target")
    assert result.sparsity.zeros == round(0.75 * result.sparsity.size)
    for leaf in jax.tree.leaves((result.state.params, result.state.batch_stats)):
        assert np.isfinite(leaf).all()
    records = [r for r in result.metrics if r["split"] == "train"]
    # Once an epoch.
    assert sum(record["skipped_steps"] for record in records) == 3
    assert all(np.isfinite(record["loss"]) for record in records)
    assert int(result.state.step) == 18


@pytest.mark.slow
def test_nothing_but_skipped_steps_is_an_error(tmp_path):
    dataset = tiny.make_dataset()
    for example in dataset.sources["train"]:
        example["image"][:] = np.nan
    with pytest.raises(NonFiniteError, match="at none of the steps 1 to 4 are"):
        run(tmp_path / "run", dataset, non_finite="skip")


@pytest.mark.slow
def test_skipping_costs_nothing_where_all_is_finite(tmp_path):
    plain = run(tmp_path / "stop")
    skipping = run(tmp_path / "skip", non_finite="skip")
    jax.tree.map(
        np.testing.assert_array_equal, *(jax.device_get(r.state) for r in (plain, skipping))
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["pmap", "jit"])
def test_the_same_seed_gives_the_same_run_twice(tmp_path, engine):
    fsdp = 2 if engine == "jit" else 1
    runs = [run(tmp_path / name, parallel=ParallelConfig(engine, fsdp)) for name in ("one", "two")]
    assert_equal_runs(*runs)


def flipped(array, device, bit=1):
    """The array, with a flipped bit in the copy of one device."""
    copies = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            words = data.reshape(-1).view(f"u{data.dtype.itemsize}")
            words[-1] ^= bit
        copies.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, copies)


@pytest.mark.cover
@pytest.mark.parametrize(
    "make",
    [PmapEngine, JitEngine, lambda: JitEngine(fsdp=2)],
    ids=["pmap", "jit", "jit over 2"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "bool"])
def test_a_flipped_bit_on_one_device_is_named(make, dtype):
    engine = make()
    array = jnp.ones((64, 32), dtype)
    tree = engine.place({"a": {"kernel": array}, "b": jnp.arange(3.0)})
    engine.check_replicas(tree, 7)
    tree["a"]["kernel"] = flipped(tree["a"]["kernel"], jax.devices()[5])
    with pytest.raises(ReplicaError, match=r"after step 7 .*: a/kernel on device") as error:
        engine.check_replicas(tree, 7)
    if engine.axis_name or not getattr(engine, "_fsdp", 1) > 1:
        assert "a/kernel on device 5." in str(error.value)


@pytest.mark.slow
def test_replicas_are_compared_before_a_checkpoint(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(PmapEngine, "check_replicas", lambda self, tree, step: seen.append(step))
    run(tmp_path / "run")
    assert seen == [6, 12, 18]
