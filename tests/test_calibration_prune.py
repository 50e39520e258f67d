"""Pruning whole functions: budgets over layers, blocks in order, devices, and what comes after."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

import lats_optax
from lats_optax import erdos_renyi, keep_support, soft_threshold, sparsity, support, target_sparsity
from lats_optax.calibration import calibrate, prune_with, sequential, solvers
from tests import matrix

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


def model(params, x):
    h = jnp.tanh(x @ params["in"])
    h = lax.scan(lambda h, w: (h + jnp.tanh(h @ w), None), h, params["stack"])[0]
    return h @ params["out"] + params["bias"]


PARAMS = {
    "in": normal(8, 16),
    "stack": 0.3 * normal(3, 16, 16),
    "out": normal(16, 4),
    "bias": normal(4),
}
BATCHES = [normal(40, 8), normal(40, 8)]


@functools.cache
def grams():
    return calibrate(model, PARAMS, BATCHES)


def zeros(params):
    return {name: np.asarray(leaf) == 0 for name, leaf in params.items()}


@pytest.mark.parametrize("method", matrix.fast(solvers.METHODS, ["wanda"]))
def test_the_sparsity_is_exact_and_the_rest_is_not_touched(method):
    pruned, report = prune_with(grams(), PARAMS, 0.75, method=method, budget="layer")
    found = zeros(pruned)
    assert found["in"].sum() == 96
    assert (found["stack"].sum((1, 2)) == 192).all()
    assert found["out"].sum() == 48
    np.testing.assert_array_equal(pruned["bias"], PARAMS["bias"])
    assert report.sparsity == 0.75
    assert "75.00%" in str(report)


@pytest.mark.slow
def test_budgets():
    prune = functools.partial(prune_with, grams(), PARAMS, method="magnitude")
    by_output = zeros(prune(0.5, budget="output").params)
    assert (by_output["in"].sum(0) == 4).all()
    assert (by_output["stack"].sum(1) == 8).all()
    wanda = zeros(prune_with(grams(), PARAMS, 0.5, method="wanda").params)
    assert (wanda["in"].sum(0) == 4).all()
    together, report = prune(0.5, budget="global")
    assert sum(zeros(together)[name].sum() for name in ("in", "stack", "out")) == 480
    assert len({round(layer.zeros / layer.size, 3) for layer in report.layers}) > 1
    _, report = prune(erdos_renyi(0.5))
    named = erdos_renyi(0.5)({name: PARAMS[name] for name in ("in", "stack", "out")})
    for layer in report.layers:
        assert layer.zeros == round(named[layer.path] * layer.size)
    pattern = zeros(prune(pattern=(2, 4)).params)
    assert (pattern["stack"].reshape(3, 4, 4, 16).sum(2) == 2).all()


@pytest.mark.parametrize("budget", ["global", "layer", "output"])
def test_no_layer_and_no_output_dies(budget):
    pruned = prune_with(grams(), PARAMS, 0.9999, budget=budget, method="wanda").params
    assert all(np.asarray(pruned[name]).any() for name in ("in", "stack", "out"))
    if budget == "output":
        assert (zeros(pruned)["in"].sum(0) == 7).all()


@pytest.mark.slow
def test_the_reported_error_is_that_of_the_outputs():
    w, x = normal(8, 5), normal(30, 8)
    found = calibrate(lambda p, x: x @ p["w"], {"w": w}, [x])
    for method in solvers.METHODS:
        pruned, report = prune_with(found, {"w": w}, 0.5, method=method)
        expected = jnp.sum((x @ pruned["w"] - x @ w) ** 2) / jnp.sum((x @ w) ** 2)
        np.testing.assert_allclose(report.layers[0].error, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", matrix.fast([jnp.bfloat16, jnp.float16], 1))
def test_sixteen_bits(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    batches = [batch.astype(dtype) for batch in BATCHES]
    pruned, report = prune_with(calibrate(model, params, batches), params, 0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(pruned)} == {jnp.dtype(dtype)}
    assert report.sparsity == 0.5


@pytest.mark.slow
def test_survivors_of_a_mask_alone_stay_bit_for_bit():
    with jax.enable_x64(True):
        before = RANDOM.normal(size=(8, 5))
        w = jnp.asarray(before)
        found = calibrate(lambda p, x: x @ p, w, [jnp.asarray(RANDOM.normal(size=(30, 8)))])
        pruned = np.asarray(prune_with(found, w, 0.5, method="wanda").params)
    assert pruned.dtype == np.float64
    np.testing.assert_array_equal(pruned, np.where(pruned == 0, 0.0, before))


@pytest.mark.slow
def test_a_solver_of_your_own():
    def halves(w, gram, budget):
        return jnp.where(budget.keep(jnp.abs(w)), w / 2, 0.0)

    pruned = prune_with(grams(), PARAMS, 0.5, method=halves).params
    expected = jnp.where(pruned["in"] == 0, 0.0, PARAMS["in"] / 2)
    np.testing.assert_array_equal(pruned["in"], expected)


@pytest.mark.slow
def test_groups_of_a_convolution_share_a_budget():
    kernel, x = normal(3, 3, 1, 6), normal(4, 7, 7, 6)

    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, p["kernel"], (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=6
        )

    found = calibrate(fn, {"kernel": kernel}, [x])
    for method in solvers.METHODS:
        pruned, report = prune_with(found, {"kernel": kernel}, 0.5, method=method, budget="layer")
        assert int((pruned["kernel"] == 0).sum()) == 27
        away = fn(pruned, x) - fn({"kernel": kernel}, x)
        expected = jnp.sum(away**2) / jnp.sum(fn({"kernel": kernel}, x) ** 2)
        np.testing.assert_allclose(report.layers[0].error, expected, rtol=1e-3)


# --- blocks in order ------------------------------------------------------------------------------


def block(params, x):
    return x + jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"])


BLOCKS = [{"a": normal(8, 12), "b": normal(12, 8)} for _ in range(3)]


@pytest.mark.slow
def test_each_block_is_calibrated_on_what_the_pruned_ones_give():
    pruned, report = sequential(block, BLOCKS, BATCHES, 0.5)
    hidden, by_hand = BATCHES, []
    for params in BLOCKS:
        by_hand.append(prune_with(calibrate(block, params, hidden), params, 0.5).params)
        hidden = [block(by_hand[-1], x) for x in hidden]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), pruned, by_hand
    )
    assert [layer.path for layer in report.layers] == ["0/a", "0/b", "1/a", "1/b", "2/a", "2/b"]


def test_stages_within_a_block():
    stages = [lats_optax.select("a"), lats_optax.select("b")]
    pruned, report = sequential([block], BLOCKS[:1], BATCHES, 0.5, stages=stages, method="wanda")
    first = prune_with(
        calibrate(block, BLOCKS[0], BATCHES, mask=stages[0]), BLOCKS[0], 0.5, method="wanda"
    )
    second = prune_with(
        calibrate(block, first.params, BATCHES, mask=stages[1]), first.params, 0.5, method="wanda"
    )
    jax.tree.map(np.testing.assert_array_equal, pruned[0], second.params)
    assert [layer.path for layer in report.layers] == ["0/a", "0/b"]


@pytest.mark.slow
def test_blocks_cost_two_passes_each():
    calls = []

    def counted(params, x):
        jax.debug.callback(lambda: calls.append(1))
        return block(params, x)

    sequential(counted, BLOCKS, BATCHES, 0.5, method="magnitude")
    jax.effects_barrier()
    # Two batches, three blocks; nothing follows the last one.
    assert len(calls) == 2 * (2 * 3 - 1)


# --- several devices ------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Specs of the parameters of `model` and of a batch, and of the mesh's axes."""

    specs: dict
    batch: PartitionSpec
    axes: tuple
    kind: jax.sharding.AxisType = jax.sharding.AxisType.Auto


