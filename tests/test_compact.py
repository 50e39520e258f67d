"""Compaction: the outputs of the model that was given, sizes by hand, and what is refused."""

import json
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from hypothesis import given, settings
from hypothesis import strategies as st

import lats_optax
from lats_optax import compaction, models, prox
from lats_optax.torch import weights

KEY = jax.random.key(0)
# Architecture -> options that make it small, pixels of its images, their channels.
ZOO = {
    "digits-cnn": ({"width": 0.3}, 8, 1),
    "resnet20": ({"width": 0.5}, 8, 3),
    "resnet18": ({"width": 0.125}, 32, 3),
    "mobilenet-v1": ({"width": 0.25}, 32, 3),
    "vgg16-bn": ({"width": 0.25}, 32, 3),
    "sew-resnet18": ({"width": 0.125, "stem": "cifar", "time_steps": 3}, 8, 3),
    "resnet34": ({"width": 0.125, "classifier_bias": True}, 32, 3),
    "resnet50": ({"width": 0.125}, 32, 3),
    "resnet101": ({"width": 0.0625}, 32, 3),
}
# What norms scale by, so that neurons fire, and images matter at the end of deep plain networks.
SCALE = {"sew-resnet18": 2.0, "mobilenet-v1": 2.5, "vgg16-bn": 1.5}


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def nested(arrays):
    return traverse_util.unflatten_dict(arrays, sep="/")


def values(shapes, seed=0, scale=1.0, dtype=np.float32):
    """Random arrays; those of the norms too, so that dead channels are constants of either sign."""
    rng, arrays = np.random.default_rng(seed), {}
    for path, leaf in flat(shapes).items():
        leaf_name = path.rpartition("/")[2]
        if leaf_name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            array = rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in)
        elif leaf_name in ("scale", "var"):
            array = rng.uniform(0.5, 1.5, size=leaf.shape) * (scale if leaf_name == "scale" else 1)
        else:
            array = 0.4 * rng.normal(size=leaf.shape)
        arrays[path] = array.astype(dtype)
    return arrays


def zoo(name, seed=0, dtype=np.float32):
    """A model of the zoo and its random arrays by path."""
    options, size, channels = ZOO[name]
    model = models.create(name, num_classes=5, dtype=dtype, **options)
    images = jax.ShapeDtypeStruct((1, size, size, channels), dtype)
    shapes = jax.eval_shape(partial(model.init, train=False), KEY, images)
    return model, values(shapes, seed, SCALE.get(name, 1.0), dtype)


def images_for(name, dtype=np.float32):
    _, size, channels = ZOO[name]
    return np.random.default_rng(1).normal(size=(3, size, size, channels)).astype(dtype)


def evaluate(model, variables, images):
    return np.asarray(jax.jit(partial(model.apply, train=False))(variables, images))


def prunable(arrays):
    return [p for p in arrays if p.endswith("kernel") and "classifier" not in p]


# Ways of being sparse: each zeroes groups of channels of the arrays that it is given.


def outputs(arrays, rng):
    for path in prunable(arrays):
        arrays[path][..., rng.permutation(arrays[path].shape[-1])[::2]] = 0


def inputs(arrays, rng):
    for path in prunable(arrays):
        if arrays[path].shape[-2] > 3:
            arrays[path][..., rng.permutation(arrays[path].shape[-2])[::2], :] = 0


def both(arrays, rng):
    outputs(arrays, rng)
    for path in prunable(arrays):
        if arrays[path].shape[-2] > 3:
            arrays[path][..., rng.permutation(arrays[path].shape[-2])[::4], :] = 0


