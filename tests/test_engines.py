"""The two engines against each other and against one device, and what a device of each holds."""

import dataclasses
import math
import os
import re
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lats_optax
from lats_optax.training import assembly
from lats_optax.training.config import ParallelConfig, PruneConfig
from lats_optax.training.optimizer import make_optimizer
from lats_optax.training.parallel import Engine, JitEngine, PmapEngine
from lats_optax.training.step import split_in_order
from tests import matrix, tiny
from tests.runs import BEFORE, EARLY, at_step

ENGINES = {
    "pmap": ParallelConfig(),
    "jit": ParallelConfig("jit"),
    "jit over 2": ParallelConfig("jit", fsdp=2),
    "jit over 8": ParallelConfig("jit", fsdp=8),
}
REST = ENGINES.keys() - {"pmap", "jit over 2"}
TARGET = PruneConfig(target_sparsity=0.75)


@pytest.fixture(autouse=True)
def _everything_is_divided(monkeypatch):
    # The tiny model's arrays too.
    monkeypatch.setattr("lats_optax.training.parallel._DIVIDED_FROM", 16)


def run(workdir, engine, devices=None, **changes):
    return tiny.train(tiny.config(workdir, parallel=ENGINES[engine], **changes), devices)


def assert_agree(result, expected):
    """The same to the rounding of sums in another order, the same zeros and the same records."""
    assert_agree_at_the_end(result, expected)
    for ours, theirs in zip(result.metrics, expected.metrics, strict=True):
        if ours["split"] != "weights":
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
            assert ours.get("sparsity") == theirs.get("sparsity")


def assert_agree_at_the_end(result, expected):
    a, b = (jax.device_get(one.state) for one in (result, expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a, b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x == 0, y == 0), a.params, b.params)


@pytest.mark.parametrize(
    "engine",
    matrix.fast(["pmap", "jit over 2", *sorted(REST)], ["jit over 2"]),
)
def test_an_engine_trains_as_one_device(tmp_path, engine):
    changes = {"prune": TARGET, "bn_recalibration_batches": 2, "epochs": 2}
    expected = run(tmp_path / "one", "pmap", jax.devices()[:1], **changes)
    assert_agree(run(tmp_path / engine, engine, **changes), expected)


@pytest.mark.slow
@pytest.mark.parametrize("prune", [EARLY, BEFORE], ids=["early", "at initialization"])
def test_a_second_phase_is_the_same_too(tmp_path, prune):
    expected = run(tmp_path / "one", "pmap", prune=prune)
    assert_agree(run(tmp_path / "jit", "jit over 8", prune=prune), expected)


@pytest.mark.slow
def test_the_parts_of_a_batch_are_the_same_too(tmp_path):
    plain = tiny.config(tmp_path)
    changes = {
        "data": dataclasses.replace(plain.data, batch_size=16),
        "grad_accum_steps": 2,
    }
    expected = run(tmp_path / "pmap", "pmap", **changes)
    assert_agree(run(tmp_path / "jit", "jit over 8", **changes), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [("jit over 2", "pmap"), pytest.param("pmap", "jit over 8", marks=pytest.mark.slow)],
)
def test_a_checkpoint_goes_on_in_another_engine(tmp_path, before, after):
    expected = run(tmp_path / "whole", "pmap", prune=TARGET)
    with pytest.MonkeyPatch.context() as patch:
        kind = JitEngine if "jit" in before else PmapEngine
        at_step(patch, 9, lambda: os.kill(os.getpid(), signal.SIGINT), kind)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", before, prune=TARGET)
    resumed = run(
        tmp_path / "run",
        after,
        jax.devices()[: 8 if "jit" in after else 4],
        prune=TARGET,
        resume=True,
    )
    assert_agree_at_the_end(resumed, expected)