P = PartitionSpec
LAYOUTS = {
    "columns and rows": Layout(
        {"in": P(None, "m"), "stack": P(None, None, "m"), "out": P("m", None), "bias": P()},
        P("d"),
        (2, 4),
    ),
    "every large axis": Layout(
        {"in": P(("d", "m")), "stack": P(None, ("d", "m")), "out": P(("d", "m")), "bias": P()},
        P("d"),
        (4, 2),
    ),
    "data parallel": Layout(dict.fromkeys(PARAMS, P()), P(("d", "m")), (2, 4)),
    "explicit axes": Layout(
        dict.fromkeys(PARAMS, P()), P("d"), (8, 1), jax.sharding.AxisType.Explicit
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eight_devices_find_the_masks_of_one(layout):
    specs, batch, axes, kind = LAYOUTS[layout]
    mesh = jax.make_mesh(axes, ("d", "m"), axis_types=(kind, kind))
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    params = {name: put(leaf, specs[name]) for name, leaf in PARAMS.items()}
    batches = [put(x, batch) for x in BATCHES]
    found = calibrate(model, params, batches)
    for one, many in zip(grams().products, found.products):
        np.testing.assert_allclose(one.matrices, many.matrices, rtol=2e-5, atol=1e-4)
        if "m" in str(specs[many.path]):
            assert not many.matrices.sharding.is_fully_replicated
    for method in ("wanda", "lats"):  # each is compiled for each device
        expected = prune_with(grams(), PARAMS, 0.5, method=method)
        pruned = prune_with(found, params, 0.5, method=method)
        for name, zero in zeros(pruned.params).items():
            np.testing.assert_array_equal(zero, zeros(expected.params)[name], err_msg=method)
            np.testing.assert_allclose(
                pruned.params[name], expected.params[name], rtol=1e-2, atol=1e-3
            )
            assert pruned.params[name].sharding == params[name].sharding


# --- afterwards -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_fine_tuning_keeps_the_zeros():
    pruned = prune_with(grams(), PARAMS, 0.75).params
    x = jnp.concatenate(BATCHES)
    y = model(PARAMS, x)
    loss = lambda p: jnp.mean((model(p, x) - y) ** 2)  # noqa: E731
    steps, rate = 60, 3e-3
    for tx in (
        optax.chain(optax.adam(rate), keep_support(support(pruned))),
        optax.chain(optax.adam(rate), soft_threshold(target_sparsity(0.75, rate, steps))),
    ):

        @jax.jit
        def step(carry, _, tx=tx):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        (tuned, _), _ = lax.scan(step, (pruned, tx.init(pruned)), length=steps)
        assert sparsity(tuned).zeros == 720
        assert loss(tuned) < 0.6 * loss(pruned)