def streams(arrays, rng):
    """The first third of the channels of every layer: those of a residual stream in all blocks."""
    del rng
    for path in prunable(arrays):
        arrays[path][..., : arrays[path].shape[-1] // 3] = 0


def inner(arrays, rng):
    """What a block alone sees: the first convolutions of all blocks."""
    for path in prunable(arrays):
        if path.endswith("conv1/kernel"):
            arrays[path][..., rng.permutation(arrays[path].shape[-1])[::2]] = 0


def everything(arrays, rng):
    """All of this, to a lesser extent; what is left is scaled up, lest the signal be lost."""
    for path in prunable(arrays):
        kernel = arrays[path]
        kernel[..., : kernel.shape[-1] // 5] = 0
        kernel[..., rng.permutation(kernel.shape[-1])[::4]] = 0
        if kernel.shape[-2] > 3:
            kernel[..., rng.permutation(kernel.shape[-2])[::5], :] = 0
        kernel *= 1.5


def norms(arrays, rng):
    """Scales of zero: the channel is its bias."""
    for path in arrays:
        if path.endswith("scale"):
            arrays[path][rng.random(arrays[path].shape) < 0.3] = 0


slow = pytest.mark.slow
CASES = [
    *[("digits-cnn", way) for way in (both, streams, norms)],
    *[(name, everything) for name in ("resnet20", "mobilenet-v1", "vgg16-bn")],
    *[pytest.param("digits-cnn", way, marks=slow) for way in (outputs, inputs, inner)],
    *[
        pytest.param(name, way, marks=slow)
        for name in ("sew-resnet18", "resnet34", "resnet50", "resnet101")
        for way in (both, streams)
    ],
    *[
        pytest.param(name, way, marks=slow)
        for name in ("resnet20", "resnet18", "mobilenet-v1", "vgg16-bn")
        for way in (outputs, inputs, inner, norms)
        if way is not inner or name == "resnet18"
    ],
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_outputs_are_the_same(name, way):
    model, arrays = zoo(name)
    way(arrays, np.random.default_rng(2))
    variables, images = nested(arrays), images_for(name)
    small = compaction.compact(model, variables)
    expected = evaluate(model, variables, images)
    actual = evaluate(small.model, small.variables, images)
    assert np.ptp(expected, axis=0).max() > 0.01 * np.abs(expected).max()  # images do matter
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert small.report.parameters_after < 0.95 * small.report.parameters_before
    counted = sum(leaf.size for leaf in jax.tree.leaves(small.variables["params"]))
    assert counted == small.report.parameters_after
    # Once more: there is nothing left to cut, but perhaps a constant that another can stand for.
    again = compaction.compact(small.model, small.variables)
    rows = zip(small.report.layers, again.report.layers)
    assert all(after.after >= before.after - sum(before.stays.values()) for before, after in rows)
    if name == "digits-cnn":
        assert again.model == small.model
        jax.tree.map(np.testing.assert_array_equal, again.variables, small.variables)


@pytest.mark.parametrize("name", ["digits-cnn", pytest.param("resnet20", marks=slow)])
def test_in_float64_they_differ_by_its_rounding(name):
    with jax.enable_x64(True):
        model, arrays = zoo(name, dtype=np.float64)
        everything(arrays, np.random.default_rng(3))
        variables, images = nested(arrays), images_for(name, np.float64)
        small = compaction.compact(model, variables)
        expected = evaluate(model, variables, images)
        actual = evaluate(small.model, small.variables, images)
    assert actual.dtype == np.float64
    assert {leaf.dtype for leaf in jax.tree.leaves(small.variables)} == {np.dtype(np.float64)}
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize(
    "name", [*list(ZOO)[:5], *[pytest.param(name, marks=slow) for name in list(ZOO)[5:]]]
)
def test_where_nothing_is_zero_nothing_is_cut(name):
    model, arrays = zoo(name)
    if name == "sew-resnet18":
        # Neurons of which some never fire would be cut.
        arrays = {p: np.abs(a) if p.endswith("bias") else a for p, a in arrays.items()}
    small = compaction.compact(model, nested(arrays))
    assert small.model == model
    assert small.report.parameters_before == small.report.parameters_after
    assert all(row.before == row.after and not row.stays for row in small.report.layers)
    for path, array in flat(small.variables).items():
        np.testing.assert_array_equal(array, arrays[path])
        assert not np.shares_memory(array, arrays[path])


# --- sizes, by hand -----------------------------------------------------------------------------


def constant(arrays, norm):
    """What a norm makes of a channel of zeros."""
    scale, bias = arrays[f"params/{norm}/scale"], arrays[f"params/{norm}/bias"]
    mean, var = arrays[f"batch_stats/{norm}/mean"], arrays[f"batch_stats/{norm}/var"]
    return bias - mean / np.sqrt(var + 1e-5) * scale


@pytest.mark.parametrize("positive", [True, False])
def test_sizes_of_a_plain_network(positive):
    """All that is not zero; and, where a constant is above zero, one channel for all of them."""
    model, arrays = zoo("vgg16-bn")
    rng, expected = np.random.default_rng(4), {}
    for path in prunable(arrays):
        layer = path.split("/")[1]
        dead = rng.random(arrays[path].shape[-1]) < 0.6
        arrays[path][..., dead] = 0
        if not positive:
            above = constant(arrays, f"{layer}_norm") > 0
            arrays[f"params/{layer}_norm/bias"][above] -= 10
        expected[layer] = int((~dead).sum()) + positive
        assert (constant(arrays, f"{layer}_norm")[dead] > 0).any() == positive
    report = compaction.compact(model, nested(arrays)).report
    found = {row.layer: row.after for row in report.layers}
    assert found == {**expected, "classifier": 5}
    channels, parameters = 3, 0
    for after in expected.values():
        parameters += 9 * channels * after + 2 * after
        channels = after
    assert report.parameters_after == parameters + 5 * channels
    stays = {"stands for the constants of stage2_conv1": 1} if positive else {}
    assert report.layers[1].stays == stays


def test_sizes_of_residual_streams():
    """What is dead in all writers goes from all of them; what one of them writes, stays."""
    model, arrays = zoo("resnet18")
    writers = ["stage2_block1/conv2", "stage2_block1/shortcut", "stage2_block2/conv2"]
    for layer in writers:
        arrays[f"params/{layer}/kernel"][..., :5] = 0
        for norm in (layer.replace("conv", "norm"), f"{layer}_norm"):
            if f"params/{norm}/bias" in arrays:
                # Below zero, so that relu leaves nothing: no channel has to stand for constants.
                arrays[f"params/{norm}/bias"][:5] = -5
    arrays["params/stage2_block2/conv2/kernel"][..., 5:8] = 0
    small = compaction.compact(model, nested(arrays))
    rows = {row.layer: row for row in small.report.layers}
    assert {layer: rows[layer].after for layer in writers} == dict.fromkeys(writers, 11)
    assert rows["stage2_block2/conv2"].stays == {
        "written by stage2_block1/conv2, stage2_block1/shortcut": 3
    }
    assert dict(small.model.features) == {"stage2_block1/conv2": 11, "stage2_block2/conv2": 11}
    assert small.variables["params"]["stage3_block1"]["conv1"]["kernel"].shape == (3, 3, 11, 32)
    assert re.search(r"\nstage2_block2/conv2 +16 → 11 .* 3: written by", str(small.report))


def test_padded_shortcuts_follow_the_channels_that_are_left():
    model, arrays = zoo("resnet20")
    stem = [p for p in prunable(arrays) if re.search("stem|stage1_block./conv2", p)]
    for path in stem:
        arrays[path][..., [1, 4]] = 0
        norm = path.replace("stem", "stem_norm").replace("conv2", "norm2").replace("/kernel", "")
        arrays[f"{norm}/bias"][[1, 4]] = -5
    for block in (2, 3):
        arrays[f"params/stage2_block{block}/conv2/kernel"][..., [0, 6]] = 0
    arrays["params/stage2_block1/conv2/kernel"][..., [0, 6]] = 0
    small = compaction.compact(model, nested(arrays))
    # Of 8 channels, which the 16 of stage 2 have from 4 on, 1 and 4 are gone; so may 0 of the 16,
    # but 6 has been written by channel 2.
    assert small.model.features["stem"] == 6
    places = [-1, -1, -1, -1, 0, -1, 1, 2, -1, 3, 4, 5, -1, -1, -1, -1]
    kept = [i for i in range(16) if i or small.model.features.get("stage2_block1/conv2") != 15]
    assert list(small.model.channel_index["stage2_block1"]) == [places[i] for i in kept]
    found = models.describe(small.model)
    again = models.create(**json.loads(json.dumps(found)))
    assert again.clone(dtype=small.model.dtype) == small.model
    hash(again)  # what jit asks of a static argument


@pytest.mark.parametrize(("bias", "stays"), [(9.0, True), (-9.0, False)])
def test_constants_before_a_padded_depthwise_convolution(bias, stays):
    """Above zero they vary at the borders; a channel that is not read goes in any case."""
    model, arrays = zoo("mobilenet-v1")
    arrays["params/block3/pointwise/kernel"][..., :4] = 0
    arrays["params/block3/pointwise_norm/bias"][:4] = bias
    arrays["params/block4/depthwise/kernel"][..., 3:6] = 0
    report = compaction.compact(model, nested(arrays)).report
    rows = {row.layer: row for row in report.layers}
    assert rows["block3/pointwise"].after == rows["block4/depthwise"].after == (29 if stays else 26)
    reason = {"constant, but not at the borders behind block4/depthwise": 3}
    assert rows["block3/pointwise"].stays == (reason if stays else {})


# --- what is done with the model ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-cnn", pytest.param("resnet20", marks=slow)])
def test_training_goes_on(name):
    model, arrays = zoo(name)
    everything(arrays, np.random.default_rng(5))
    small = compaction.compact(model, nested(arrays))
    images = images_for(name)

    @jax.jit
    def step(params, batch_stats):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = small.model.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[:, 0]), updated

        (value, updated), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, gradients), updated

    before, params, updated = step(**small.variables)
    after, *_ = step(params, **updated)
    assert np.isfinite(before)
    assert after < before
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, small.variables["params"])


