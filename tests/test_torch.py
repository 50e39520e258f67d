"""PyTorch weights: recorded names, scalar arithmetic, bits there and back, PyTorch itself."""

import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from lats_optax import models, s_lats_threshold
from lats_optax.torch import weights
from tests import matrix

REFERENCE = Path(__file__).parent / "reference"
PLIF = models.Neuron("plif")

# Name of a model, its options, layout. Every model with a PyTorch form, every layout.
FORMS = [
    *(("resnet18", {}, layout) for layout in ("torchvision", "lats")),
    ("resnet50", {"classifier_bias": True}, "lats"),
    ("resnet34", {"classifier_bias": True}, None),
    ("resnet101", {"width": 0.25}, None),
    ("mobilenet-v1", {"width": 0.25}, "lats"),
    *((f"resnet{depth}", {}, "akamaster") for depth in (20, 32, 56)),
    ("vgg16-bn", {}, "torchvision"),
    ("sew-resnet18", {}, "spikingjelly"),
    ("sew-resnet34", {"neuron": PLIF}, None),
    ("sew-resnet50", {"neuron": PLIF}, None),
    ("vit-tiny", {"depth": 2}, "timm"),
]
FORM_IDS = [f"{name}-{layout}" for name, _, layout in FORMS]
each_form = pytest.mark.parametrize(("name", "options", "layout"), FORMS, ids=FORM_IDS)
# Small arrays, for the fast suite.
LIGHT = ("mobilenet-v1", "resnet20", "vit-tiny")
DTYPES = [jnp.dtype(dtype) for dtype in ("float32", "bfloat16", "float16", "float64")]


def create(name="resnet20", num_classes=10, **options):
    return models.create(name, num_classes=num_classes, **options)


def shapes(model, channels=3):
    images = jnp.zeros((1, 32, 32, channels))
    return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def any_bits(model):
    """Variables of all dtypes in turn, of arbitrary bits: NaNs, infinities and -0.0 included."""
    # Each array begins elsewhere in the pool, so that those of one shape differ.
    pool, dtypes = np.random.default_rng(0).bytes(999_983), itertools.cycle(DTYPES)
    offsets = itertools.count()

    def draw(leaf):
        dtype, count = next(dtypes), int(np.prod(leaf.shape))
        drawn = np.resize(np.frombuffer(pool[next(offsets) :], np.uint8), count * dtype.itemsize)
        return drawn.view(dtype).reshape(leaf.shape)

    return jax.tree.map(draw, shapes(model))


