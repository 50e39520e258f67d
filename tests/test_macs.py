"""Operation counts: against loops over scalars, counts by hand, and published ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from lats_optax import count_macs
from tests import matrix, versions


def sparse(seed, *shape, density=0.4):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * (rng.random(shape) < density), jnp.float32)


def shape(*dimensions, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dimensions, dtype)


def counts(fn, *args, params=0):
    """Path -> (dense, effective) of what multiplies anything, and what has no parameter."""
    report = count_macs(fn, *args, params=params)
    found = {p.path: (p.dense, p.effective) for p in report.parameters if p.dense}
    return {**found, **({"": report.other} if report.other else {})}


# --- one operation, counted by loops over scalars -------------------------------------------------

CONVOLUTIONS = {
    "1d": ((7, 3), (3, 3, 4), {}),
    "plain": ((6, 5, 3), (3, 3, 3, 4), {}),
    "same": ((6, 5, 3), (3, 3, 3, 4), {"padding": "SAME"}),
    "strided": ((7, 8, 2), (3, 2, 2, 3), {"window_strides": (2, 3), "padding": "SAME"}),
    "padded": ((4, 4, 2), (3, 3, 2, 3), {"padding": [(2, 0), (1, 3)]}),
    "dilated": ((9, 9, 2), (3, 3, 2, 3), {"rhs_dilation": (2, 3)}),
    "grouped": ((5, 5, 6), (3, 3, 2, 9), {"feature_group_count": 3}),
    "depth-wise": ((5, 5, 4), (3, 3, 1, 4), {"feature_group_count": 4, "padding": "SAME"}),
    "3d": ((4, 3, 5, 2), (2, 2, 3, 2, 3), {}),
}
LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def scalar_convolution(kernel, out_shape):
    """One MAC for each output entry, kernel position and input channel of the group."""
    dense = effective = 0
    *positions, channels, _ = kernel.shape
    for *_, feature in itertools.product(*map(range, out_shape)):
        for at in itertools.product(*map(range, positions), range(channels)):
            dense += 1
            effective += kernel[(*at, feature)] != 0
    return dense, effective


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    image, kernel_shape, options = CONVOLUTIONS[case]
    kernel = sparse(1, *kernel_shape)
    settings = {"window_strides": (1,) * (len(image) - 1), "padding": "VALID", **options}
    fn = functools.partial(
        lambda w, x, **kw: lax.conv_general_dilated(x, w, **kw),
        dimension_numbers=LAYOUTS[len(image) - 1],
        **settings,
    )
    x = shape(2, *image)
    out = jax.eval_shape(fn, kernel, x)
    assert counts(fn, kernel, x) == {"params": scalar_convolution(np.asarray(kernel), out.shape)}


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_transposed_convolution_spends_nothing_on_the_zeros_between_its_inputs(stride, size):
    kernel, x = sparse(2, size, size, 3, 5), shape(2, 6, 4, 3)

    def fn(w, x):
        return lax.conv_transpose(x, w, (stride, stride), "VALID")

    nonzero = int((kernel != 0).sum())
    # Each of the 2·6·4 input positions meets every entry of the kernel once.
    expected = 48 * kernel.size, 48 * nonzero
    found = counts(fn, kernel, x)["params"]
    if stride == 1:  # a convolution proper, of which the padding counts
        positions = 2 * (6 + size - 1) * (4 + size - 1)
        expected = positions * kernel.size, positions * nonzero
    assert found == expected


PRODUCTS = {
    "x @ w": (lambda w, x: x @ w, (4, 5), (3, 4)),
    "vector": (lambda w, x: x @ w, (4, 5), (4,)),
    "w @ x": (lambda w, x: w @ x, (5, 4), (4, 3)),
    "batch of matrices": (lambda w, x: jnp.einsum("bij,bjk->bik", x, w), (2, 4, 5), (2, 3, 4)),
    "shared over a batch": (lambda w, x: jnp.einsum("bij,jk->bik", x, w), (4, 5), (7, 3, 4)),
    "two contracted": (lambda w, x: jnp.einsum("aij,ijk->ak", x, w), (3, 4, 5), (6, 3, 4)),
    "vmap": (lambda w, x: jax.vmap(lambda x: x @ w)(x), (4, 5), (3, 2, 4)),
    "vmap over w": (jax.vmap(lambda w, x: x @ w), (2, 4, 5), (2, 3, 4)),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_products(case):
    fn, weights, inputs = PRODUCTS[case]
    w = sparse(3, *weights)
    uses = {"vector": 1, "batch of matrices": 3, "shared over a batch": 21, "two contracted": 6}
    times = {**uses, "vmap": 6, "vmap over w": 3}.get(case, 3)
    assert counts(fn, w, shape(*inputs)) == {
        "params": (times * w.size, times * int((w != 0).sum()))
    }


# --- following a parameter ------------------------------------------------------------------------

W = sparse(4, 6, 8)
NONZERO = int((W != 0).sum())
LEFT = int((W[:, :4] != 0).sum())
STACK = sparse(5, 3, 6, 6)
STACKED = int((STACK != 0).sum())
X = shape(2, 6)
DENSE, FULL = (96, 2 * NONZERO), (96, 96)

FOLLOWED = {
    "as it is": (lambda w, x: x @ w, DENSE),
    "cast": (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), DENSE),
    "transposed": (lambda w, x: w.T @ x.T, DENSE),
    "reshaped": (lambda w, x: x @ w.reshape(4, 2, 6).transpose(2, 0, 1).reshape(6, 8), DENSE),
    "scaled": (lambda w, x: x @ (2.0 * w / 3.0), DENSE),
    "negated": (lambda w, x: x @ -w, DENSE),
    "soft-thresholded": (lambda w, x: x @ (jnp.sign(w) * jnp.abs(w)), DENSE),
    "standardized": (lambda w, x: x @ ((w - w.mean(0)) / w.std(0)), FULL),
    "shifted": (lambda w, x: x @ (w + 1.0), FULL),
    "half": (lambda w, x: x @ w[:, :4], (48, 2 * LEFT)),
    "split": (lambda w, x: x @ jnp.split(w, 2, 1)[0], (48, 2 * LEFT)),
    "half of a split cast": (
        lambda w, x: x @ jnp.split(w.astype(jnp.bfloat16), 2, 1)[0],
        (48, 2 * LEFT),
    ),
    "unstacked": (lambda w, x: [x @ row for row in jnp.unstack(w.T)[:4]], (48, 2 * LEFT)),
    "tiled": (lambda w, x: x @ jnp.tile(w, (1, 3)), (288, 6 * NONZERO)),
    "tiled, half": (lambda w, x: x @ jnp.tile(w, (1, 3))[:, 8:12], (48, 2 * LEFT)),
    "repeated": (lambda w, x: x @ jnp.repeat(w, 2, 1), (192, 4 * NONZERO)),
    "stacked": (lambda w, x: jnp.einsum("bi,sij->sbj", x, jnp.stack([w, -w])), (192, 4 * NONZERO)),
    "both halves": (lambda w, x: (x @ w[:, :4], x @ w[:, 4:]), DENSE),
    "half, transposed": (lambda w, x: w.T[:4] @ x.T, (48, 2 * LEFT)),
    "half, reversed": (lambda w, x: x @ jnp.flip(w, 1)[:, 4:], (48, 2 * LEFT)),
    "half of a cast": (lambda w, x: x @ (2 * w.astype(jnp.float16))[:, :4], (48, 2 * LEFT)),
    "twice": (lambda w, x: x @ w + (2 * x) @ w, (192, 4 * NONZERO)),
    "tied": (lambda w, x: x @ w @ w.T, (192, 4 * NONZERO)),
    "jit": (lambda w, x: jax.jit(lambda a: a @ w)(x), DENSE),
    "checkpoint": (lambda w, x: jax.checkpoint(lambda w, a: a @ w)(w, x), DENSE),
    "cond": (lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ (w * 2)), DENSE),
    "branches": (
        lambda w, x: lax.switch(2, [lambda: x[0] @ w, lambda: (x @ w)[0], lambda: w[0]]),
        DENSE,
    ),
    "fori_loop": (
        lambda w, x: lax.fori_loop(0, 5, lambda i, y: y + x @ w, jnp.zeros((2, 8))),
        (480, 10 * NONZERO),
    ),
    "through a carry": (
        lambda w, x: lax.fori_loop(0, 5, lambda i, c: (c[0], c[1] + x @ c[0]), (w, x @ w)),
        (576, 12 * NONZERO),
    ),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_a_parameter_is_followed(case):
    fn, expected = FOLLOWED[case]
    assert counts(fn, W, X) == {"params": expected}


# Zeros that come from elsewhere: the weight that multiplies x, which has the zeros.
MASK = np.random.default_rng(6).random((6, 8)) < 0.5
BLANK = np.zeros((6, 3), np.float32)
EYE = np.eye(6, 8, dtype=np.float32)
MADE = {
    "where": lambda w: jnp.where(MASK, w, 0),
    "where not": lambda w: jnp.where(~MASK, 0.0, -w),
    "where, of a cast": lambda w: jnp.where(MASK, w.astype(jnp.bfloat16), 0).astype(jnp.float32),
    "where in jit": lambda w: jax.jit(lambda w: jnp.where(jnp.asarray(MASK), w, 0))(w),
    "where of a row": lambda w: jnp.where(MASK[0], w, 0),
    "where, else ones": lambda w: jnp.where(MASK, w, 1.0),
    "where, else itself": lambda w: jnp.where(MASK, w, 2 * w),
    "where, twice": lambda w: jnp.where(MASK, jnp.where(MASK[::-1], w, 0), 0),
    "where by a mask that is computed": lambda w: jnp.where(jnp.cumsum(MASK, 1) % 3 > 0, w, 0),
    "transposed before": lambda w: jnp.where(MASK.T, w.T, 0).T,
    "sliced afterwards": lambda w: jnp.where(MASK, w, 0)[:, 2:7],
    "triangular": jnp.tril,
    "select_n of three": lambda w: lax.select_n(
        MASK.astype(np.int32) + EYE.astype(np.int32), w, 0 * EYE, EYE
    ),
    "multiplied": lambda w: w * MASK,
    "multiplied by the identity": lambda w: EYE * w,
    "divided": lambda w: (w * MASK) / (1.0 + EYE),
    "padded": lambda w: jnp.pad(w, ((0, 0), (2, 3))),
    "padded with ones": lambda w: jnp.pad(w, ((0, 0), (2, 3)), constant_values=1.0),
    "padded between": lambda w: lax.pad(w, 0.0, [(0, 0, 0), (1, -2, 1)]),
    "padded, of a mask": lambda w: jnp.pad(w * MASK, ((0, 0), (0, 5))),
    "concatenated with zeros": lambda w: jnp.concatenate([w, BLANK], 1),
    "concatenated with ones": lambda w: jnp.concatenate([BLANK + 1, w], 1),
    "stacked with zeros": lambda w: jnp.hstack([w[:, :3], jnp.zeros((6, 2)), w[:, 3:]]),
}


@pytest.mark.parametrize("abstractly", [False, True], ids=["values", "shapes"])
@pytest.mark.parametrize("case", MADE)
def test_zeros_of_masks_and_padding(case, abstractly):
    made = np.asarray(MADE[case](W))
    found = counts(lambda w, x: x @ MADE[case](w), shape(6, 8) if abstractly else W, X)
    effective = None if abstractly else 2 * int((made != 0).sum())
    assert found == {"params": (2 * made.size, effective)}


def test_a_mask_among_the_parameters():
    params = {"mask": jnp.asarray(MASK), "w": W}
    found = counts(lambda p, x: x @ jnp.where(p["mask"], p["w"], 0), params, X)
    assert found == {"w": (96, 2 * int((W * MASK != 0).sum()))}


def test_a_mask_that_depends_on_the_weights_leaves_their_zeros():
    assert counts(lambda w, x: x @ jnp.where(jnp.abs(w) > 0.5, w, 0), W, X) == {"params": DENSE}


def test_a_mask_that_depends_on_activations_hides_the_weights():
    assert counts(lambda w, x: x @ jnp.where(x[0, 0] > 0, w, 0), W, X) == {"": 96}


def test_a_mask_in_a_loop():
    """Of what the loop counts nothing is known; of a mask from outside, all."""

    def counted(w, x):
        rows = jnp.arange(6)[:, None]
        return lax.fori_loop(
            0, 5, lambda i, y: y + x @ jnp.where(rows > i, w, 0), jnp.zeros((2, 8))
        )

    assert counts(counted, W, X) == {"params": (480, 10 * NONZERO)}

    def fixed(w, x):
        return lax.scan(lambda y, _: (y + x @ jnp.where(MASK, w, 0), None), x @ w, None, length=4)

    effective = 2 * NONZERO + 8 * int((W * MASK != 0).sum())
    assert counts(fixed, W, X) == {"params": (480, effective)}


def test_a_mask_that_each_device_computes_for_itself():
    mesh, spec = versions.auto_mesh((8,), ("d",)), PartitionSpec()

    def local(w, x):
        return x @ jnp.where(jnp.arange(8) > lax.axis_index("d"), w, 0)

    fn = versions.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check=False)
    assert counts(fn, W, X) == {"params": (8 * 96, 16 * NONZERO)}


STACKS = {
    "scan": lambda w, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0],
    "reverse scan": lambda w, x: lax.scan(lambda x, w: (x @ w.T, x), x, w, reverse=True),
    "index": lambda w, x: lax.fori_loop(0, 3, lambda i, x: x @ w[i], x),
    "python loop": lambda w, x: functools.reduce(lambda x, i: x @ w[i], range(3), x),
    "unrolled scan": lambda w, x: lax.scan(lambda x, w: (x @ w, None), x, w, unroll=3)[0],
}


@pytest.mark.parametrize("case", STACKS)
def test_a_stack_of_layers(case):
    assert counts(STACKS[case], STACK, X) == {"params": (216, 2 * STACKED)}


@jax.custom_vjp
def with_vjp(w, x):
    return x @ w


with_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))


@jax.custom_jvp
def with_jvp(w, x):
    return x @ w


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), with_jvp(*tangents)))


@pytest.mark.parametrize("fn", [with_vjp, with_jvp])
def test_custom_derivatives(fn):
    assert counts(fn, W, X) == {"params": DENSE}


def test_gradients_take_two_more_products():
    fn = jax.grad(lambda w, x: jnp.sum(jnp.tanh((x @ w["a"]) @ w["b"])), (0, 1))
    params = {"a": W, "b": sparse(6, 8, 3)}
    b = int((params["b"] != 0).sum())
    # Forward, and the gradient for what came in; the gradient for the weights has no parameter.
    assert counts(fn, params, X) == {
        "a": (2 * 96, 4 * NONZERO),
        "b": (2 * 48, 4 * b),
        "": 96 + 48,
    }


@pytest.mark.slow
def test_which_parameter():
    params = {
        "embedding": sparse(0, 11, 6),
        "gate": W,
        "low": {"a": sparse(1, 6, 2), "b": sparse(2, 2, 8)},
        "out": [sparse(3, 8, 5), jnp.ones(5)],
    }

    def fn(scale, params, tokens):
        x = params["embedding"][tokens] * scale
        scores = x @ x.T
        x = scores @ x
        both = jnp.concatenate([params["gate"], params["low"]["a"]], axis=1)
        y = x @ both
        return (y[:, :8] + y[:, 8:] @ params["low"]["b"]) @ params["out"][0] + params["out"][1]

    nonzero = jax.tree.map(lambda w: int((w != 0).sum()), params)
    assert counts(fn, 2.0, params, shape(4, dtype=jnp.int32), params=1) == {
        "gate": (4 * 48, 4 * nonzero["gate"]),
        "low/a": (4 * 12, 4 * nonzero["low"]["a"]),
        "low/b": (4 * 16, 4 * nonzero["low"]["b"]),
        "out/0": (4 * 40, 4 * nonzero["out"][0]),
        "": 2 * 4 * 4 * 6,
    }


def test_loops_that_no_one_knows_the_length_of():
    def fn(w, x):
        return lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w @ w, x)

    w = sparse(7, 6, 6)
    report = count_macs(fn, w, X)
    assert (report.dense, report.effective) == (144, 4 * int((w != 0).sum()))
    assert str(report).endswith("while loops of unknown length, counted as one iteration: 1")
    harmless = count_macs(
        lambda w, x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x @ w), w, X
    )
    assert harmless.unknown_loops == 0


def test_what_a_loop_makes_of_a_parameter_is_no_longer_known():
    def fn(w, x):
        return lax.fori_loop(0, 4, lambda i, c: (c[0] + x.T @ x, c[1] + x @ c[0]), (w, x))

    assert counts(fn, sparse(8, 6, 6), X) == {"": 4 * (2 * 36 + 2 * 36)}


def test_the_dearest_branch():
    def fn(w, x, i):
        return lax.switch(
            i, [lambda x: x, lambda x: x @ w["a"] @ w["b"], lambda x: x @ w["b"].T @ w["b"]], x
        )

    params = {"a": sparse(1, 6, 9), "b": sparse(2, 9, 6)}
    assert counts(fn, params, X, shape(dtype=jnp.int32)) == {
        "a": (108, 2 * int((params["a"] != 0).sum())),
        "b": (108, 2 * int((params["b"] != 0).sum())),
    }


def test_all_devices_together():
    mesh = versions.auto_mesh((4, 2), ("data", "model"))
    split = versions.shard_map(
        lambda w, x: x @ w[:, :2],
        mesh=mesh,
        in_specs=(PartitionSpec(None, "model"), PartitionSpec("data")),
        out_specs=PartitionSpec("data", "model"),
    )
    assert counts(split, W, shape(8, 6)) == {"params": (8 * 24, 4 * NONZERO)}
    replicated = jax.pmap(lambda w, x: x @ w, in_axes=(None, 0))
    assert counts(replicated, W, shape(8, 1, 6)) == {"params": (8 * 48, 8 * NONZERO)}


def test_what_cannot_be_looked_into_is_named():
    with pytest.warns(UserWarning, match="^fn: not counted are fft, which may multiply arrays"):
        report = count_macs(lambda w, x: jnp.fft.fft(x @ w), W, X)
    assert report.uncounted == ("fft",)
    assert str(report).endswith("not counted: fft")


# --- models ---------------------------------------------------------------------------------------


def zoo(name, size, num_classes=1000, **options):
    pytest.importorskip("flax")
    from lats_optax import models

    model = models.create(name, num_classes=num_classes, **options)
    images = shape(1, size, size, 3)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    rest = {"batch_stats": variables["batch_stats"]}

    def fn(params, x):
        return model.apply({"params": params, **rest}, x, train=False)

    rest["batch_stats"] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), rest["batch_stats"])
    return fn, variables["params"], images


@pytest.mark.parametrize(
    ("name", "macs", "published"),
    matrix.fast(
        [("resnet50", 4_089_184_256, 4.09), ("mobilenet-v1", 568_740_352, 0.57)],
        [("mobilenet-v1", 568_740_352, 0.57)],
    ),
)
def test_published_counts(name, macs, published):
    report = count_macs(*zoo(name, 224))
    assert report.dense == macs
    assert round(report.dense / 1e9, 2) == published
    assert report.effective is None
    assert report.other == 0
    kernels = {p.path for p in report.parameters if len(p.shape) > 1}
    assert {p.path for p in report.parameters if p.dense} == kernels


@pytest.mark.parametrize("steps", [1, 4])
def test_a_spiking_network_computes_its_stem_once_and_the_rest_at_every_step(steps):
    report = count_macs(*zoo("sew-resnet18", 64, time_steps=steps))
    stem = 7 * 7 * 3 * 64 * 32 * 32
    first = 4 * 9 * 64 * 64 * 16 * 16  # both blocks of the first stage, on 16×16
    # A later stage halves the map and doubles the channels: 9·c·2c + 3·9·2c·2c and a 1×1 shortcut.
    later = sum(
        (9 * c * 2 * c + 27 * 4 * c * c + 2 * c * c) * (512 // c) ** 2 for c in (64, 128, 256)
    )
    assert report.dense == stem + steps * (first + later + 512 * 1000)


@pytest.mark.slow
def test_a_sparse_model_against_its_kernels_one_by_one():
    fn, shapes, images = zoo("resnet20", 32, num_classes=10)
    params = jax.tree.map(lambda leaf: sparse(leaf.size, *leaf.shape, density=0.1), shapes)
    report = count_macs(fn, params, images)
    for p in report.parameters:
        assert p.size - p.zeros == np.count_nonzero(
            functools.reduce(lambda node, key: node[key], p.path.split("/"), params)
        )
        assert p.effective * p.size == p.dense * (p.size - p.zeros)
    assert report.effective == sum(p.effective for p in report.parameters)
    # 16 channels on 32×32, by hand: the stem and the first stage.
    at = {p.path: p.dense for p in report.parameters}
    assert at["stem/kernel"] == 3 * 3 * 3 * 16 * 32 * 32
    assert at["classifier/kernel"] == 640


@pytest.mark.slow
def test_a_recurrent_layer_whose_kernels_are_concatenated():
    nn = pytest.importorskip("flax.linen")

    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.OptimizedLSTMCell(7))(x)

    model, x = Recurrent(), shape(2, 5, 3)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: sparse(leaf.size, *leaf.shape), params)
    found = counts(model.apply, params, x)
    for gate, (letter, inputs) in itertools.product("ifgo", [("i", 3), ("h", 7)]):
        path = f"params/OptimizedLSTMCell_0/{letter}{gate}/kernel"
        assert found.pop(path)[0] == 2 * 5 * inputs * 7
    assert not found


@pytest.mark.slow
def test_attention_in_nnx():
    nnx = pytest.importorskip("flax.nnx")
    layer = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    def fn(params, x):
        return nnx.merge(graph, params, rest)(x)

    found = counts(fn, params, shape(3, 5, 8))
    assert found.pop("") == 2 * 3 * 5 * 5 * 8
    assert found == {f"{name}/kernel": (15 * 64,) * 2 for name in ("query", "key", "value", "out")}


# --- the report -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table():
    params = {
        "a": {"kernel": jnp.zeros((100, 300)).at[0].set(1.0), "bias": jnp.ones(300)},
        "b": shape(300, 10),
    }

    def fn(p, x):
        return (x @ x.T) @ x @ p["a"]["kernel"] @ p["b"]

    assert str(count_macs(fn, params, shape(2, 100))).split("\n") == [
        "parameter       shape  sparsity              dense          effective",
        "-" * 69,
        "a/kernel      100×300    99.00%             60,000                600",
        "b              300×10                        6,000",
        "no parameter                                   800                800",
        "-" * 69,
        "MACs                                        66,800",
    ]


def test_nothing_to_count():
    report = count_macs(lambda p, x: x + p, jnp.zeros(0), 1.0)
    assert (report.dense, report.effective) == (0, 0)
    assert report.parameters[0].sparsity == 0.0
    assert str(report).count("\n") == 3


@pytest.mark.parametrize(
    ("args", "params", "message"),
    [
        ((W, X), 2, "params: 2 is not the number of an argument; allowed are 0 to 1"),
        ((W, X), -1, "params: -1 is not"),
        ((W, X), True, "params: True is not"),
        ((W, X), "w", "params: 'w' is not"),
        ((), 0, "params: there are no arguments"),
        (({}, X), 0, "params: argument 0 is not a pytree of arrays"),
        ((2.0, X), 0, "params: argument 0 is not a pytree of arrays"),
    ],
)
def test_errors(args, params, message):
    with pytest.raises(ValueError, match=message):
        count_macs(lambda w, x: x @ w, *args, params=params)