@pytest.mark.slow
def test_what_group_lasso_leaves_of_a_network_in_training():
    """The whole way: soft thresholds on output channels, then a smaller model."""
    model, arrays = zoo("digits-cnn")
    images, labels, steps = images_for("digits-cnn"), np.arange(3), 10
    target = lats_optax.target_sparsity(lats_optax.uniform(0.6), 1e-2, steps)
    mask = lats_optax.select("kernel", exclude="classifier")
    threshold = lats_optax.soft_threshold(target, operator=prox.Axes(), mask=mask)
    tx = optax.chain(optax.adam(1e-2), threshold)

    @jax.jit
    def step(variables, state):
        def loss(params):
            logits, stats = model.apply(
                {**variables, "params": params}, images, train=True, mutable="batch_stats"
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

        gradients, stats = jax.grad(loss, has_aux=True)(variables["params"])
        updates, state = tx.update(gradients, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **stats}, state

    variables = jax.tree.map(jnp.asarray, nested(arrays))
    state = tx.init(variables["params"])
    for _ in range(steps):
        variables, state = step(variables, state)
    small = compaction.compact(model, variables)
    for row in small.report.layers[:-1]:
        alive = (flat(variables)[f"params/{row.layer}/kernel"] != 0).any((0, 1, 2)).sum()
        assert row.after - sum(row.stays.values()) == alive < row.before
    expected = evaluate(model, variables, images)
    actual = evaluate(small.model, small.variables, images)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("multiple", [1, 4, 1000])
@pytest.mark.parametrize("name", ["digits-cnn", "resnet20", "mobilenet-v1"])
def test_channels_are_rounded_up(name, multiple):
    model, arrays = zoo(name)
    everything(arrays, np.random.default_rng(0))
    exact = compaction.compact(model, nested(arrays))
    small = compaction.compact(model, nested(arrays), multiple_of=multiple)
    for before, after in zip(exact.report.layers, small.report.layers):
        assert before.after <= after.after <= after.before
        assert after.after % multiple == 0 or after.after == after.before
    if multiple == 1:
        assert str(small.report) == str(exact.report)
    elif multiple == 4:
        assert small.report.parameters_after < small.report.parameters_before
        assert "for a multiple of 4" in str(small.report)
        if name == "digits-cnn":
            images = images_for(name)
            np.testing.assert_allclose(
                evaluate(small.model, small.variables, images),
                evaluate(model, nested(arrays), images),
                rtol=1e-4,
                atol=1e-5,
            )
    else:
        assert small.report.parameters_after == small.report.parameters_before


@pytest.mark.parametrize("multiple", [0, -4, 2.0, True, None])
def test_a_multiple_that_is_not_one(multiple):
    model, arrays = zoo("digits-cnn")
    with pytest.raises(ValueError, match=f"multiple_of is {multiple}; allowed: a whole number of"):
        compaction.compact(model, nested(arrays), multiple_of=multiple)


@pytest.mark.parametrize("name", ["resnet20", "mobilenet-v1"])
def test_a_compacted_model_is_described_and_built_again(name):
    model, arrays = zoo(name)
    everything(arrays, np.random.default_rng(6))
    small = compaction.compact(model, nested(arrays))
    description = json.loads(json.dumps(models.describe(small.model)))
    again = models.create(**description)
    assert models.describe(again) == description
    init = partial(again.init, train=False)
    shapes = jax.eval_shape(init, KEY, images_for(name))
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, small.variables)