@pytest.mark.slow
def test_a_device_holds_its_part_alone():
    """By the compiler's report: an eighth of the arrays, where pmap has all of them."""
    params = {"kernel": jnp.zeros((512, 256))}
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        lats_optax.soft_threshold(lats_optax.target_sparsity(0.9, 0.1, 10)),
    )

    def step(state, batch, mean):
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((batch["x"] @ p["kernel"]) ** 2))(
            params
        )
        updates, opt_state = tx.update(mean(grads), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    def report(engine: Engine):
        state = engine.create(lambda: (params, tx.init(params)))
        batch = engine.shard({"x": np.zeros((8, 512), np.float32)})
        compiled = engine.compile_update(step).lower(state, batch).compile()
        return compiled.memory_analysis(), compiled.as_text()

    (whole, _), (part, text) = report(PmapEngine()), report(JitEngine(fsdp=8))
    size = params["kernel"].nbytes
    assert whole.argument_size_in_bytes >= 3 * size
    assert part.argument_size_in_bytes <= 3 * size / 8 + 8192
    # The forward pass gathers the kernel, once; what else goes around are counts.
    assert sum(sizes(text, "all-gather")) < 1.01 * params["kernel"].size

    # The update with its closed loop gathers nothing: what goes around are counts and sums.
    engine = JitEngine(fsdp=8)
    arguments = engine.place((params, tx.init(params), params))
    text = jax.jit(tx.update).lower(*arguments).compile().as_text()
    assert sum(sizes(text, "all-gather") + sizes(text, "all-to-all")) < 1000
    assert 0 < sum(sizes(text, "all-reduce")) < 10_000


class Separable(nn.Module):
    """Activations far larger than weights, and kernels of one axis that can be divided."""

    @nn.compact
    def __call__(self, x, train=True):
        for features in (8, 16):
            for size, groups in ((1, 1), (3, features)):
                kernel = (size, size)
                x = nn.Conv(features, kernel, feature_group_count=groups, use_bias=False)(x)
                x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.relu(x)
        return nn.Dense(8)(x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [2, 8])
def test_weights_are_gathered_and_activations_stay(fsdp):
    config, model, shape = tiny.config(Path("unused")), Separable(), (8, 8, 4)
    phase, engine = make_optimizer(config, 10).phases[0], JitEngine(fsdp=fsdp)
    state = jax.eval_shape(assembly.bind_state(config, model, phase, shape))
    batch = {
        "image": jax.ShapeDtypeStruct((32, *shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((32,), jnp.int32),
    }
    step = engine.compile_update(
        assembly.bind_step(config, model, phase, engine.split, engine.whole)
    )
    text = step.lower(*engine.abstract(state, batch)).compile().as_text()
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    kinds = ("all-gather", "all-to-all", "collective-permute")
    assert sum(sum(sizes(text, kind)) for kind in kinds) < 2 * weights


def sizes(text, kind):
    """How many numbers each collective of a kind gives."""
    lines = [line for line in text.splitlines() if re.search(rf" {kind}(-start)?\(", line)]
    shapes = [re.findall(r"\w\d+\[([\d,]*)\]", line.split(f" {kind}")[0]) for line in lines]
    return [math.prod(map(int, filter(None, shape.split(",")))) for one in shapes for shape in one]


def test_parts_have_a_share_of_every_device():
    engine = JitEngine()
    batch = {"label": np.arange(32)}
    parts = jax.jit(lambda batch: engine.split(batch, 2))(engine.shard(batch))["label"]
    each = split_in_order({"label": np.arange(32).reshape(8, 4).T}, 2)["label"]
    assert sorted(parts[0].tolist()) == sorted(each[0].ravel().tolist())
    assert {shard.data.shape for shard in parts.addressable_shards} == {(2, 2)}


def test_devices_that_do_not_divide_are_named():
    tiny.assert_refused(lambda: JitEngine(jax.devices()[:6], fsdp=4), ["parallel.fsdp", "4", "6"])
    tiny.assert_refused(lambda: ParallelConfig(fsdp=2), ["parallel.fsdp", "2", "engine jit"])
    tiny.assert_refused(lambda: ParallelConfig("jit", fsdp=0), ["parallel.fsdp", "0"])
