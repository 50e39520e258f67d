"""The zoo: logits recorded from PyTorch, counts worked out by hand, what every model promises."""

import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lats_optax import models
from tests import matrix, torch_weights

REFERENCE = Path(__file__).parent / "reference"
KEY = jax.random.key(0)

# Model, number of classes, options -> parameters. Worked out below, or published.
COUNTS = [
    ("resnet18", 1000, {}, 11_688_512),
    ("resnet18", 1000, {"classifier_bias": True}, 11_689_512),  # torchvision's
    ("resnet34", 1000, {"classifier_bias": True}, 21_797_672),  # torchvision's
    ("resnet50", 1000, {}, 25_556_032),
    ("resnet101", 1000, {"classifier_bias": True}, 44_549_160),  # torchvision's
    ("mobilenet-v1", 1000, {}, 4_230_976),
    ("sew-resnet18", 100, {}, 11_227_812),
    # The same convolutions, normalizations and classifiers as without spikes.
    ("sew-resnet34", 1000, {}, 21_797_672),
    ("sew-resnet50", 1000, {}, 25_557_032),
    # torchvision's vgg16_bn has 14,723,136 before its classifier, 4,224 of them biases.
    ("vgg16-bn", 10, {"classifier_bias": True}, 14_723_136 - 4_224 + 5_130),
]
# Model -> the recording.
RECORDED = {
    "resnet18": "logits_resnet18",
    "resnet50": "logits_resnet50",
    "mobilenet-v1": "logits_mobilenet_v1",
}
# A model of each class -> pixels of the smallest images.
SIZES = {"resnet18": 32, "resnet20": 4, "mobilenet-v1": 32, "vgg16-bn": 32, "sew-resnet18": 32}


