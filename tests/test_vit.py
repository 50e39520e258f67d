"""Vision transformers: equations written out in NumPy, timm's names, heads and units that die."""

import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from flax import traverse_util

import lats_optax
from lats_optax import cli, groups, models, select, soft_threshold, target_sparsity
from lats_optax.compaction import compact
from lats_optax.torch import weights as torch_weights
from lats_optax.training import export
from tests import matrix

KEY = jax.random.key(0)
HEADS = {"tiny": 3, "small": 6, "base": 12}
SMALL = {"width": 1 / 16, "depth": 2, "patch_size": 4}  # 12 channels, 48 hidden units, 3 heads
CHANNELS, HIDDEN, CLASSES, SIZE = 12, 48, 5, 12
PATCHES = (SIZE // 4) ** 2


def create(name="vit-tiny", num_classes=CLASSES, **options):
    return models.create(name, num_classes=num_classes, **(SMALL | options))


def shapes(model, size=SIZE, channels=3):
    images = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return jax.eval_shape(partial(model.init, train=False), KEY, images)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def timm(patches=PATCHES, depth=2):
    """A state dict with the names and shapes of timm's vit_tiny_patch16_224, at small sizes."""
    c, h = CHANNELS, HIDDEN
    sizes = {"cls_token": (1, 1, c), "pos_embed": (1, 1 + patches, c)}
    linear = {"patch_embed.proj": (c, 3, 4, 4), "head": (CLASSES, c)}
    norms = ["norm"]
    for i in range(depth):
        norms += [f"blocks.{i}.norm1", f"blocks.{i}.norm2"]
        linear |= {f"blocks.{i}.attn.qkv": (3 * c, c), f"blocks.{i}.attn.proj": (c, c)}
        linear |= {f"blocks.{i}.mlp.fc1": (h, c), f"blocks.{i}.mlp.fc2": (c, h)}
    sizes |= {f"{name}.weight": shape for name, shape in linear.items()}
    sizes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    sizes |= {f"{name}.{leaf}": (c,) for name in norms for leaf in ("weight", "bias")}
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape) * (0.5 / math.sqrt(shape[-1])) for name, shape in sizes.items()
    }


def written_out(tensors, images, heads=3, depth=2):
    """Equations 1 to 4 of the paper, image by image and head by head, from timm's tensors."""

    def linear(name, x):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name, x):
        centered = x - x.mean(-1, keepdims=True)
        scaled = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def attention(name, x):
        width = x.shape[1] // heads
        queries, keys, values = np.split(linear(f"{name}.qkv", x), 3, axis=1)
        mixed = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            scores = queries[:, own] @ keys[:, own].T / math.sqrt(width)
            weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            mixed.append(weights @ values[:, own])
        return linear(f"{name}.proj", np.concatenate(mixed, axis=1))

    def mlp(name, x):
        hidden = linear(f"{name}.fc1", x)
        hidden = hidden * (1 + scipy.special.erf(hidden / math.sqrt(2))) / 2
        return linear(f"{name}.fc2", hidden)

    def logits(image):
        tokens = [tensors["cls_token"][0, 0]]
        kernel = tensors["patch_embed.proj.weight"]
        size = kernel.shape[-1]
        for row in range(0, image.shape[0], size):
            for column in range(0, image.shape[1], size):
                patch = image[row : row + size, column : column + size]
                token = np.einsum("ochw,hwc->o", kernel, patch)
                tokens.append(token + tensors["patch_embed.proj.bias"])
        z = np.stack(tokens) + tensors["pos_embed"][0]
        for i in range(depth):
            z = z + attention(f"blocks.{i}.attn", norm(f"blocks.{i}.norm1", z))
            z = z + mlp(f"blocks.{i}.mlp", norm(f"blocks.{i}.norm2", z))
        return linear("head", norm("norm", z)[0])

    return np.stack([logits(image) for image in images])


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert (array.shape, array.dtype) == (right[name].shape, right[name].dtype), name
        assert array.tobytes() == right[name].tobytes(), name


# --- the network and its weights ----------------------------------------------------------------