def normal(model, dtype=np.float32, channels=3):
    """Variables of which a threshold of 0.5 prunes some; variances are positive."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.standard_normal(leaf.shape, np.float32).astype(dtype)
        return values if values.ndim > 1 else np.abs(values)

    return jax.tree.map(draw, shapes(model, channels))


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert type(array) is type(right[name]) is np.ndarray, name
        assert (array.shape, array.dtype) == (right[name].shape, right[name].dtype), name
        assert array.tobytes() == right[name].tobytes(), name


# --- names and layouts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "layout"),
    [pytest.param(*form, marks=() if form[0] in LIGHT else pytest.mark.slow) for form in FORMS],
    ids=FORM_IDS,
)
def test_round_trip_keeps_every_bit(name, options, layout):
    model = create(name, **options)
    variables = any_bits(model)
    tensors = weights.variables_to_torch(variables, model, layout=layout)
    back = weights.variables_from_torch(tensors, model)
    assert_same_bits(flat(back), flat(variables))
    assert_same_bits(weights.variables_to_torch(back, model, layout=layout), tensors)


@pytest.mark.parametrize(
    ("name", "file", "layout"),
    matrix.fast(
        [
            ("resnet18", "logits_resnet18", "lats"),
            ("resnet50", "logits_resnet50", "lats"),
            ("mobilenet-v1", "logits_mobilenet_v1", "lats"),
            ("sew-resnet18", "logits_sew_resnet18", "spikingjelly"),
        ],
        1,
    ),
)
def test_names_and_shapes_are_the_recorded_ones(name, file, layout):
    with np.load(REFERENCE / f"{file}.npz") as recording:
        recorded = json.loads(str(recording["params"]))
        model = create(name, recording["logits_eval"].shape[-1])
    tensors = weights.variables_to_torch(normal(model), model, layout=layout)
    counters = {name for name in tensors if name.endswith(".num_batches_tracked")}
    means = {name for name, _ in recorded if name.endswith(".running_mean")}
    assert counters == {name.replace("running_mean", "num_batches_tracked") for name in means}
    assert {name: list(tensors[name].shape) for name in tensors.keys() - counters} == dict(recorded)


def test_where_each_weight_lies():
    """kernel[height, width, input, output] is weight[output, input, height, width]."""
    model = create("mobilenet-v1", width=0.25)
    variables = normal(model)
    tensors = weights.variables_to_torch(variables, model)
    params = variables["params"]
    for weight, kernel in [
        (tensors["model.0.0.weight"], params["stem"]["kernel"]),
        (tensors["model.3.0.weight"], params["block3"]["depthwise"]["kernel"]),
        (tensors["model.3.3.weight"], params["block3"]["pointwise"]["kernel"]),
        (tensors["fc.weight"], params["classifier"]["kernel"][None, None]),
    ]:
        height, width, inputs, outputs = kernel.shape
        assert weight.shape == (outputs, inputs, height, width)
        for index in np.random.default_rng(0).integers(kernel.shape, size=(50, 4)):
            h, w, i, o = index
            assert weight[o, i, h, w] == kernel[h, w, i, o]
    for name, collection, leaf in [
        ("weight", "params", "scale"),
        ("bias", "params", "bias"),
        ("running_mean", "batch_stats", "mean"),
        ("running_var", "batch_stats", "var"),
    ]:
        norm = variables[collection]["block3"]["pointwise_norm"]
        np.testing.assert_array_equal(tensors[f"model.3.4.{name}"], norm[leaf])


@pytest.mark.slow
def test_layouts_of_a_resnet_differ_in_the_classifier_alone():
    model = create("resnet18", classifier_bias=True)
    variables = normal(model)
    torchvision = weights.variables_to_torch(variables, model)
    lats = weights.variables_to_torch(variables, model, layout="lats")
    assert torchvision["fc.weight"].shape == (10, 512)
    assert lats["fc.weight"].shape == (10, 512, 1, 1)
    assert_same_bits(lats | {"fc.weight": lats["fc.weight"][:, :, 0, 0]}, torchvision)


@pytest.mark.slow
def test_trained_time_constants_of_spiking_neurons():
    model = create("sew-resnet18", neuron=PLIF)
    variables = normal(model)
    tensors = weights.variables_to_torch(variables, model)
    names = {name for name in tensors if name.endswith(".w")}
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert names == {
        "sn1.w",
        *(f"{block}.sn{i}.w" for block in blocks for i in (1, 2)),
        *(f"layer{stage}.0.downsample_sn.w" for stage in (2, 3, 4)),
    }
    tau = variables["params"]["stage3_block2"]["neuron1"]["tau_logit"]
    assert tensors["layer3.1.sn1.w"] == tau
    assert tensors["layer3.1.sn1.w"].shape == ()
    with pytest.raises(ValueError, match=r"sn1\.w is unknown, \(\)"):
        weights.variables_from_torch(tensors, create("sew-resnet18"))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_training_scripts_put_around_a_state_dict(wrapper, prefix):
    model = create()
    variables = normal(model)
    tensors = weights.variables_to_torch(variables, model)
    tensors = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    checkpoint = tensors if wrapper is None else {"epoch": 3, wrapper: tensors, "optimizer": {}}
    assert_same_bits(flat(weights.variables_from_torch(checkpoint, model)), flat(variables))


def test_results_share_no_memory_with_what_was_given():
    model = create()
    variables = normal(model)
    tensors = weights.variables_to_torch(variables, model)
    back = weights.variables_from_torch(tensors, model)
    for tensor in tensors.values():
        tensor[...] = 7
    assert_same_bits(flat(back), flat(variables))


@pytest.mark.slow
def test_other_numbers_of_channels():
    model = create()
    variables = normal(model, channels=1)
    tensors = weights.variables_to_torch(variables, model, channels=1)
    assert tensors["conv1.weight"].shape == (16, 1, 3, 3)
    assert_same_bits(
        flat(weights.variables_from_torch(tensors, model, channels=1)), flat(variables)
    )
    message = r"conv1\.weight is \(16, 1, 3, 3\), wanted \(16, 3, 3, 3\)"
    with pytest.raises(ValueError, match=message):
        weights.variables_from_torch(tensors, model)


# --- latent weights -----------------------------------------------------------------------------


def soft_threshold(x, d):
    return math.copysign(abs(x) - d, x) if abs(x) > d else 0.0


def assert_thresholded(kernel, weight, d):
    """Samples of a kernel against scalars of a latent weight, and no zero is -0.0."""
    assert kernel.dtype == weight.dtype
    assert not np.signbit(kernel[kernel == 0]).any()
    weight = weight.reshape((*weight.shape, 1, 1)[:4])
    kernel = kernel.reshape((1, 1, *kernel.shape)[-4:])
    step = 2.0 ** -{"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}[weight.dtype.name]
    pruned = 0
    for h, w, i, o in np.random.default_rng(1).integers(kernel.shape, size=(100, 4)):
        expected = soft_threshold(float(weight[o, i, h, w]), d)
        pruned += expected == 0
        assert float(kernel[h, w, i, o]) == pytest.approx(expected, abs=4 * step)
        assert (float(kernel[h, w, i, o]) == 0) == (expected == 0)
    assert 10 < pruned < 90


@pytest.mark.parametrize(
    ("name", "options", "pruned"),
    matrix.fast(
        [
            ("resnet18", {}, 21),
            ("mobilenet-v1", {"width": 0.25}, 28),
            ("resnet18", {"classifier_bias": True}, 20),
        ],
        [("mobilenet-v1", {"width": 0.25}, 28)],
    ),
)
def test_latent_weights_of_lats(name, options, pruned):
    """All convolutions and a classifier without a bias; what is dense in LATS keeps its bits."""
    model = create(name, **options)
    variables = normal(model)
    latent = weights.variables_to_torch(variables, model, layout="lats")
    sparse = flat(weights.variables_from_torch(latent, model, threshold=0.5))
    dense = {path for path in sparse if not path.endswith("/kernel")}
    if options == {"classifier_bias": True}:
        dense.add("params/classifier/kernel")
    assert_same_bits({p: sparse[p] for p in dense}, {p: flat(variables)[p] for p in dense})
    assert len(sparse.keys() - dense) == pruned
    for path in sparse.keys() - dense:
        kernel = flat(variables)[path]
        weight = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        assert_thresholded(sparse[path], weight, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_latent_weights_keep_their_dtype(dtype):
    model = create()
    latent = weights.variables_to_torch(normal(model, dtype), model)
    sparse = weights.variables_from_torch(latent, model, threshold=0.3)
    assert {leaf.dtype for leaf in jax.tree.leaves(sparse)} == {dtype}
    kernel = sparse["params"]["stage2_block1"]["conv1"]["kernel"]
    assert_thresholded(kernel, latent["layer2.0.conv1.weight"], 0.3)


@pytest.mark.slow
def test_a_threshold_of_zero_leaves_the_values():
    model = create()
    latent = weights.variables_to_torch(normal(model), model)
    latent["conv1.weight"][0, 0, 0, 0] = -0.0
    sparse = weights.variables_from_torch(latent, model, threshold=0)
    as_is = weights.variables_from_torch(latent, model)
    assert np.signbit(as_is["params"]["stem"]["kernel"][0, 0, 0, 0])
    assert not np.signbit(sparse["params"]["stem"]["kernel"][0, 0, 0, 0])
    jax.tree.map(np.testing.assert_array_equal, sparse, as_is)


@pytest.mark.slow
def test_latent_weights_of_str():
    """A threshold of its own for each layer that has one; a scale of -12800 prunes nothing."""
    model = create("resnet18")
    variables = normal(model)
    latent = weights.variables_to_torch(variables, model, layout="lats")
    scales = {"layer1.0.conv2": -0.3, "layer2.0.downsample.0": -1.5, "fc": 0.2, "conv1": -12800.0}
    own = {f"{m}.sparseThreshold": np.full((1, 1), s, np.float32) for m, s in scales.items()}
    params = weights.variables_from_torch(latent | own, model)["params"]
    for module, kernel in [
        ("layer1.0.conv2", params["stage1_block1"]["conv2"]["kernel"]),
        ("layer2.0.downsample.0", params["stage2_block1"]["shortcut"]["kernel"]),
        ("fc", params["classifier"]["kernel"]),
    ]:
        d = 1 / (1 + math.exp(-float(np.float32(scales[module]))))
        assert_thresholded(kernel, latent[f"{module}.weight"], d)
    unchanged = ["stem", "stage1_block2", "stage4_block2"]
    for layer in unchanged:
        assert_same_bits(flat(params[layer]), flat(variables["params"][layer]))
    message = r"threshold is 0\.1; allowed: None, since the state dict has its own: conv1\.sparse"
    with pytest.raises(ValueError, match=message):
        weights.variables_from_torch(latent | own, model, threshold=0.1)
    wrong = {"conv1.sparseThreshold": np.zeros(64), "bn1.sparseThreshold": np.zeros((1, 1))}
    with pytest.raises(ValueError, match="and ResNet do not fit") as raised:
        weights.variables_from_torch(latent | wrong, model)
    assert "conv1.sparseThreshold is (64,), wanted () or (1,) or (1, 1)" in str(raised.value)
    assert "bn1.sparseThreshold is unknown, (1, 1)" in str(raised.value)


# --- what does not fit --------------------------------------------------------------------------


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


# What becomes of a state dict -> all that the error has to say, after its first line.
WRONG = {
    "unknown": (
        lambda t: t | {"fc.weight": np.ones((2, 3)), "layer1.9.bn1.num_batches_tracked": 0},
        ["fc.weight is unknown, (2, 3)", "layer1.9.bn1.num_batches_tracked is unknown, ()"],
    ),
    "missing": (
        lambda t: without(t, "bn1.running_var", "layer1.0.conv1.weight"),
        [
            "bn1.running_var is missing, wanted (16,)",
            "layer1.0.conv1.weight is missing, wanted (16, 16, 3, 3)",
        ],
    ),
    "misshapen": (
        lambda t: t | {"bn1.bias": np.ones(17), "linear.weight": np.ones((64, 10))},
        [
            "bn1.bias is (17,), wanted (16,)",
            "linear.weight is (64, 10), wanted (10, 64)",
        ],
    ),
    "dtype": (
        lambda t: t | {"bn1.bias": np.ones(16, int), "bn1.weight": np.ones(16, complex)},
        [
            f"bn1.{name} wanted float16, bfloat16, float32, float64"
            for name in ("bias is int64,", "weight is complex128,")
        ],
    ),
    "text": (
        lambda t: t | {"bn1.bias": "ones"},
        ["bn1.bias is (), wanted (16,)"],
    ),
    "all at once": (
        lambda t: without(t, "bn1.bias") | {"extra": np.ones(1), "bn1.weight": np.ones((16, 1))},
        [
            "extra is unknown, (1,)",
            "bn1.bias is missing, wanted (16,)",
            "bn1.weight is (16, 1), wanted (16,)",
        ],
    ),
    "bias": (
        lambda t: t | {"linear.bias": np.ones(10)},
        [
            "linear.bias is unknown, (10,)",
            "The model's classifier_bias says whether its classifier has a bias.",
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_every_tensor_that_does_not_fit_is_named(case):
    change, expected = WRONG[case]
    model = create()
    tensors = change(weights.variables_to_torch(normal(model), model))
    with pytest.raises(ValueError, match="the state dict and") as raised:
        weights.variables_from_torch(tensors, model)
    first, *lines = str(raised.value).split("\n  ")
    assert first == "the state dict and CifarResNet do not fit:"
    assert sorted(lines) == sorted(expected)


def test_every_array_that_does_not_fit_is_named_on_the_way_out():
    model = create()
    variables = normal(model)
    del variables["batch_stats"]["stem_norm"]["var"]
    variables["params"]["stem"]["kernel"] = np.zeros((3, 3, 3, 8))
    variables["params"]["stem"]["bias"] = np.zeros(16)
    with pytest.raises(ValueError, match="the variables and CifarResNet do not fit:") as raised:
        weights.variables_to_torch(variables, model)
    assert str(raised.value).split("\n  ")[1:] == [
        "batch_stats/stem_norm/var is missing, wanted (16,)",
        "params/stem/bias is unknown, (16,)",
        "params/stem/kernel is (3, 3, 3, 8), wanted (3, 3, 3, 16)",
    ]


@pytest.mark.slow
def test_torchvisions_vgg_is_refused_with_what_to_do():
    model = create("vgg16-bn", classifier_bias=True)
    tensors = weights.variables_to_torch(normal(model), model)
    theirs = tensors | {"features.0.bias": np.zeros(64), "classifier.6.bias": np.zeros(1000)}
    with pytest.raises(ValueError, match="subtracted from the running_mean") as raised:
        weights.variables_from_torch(theirs, model)
    assert "features.0.bias is unknown, (64,)" in str(raised.value)


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf, True, "0.1"])
def test_wrong_thresholds(threshold):
    with pytest.raises(ValueError, match=r"^threshold: .* is not allowed; allowed are finite numb"):
        weights.variables_from_torch({}, create(), threshold=threshold)


@pytest.mark.parametrize("wrong", [[1, 2], None, {1: np.ones(2)}])
def test_what_is_no_state_dict(wrong):
    with pytest.raises(ValueError, match="allowed: a mapping from names to arrays"):
        weights.variables_from_torch(wrong, create())


def test_what_is_no_array():
    model = create()
    tensors = weights.variables_to_torch(normal(model), model)
    ragged = {name: [[1.0], [1.0, 2.0]] for name in ("bn1.bias", "bn1.weight")}
    with pytest.raises(ValueError, match="these cannot be taken:") as raised:
        weights.variables_from_torch(tensors | ragged, model)
    _, *lines = str(raised.value).split("\n  ")
    assert [line.split(" is no dense array: ")[0] for line in lines] == ["bn1.bias", "bn1.weight"]
    with pytest.raises(ValueError, match="variables is None; allowed: a mapping with 'params'"):
        weights.variables_to_torch(None, model)


def test_wrong_layouts_and_models():
    model = create("mobilenet-v1", width=0.25)
    with pytest.raises(ValueError, match="layout of MobileNetV1 is 'torchvision'; allowed: 'lats'"):
        weights.variables_to_torch(normal(model), model, layout="torchvision")
    message = "model is DigitsCNN, which has no PyTorch form; allowed: ResNet, MobileNetV1"
    with pytest.raises(ValueError, match=message):
        weights.variables_from_torch({}, create("digits-cnn"))
    with pytest.raises(ValueError, match="channels is 0; allowed: 1 or more"):
        weights.variables_from_torch({}, create(), channels=0)


# --- files --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_safetensors_keep_every_bit(tmp_path):
    model = create("resnet18")
    variables = any_bits(model)
    for layout in ("torchvision", "lats"):
        weights.save(tmp_path / "a.safetensors", variables, model, layout=layout)
        loaded = weights.load(str(tmp_path / "a.safetensors"), model)
        assert_same_bits(flat(loaded), flat(variables))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o044


@pytest.mark.slow
def test_a_file_of_latent_weights_feeds_the_model(tmp_path):
    model = create()
    weights.save(tmp_path / "a.safetensors", normal(model), model)
    variables = weights.load(tmp_path / "a.safetensors", model, threshold=0.5)
    images = np.zeros((2, 8, 8, 3), np.float32)
    logits = jax.jit(partial(model.apply, train=False))(variables, images)
    assert logits.shape == (2, 10)
    assert np.isfinite(logits).all()


@pytest.mark.slow
def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    model, path = create(), tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a\.safetensors\."):
        weights.load(path, model)
    for name in ("a.npz", "a"):
        message = rf"suffix of .*{name} is '.*'; allowed: '.safetensors', '.pt', '.pth', '.th'"
        with pytest.raises(ValueError, match=message):
            weights.load(tmp_path / name, model)
    weights.save(path, normal(model), model)
    whole = path.read_bytes()
    for content in (whole[:-7], whole[:5], b"", b"something else, longer than a header" * 9):
        path.write_bytes(content)
        message = r"a\.safetensors is damaged or not a safetensors file"
        with pytest.raises(ValueError, match=message):
            weights.load(path, model)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"a\.safetensors: the state dict and ResNet do not fit"):
        weights.load(path, create("resnet18"))
    (tmp_path / "a.pt").write_bytes(whole)
    for module, file in (("safetensors", path), ("torch", tmp_path / "a.pt")):
        for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.setitem(sys.modules, loaded, None)
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"{module} is missing .*: pip install {module}"):
            weights.load(file, model)
        with pytest.raises(ImportError, match=rf"pip install {module}"):
            weights.save(file, normal(model), model)


@pytest.mark.slow
def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    model, path = create(), tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*none\."):
        weights.save(tmp_path / "none" / "a.safetensors", normal(model), model)
    with pytest.raises(ValueError, match=r"suffix of .*a\.npz is '\.npz'; allowed"):
        weights.save(tmp_path / "a.npz", normal(model), model)
    weights.save(path, normal(model), model)
    before = path.read_bytes()

    def fail_half_way(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        weights.save(path, normal(model), model)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- PyTorch itself, where it is installed ------------------------------------------------------


def torch_networks():
    """Networks written here with published names, of 10 classes."""
    torch = pytest.importorskip("torch")
    nn, functional = torch.nn, torch.nn.functional

    def conv(inputs, outputs, size, stride=1):
        return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs, width, stride, project):
            super().__init__()
            self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)
            self.stride, self.pad = stride, (width - inputs) // 2
            if project and stride == 2:
                shortcut = [conv(inputs, width, 1, stride), nn.BatchNorm2d(width)]
                self.downsample = nn.Sequential(*shortcut)

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            if hasattr(self, "downsample"):
                x = self.downsample(x)
            elif self.stride == 2:
                x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
            return (x + y).relu()

    class Residual(nn.Module):
        def __init__(self, widths, blocks, stem, head, project):
            super().__init__()
            self.conv1, self.bn1 = conv(3, widths[0], *stem), nn.BatchNorm2d(widths[0])
            self.head, before, self.stages = head, widths[0], len(widths)
            for stage, width in enumerate(widths, 1):
                strides = [1 if stage == 1 else 2] + [1] * (blocks - 1)
                inputs = [before] + [width] * (blocks - 1)
                made = [Block(i, width, s, project) for i, s in zip(inputs, strides, strict=True)]
                setattr(self, f"layer{stage}", nn.Sequential(*made))
                before = width
            setattr(self, head, nn.Linear(before, 10))
            self.pool = nn.MaxPool2d(3, 2, 1) if project else nn.Identity()

        def forward(self, x):
            x = self.pool(self.bn1(self.conv1(x)).relu())
            for stage in range(1, self.stages + 1):
                x = getattr(self, f"layer{stage}")(x)
            return getattr(self, self.head)(x.mean((2, 3)))

    class VGG(nn.Module):
        def __init__(self):
            super().__init__()
            layers, before = [], 3
            for width in [64, 64, 0, 128, 128, 0, *[256] * 3, 0, *[512] * 3, 0, *[512] * 3, 0]:
                if width:
                    layers += [conv(before, width, 3), nn.BatchNorm2d(width), nn.ReLU()]
                    before = width
                else:
                    layers.append(nn.MaxPool2d(2))
            self.features, self.classifier = nn.Sequential(*layers), nn.Linear(512, 10)

        def forward(self, x):
            return self.classifier(self.features(x).mean((2, 3)))

    return torch, {
        "resnet18": lambda: Residual([64, 128, 256, 512], 2, (7, 2), "fc", project=True),
        "resnet20": lambda: Residual([16, 32, 64], 3, (3, 1), "linear", project=False),
        "vgg16-bn": VGG,
    }


def randomized(torch, network):
    """A network in float64 whose scales and statistics are not those that it begins with."""
    torch.manual_seed(0)
    network = network().double()
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 1:
            low = -0.1 if name.endswith(("bias", "mean")) else 0.5
            tensor.uniform_(low, low + 0.5)
    return network.eval()


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "vgg16-bn"])
def test_logits_are_pytorchs_and_pytorch_takes_the_file(name, tmp_path):
    torch, networks = torch_networks()
    network = randomized(torch, networks[name])
    model = create(name, classifier_bias=True, dtype=jnp.float64)
    torch.save({"state_dict": network.state_dict(), "epoch": 3}, tmp_path / "a.pth")
    variables = weights.load(tmp_path / "a.pth", model)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
    with torch.no_grad():
        expected = network(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy()
    with jax.enable_x64(True):
        logits = jax.device_get(jax.jit(partial(model.apply, train=False))(variables, images))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-9 * np.abs(expected).max())
    # And back: every name is there and no other, and all values are the same.
    weights.save(tmp_path / "b.pt", variables, model)
    again = networks[name]().double()
    again.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True), strict=True)
    for key, tensor in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    # The live tensors do as well as a file, parameters that require a gradient included.
    live = weights.variables_from_torch(network.state_dict(keep_vars=True), model)
    assert_same_bits(flat(live), flat(variables))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".state"])
def test_pytorch_files_keep_every_bit(suffix, tmp_path):
    torch = pytest.importorskip("torch")
    model, path = create(), tmp_path / f"a{suffix}"
    variables = any_bits(model)
    weights.save(path, variables, model)
    assert_same_bits(flat(weights.load(path, model)), flat(variables))
    kinds = {tensor.dtype for tensor in torch.load(path, weights_only=True).values()}
    assert kinds == {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64}


def test_a_checkpoint_as_the_published_code_writes_it(tmp_path):
    """Parallel, within a dict with the optimizer's state, latent; thresholded as in PyTorch."""
    torch, networks = torch_networks()
    network = networks["resnet18"]()
    network.fc = torch.nn.Conv2d(512, 10, 1, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.875)
    sum(p.sum() for p in network.parameters()).backward()
    optimizer.step()
    checkpoint = {
        "epoch": 100,
        "arch": "ResNet18",
        "state_dict": torch.nn.DataParallel(network).state_dict(),
        "best_acc1": 76.1,
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "epoch_99.state")
    path, threshold = tmp_path / "epoch_99.state", s_lats_threshold(100, final=0.05)
    variables = weights.load(path, create("resnet18"), threshold=threshold)
    params = variables["params"]
    for weight, kernel in [
        (network.conv1.weight, params["stem"]["kernel"]),
        (network.layer2[0].downsample[0].weight, params["stage2_block1"]["shortcut"]["kernel"]),
        (network.fc.weight, params["classifier"]["kernel"][None, None]),
    ]:
        sparse = torch.sign(weight) * torch.relu(torch.abs(weight) - 0.05)
        np.testing.assert_array_equal(kernel, sparse.detach().numpy().transpose(2, 3, 1, 0))


def test_pytorch_files_that_cannot_be_read(tmp_path):
    torch = pytest.importorskip("torch")
    model, path = create(), tmp_path / "a.pt"
    weights.save(path, normal(model), model)
    whole = path.read_bytes()
    for content in (whole[:-7], whole[:5], b"", b"something else"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.pt is damaged, or not a PyTorch file of tensors"):
            weights.load(path, model)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"write the state dict alone: torch\.save\(model"):
        weights.load(path, model)
    tensors = {"bn1.bias": torch.ones(16).to_sparse(), "bn1.weight": torch.ones(16).to("meta")}
    with pytest.raises(ValueError, match=r"bn1\.bias is no .*\n.*bn1\.weight is no dense array"):
        weights.variables_from_torch(tensors, model)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"a\.pt: the state dict is a list; allowed: a mapping"):
        weights.load(path, model)
