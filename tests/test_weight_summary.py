"""What is counted of the weights, against loops written out; and that a run logs it, exactly."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax import prox
from lats_optax.analysis import weight_summary
from lats_optax.analysis.weight_summary import BINS
from lats_optax.training import loop
from lats_optax.training.config import PruneConfig
from lats_optax.training.logging import read_metrics
from tests import tiny
from tests.runs import assert_equal_runs, at_step, events

# One program for the tests that need no other.
WATCHED = {"prune": PruneConfig(target_sparsity=0.75), "ema_decay": 0.9, "log_every": 1}
SIZES = {"Conv_0/kernel": 72, "Dense_0/kernel": 384}  # of tests.tiny


# A layer, by hand


def tree(seed, dtype=np.float32):
    """Two layers that are pruned, one of them of a size that no byte ends with, and a bias."""
    rng = np.random.default_rng(seed)
    kernels = [rng.standard_t(3, size=shape).astype(dtype) for shape in ((3, 3, 5), (40, 8))]
    return {"first": kernels[0], "second": kernels[1], "bias": np.zeros(8, dtype)}


def shrink(theta, threshold):
    return np.sign(theta) * np.maximum(np.abs(theta) - theta.dtype.type(threshold), 0)


def latent_state(latent, threshold):
    latent = {**latent, "bias": optax.MaskedNode()}
    return lats_optax.SoftThresholdState(jnp.zeros((), int), threshold, latent, (), ())


def by_loop(before, after):
    pruned = revived = zeros = 0
    for old, new in zip(before.ravel().tolist(), after.ravel().tolist()):
        pruned += old != 0 and new == 0
        revived += old == 0 and new != 0
        zeros += new == 0
    return zeros, pruned, revived


@pytest.mark.cover
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("thresholds", [(0.7,), (0.5, 1.5)], ids=["global", "by-layer"])
def test_counts_are_those_of_a_loop(dtype, thresholds):
    first, second = tree(0, dtype), tree(1, dtype)
    by_name = dict(zip(("first", "second"), np.broadcast_to(thresholds, 2)))
    old, new = (
        {n: shrink(x, by_name[n]) if n in by_name else x for n, x in latent.items()}
        for latent in (first, second)
    )
    threshold = jnp.float32(thresholds[0]) if len(thresholds) == 1 else jnp.array(thresholds)
    mask = lats_optax.prunable
    bits = weight_summary.support_bits(old, mask)
    assert [b.nbytes for b in bits] == [6, 40]
    layers, now = weight_summary.measure(new, latent_state(second, threshold), mask, bits)

    assert list(layers) == ["first", "second"]
    for name, layer in layers.items():
        assert (layer.zeros, layer.pruned, layer.revived) == by_loop(old[name], new[name])
        assert min(layer.pruned, layer.revived) > 0
        assert layer.zeros == (old[name] == 0).sum() + layer.pruned - layer.revived
        assert layer.size == new[name].size
        assert layer.threshold == np.float32(by_name[name])
        w, theta = new[name].astype(np.float64), second[name].astype(np.float64)
        alive = w[w != 0]
        limit = np.abs(theta - w).max() + 4 * np.sqrt(np.mean(alive**2))
        for histogram, values in ((layer.weights, alive), (layer.latent, theta)):
            assert histogram.limit == pytest.approx(limit, rel=1e-5)
            kept = np.clip(values, -histogram.limit, histogram.limit)
            expected = np.histogram(kept, histogram.edges)[0]
            np.testing.assert_array_equal(histogram.counts, expected)
    for packed, name in zip(now, layers):
        np.testing.assert_array_equal(packed, np.packbits(new[name].ravel() != 0))
    totals = weight_summary.counts(layers)
    assert totals["pruned"] == sum(layer.pruned for layer in layers.values())
    assert totals["layers"]["first"]["zeros"] == layers["first"].zeros


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "ends"),
    [
        ([0.0, -0.0, 0.0], (0, 0)),
        ([1.0, 0.0, -1.0], (0, 0)),
        ([1e30, 0.0, -1e30], (1, 1)),  # whose squares are not finite
        ([1e-30, 0.0, -1e-30], (0, 0)),  # whose squares are zero
        ([INF, -INF, 1.0], (1, 2)),  # within ±1, for want of a scale
        ([NAN, NAN, 0.25], (0, 2)),
        ([-9.0] + 99 * [0.1], (1, 0)),
    ],
)
def test_no_weight_is_lost(values, ends):
    params = {"kernel": np.array([values + (100 - len(values)) * [0.0]], np.float32)}
    bits = weight_summary.support_bits(params, lats_optax.prunable)
    layers, _ = weight_summary.measure(params, (), lats_optax.prunable, bits)
    layer = layers["kernel"]
    zeros = 100 - np.count_nonzero(params["kernel"])
    assert (layer.zeros, layer.pruned, layer.revived, layer.size) == (zeros, 0, 0, 100)
    assert (layer.weights.counts[0], layer.weights.counts[-1]) == ends
    assert layer.weights.counts.min() >= 0
    assert layer.latent is None
    assert layer.threshold is None


@pytest.mark.slow
def test_groups_die_and_revive_whole():
    columns = prox.Axes(axes=0)
    transform = lats_optax.soft_threshold(0.5, operator=columns, pruned_scale=1.0)
    mask = lats_optax.prunable
    params = {"kernel": jnp.ones((4, 6))}
    state, bits = transform.init(params), weight_summary.support_bits(params, mask)
    # Latent weights of 1.5; of the first three columns 0.25, which dies, and then 1.5 again.
    for push, (zeros, pruned, revived) in ((-1.25, (12, 12, 0)), (1.25, (0, 0, 12))):
        updates = {"kernel": push * jnp.ones((4, 6)) * (jnp.arange(6) < 3)}
        updates, state = transform.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        layers, bits = weight_summary.measure(params, state, mask, bits)
        layer = layers["kernel"]
        assert (layer.zeros, layer.pruned, layer.revived) == (zeros, pruned, revived)
        assert (layer.weights.counts.sum(), layer.latent.counts.sum()) == (24 - zeros, 24)


# A run


def weights_of(result):
    return [record for record in result.metrics if record["split"] == "weights"]


@pytest.mark.slow
def test_a_run_logs_its_weights(tmp_path):
    config = tiny.config(tmp_path / "run", **WATCHED, eval_every=2)
    result = tiny.train(config, jax.devices()[:2])
    records = weights_of(result)
    assert [(record["step"], record["epoch"]) for record in records] == [(12, 2), (18, 3)]
    assert records == [r for r in read_metrics(tmp_path / "run/metrics.jsonl") if "layers" in r]
    for name, size in SIZES.items():
        rows = [record["layers"][name] for record in records]
        # Of the initial weights none is zero.
        zeros = 0
        for row in rows:
            zeros += row["pruned"] - row["revived"]
            assert row["zeros"] == zeros
        kernel = result.state.params[name.split("/")[0]]["kernel"]
        assert zeros == kernel.size - np.count_nonzero(kernel)
        assert size == kernel.size == result.weights[name].size
    for record in records:
        for count in ("zeros", "pruned", "revived"):
            assert record[count] == sum(row[count] for row in record["layers"].values())
    assert records[-1]["zeros"] == result.sparsity.zeros == 342

    found = events(tmp_path / "run")
    for tag in ("weights/pruned", "weights/revived"):
        name = tag.removeprefix("weights/")
        assert {step: value.simple_value for step, value in found[tag].items()} == {
            record["step"]: record[name] for record in records
        }
    for name, size in SIZES.items():
        last = records[-1]["layers"][name]
        assert found[f"pruned/{name}"][18].simple_value == last["pruned"]
        assert found[f"revived/{name}"][18].simple_value == last["revived"]
        assert found[f"sparsity/{name}"][18].simple_value == pytest.approx(last["zeros"] / size)
        for tag, total in ((f"latent/{name}", size), (f"sparse/{name}", size - last["zeros"])):
            assert found[tag].keys() == {12, 18}
            histogram = found[tag][18].histo
            assert histogram.num == sum(histogram.bucket) == total
            assert len(histogram.bucket) == len(histogram.bucket_limit) == BINS
            assert histogram.bucket_limit[-1] == histogram.max == -histogram.min
        kernel = np.asarray(result.state.params[name.split("/")[0]]["kernel"], np.float64)
        width = 2 * histogram.max / BINS
        assert histogram.sum == pytest.approx(kernel.sum(), abs=width / 2 * histogram.num)


@pytest.mark.slow
def test_a_resumed_run_compares_with_the_evaluation_before_it_stopped(tmp_path, monkeypatch):
    """The checkpoint is of step 9, the support in it of step 6: what step 12 is compared with."""
    devices = jax.devices()[:2]
    straight = tiny.train(tiny.config(tmp_path / "straight", **WATCHED), devices)
    config = tiny.config(tmp_path / "stopped", **WATCHED)
    seen = []
    with monkeypatch.context() as context:
        save = loop.Checkpoints.save

        def spy(self, state, position, json, support):
            seen.append((int(state.step), jax.device_get(state.params), jax.device_get(support)))
            save(self, state, position, json, support)

        context.setattr(loop.Checkpoints, "save", spy)
        at_step(context, 9, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt, match="after step 9;"):
            tiny.train(config, devices)
    (_, params, support), (step, later, saved) = seen
    assert step == 9
    jax.tree.map(np.testing.assert_array_equal, saved, support)
    of_six, of_nine = (
        jax.device_get(weight_summary.support_bits(p, lats_optax.prunable)) for p in (params, later)
    )
    jax.tree.map(np.testing.assert_array_equal, support, of_six)
    assert any((a != b).any() for a, b in zip(of_six, of_nine)), "nothing that could be mistaken"

    resumed = tiny.train(dataclasses.replace(config, resume=True), devices)
    assert_equal_runs(straight, resumed)
    assert [record["step"] for record in weights_of(resumed)] == [6, 12, 18]
    again = tiny.train(dataclasses.replace(config, resume=True), devices)
    assert weights_of(again) == weights_of(straight)
    assert {p: w.zeros for p, w in again.weights.items()} == {
        p: w.zeros for p, w in straight.weights.items()
    }