@pytest.mark.slow
def test_logits_are_those_of_the_paper_written_out():
    tensors = timm()
    images = np.random.default_rng(1).normal(size=(3, SIZE, SIZE, 3))
    model = create(dtype=jnp.float64)
    variables = torch_weights.variables_from_torch(tensors, model)
    with jax.enable_x64(True):
        logits = jax.device_get(jax.jit(partial(model.apply, train=False))(variables, images))
    expected = written_out(tensors, images)
    assert logits.dtype == np.float64
    # Seen: 1e-15.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_timms_tensors_there_and_back_keep_every_bit(dtype):
    model, tensors = create(), {k: v.astype(jnp.dtype(dtype)) for k, v in timm().items()}
    variables = torch_weights.variables_from_torch(tensors, model)
    assert {path: leaf.shape for path, leaf in flat(variables).items()} == {
        path: leaf.shape for path, leaf in flat(shapes(model)).items()
    }
    assert_same_bits(torch_weights.variables_to_torch(variables, model), tensors)
    again = torch_weights.variables_to_torch(variables | {"batch_stats": {}}, model, layout="timm")
    assert_same_bits(again, tensors)


@pytest.mark.parametrize(
    ("patches", "problem"),
    [
        (PATCHES + 1, r"pos_embed is \(1, 11, 12\), wanted \(1, 10, 12\)"),
        (PATCHES - 1, r"pos_embed is \(1, 9, 12\), wanted \(1, 10, 12\)"),
        (-1, r"pos_embed is \(1, 0, 12\), wanted \(1, 2, 12\)"),
    ],
)
def test_positions_of_images_that_are_not_square(patches, problem):
    with pytest.raises(ValueError, match=rf"{problem}\n(.*\n)*.*images have to be square"):
        torch_weights.variables_from_torch(timm(patches), create())


def test_tensors_that_do_not_fit_are_named():
    tensors = timm() | {"pos_embed": np.zeros(3), "fc_norm.weight": np.ones(12)}
    del tensors["blocks.1.attn.qkv.bias"]
    with pytest.raises(ValueError, match="do not fit") as raised:
        torch_weights.variables_from_torch(tensors, create())
    for problem in (
        "pos_embed is (3,), wanted (1, 197, 12)",
        "fc_norm.weight is unknown, (12,)",
        "blocks.1.attn.qkv.bias is missing, wanted (36,)",
    ):
        assert problem in str(raised.value)
    with pytest.raises(ValueError, match=r"layout of VisionTransformer is 'lats'; allowed: 'timm'"):
        torch_weights.variables_to_torch({}, create(), layout="lats")


@pytest.mark.parametrize(
    ("size", "count"),
    matrix.fast([("tiny", 5_717_416), ("small", 22_050_664), ("base", 86_567_656)], 1),
)
def test_count_of_parameters_is_timms(size, count):
    """Published, and by hand: c channels, 12 blocks of 12 c² + 13 c."""
    c = 64 * HEADS[size]
    by_hand = (3 * 256 * c + c) + c + 197 * c + 12 * (12 * c**2 + 13 * c) + 2 * c + 1000 * (c + 1)
    model = models.create(f"vit-{size}", num_classes=1000)
    variables = shapes(model, 224)
    assert set(variables) == {"params"}
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == count == by_hand


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_computes_in_its_dtype_and_keeps_the_rest_in_float32(dtype):
    model = create(dtype=dtype)
    variables = shapes(model)
    images = jax.ShapeDtypeStruct((2, SIZE, SIZE, 3), jnp.float32)
    apply = partial(model.apply, train=True, capture_intermediates=True, mutable=["intermediates"])
    logits, state = jax.eval_shape(apply, variables, images)
    inner = {path: leaf for path, (leaf,) in flat(state["intermediates"]).items()}
    assert inner.pop("__call__").dtype == jnp.float32
    assert {leaf.dtype for leaf in inner.values()} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert logits.shape == (2, CLASSES)


