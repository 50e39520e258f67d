"""Gram matrices against what the function itself does to a change of its weights, and NumPy."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lats_optax import masks
from lats_optax.calibration import calibrate
from tests import matrix

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RANDOM.normal(size=shape), jnp.float32)


@jax.custom_jvp
def with_jvp(w, x):
    return x @ w


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), with_jvp(*tangents)))


@jax.custom_vjp
def with_vjp(w, x):
    return x @ w


with_vjp.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, g: (saved[1].T @ g, g @ saved[0].T))


def conv(w, x, layout=("NHWC", "HWIO", "NHWC"), **options):
    options = {"window_strides": (1, 1), "padding": "VALID"} | options
    return lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)


class Linear(NamedTuple):
    """A function that is linear in its weights, its shapes, and the matrices that it has."""

    fn: Any
    weights: tuple[int, ...]
    batch: tuple[int, ...]
    matrices: tuple[int, ...]  # matrices, groups, inputs


LINEAR = {
    "dense": Linear(lambda w, x: x @ w, (6, 8), (5, 6), (1, 1, 6)),
    "dense, more axes": Linear(lambda w, x: x @ w, (6, 8), (2, 5, 6), (1, 1, 6)),
    "transposed": Linear(lambda w, x: x @ w.T, (8, 6), (5, 6), (1, 1, 6)),
    "on the left": Linear(lambda w, x: w @ x.T, (8, 6), (5, 6), (1, 1, 6)),
    "into heads": Linear(
        lambda w, x: jnp.einsum("bi,ihd->bhd", x, w), (6, 2, 3), (5, 6), (1, 1, 6)
    ),
    "out of heads": Linear(
        lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (2, 3, 4), (5, 2, 3), (1, 1, 6)
    ),
    "out of heads, the other way": Linear(
        lambda w, x: jnp.einsum("bdh,hdo->bo", x, w), (2, 3, 4), (5, 3, 2), (1, 1, 6)
    ),
    "contracted axes that lie apart": Linear(
        lambda w, x: jnp.einsum("ibj,jki->bk", x, w), (3, 4, 2), (2, 5, 3), (1, 1, 6)
    ),
    "a batch axis": Linear(
        lambda w, x: jnp.einsum("bei,eio->beo", x, w), (3, 6, 4), (5, 3, 6), (3, 1, 6)
    ),
    "two batch axes, outputs first": Linear(
        lambda w, x: jnp.einsum("abxi,oiab->abxo", x, w), (4, 6, 2, 3), (2, 3, 5, 6), (6, 1, 6)
    ),
    "vmapped experts": Linear(
        lambda w, x: jax.vmap(lambda w, x: x @ w)(w, x), (3, 6, 4), (3, 5, 6), (3, 1, 6)
    ),
    "no outputs": Linear(lambda w, x: x @ w, (6,), (5, 6), (1, 1, 6)),
    "a constant behind it": Linear(lambda w, x: x @ w + 3.0, (6, 8), (5, 6), (1, 1, 6)),
    "jit": Linear(lambda w, x: jax.jit(lambda a: a @ w)(x), (6, 8), (5, 6), (1, 1, 6)),
    "checkpoint": Linear(
        lambda w, x: jax.checkpoint(lambda w, a: a @ w)(w, x), (6, 8), (5, 6), (1, 1, 6)
    ),
    "custom jvp": Linear(with_jvp, (6, 8), (5, 6), (1, 1, 6)),
    "custom vjp": Linear(with_vjp, (6, 8), (5, 6), (1, 1, 6)),
    "reshaped": Linear(lambda w, x: x @ w.reshape(6, 8), (48,), (5, 6), (1, 1, 6)),
    "twice a cast": Linear(
        lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), (6, 8), (5, 6), (1, 1, 6)
    ),
    "a slice of a stack": Linear(
        lambda w, x: jnp.stack([x @ w[i] for i in range(3)]), (3, 6, 4), (5, 6), (1, 1, 6)
    ),
    "scan": Linear(
        lambda w, x: lax.scan(lambda c, w: (c, x @ w), 0.0, w)[1], (3, 6, 4), (5, 6), (3, 1, 6)
    ),
    "reverse scan": Linear(
        lambda w, x: lax.scan(lambda c, xw: (c, xw[0] @ xw[1]), 0.0, (x, w), reverse=True)[1],
        (3, 6, 4),
        (3, 5, 6),
        (3, 1, 6),
    ),
    "scan of a scan": Linear(
        lambda w, x: lax.scan(
            lambda c, w: (c, lax.scan(lambda c, w: (c, x @ w.T), 0.0, w)[1]), 0.0, w
        )[1],
        (2, 3, 4, 6),
        (5, 6),
        (6, 1, 6),
    ),
    "the same weights in every iteration": Linear(
        lambda w, x: lax.scan(lambda c, x: (c, x @ w), 0.0, x)[1], (6, 8), (7, 5, 6), (1, 1, 6)
    ),
    "a scan's weights in each iteration of another": Linear(
        lambda w, x: lax.scan(
            lambda c, w: (c, lax.scan(lambda c, x: (c, x @ w), 0.0, x)[1]), 0.0, w
        )[1],
        (2, 6, 8),
        (7, 5, 6),
        (2, 1, 6),
    ),
    "through a carry": Linear(
        lambda w, x: lax.fori_loop(0, 3, lambda i, c: (c[0], c[1].at[i].set(x[i] @ c[0])), (w, B))[
            1
        ],
        (6, 8),
        (3, 5, 6),
        (1, 1, 6),
    ),
    "while": Linear(
        lambda w, x: lax.while_loop(
            lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1].at[c[0]].set(x[c[0]] @ w)), (0, B)
        )[1],
        (6, 8),
        (3, 5, 6),
        (1, 1, 6),
    ),
    "cond": Linear(
        lambda w, x: lax.cond(x.sum() > 1e9, lambda: x @ w, lambda: 2 * x @ w),
        (6, 8),
        (5, 6),
        (1, 1, 6),
    ),
    "scaled": Linear(lambda w, x: x @ (w * 3.0), (6, 8), (5, 6), (1, 1, 6)),
    "scaled by an activation": Linear(lambda w, x: x @ (w / x[0, 0]), (6, 8), (5, 6), (1, 1, 6)),
    "negative": Linear(lambda w, x: x @ -w, (6, 8), (5, 6), (1, 1, 6)),
    "half of it": Linear(lambda w, x: x @ w[:, :4], (6, 8), (5, 6), (1, 1, 6)),
    "every other input": Linear(lambda w, x: x @ w[::2], (6, 8), (5, 3), (1, 1, 3)),
    "in two places": Linear(
        lambda w, x: jnp.concatenate([x @ w, jnp.tanh(x) @ w]), (6, 8), (5, 6), (1, 1, 6)
    ),
    "convolution": Linear(conv, (2, 3, 4, 5), (2, 6, 7, 4), (1, 1, 24)),
    "strides and padding": Linear(
        functools.partial(conv, window_strides=(2, 3), padding=((1, 2), (0, 1))),
        (2, 3, 4, 5),
        (2, 6, 7, 4),
        (1, 1, 24),
    ),
    "padded to the same size": Linear(
        functools.partial(conv, padding="SAME"), (3, 3, 2, 5), (2, 6, 7, 2), (1, 1, 18)
    ),
    "dilated": Linear(
        functools.partial(conv, rhs_dilation=(2, 1)), (2, 3, 4, 5), (2, 6, 7, 4), (1, 1, 24)
    ),
    "groups": Linear(
        functools.partial(conv, feature_group_count=2), (2, 3, 2, 6), (2, 6, 7, 4), (1, 2, 12)
    ),
    "depthwise": Linear(
        functools.partial(conv, feature_group_count=4, padding="SAME"),
        (3, 3, 1, 4),
        (2, 5, 5, 4),
        (1, 4, 9),
    ),
    "transposed convolution": Linear(
        lambda w, x: lax.conv_transpose(x, w, (2, 2), "SAME"),
        (3, 3, 2, 5),
        (2, 4, 4, 2),
        (1, 1, 18),
    ),
    "channels first": Linear(
        functools.partial(conv, layout=("NCHW", "OIHW", "NCHW")),
        (5, 4, 2, 3),
        (2, 4, 6, 7),
        (1, 1, 24),
    ),
    "one axis": Linear(
        lambda w, x: lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
        ),
        (3, 4, 5),
        (2, 6, 4),
        (1, 1, 12),
    ),
}
B = jnp.zeros((3, 5, 8))


def everything(params):
    return jax.tree.map(lambda leaf: True, params)


@pytest.mark.parametrize(
    "case",
    matrix.fast(
        LINEAR,
        ["dense", "vmapped experts", "scan", "one axis"],
    ),
)
def test_a_change_of_the_weights_changes_the_output_as_the_gram_matrix_says(case):
    """``||f(W + D) - f(W)||^2 = sum over matrices of tr(D^T G D)``, for any D."""
    fn, weights, batch, sides = LINEAR[case]
    w = {"w": normal(*weights)}
    batches = [normal(*batch), normal(*batch)]
    grams = calibrate(lambda p, x: fn(p["w"], x), w, batches, mask=everything)
    assert {gram.path for gram in grams.products} == {"w"}
    for gram in grams.products:
        assert (*gram.matrices.shape[:2], gram.inputs) == sides
        assert gram.kind == "full"
    for _ in range(3):
        change = normal(*weights)
        before, after = ([fn(v, x) for x in batches] for v in (w["w"], w["w"] + change))
        expected = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(after, before))
        # A cast to bfloat16 is followed, and rounds the outputs.
        rough = 2e-2 if "cast" in case else 2e-4
        found = 0.0
        for gram in grams.products:
            d, g = (np.asarray(a, np.float64) for a in (gram.unpack(change), gram.matrices))
            found += np.einsum("mgio,mgij,mgjo", d, g[:, :, 0], d)
        np.testing.assert_allclose(found, expected, rtol=rough)


@pytest.mark.parametrize("case", matrix.fast(LINEAR, 6))
def test_matrices_go_back_where_they_came_from(case):
    fn, weights, batch, _ = LINEAR[case]
    w = {"w": normal(*weights)}
    grams = calibrate(lambda p, x: fn(p["w"], x), w, [normal(*batch)], mask=everything)
    leaf, marked = w["w"], jnp.zeros(weights)
    for gram in grams.products:
        leaf = gram.pack(gram.unpack(leaf) + 1.0, leaf)
        marked = gram.pack(jnp.ones_like(gram.unpack(marked)), marked)
    np.testing.assert_array_equal(leaf, jnp.where(marked > 0, w["w"] + 1.0, w["w"]))
    covered = {"half of it": 0.5, "every other input": 0.5}.get(case, 1.0)
    assert float(marked.mean()) == covered


@pytest.mark.slow
def test_layers_of_a_scan_have_gram_matrices_of_their_own():
    w, x = normal(3, 6, 6), normal(5, 6)

    def fn(p, x):
        layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return lax.scan(layer, x, p["w"])[0]

    (gram,) = calibrate(fn, {"w": w}, [x, 2 * x]).products
    expected = np.zeros((3, 6, 6))
    for batch in (x, 2 * x):
        hidden = np.asarray(batch, np.float64)
        for layer in range(3):
            expected[layer] += hidden.T @ hidden
            hidden = np.tanh(hidden @ np.asarray(w[layer], np.float64))
    np.testing.assert_allclose(gram.matrices[:, 0, 0], expected, rtol=1e-5)
    assert gram.samples == 10


@pytest.mark.slow
def test_a_recurrent_cell_whose_kernels_are_concatenated():
    params = {name: normal(4, 3) for name in "ifgo"} | {"h": normal(3, 12)}
    x = normal(7, 5, 4)

    def fn(p, x):
        kernel = jnp.concatenate([p[name] for name in "ifgo"], axis=1)

        def step(h, x):
            gates = x @ kernel + h @ p["h"]
            return jnp.tanh(gates[:, :3]) * gates[:, 3:6], None

        return lax.scan(step, jnp.zeros((5, 3)), x)[0]

    grams = calibrate(fn, params, [x])
    inputs = np.asarray(x).reshape(-1, 4)
    found = {gram.path: gram.matrices[0, 0, 0] for gram in grams.products}
    assert set(found) == {*"ifgo", "h"}
    for name in "ifgo":
        np.testing.assert_allclose(found[name], inputs.T @ inputs, rtol=1e-5)


@pytest.mark.slow
def test_parts_of_one_kernel_are_products_of_their_own():
    def fn(p, x):
        query, key = jnp.split(p["qk"], 2, axis=1)
        return (x @ query) @ (jnp.tanh(x) @ key).T

    x = normal(5, 6)
    first, second = calibrate(fn, {"qk": normal(6, 8)}, [x]).products
    found = sorted([first, second], key=lambda gram: -float(gram.matrices.sum()))
    expected = sorted((x, jnp.tanh(x)), key=lambda x: -float((x.T @ x).sum()))
    for gram, inputs in zip(found, expected):
        np.testing.assert_allclose(gram.matrices[0, 0, 0], inputs.T @ inputs, rtol=1e-5)


@pytest.mark.parametrize(
    ("largest", "kind", "size"), [(6, "full", 6), (5, "block-diagonal", 3), (1, "diagonal", 1)]
)
def test_blocks_where_a_full_matrix_is_too_large(largest, kind, size):
    x = normal(5, 6)
    grams = calibrate(lambda p, x: x @ p, normal(6, 8), [x], largest=largest)
    (gram,) = grams.products
    whole = np.asarray(x.T @ x).reshape(6 // size, size, 6 // size, size)
    expected = np.einsum("bibj->bij", whole)
    np.testing.assert_allclose(gram.matrices[0, 0], expected, rtol=1e-5)
    assert gram.kind == kind
    assert kind in str(grams)


def test_a_last_batch_may_be_smaller():
    x = normal(5, 6)
    (gram,) = calibrate(lambda p, x: x @ p, normal(6, 8), [x, x[:2]]).products
    np.testing.assert_allclose(gram.matrices[0, 0, 0], x.T @ x + x[:2].T @ x[:2], rtol=1e-5)


def test_batches_may_be_an_iterator_of_trees():
    batches = ({"x": normal(5, 6), "skip": i} for i in range(3))
    (gram,) = calibrate(lambda p, b: b["x"] @ p, normal(6, 8), batches).products
    assert gram.samples == 15


def test_equal_programs_are_compiled_once(caplog):
    def fn(p, x):
        return x @ p["w"]

    with jax.log_compiles():
        for seed in range(3):
            calibrate(fn, {"w": jnp.ones((6, 8)) * seed}, [normal(5, 6)] * 2)
    compiled = [
        r for r in caplog.records if "Finished XLA compilation of jit(add_batch)" in r.message
    ]
    assert len(compiled) == 1


# --- the report -----------------------------------------------------------------------------------

X = normal(5, 6)
REPORTED = {
    "equal products": (
        lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"],
        {"w": normal(6, 6)},
        "w: in 2 products; their Gram matrices are added",
    ),
    "along different axes": (
        lambda p, x: x @ p["w"] @ p["w"].T,
        {"w": normal(6, 6)},
        "w: in 2 products, along different axes; its Gram matrix is that of the largest",
    ),
    "never": (
        lambda p, x: x @ p["w"],
        {"w": normal(6, 6), "other": normal(3, 3)},
        "not calibrated: other: in no product with activations",
    ),
    "looked up": (
        lambda p, x: (p["table"][x[:, 0].astype(int) * 0] + x) @ p["w"],
        {"w": normal(6, 6), "table": normal(3, 6)},
        "not calibrated: table: looked up by index, which is no product",
    ),
    "arithmetic before the product": (
        lambda p, x: x @ p["w"] + x @ jnp.tanh(p["v"]),
        {"w": normal(6, 6), "v": normal(6, 6)},
        "not calibrated: v: tanh stands before its product",
    ),
    "several places of one product": (
        lambda p, x: x @ p["w"] + x @ jnp.tile(p["v"], (1, 2)),
        {"w": normal(6, 6), "v": normal(6, 3)},
        "not calibrated: v: an entry stands in several places of one product",
    ),
    "indexed by a loop": (
        lambda p, x: lax.fori_loop(0, 3, lambda i, x: x @ p["stack"][i], x) @ p["w"],
        {"w": normal(6, 6), "stack": normal(3, 6, 6)},
        "not calibrated: stack: dynamic_slice stands before its product",
    ),
    "a primitive that is not looked into": (
        lambda p, x: jnp.linalg.solve(p["v"], x.T).T @ p["w"],
        {"w": normal(6, 6), "v": normal(6, 6)},
        "not calibrated: v: ",
    ),
    "a part of it": (
        lambda p, x: x @ p["w"][:, :3],
        {"w": normal(6, 6)},
        "not calibrated: w: a part of it is in no product, and stays as it is",
    ),
    "silent inputs": (
        lambda p, x: x.at[:, :2].set(0.0) @ p["w"],
        {"w": normal(6, 6)},
        "full  singular: 2 inputs are always zero",
    ),
    "few samples": (
        lambda p, x: x[:3] @ p["w"],
        {"w": normal(6, 6)},
        "full  singular: 3 samples",
    ),
}


@pytest.mark.parametrize("case", REPORTED)
def test_the_report_says_so(case):
    fn, params, line = REPORTED[case]
    assert any(line in each for each in str(calibrate(fn, params, [X])).splitlines())


def test_products_of_one_layer_that_is_used_twice_add_up():
    fn, params, _ = REPORTED["equal products"]
    (gram,) = calibrate(fn, params, [X]).products
    hidden = np.tanh(np.asarray(X @ params["w"]))
    np.testing.assert_allclose(gram.matrices[0, 0, 0], X.T @ X + hidden.T @ hidden, rtol=1e-4)


def test_what_the_mask_leaves_out_is_not_measured():
    params = {"a": normal(6, 6), "b": normal(6, 6), "bias": normal(6)}
    grams = calibrate(
        lambda p, x: x @ p["a"] @ p["b"] + p["bias"], params, [X], mask=masks.select(exclude="a")
    )
    assert [gram.path for gram in grams.products] == ["b"]
    assert not grams.missing