@pytest.mark.slow
def test_a_compacted_model_goes_to_pytorch():
    model, arrays = zoo("resnet20")
    everything(arrays, np.random.default_rng(6))
    small = compaction.compact(model, nested(arrays))
    tensors = weights.variables_to_torch(small.variables, small.model)
    back = weights.variables_from_torch(tensors, small.model)
    jax.tree.map(np.testing.assert_array_equal, back, small.variables)


def test_a_shortcut_is_not_the_identity_because_channels_happen_to_be_equal():
    streams = {f"stage1_block{block}/conv3": 64 for block in (1, 2, 3)}
    model = models.create("resnet50", num_classes=3, features=streams)
    init = partial(model.init, train=False)
    shapes = jax.eval_shape(init, KEY, jnp.zeros((1, 32, 32, 3)))
    assert shapes["params"]["stage1_block1"]["shortcut"]["kernel"].shape == (1, 1, 64, 64)
    assert "shortcut" not in shapes["params"]["stage1_block2"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vgg16-bn", {"features": {"conv1": 3}}, "layer of features is 'conv1'; allowed: 'stage1_"),
        ("vgg16-bn", {"features": {"stage1_conv1": 0}}, "of stage1_conv1 is 0; allowed: 1 or more"),
        ("resnet18", {"features": {"stem": 2.5}}, "features of stem is 2.5; allowed: 1 or more"),
        (
            "resnet18",
            {"features": {"stem": 60}},
            "features of stage1_block1/conv2 is 64; allowed: 60, as many as stem has",
        ),
        ("sew-resnet18", {"features": {"stage1_block1/conv2": 1}}, "is 1; allowed: 64, as many as"),
        (
            "digits-cnn",
            {"features": {"block2/conv2": 9}},
            "is 9; allowed: 56, as many as block1/co",
        ),
        ("mobilenet-v1", {"features": {"block1/depthwise": 9}}, "layer of features is 'block1/dep"),
        (
            "resnet20",
            {"channel_index": {"stage1_block1": [0]}},
            "block of channel_index is 'stage1_block1'; all",
        ),
        (
            "resnet20",
            {"channel_index": {"stage2_block1": [0, 16]}},
            "channel_index of stage2_block1 is .*; allowed: 32 numbers from -1 to 15",
        ),
        (
            "resnet20",
            {"features": {f"stage2_block{block}/conv2": 9 for block in (1, 2, 3)}},
            "channel_index of stage2_block1 is None; allowed: 9 of them, for 16 channels do not "
            "fit into 9",
        ),
    ],
)
def test_channels_that_do_not_fit(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, num_classes=3, **options)