def test_options_come_back_from_json():
    model = create("vit-small", features={"block2/mlp/fc1": 7}, classifier_bias=False)
    description = json.loads(json.dumps(models.describe(model)))
    assert models.describe(models.create(**description)) == models.describe(model) == description
    params = shapes(model)["params"]
    assert params["block1"]["mlp"]["fc1"]["kernel"].shape == (24, 96)
    assert params["block2"]["mlp"]["fc2"]["kernel"].shape == (7, 24)
    assert set(params["classifier"]) == {"kernel"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "large"}, "an option of 'vit-tiny' is 'size'; allowed: .*'depth', 'patch_size'"),
        ({"depth": 0}, r"depth is 0; allowed: 1 to 100\."),
        ({"depth": 2.0}, r"depth is 2\.0; allowed"),
        ({"depth": 10**9}, r"depth is 1000000000; allowed"),
        ({"patch_size": 0}, r"patch_size is 0; allowed: 1 or more\."),
        ({"patch_size": True}, r"patch_size is True; allowed: 1 or more\."),
        ({"width": 1 / 192}, r"width is 0\.005.*; allowed: those at which its 3 heads divide"),
        ({"width": 0.0}, r"width is 0\.0; allowed: 0\.005.* to 1000"),
        ({"features": {"block3/mlp/fc1": 4}}, "is 'block3/mlp/fc1'; allowed: 'block1/mlp/fc1'"),
        ({"num_classes": 0}, r"num_classes is 0; allowed: 1 or more\."),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        create(**options)
    with pytest.raises(ValueError, match="size is 'large'; allowed: 'tiny', 'small', 'base'"):
        models.VisionTransformer(size="large", num_classes=CLASSES)


def test_images_of_the_wrong_shape():
    model = create()
    variables = shapes(model)
    for shape, message in [
        ((12, 12, 3), r"images have shape \(12, 12, 3\); .*at least 4\."),
        ((1, 3, 12, 3), r"images have shape \(1, 3, 12, 3\); .*at least 4\."),
        ((1, 12, 14, 3), "height and width that are multiples of patch_size, 4"),
        ((1, 12, 16, 3), r"shape \(1, 12, 16, 3\), 12 patches; allowed: 9 patches, for which"),
    ]:
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(partial(model.apply, train=False), variables, jnp.zeros(shape))
    wide = jax.eval_shape(partial(model.init, train=False), KEY, jnp.zeros((1, 4, 16, 3)))
    assert wide["params"]["pos_embed"].shape == (1, 5, CHANNELS)


@pytest.mark.slow
def test_initial_weights():
    """Variances; Xavier-uniform draws are bounded by √3 of their deviations."""
    model = create(width=1.0, depth=1, patch_size=16, num_classes=100)
    init = jax.jit(partial(model.init, train=False))
    drawn = flat(init(jax.random.key(1, impl="rbg"), jnp.zeros((1, 160, 160, 3)))["params"])
    for path, variance, bound in [
        ("block1/attn/qkv/kernel", 2 / (192 + 192), math.sqrt(3)),
        ("block1/attn/proj/kernel", 2 / (192 + 192), math.sqrt(3)),
        ("block1/mlp/fc1/kernel", 2 / (192 + 768), math.sqrt(3)),
        ("block1/mlp/fc2/kernel", 2 / (192 + 768), math.sqrt(3)),
        ("pos_embed", 0.02**2, 6),
        ("classifier/kernel", 0.02**2, 6),
        ("patch_embed/kernel", 1 / (3 * 256), 3),
    ]:
        weights = np.asarray(drawn.pop(path))
        np.testing.assert_allclose(weights.var(), variance, rtol=0.05, err_msg=path)
        assert np.abs(weights).max() <= bound * math.sqrt(variance) * (1 + 1e-6), path
    for path, leaf in drawn.items():
        np.testing.assert_array_equal(leaf, float(path.endswith("scale")), err_msg=path)


# --- pruning ------------------------------------------------------------------------------------