def recording(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def shapes(model, size, train=False):
    """Shapes and dtypes of the logits and the variables of two images; nothing is computed."""
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    return jax.eval_shape(partial(model.init_with_output, train=train), KEY, images)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


# --- the published networks ---------------------------------------------------------------------


@pytest.mark.parametrize("name", matrix.fast(RECORDED, ["resnet18"]))
@pytest.mark.parametrize("mode", matrix.fast(["eval", "train"], ["eval"]))
def test_logits_are_the_published_ones(name, mode):
    run = recording(RECORDED[name])
    recorded = run[f"logits_{mode}"]
    with jax.enable_x64(True):
        model = models.create(name, num_classes=recorded.shape[-1], dtype=jnp.float64)
        apply = partial(model.apply, train=mode == "train", mutable=["batch_stats"])
        variables = torch_weights.variables_of(run, model)
        # To NumPy here: outside, arithmetic on float64 arrays of JAX is rounded to float32.
        logits, _ = jax.device_get(jax.jit(apply)(variables, torch_weights.images_of(run)))
    assert logits.dtype == np.float64
    # Seen: 3e-15 in evaluation, 2e-13 in training.
    np.testing.assert_allclose(logits, recorded, rtol=0, atol=1e-9 * np.abs(recorded).max())


# --- networks that nobody recorded, written out ---------------------------------------------------


def convolve(x, kernel, stride=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def normalize(x, params, stats):
    deviation = jnp.sqrt(stats["var"] + 1e-5)
    return (x - stats["mean"]) / deviation * params["scale"] + params["bias"]


def written_out_vgg(params, stats, x):
    for stage, count in enumerate([2, 2, 3, 3, 3], 1):
        for index in range(1, count + 1):
            layer = f"stage{stage}_conv{index}"
            x = convolve(x, params[layer]["kernel"])
            x = jax.nn.relu(normalize(x, params[f"{layer}_norm"], stats[f"{layer}_norm"]))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
    return x[:, 0, 0] @ params["classifier"]["kernel"]


def written_out_resnet20(params, stats, x):
    x = convolve(x, params["stem"]["kernel"])
    x = jax.nn.relu(normalize(x, params["stem_norm"], stats["stem_norm"]))
    for stage, features in enumerate([16, 32, 64], 1):
        for index in range(1, 4):
            halves = stage > 1 and index == 1
            p, s = params[f"stage{stage}_block{index}"], stats[f"stage{stage}_block{index}"]
            y = convolve(x, p["conv1"]["kernel"], 2 if halves else 1)
            y = jax.nn.relu(normalize(y, p["norm1"], s["norm1"]))
            y = normalize(convolve(y, p["conv2"]["kernel"]), p["norm2"], s["norm2"])
            if halves:
                zeros = np.zeros((*y.shape[:3], features // 4))
                x = jnp.concatenate([zeros, x[:, ::2, ::2], zeros], axis=3)
            x = jax.nn.relu(x + y)
    return x.mean((1, 2)) @ params["classifier"]["kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "written_out"),
    [("vgg16-bn", written_out_vgg), ("resnet20", written_out_resnet20)],
)
def test_logits_are_those_of_the_network_written_out(name, written_out):
    model = models.create(name, num_classes=10, dtype=jnp.float64)
    rng = np.random.default_rng(0)

    def values(leaf):
        if leaf.ndim > 1:
            return rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return rng.uniform(0.5, 1.5, size=leaf.shape)

    variables = jax.tree.map(values, shapes(models.create(name, num_classes=10), 32)[1])
    images = rng.normal(size=(2, 32, 32, 3))
    with jax.enable_x64(True):
        logits = jax.jit(partial(model.apply, train=False))(variables, images)
        expected = jax.jit(written_out)(variables["params"], variables["batch_stats"], images)
        logits, expected = jax.device_get((logits, expected))
    assert logits.dtype == expected.dtype == np.float64
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


# --- how many parameters ------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "classes", "options", "count"), matrix.fast(COUNTS, 3))
def test_count_of_parameters(name, classes, options, count):
    _, variables = shapes(models.create(name, num_classes=classes, **options), 32)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


@pytest.mark.parametrize("depth", [20, 32, 56])
def test_count_of_parameters_of_cifar_resnets(depth):
    """6n + 2 layers of weights, n blocks a stage; the paper says 0.27 M, 0.46 M and 0.85 M."""
    n, conv, norm = (depth - 2) // 6, lambda i, o: 9 * i * o, lambda features: 2 * features
    total = conv(3, 16) + norm(16) + 64 * 10
    for before, width in ((16, 16), (16, 32), (32, 64)):
        total += conv(before, width) + (2 * n - 1) * conv(width, width) + 2 * n * norm(width)
    _, variables = shapes(models.create(f"resnet{depth}", num_classes=10), 32)
    params = flat(variables["params"])
    assert sum(leaf.size for leaf in params.values()) == total
    assert round(total / 1e6, 2) == {20: 0.27, 32: 0.46, 56: 0.85}[depth]
    assert sum(leaf.ndim > 1 for leaf in params.values()) == depth


@pytest.mark.parametrize(("width", "millions"), [(1, 4.2), (0.75, 2.6), (0.5, 1.3), (0.25, 0.5)])
def test_count_of_parameters_of_mobilenets(width, millions):
    """By hand; the paper's table 6 has the millions."""
    features = [32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024]
    features = [int(width * f) for f in features]
    total = 27 * features[0] + 2 * features[0] + 1000 * features[-1]
    for before, after in itertools.pairwise(features):
        total += 9 * before + 2 * before + before * after + 2 * after
    _, variables = shapes(models.create("mobilenet-v1", num_classes=1000, width=width), 32)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == total
    assert round(total / 1e6, 1) == millions


# --- what every model promises ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", SIZES)
def test_parameters_statistics_and_logits_are_float32(name, dtype):
    model = models.create(name, num_classes=7, dtype=dtype)
    logits, variables = shapes(model, 32, train=True)
    assert logits.shape == (2, 7)
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, variables))} == {jnp.dtype("float32")}
    assert set(variables) == {"params", "batch_stats"}


@pytest.mark.parametrize("name", matrix.fast(SIZES, ["resnet20", "vgg16-bn", "sew-resnet18"]))
def test_computes_in_bfloat16(name):
    """Every layer returns bfloat16; the network as a whole, float32."""
    model = models.create(name, num_classes=7, dtype=jnp.bfloat16)
    _, variables = shapes(model, 32)
    apply = partial(model.apply, train=False, capture_intermediates=True, mutable=["intermediates"])
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    _, state = jax.eval_shape(apply, variables, images)
    inner = {
        path: leaf for path, (leaf,) in flat(state["intermediates"]).items() if "__call__" in path
    }
    assert inner.pop("__call__").dtype == jnp.float32
    assert {leaf.dtype for leaf in inner.values()} == {jnp.dtype("bfloat16")}


@pytest.mark.cover
@pytest.mark.parametrize("name", matrix.fast(SIZES, ["resnet20", "vgg16-bn"]))
def test_statistics_are_averaged_over_the_named_axis(name):
    """The traced program holds one average a normalization, and none where no axis is named."""

    def averages(axis_name):
        model = models.create(name, num_classes=7, axis_name=axis_name)
        _, variables = shapes(models.create(name, num_classes=7), 32)
        images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
        apply = partial(model.apply, train=True, mutable=["batch_stats"])
        traced = jax.make_jaxpr(apply, axis_env=[("replica", 2)])(variables, images)
        norms = sum(path.endswith("mean") for path in flat(variables["batch_stats"]))
        return str(traced).count("psum"), norms

    found, norms = averages("replica")
    assert found == norms
    assert averages(None)[0] == 0


@pytest.mark.parametrize("name", SIZES)
def test_images_of_the_wrong_shape(name):
    model, least = models.create(name, num_classes=7), SIZES[name]
    shapes(model, least)
    for shape in [(32, 32, 3), (1, least - 1, 32, 3), (1, 32, least - 1, 3), (1, 3, 32, 32, 3)]:
        with pytest.raises(ValueError, match=rf"images have shape .*at least {least}\."):
            jax.eval_shape(partial(model.init, train=False), KEY, jnp.zeros(shape))


def test_unknown_model():
    with pytest.raises(ValueError, match="model 'resnet19' is not known; known are 'digits-cnn', "):
        models.create("resnet19", num_classes=10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet50", {"num_classes": 0}, r"num_classes is 0; allowed: 1 or more\."),
        ("resnet20", {"num_classes": -1}, r"num_classes is -1; allowed: 1 or more\."),
        ("digits-cnn", {"num_classes": 0}, r"num_classes is 0; allowed: 1 or more\."),
        (
            "resnet50",
            {"bias": True},
            r"an option of 'resnet50' is 'bias'; allowed: 'width', 'classifier_bias', 'features'\.",
        ),
        ("vgg16-bn", {"num_classes": 0}, r"num_classes is 0; allowed: 1 or more\."),
        ("mobilenet-v1", {"num_classes": 0}, r"num_classes is 0; allowed: 1 or more\."),
        ("mobilenet-v1", {"width": 0.0}, r"width is 0\.0; allowed: 0\.03125 to 1000\."),
        ("mobilenet-v1", {"width": float("nan")}, r"width is nan; allowed: 0\.03125 to 1000\."),
        ("mobilenet-v1", {"depth": 18}, "is 'depth'; allowed: 'width', 'classifier_bias'"),
        ("resnet50", {"depth": 18}, "is 'depth'; allowed: 'width', 'classifier_bias'"),
        ("resnet50", {"width": 1 / 128}, r"width is 0\.0078125; allowed: 0\.015625 to 1000\."),
        ("resnet20", {"width": float("inf")}, r"width is inf; allowed: 0\.0625 to 1000\."),
        ("vgg16-bn", {"width": -1.0}, r"width is -1\.0; allowed: 0\.015625 to 1000\."),
        ("digits-cnn", {"width": 0.03}, r"width is 0\.03; allowed: 0\.0357\d* to 1000\."),
        ("sew-resnet18", {"stem": "small"}, "stem is 'small'; allowed: 'imagenet', 'cifar'"),
        ("sew-resnet18", {"connection": "XOR"}, "is 'XOR'; allowed: 'ADD', 'AND', 'IAND'"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, **{"num_classes": 10, **options})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (partial(models.ResNet, depth=19), "depth is 19; allowed: 18, 34, 50, 101"),
        (partial(models.SEWResNet, depth=101), "depth is 101; allowed: 18, 34, 50"),
        (partial(models.CifarResNet, depth=18), "depth is 18; allowed: 20, 32, 56"),
    ],
)
def test_wrong_depth(build, message):
    with pytest.raises(ValueError, match=message):
        build(num_classes=10)


