"""Model files: the same weights and the same model come back, and nothing else is let in."""

import json
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lats_optax
from lats_optax import models
from lats_optax.training.assembly import make_model
from lats_optax.training.config import ModelConfig, TrainConfig
from lats_optax.training.export import load_model, save_model, variables_of
from lats_optax.training.initial import load_initial
from tests import matrix

SMALL = models.create("digits-cnn", num_classes=10, width=0.25)
LEAKY = models.Neuron("lif", tau=3.0, surrogate=models.Surrogate("sigmoid", alpha=4.0))


def weights(model, shape, dtype=np.float32, seed=0):
    """Random variables, nine in ten of them zero; one is -0.0."""
    rng = np.random.default_rng(seed)

    def draw(like):
        alive = rng.random(like.shape) < 0.1
        drawn = np.where(alive, rng.normal(size=like.shape), 0.0)
        drawn.reshape(-1)[0] = -0.0
        return drawn.astype(dtype)

    return jax.tree.map(draw, variables_of(model, shape))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.cover
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (SMALL, (8, 8, 1)),
        (models.create("vgg16-bn", num_classes=3, width=1 / 16, dtype=jnp.bfloat16), (32, 32, 3)),
        (models.create("sew-resnet18", num_classes=5, width=1 / 8, neuron=LEAKY), (32, 32, 3)),
    ],
    ids=["digits-cnn", "vgg16-bn", "sew-resnet18"],
)
def test_what_is_saved_comes_back_bit_for_bit(path, model, shape, dtype):
    variables = weights(model, shape, dtype)
    save_model(path, model.clone(axis_name="replica"), variables, shape, {"data": "noise"})
    saved = load_model(path)
    assert jax.tree.structure(saved.variables) == jax.tree.structure(variables)
    for read, written in zip(jax.tree.leaves(saved.variables), jax.tree.leaves(variables)):
        assert read.dtype == written.dtype
        assert read.tobytes() == written.tobytes()
    assert models.describe(saved.model) == models.describe(model)
    assert saved.model.axis_name is None
    assert (saved.image_shape, saved.metadata) == (shape, {"data": "noise"})


@pytest.mark.slow
def test_a_loaded_model_runs(path):
    variables = weights(SMALL, (8, 8, 1))
    save_model(path, SMALL, variables, (8, 8, 1))
    saved = load_model(path)
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 1)).astype(np.float32)
    apply = jax.jit(lambda v: SMALL.apply(v, images, train=False))
    again = jax.jit(lambda v: saved.model.apply(v, images, train=False))
    np.testing.assert_array_equal(again(saved.variables), apply(variables))


def test_a_model_without_statistics_is_saved_without_them(path):
    variables = weights(SMALL, (8, 8, 1))
    with pytest.raises(ValueError, match=r"^variables: .* batch_stats/.* is missing"):
        save_model(path, SMALL, {"params": variables["params"]}, (8, 8, 1))
    assert not path.exists()


def test_an_interrupted_save_leaves_the_previous_file_whole(path, monkeypatch):
    save_model(path, SMALL, weights(SMALL, (8, 8, 1)), (8, 8, 1))
    before = path.read_bytes()

    def stop(*args):
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        with monkeypatch.context() as context:
            context.setattr(os, step, stop)
            with pytest.raises(KeyboardInterrupt):
                save_model(path, SMALL, weights(SMALL, (8, 8, 1), seed=1), (8, 8, 1))
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]


class Stranger(nn.Module):
    """A model that is none of the zoo."""

    @nn.compact
    def __call__(self, images, train):
        return nn.Dense(2)(images)


def without_head(variables):
    return {**variables, "params": {k: v for k, v in variables["params"].items() if k != "stem"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variables": without_head}, r"^variables: .*params/stem/kernel is missing"),
        (
            {"variables": lambda v: {**v, "cache": {"x": np.ones(2)}}},
            "^variables: .* not a dict of batch_stats and params",
        ),
        (
            {"variables": lambda v: jax.tree.map(lambda a: a[..., :1], v)},
            r"^variables: .*/mean is \(1,\), wanted \(14,\).* and \d+ more$",
        ),
        (
            {"variables": lambda v: jax.tree.map(lambda a: a.astype(np.int8), v)},
            r"^variables: .* is int8, wanted float16, bfloat16, float32, float64",
        ),
        ({"metadata": {"model": "x"}}, "^metadata: 'model' is taken"),
        ({"metadata": {"accuracy": 0.9}}, "^metadata: 'accuracy' is 0.9"),
        ({"image_shape": (8, 8)}, r"^image_shape is \[8, 8\]; allowed"),
        ({"image_shape": (1, 8, 8)}, "images have shape"),
        ({"model": Stranger(), "variables": lambda v: None}, "Stranger"),
    ],
)
def test_what_does_not_belong_together_is_not_saved(path, change, message):
    variables = weights(SMALL, (8, 8, 1))
    arguments = {"model": SMALL, "image_shape": (8, 8, 1)} | change
    if "variables" in change:
        arguments["variables"] = change["variables"](variables)
    if arguments["model"] is not SMALL:
        model = arguments["model"]
        arguments["variables"] = weights(model, (8, 8, 1))
    with pytest.raises(ValueError, match=message) as error:
        save_model(path, **{"variables": variables} | arguments)
    assert "\n" not in str(error.value)
    assert not path.exists()