def random_params(model, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.3  # noqa: E731
    return jax.tree.map(draw, shapes(model)["params"])


def pruned(params, operator, target, mask):
    """The parameters after one step of no gradient, at a target."""
    threshold = target_sparsity(target, 0.1, 1)
    tx = soft_threshold(threshold, operator=operator, mask=mask)
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    return jax.device_get(optax.apply_updates(params, updates))


def test_the_default_mask_is_the_kernels():
    params = shapes(create())["params"]
    masked = flat(lats_optax.prunable(params))
    assert {path for path, yes in masked.items() if yes} == {
        path for path in masked if path.endswith("/kernel")
    }
    assert sum(masked.values()) == 2 + 2 * 4


@pytest.mark.slow
def test_heads_die_as_a_whole_and_nothing_is_read_of_them():
    model = create()
    params = random_params(model)
    after = pruned(params, groups.heads(3), 0.5, select("attn/.*kernel"))
    biased, dead = jax.tree.map(np.copy, after), 0
    for block in ("block1", "block2"):
        attention = after[block]["attn"]
        qkv = attention["qkv"]["kernel"].reshape(CHANNELS, 3, 3, 4)
        proj = attention["proj"]["kernel"].reshape(3, 4, CHANNELS)
        alive = qkv.any(axis=(0, 1, 3))
        np.testing.assert_array_equal(alive, proj.any(axis=(1, 2)))
        assert (qkv != 0).all(axis=(0, 1, 3)).sum() == alive.sum()
        dead += (~alive).sum()
        bias = biased[block]["attn"]["qkv"]["bias"].reshape(3, 3, 4)
        bias[:, ~alive] += 7.0
    assert dead == 3
    images = np.random.default_rng(2).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    apply = jax.jit(partial(model.apply, train=False))
    logits = apply({"params": after}, images)
    np.testing.assert_allclose(apply({"params": biased}, images), logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_hidden_units_die_as_a_whole_and_a_smaller_network_is_the_same():
    model = create()
    params = random_params(model)
    after = pruned(params, groups.hidden_units(), 0.5, select("mlp/.*kernel"))
    small, features = jax.tree.map(np.copy, after), {}
    for block in ("block1", "block2"):
        mlp = small[block]["mlp"]
        alive = mlp["fc1"]["kernel"].any(axis=0)
        np.testing.assert_array_equal(alive, mlp["fc2"]["kernel"].any(axis=1))
        features[f"{block}/mlp/fc1"] = int(alive.sum())
        mlp["fc1"] = {"kernel": mlp["fc1"]["kernel"][:, alive], "bias": mlp["fc1"]["bias"][alive]}
        mlp["fc2"]["kernel"] = mlp["fc2"]["kernel"][alive]
    assert sum(features.values()) == HIDDEN
    images = np.random.default_rng(2).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32)
    smaller = create(features=features)
    np.testing.assert_allclose(
        jax.jit(partial(smaller.apply, train=False))({"params": small}, images),
        jax.jit(partial(model.apply, train=False))({"params": after}, images),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.slow
def test_two_of_four_along_the_inputs_of_every_kernel_but_the_patches():
    params = random_params(create(depth=1))
    after = flat(pruned(params, groups.n_of_m(2, 4), 0.5, select(exclude="^patch_embed/")))
    kernels = {path: leaf for path, leaf in after.items() if path.endswith("kernel")}
    dense = kernels.pop("patch_embed/kernel")
    assert (dense != 0).all()
    assert len(kernels) == 5
    for path, kernel in kernels.items():
        fours = kernel.reshape(kernel.shape[0] // 4, 4, kernel.shape[1])
        assert ((fours != 0).sum(axis=1) == 2).all(), path


# --- the programs -------------------------------------------------------------------------------


def test_compact_refuses_it_in_one_line():
    with pytest.raises(ValueError, match=r"^model is VisionTransformer; allowed: ResNet, .*\.$"):
        compact(create(), {"params": random_params(create())})


@pytest.mark.slow
# In a few steps of a narrow network layers may die; the run says so.
@pytest.mark.filterwarnings("ignore:opt_state. every weight of")
def test_the_small_preset_trains_on_other_data_and_its_file_is_read(tmp_path, capsys):
    run = tmp_path / "run"
    command = [
        *("fashion-mnist-vit-target", "--data.name", "digits", "--data.batch-size", "360"),
        *("--model.width", str(SMALL["width"]), "--model.depth", "1", "--epochs", "3"),
        *("--workdir", str(run)),
    ]
    assert cli.train(command) == 0
    assert "90.0" in capsys.readouterr().out
    saved = export.load_model(run / "model.safetensors")
    assert isinstance(saved.model, models.VisionTransformer)
    assert (saved.model.depth, saved.model.patch_size, saved.image_shape) == (1, 4, (8, 8, 1))
    params = flat(saved.variables["params"])
    kernels = [leaf for path, leaf in params.items() if path.endswith("/kernel")]
    assert sum(int((leaf == 0).sum()) for leaf in kernels) == round(
        0.9 * sum(leaf.size for leaf in kernels)
    )
    assert (params["pos_embed"] != 0).all()
    # It goes to PyTorch and back, with one channel and 2×2 patches.
    tensors = torch_weights.variables_to_torch(saved.variables, saved.model, channels=1)
    assert tensors["pos_embed"].shape == (1, 5, CHANNELS)
    back = torch_weights.variables_from_torch(tensors, saved.model, channels=1)
    assert_same_bits(flat(back["params"]), params)
    # And the other commands read it, or refuse it in one line.
    assert cli.compact([str(run), "--out", str(tmp_path / "small.safetensors")]) != 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "model is VisionTransformer; allowed: ResNet, " in error