# --- options of the sizes -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-cnn", *SIZES])
def test_width_multiplies_every_channel(name):
    size = SIZES.get(name, 8)
    whole, half = (
        flat(shapes(models.create(name, num_classes=7, width=width), size)[1]["params"])
        for width in (1.0, 0.5)
    )
    assert whole.keys() == half.keys()
    for path, leaf in whole.items():
        # All axes but those of the kernel's window, the image's three channels and the logits, and
        # the single input channel of a depth-wise kernel.
        fixed = {0, 1} if leaf.ndim == 4 else set()
        fixed |= {2} if leaf.ndim == 4 and leaf.shape[2] in (1, 3) else set()
        fixed |= {leaf.ndim - 1} if path.startswith("classifier/") else set()
        expected = tuple(n if axis in fixed else n // 2 for axis, n in enumerate(leaf.shape))
        assert half[path].shape == expected, path


def test_small_stem_keeps_small_images_on_four_by_four_maps():
    model = models.create("sew-resnet18", num_classes=10, stem="cifar", time_steps=2)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    apply = partial(model.init_with_output, train=False, capture_intermediates=True)
    logits, variables = jax.eval_shape(apply, KEY, images)
    maps = {
        path.removesuffix("/__call__"): leaf[0].shape
        for path, leaf in flat(variables["intermediates"]).items()
        if path.endswith("__call__")
    }
    assert logits.shape == (2, 10)
    assert variables["params"]["stem"]["kernel"].shape == (3, 3, 3, 64)
    assert maps["stem"] == (2, 32, 32, 64)
    ends = [maps[f"stage{stage}_block2"] for stage in (1, 2, 3, 4)]
    assert ends == [(2, 2, 32, 32, 64), (2, 2, 16, 16, 128), (2, 2, 8, 8, 256), (2, 2, 4, 4, 512)]
    with pytest.raises(ValueError, match="height and width of at least 8"):
        shapes(model, 4)


# --- what weights are drawn from ----------------------------------------------------------------


def drawn(name, path, size=32):
    """One array of a model's initial parameters; the others are not computed."""
    model = models.create(name, num_classes=1000)

    @jax.jit
    def leaf(key):
        return flat(model.init(key, jnp.zeros((1, size, size, 3)), train=False)["params"])[path]

    return np.asarray(leaf(jax.random.key(1, impl="rbg")))


# Model, array, variance, whether uniform (and bounded) rather than normal.
DRAWN = [
    ("resnet50", "stage1_block1/conv2/kernel", 2 / (9 * 64), False),
    ("resnet50", "stage4_block1/conv3/kernel", 2 / 512, False),
    ("resnet50", "classifier/kernel", 2 / 2048, False),
    ("mobilenet-v1", "block13/depthwise/kernel", 1 / (3 * 9), True),
    ("mobilenet-v1", "block13/pointwise/kernel", 1 / (3 * 1024), True),
    ("mobilenet-v1", "classifier/kernel", 2 / 1024, False),
    ("vgg16-bn", "stage5_conv1/kernel", 2 / (9 * 512), False),
    ("sew-resnet18", "stage4_block1/conv1/kernel", 2 / (9 * 512), False),
    ("sew-resnet18", "classifier/kernel", 1 / (3 * 512), True),
    ("sew-resnet18", "classifier/bias", 1 / (3 * 512), True),
    ("resnet56", "stage3_block1/conv1/kernel", 2 / (9 * 32), False),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "path", "variance", "uniform"),
    DRAWN,
)
def test_initial_weights(name, path, variance, uniform):
    weights = drawn(name, path)
    np.testing.assert_allclose(weights.var(), variance, rtol=0.05)
    assert abs(weights.mean()) < 4 * np.sqrt(variance / weights.size)
    furthest = np.abs(weights).max() / np.sqrt(variance)
    assert furthest <= np.sqrt(3) + 1e-6 if uniform else furthest > 3.5


def test_models_know_nothing_of_pruning_or_training():
    """Nothing but checks of options and arrays, and files; latent weights take a threshold."""
    zoo = Path(models.__file__).parent
    own = ("lats_optax.models", "lats_optax.checks.options ")
    moving = (*own, "lats_optax.torch", "lats_optax.files", "lats_optax.checks.arrays ")
    latent = ("lats_optax.prox ", "lats_optax.checks.numbers ", "lats_optax.compatibility ")
    for file in [*zoo.glob("*.py"), *zoo.with_name("torch").glob("*.py")]:
        allowed = own if file.parent == zoo else moving
        if file.name == "weights.py":
            allowed += latent
        for line in file.read_text().splitlines():
            keyword, _, imported = line.strip().partition(" ")
            if keyword in ("from", "import") and imported.startswith("lats_optax"):
                assert imported.startswith(allowed), f"{file.name}: {line}"