# --- sequences ----------------------------------------------------------------------------------


def norm(**options):
    return nn.BatchNorm(use_running_average=True, **options)


def pool(x):
    return nn.max_pool(x, (2, 2), (2, 2))


def rows(x):
    return x.reshape(x.shape[0], -1)


SEQUENCES = {
    "dense": ([nn.Dense(8), nn.relu, nn.Dense(8, use_bias=False), norm(), jnp.tanh], (2, 5)),
    "images": ([nn.Conv(8, (3, 3)), norm(), nn.gelu, pool, nn.Conv(6, (3, 3)), rows], (2, 4, 4, 2)),
    "no padding": (
        [nn.Conv(8, (3, 3), padding="VALID"), nn.sigmoid, nn.Conv(6, (2, 2), padding="CIRCULAR")],
        (2, 5, 5, 2),
    ),
    "depth-wise": (
        [
            *[nn.Conv(6, (1, 1)), norm(use_bias=False), nn.relu],
            *[nn.Conv(6, (3, 3), feature_group_count=6, strides=2), norm(use_scale=False)],
            *[nn.Sequential([nn.leaky_relu, nn.Dense(6)]), lambda x: x.mean((1, 2))],
        ],
        (2, 4, 4, 3),
    ),
    "one dimension": ([nn.Conv(8, 3, padding="CAUSAL"), nn.silu, nn.Conv(8, 3, 2)], (2, 8, 3)),
    "steps": ([nn.Dense(8), lambda x: jnp.where(x > 0.1, 1.0, 0.0)], (4, 5)),
    "other modules": (
        [nn.Dense(8), nn.PReLU(), nn.Dropout(0.5, deterministic=True), nn.Dense(8), nn.LayerNorm()],
        (2, 5),
    ),
}