@pytest.mark.filterwarnings("ignore:init_from is")  # it has zeros that such a run does not keep
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"classifier_bias": True, "width": 0.25, "dtype": "bfloat16"}, []),
        ({"width": 0.5}, ["width is 0.25 and the run's is 0.5"]),
        ({"name": "resnet20"}, ["name is 'digits-cnn' and the run's is 'resnet20'"]),
        (
            {"name": "sew-resnet18", "neuron": "lif"},
            ["name is 'digits-cnn'", "neuron is None and the run's is {'kind': 'lif'"],
        ),
    ],
    ids=str,
)
def test_a_run_takes_the_model_of_the_file(path, change, words):
    """Which may have options that no config has a field for, as a compacted one does."""
    cut = models.create("digits-cnn", num_classes=10, width=0.25, features={"block1/conv1": 3})
    save_model(path, cut, weights(cut, (8, 8, 1), jnp.bfloat16), (8, 8, 1))
    config = TrainConfig(model=ModelConfig(**change), init_from=path)
    wanted = make_model(config, num_classes=10)
    arguments = (path, config, wanted, (16, 16, 1), lats_optax.prunable)
    if words:
        with pytest.raises(ValueError, match=r"^init_from is ") as error:
            load_initial(*arguments)
        for word in words:
            assert word in str(error.value)
        return
    model, variables, _, _ = load_initial(*arguments)
    expected = models.describe(cut) | {"dtype": config.model.dtype}
    assert models.describe(model) == expected
    assert model.axis_name == wanted.axis_name
    assert variables["params"]["block1"]["conv1"]["kernel"].shape == (3, 3, 7, 3)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


# Files of others, and hostile ones

PLAIN = models.describe(SMALL)
ODD = [None, True, -1, 0.5, 1e300, 10**18, "", "\ud800", [], {"a": 1}, float("nan"), float("inf")]


def write(path, description=PLAIN, image_shape=(8, 8, 1), tree=None):
    tree = weights(SMALL, (8, 8, 1)) if tree is None else tree
    texts = {"model": description, "image_shape": image_shape}
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in texts.items()}
    lats_optax.save_sparse(path, tree, texts)


def refused(path):
    """The one line that a file is refused with."""
    with pytest.raises(ValueError, match=r"model\.safetensors") as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize(
    "field",
    matrix.fast(
        ["name", "num_classes", "dtype", "width", "classifier_bias", "axis_name", "time_steps"], 2
    ),
)
def test_a_description_with_any_field_changed_is_refused(path, field):
    for value in ODD:
        if (field, value) != ("classifier_bias", True):
            write(path, {**PLAIN, field: value})
            assert "description" in refused(path) or "arrays" in refused(path), value


@pytest.mark.parametrize(
    "description",
    [
        *(value for value in ODD if not isinstance(value, str)),
        *("", "{", "[" * 100_000, "1" * 5000, '{"name": "digits-cnn"}', "\x00"),
        {"name": "resnet51", "num_classes": 10},
        {"name": "resnet20", "num_classes": 10, "dtype": "float32"},
        *(
            {"name": "sew-resnet18", "num_classes": 10, "dtype": "float32"} | odd
            for odd in (
                {"time_steps": 10**12},
                {"neuron": {"tau": "x"}},
                {"neuron": {"surrogate": 1}},
            )
        ),
    ],
    ids=lambda description: str(description)[:40],
)
def test_a_description_of_another_kind_is_refused(path, description):
    write(path, description)
    refused(path)


@pytest.mark.slow
def test_a_shape_that_no_image_has_is_refused(path):
    hostile = [
        *([value, 8, 1] for value in ODD),
        [8, 8],
        [8, 8, 1, 1],
        [10**9, 10**9, 1],
        [2**14, 2**14, 4],
        "x",
        "[",
        "{}",
    ]
    for shape in hostile:
        write(path, image_shape=shape)
        assert "description" in refused(path)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (lambda v: np.ones(3), ["not a dict of batch_stats and params"]),
        (lambda v: {"params": v["params"]}, ["not a dict of batch_stats and params"]),
        (lambda v: {**v, "params": None}, ["params/block1/conv1/kernel is missing"]),
        (lambda v: {**v, "batch_stats": [v]}, ["batch_stats/0/", " is unknown, "]),
        (lambda v: {**v, "params": {**v["params"], 1: np.ones(2)}}, ["its arrays"]),
        (lambda v: {**v, "params": {**v["params"], "x": ()}}, ["other containers"]),
        (
            lambda v: {"params": v["params"], "batch_stats": v["params"]},
            ["/norm1/scale is unknown"],
        ),
    ],
)
def test_arrays_that_are_not_the_models_are_named(path, tree, words):
    write(path, tree=tree(weights(SMALL, (8, 8, 1))))
    line = refused(path)
    for word in words:
        assert word in line


def test_a_file_of_something_else_is_refused(path):
    lats_optax.save_sparse(path, {"a": np.ones(3)}, {"model": "mlp"})
    assert "not one of a model: its metadata has no image_shape;" in refused(path)
    path.write_bytes(b"hello")
    refused(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load_model(path)
