"""What every model promises: names, shapes, dtypes, and batch statistics that NumPy agrees with."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lats_optax import models

PARAMETERS = {
    "stem/kernel": (3, 3, 1, 28),
    "stem_norm/scale": (28,),
    "stem_norm/bias": (28,),
    "block1/conv1/kernel": (3, 3, 28, 56),
    "block1/norm1/scale": (56,),
    "block1/norm1/bias": (56,),
    "block1/conv2/kernel": (3, 3, 56, 56),
    "block1/norm2/scale": (56,),
    "block1/norm2/bias": (56,),
    "block1/shortcut/kernel": (1, 1, 28, 56),
    "block1/shortcut_norm/scale": (56,),
    "block1/shortcut_norm/bias": (56,),
    "block2/conv1/kernel": (3, 3, 56, 56),
    "block2/norm1/scale": (56,),
    "block2/norm1/bias": (56,),
    "block2/conv2/kernel": (3, 3, 56, 56),
    "block2/norm2/scale": (56,),
    "block2/norm2/bias": (56,),
    "classifier/kernel": (56, 10),
    "classifier/bias": (10,),
}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (6, 8, 8, 1)) * 2 + 1


def create(**options):
    return models.create("digits-cnn", **{"num_classes": 10, **options})


@pytest.fixture(scope="module")
def variables(images):
    # XLA spends a second on a draw of each shape from the default generator, little on this one.
    return jax.jit(partial(create().init, train=False))(jax.random.key(0, impl="rbg"), images)


def train_step(model, variables, images):
    return jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))(variables, images)


def evaluate(model, variables, images):
    return jax.jit(partial(model.apply, train=False))(variables, images)


def intermediates(model, variables, images, **options):
    """What every module returned, by path, and the other collections."""
    apply = partial(model.apply, capture_intermediates=True, **options)
    updated = dict(jax.jit(apply)(variables, images)[1])
    flat = traverse_util.flatten_dict(updated.pop("intermediates"), sep="/")
    return {path.removesuffix("/__call__"): leaf for path, (leaf,) in flat.items()}, updated


@pytest.mark.slow
def test_parameters_are_these_and_no_others(variables):
    flat = traverse_util.flatten_dict(variables["params"], sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == PARAMETERS
    assert sum(leaf.size for leaf in flat.values()) == 101_790


@pytest.mark.parametrize("num_classes", [2, 10])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_statistics_and_logits_are_float32(images, dtype, num_classes):
    model = create(dtype=dtype, num_classes=num_classes)
    key = jax.random.key(0)
    logits, variables = jax.eval_shape(partial(model.init_with_output, train=True), key, images)
    assert logits.shape == (6, num_classes)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((logits, variables)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_computes_in_dtype(images, variables, dtype):
    inner, _ = intermediates(create(dtype=dtype), variables, images, train=False)
    assert inner.pop("__call__").dtype == jnp.float32
    assert {leaf.dtype for leaf in inner.values()} == {jnp.dtype(dtype)}


@pytest.mark.slow
def test_bfloat16_agrees_with_float32(images, variables):
    full, half = (
        evaluate(create(dtype=dtype), variables, images) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert 0 < np.abs(full - half).max() < 0.02 * np.abs(full).max()


def test_maps_stay_at_four_by_four_or_larger(images, variables):
    inner, _ = intermediates(create(), variables, images, train=False)
    assert {leaf.shape[1:3] for leaf in inner.values() if leaf.ndim == 4} == {(8, 8), (4, 4)}


def test_batch_statistics_agree_with_numpy(images, variables):
    mutable = ["batch_stats", "intermediates"]
    inner, updated = intermediates(create(), variables, images, train=True, mutable=mutable)
    before = np.asarray(inner["stem"], np.float64)
    mean, variance = before.mean((0, 1, 2)), before.var((0, 1, 2))
    normal = (before - mean) / np.sqrt(variance + 1e-5)
    np.testing.assert_allclose(inner["stem_norm"], normal, atol=1e-4)
    # From (0, 1), a tenth of the way to the statistics of the batch.
    running = updated["batch_stats"]["stem_norm"]
    np.testing.assert_allclose(running["mean"], 0.1 * mean, atol=1e-5)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * variance, rtol=1e-4)


@pytest.mark.slow
def test_evaluation_uses_the_running_statistics_one_image_at_a_time(images, variables):
    in_training, updated = train_step(create(), variables, images)
    trained = {"params": variables["params"]} | updated
    together = evaluate(create(), trained, images)
    alone = jax.lax.map(lambda im: create().apply(trained, im[None], train=False)[0], images)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert np.abs(in_training - together).max() > 0.1


@pytest.mark.slow
def test_statistics_are_shared_over_the_named_axis(images, variables):
    """Halves of a batch with a common axis are normalized as the whole, and else are not."""
    whole, _ = train_step(create(), variables, images)
    halves = images.reshape(2, 3, 8, 8, 1)

    def in_halves(axis_name):
        apply = partial(create(axis_name=axis_name).apply, train=True, mutable=["batch_stats"])
        step = jax.jit(jax.vmap(partial(apply, variables), axis_name="replica"))
        logits, updated = step(halves)
        return logits.reshape(whole.shape), updated["batch_stats"]["block2"]["norm2"]["mean"]

    logits, mean = in_halves("replica")
    np.testing.assert_allclose(logits, whole, atol=1e-4)
    np.testing.assert_allclose(mean[0], mean[1], atol=1e-6)
    logits, mean = in_halves(None)
    assert np.abs(logits - whole).max() > 0.1
    assert np.abs(mean[0] - mean[1]).max() > 1e-3


def test_unknown_name():
    with pytest.raises(ValueError, match="model 'resnet' is not known; known are 'digits-cnn'"):
        models.create("resnet", num_classes=10)


# --- descriptions -------------------------------------------------------------------------------

LEAKY = models.Neuron("lif", reset="soft", tau=3.0, surrogate=models.Surrogate("sigmoid", 4.0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("digits-cnn", {"num_classes": 10}),
        ("resnet50", {"num_classes": 1000, "dtype": jnp.bfloat16, "classifier_bias": True}),
        ("resnet56", {"num_classes": 7, "width": 0.5}),
        ("mobilenet-v1", {"num_classes": 3, "axis_name": "batch"}),
        ("vgg16-bn", {"num_classes": 3}),
        ("sew-resnet34", {"num_classes": 3, "time_steps": 2, "stem": "cifar", "neuron": LEAKY}),
    ],
)
def test_a_description_in_json_makes_the_model_again(name, options):
    model = models.create(name, **options)
    description = models.describe(model)
    assert description["name"] == name
    assert "axis_name" not in description
    again = models.create(**json.loads(json.dumps(description)))
    assert models.describe(again) == description
    assert jnp.dtype(again.dtype) == jnp.dtype(model.dtype)
    assert again.clone(dtype=model.dtype, axis_name=model.axis_name) == model


def test_only_models_of_the_zoo_have_a_description():
    with pytest.raises(ValueError, match="model is Dense, not one of the zoo: 'digits-cnn', 'res"):
        models.describe(nn.Dense(3))


@pytest.mark.parametrize(
    ("neuron", "message"),
    [
        ({"kind": "if", "level": 1}, "a value of the neuron is 'level'; allowed: 'kind', "),
        (
            {"surrogate": {"beta": 1}},
            "a value of the surrogate is 'beta'; allowed: 'name', 'alpha'",
        ),
        ({"kind": "of"}, "neuron kind is 'of'"),
    ],
)
def test_a_description_of_a_neuron_that_does_not_exist(neuron, message):
    with pytest.raises(ValueError, match=message):
        models.create("sew-resnet18", num_classes=3, neuron=neuron)