def sequence(name, zeros=0.5):
    layers, shape = SEQUENCES[name]
    model = nn.Sequential([*layers, nn.Dense(3, use_bias=False)])
    sample = jax.ShapeDtypeStruct(shape, np.float32)
    arrays = values(jax.eval_shape(model.init, KEY, sample), seed=7)
    rng = np.random.default_rng(8)
    for path in prunable(arrays):
        if path != f"params/layers_{len(layers)}/kernel":
            arrays[path][..., rng.permutation(arrays[path].shape[-1])[::2]] = 0
    return model, nested(arrays), sample


@pytest.mark.parametrize("name", SEQUENCES)
def test_outputs_of_a_sequence_are_the_same(name):
    model, variables, sample = sequence(name)
    small = compaction.compact(model, variables, sample=sample)
    x = np.random.default_rng(9).normal(size=sample.shape).astype(np.float32)
    expected = jax.jit(model.apply)(variables, x)
    np.testing.assert_allclose(
        jax.jit(small.model.apply)(small.variables, x), expected, rtol=0, atol=2e-6
    )
    assert np.ptp(expected, axis=0).max() > 0.01
    assert small.report.parameters_after < small.report.parameters_before
    shapes = jax.eval_shape(small.model.init, KEY, sample)
    assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, small.variables)


def test_sizes_of_a_sequence():
    model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(4), nn.relu, nn.Dense(2)])
    bias = np.array([1.0, -1.0, 2.0, 0.5], np.float32)
    first = np.ones((3, 4), np.float32) * [1, 0, 0, 1]  # units 1 and 2 are 0 and 2
    second = np.ones((4, 4), np.float32) * [[1], [1], [3], [1]] * [1, 1, 0, 1]
    third = np.ones((4, 2), np.float32) * [[1], [0], [4], [1]]  # unit 1 is not read, 2 is 0.5
    layers = [(first, bias), (second, np.array([0, 0, 0.5, 0])), (third, np.zeros(2))]
    params = {
        f"layers_{2 * i}": {"kernel": np.float32(kernel), "bias": np.float32(bias)}
        for i, (kernel, bias) in enumerate(layers)
    }
    small = compaction.compact(model, {"params": params}, sample=np.ones((1, 3), np.float32))
    assert [row.after for row in small.report.layers] == [2, 2, 2]
    params = small.variables["params"]
    np.testing.assert_array_equal(params["layers_2"]["bias"], [6, 6])  # 3 times 2
    np.testing.assert_array_equal(params["layers_4"]["bias"], [2, 2])  # 4 times 0.5
    assert [layer.features for layer in small.model.layers[::2]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("layers", "layer", "reason"),
    [
        ([nn.Dense(6), nn.softmax], "layers_1", "it mixes channels"),
        ([nn.Dense(6), lambda x: x.reshape(-1, 6)], "layers_1", "it is made for 6 channels"),
        ([nn.Dense(6), lambda x: x * np.arange(6.0)], "layers_1", "it is made for 6 channels"),
        (
            [nn.Conv(6, 3), nn.relu, nn.Conv(6, 3, feature_group_count=3)],
            "layers_2",
            "its 3 groups of channels have to stay equal",
        ),
        ([nn.Dense(6), *[nn.Dense(6)] * 2], "layers_1", "its parameters are used in more than one"),
        ([nn.Conv(6, 1), nn.Conv(6, 1, mask=np.ones((1, 6, 6)))], "layers_1", "has a mask"),
    ],
)
def test_what_keeps_its_channels_is_explained(layers, layer, reason):
    model = nn.Sequential([*layers, nn.Dense(2)])
    x = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)
    arrays = values(jax.eval_shape(model.init, KEY, x))
    arrays["params/layers_0/kernel"][..., :3] = 0
    small = compaction.compact(model, nested(arrays), sample=x)
    assert reason in small.report.pinned[layer]
    assert f"{layer} keeps all that it reads and writes: {small.report.pinned[layer]}" in str(
        small.report
    )
    first = small.report.layers[0]
    assert (first.before, first.after) == (6, 6)
    assert first.stays == {f"{layer} reads it": 3}


@st.composite
def plain_networks(draw):
    """Layers, and which of their kernels' rows and columns are zero."""
    layers, count = [], draw(st.integers(1, 3))
    for _ in range(count):
        layers.append(nn.Dense(4, use_bias=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(norm(use_bias=draw(st.booleans()), use_scale=draw(st.booleans())))
        if draw(st.booleans()):
            layers.append(draw(st.sampled_from([nn.relu, jnp.tanh, rows])))
    return [*layers, nn.Dense(4, use_bias=draw(st.booleans()))], draw(st.integers(0, 2**16))


def by_hand(model, variables, x):
    """What the layers compute, in NumPy."""
    names = {nn.relu: lambda x: np.maximum(x, 0), jnp.tanh: np.tanh, rows: rows}
    for index, layer in enumerate(model.layers):
        if isinstance(layer, nn.Module):
            p = variables.get("params", {}).get(f"layers_{index}", {})
        if isinstance(layer, nn.Dense):
            assert p["kernel"].shape[-1] == layer.features
            x = x @ p["kernel"] + p.get("bias", 0)
        elif isinstance(layer, nn.BatchNorm):
            stats = variables["batch_stats"][f"layers_{index}"]
            x = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
            x = x * p.get("scale", 1) + p.get("bias", 0)
        else:
            x = names[layer](x)
    return x


@settings(max_examples=20, deadline=None, derandomize=True)
@given(plain_networks())
def test_any_plain_network(network):
    layers, seed = network
    model, x = nn.Sequential(layers), np.random.default_rng(seed).normal(size=(3, 4))
    shapes = jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((1, 4), np.float32))
    arrays = values(shapes, seed)
    rng = np.random.default_rng(seed + 1)
    for path in prunable(arrays):
        arrays[path][:, rng.random(4) < 0.4] = 0
        arrays[path][rng.random(4) < 0.3] = 0
    variables = nested(arrays)
    try:
        small = compaction.compact(
            model, variables, sample=jax.ShapeDtypeStruct((1, 4), np.float32)
        )
    except ValueError as error:
        # Only where nothing that such a layer tells apart gets to the output.
        named = re.findall(r"layers_\d+", str(error))
        other = {
            **arrays,
            **{f"params/{n}/kernel": arrays[f"params/{n}/kernel"] * 0 for n in named},
        }
        assert named
        changes = by_hand(model, variables, x) - by_hand(model, nested(other), x)
        np.testing.assert_allclose(changes, np.broadcast_to(changes[0], changes.shape), atol=1e-5)
        return
    actual, expected = by_hand(small.model, small.variables, x), by_hand(model, variables, x)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))


# --- what is refused ----------------------------------------------------------------------------

DENSE = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(2)])
X = np.ones((1, 4), np.float32)


def dense_arrays(**changes):
    arrays = values(jax.eval_shape(DENSE.init, KEY, X))
    return nested({**arrays, **{f"params/{k.replace('__', '/')}": v for k, v in changes.items()}})


@pytest.mark.parametrize(
    ("model", "variables", "sample", "message"),
    [
        (nn.Dense(3), {}, X, "model is Dense; allowed: ResNet, .*, Sequential"),
        (DENSE, dense_arrays(), None, "sample is None; allowed with a Sequential: an input"),
        (DENSE, dense_arrays(), "x", "sample: the model cannot be called with it"),
        (DENSE, [], X, r"variables is \[\]; allowed: a dict with params in it"),
        (DENSE, {"params": {}}, X, "do not fit the model:\n  params/layers_0/bias is missing"),
        (DENSE, dense_arrays(layers_0__bias=np.ones(4)), X, r"layers_0/bias is \(4,\), wanted \(3"),
        (
            DENSE,
            dense_arrays(layers_9__kernel=X),
            X,
            r"params/layers_9/kernel is unknown, \(1, 4\)",
        ),
        (
            DENSE,
            dense_arrays(layers_0__kernel=np.full((4, 3), np.nan)),
            X,
            "params/layers_0/kernel is not finite",
        ),
        (
            DENSE,
            dense_arrays(layers_0__kernel=np.zeros((4, 3))),
            X,
            "leave no channel in layers_0: .* at least one channel in each",
        ),
        (
            nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)]),
            None,
            X,
            r"layers_1 \(BatchNorm\) normalizes with the statistics of the batch",
        ),
        (
            nn.Sequential([nn.Dense(3), lambda x: (x, x), lambda x, y: x + y]),
            None,
            X,
            r"layers_1 \(<lambda>\) returns .*; allowed: an array",
        ),
        (
            nn.Sequential([nn.Dense(3), nn.Dropout(0.5, deterministic=False)]),
            None,
            X,
            r"layers_1 \(Dropout\) cannot be run in evaluation",
        ),
    ],
)
def test_refused(model, variables, sample, message):
    if variables is None:
        variables = nested(
            values(jax.eval_shape(lambda: model.init({"params": KEY, "dropout": KEY}, X)))
        )
    with pytest.raises(ValueError, match=message):
        compaction.compact(model, variables, sample=sample)


def test_a_layer_of_the_zoo_that_would_vanish_is_named():
    model, arrays = zoo("resnet18")
    arrays["params/stage2_block2/conv1/kernel"][:] = 0
    arrays["params/stage2_block2/norm1/bias"][:] = -5
    with pytest.raises(ValueError, match="leave no channel in stage2_block2/conv1: "):
        compaction.compact(model, nested(arrays))
    missing = {path: array for path, array in arrays.items() if "stem/" not in path}
    with pytest.raises(ValueError, match="params/stem/kernel is missing"):
        compaction.compact(model, nested(missing))
