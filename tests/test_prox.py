"""Proximal operators against scalar arithmetic in plain Python, calculus and convex analysis."""

import functools
import math
from typing import NamedTuple

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import lats_optax
from lats_optax import prox

elastic = functools.partial(prox.prox_elastic_net, l2=0.5)
by_row = functools.partial(prox.prox_group_lasso, axes=1)


# --- the definitions, one number (or one group) at a time ---------------------------------------


def soft(x, d):
    excess = abs(x) - d
    return 0.0 if excess <= 0 else math.copysign(excess, x)


def non_negative(x, d):
    return 0.0 if x - d <= 0 else x - d


def elastic_net(x, d, l2):
    return soft(x, d) / (1 + d * l2) if soft(x, d) else 0.0


def hard(x, d):
    if math.isnan(d):
        return d
    return 0.0 if abs(x) <= math.sqrt(2 * d) else x


def block(group, d):
    """Block soft thresholding of one group, a list of numbers."""
    norm, radius = math.sqrt(math.fsum(v * v for v in group)), d * math.sqrt(len(group))
    if norm - radius <= 0:
        return [0.0] * len(group)
    factor = 1 - radius / norm if norm else math.nan
    return [v * factor for v in group]


def over_groups(x, strengths, axes):
    """`block` over all groups of an array; `strengths` has the reduced shape, axes kept."""
    x = np.asarray(x, float)
    inside = {axis % x.ndim for axis in axes}
    out = np.empty_like(x)
    for number in np.ndindex(*(1 if a in inside else n for a, n in enumerate(x.shape))):
        where = tuple(slice(None) if a in inside else i for a, i in enumerate(number))
        group = block(x[where].ravel().tolist(), float(strengths[number]))
        out[where] = np.reshape(group, x[where].shape)
    return out


ELEMENTWISE = {
    "l1": (prox.prox_l1, soft),
    "non_negative_l1": (prox.prox_non_negative_l1, non_negative),
    "elastic_net": (elastic, functools.partial(elastic_net, l2=0.5)),
    "elastic_net_no_l2": (
        functools.partial(prox.prox_elastic_net, l2=0.0),
        functools.partial(elastic_net, l2=0.0),
    ),
    "l0": (prox.prox_l0, hard),
}
CONVEX = {
    "l1": prox.prox_l1,
    "non_negative_l1": prox.prox_non_negative_l1,
    "elastic_net": elastic,
    "group_lasso": prox.prox_group_lasso,
    "group_lasso_rows": by_row,
}
ALL = CONVEX | {"l0": prox.prox_l0}
FLOATS = ("float16", "bfloat16", "float32", "float64")

EDGES = [0.0, -0.0, 1e-3, 0.25, -0.25, 0.5, 1.0, -1.0, 1.375, -3.0, 1e4, math.inf, math.nan]
EDGES += [-value for value in EDGES[-3:-1]]
STRENGTHS = [0.0, 1e-3, 0.1, 0.25, 0.5, 1.0, 8.0, math.inf, math.nan]


def assert_matches(result, expected, dtype, size=0.0):
    """Equal to a few roundings of `dtype`, zero in the same places, and no zero has a sign.

    `size`: what the result is a difference of, where rounding is relative to that.
    """
    assert result.dtype == dtype
    result = np.asarray(result, np.float64)
    expected = np.asarray(np.asarray(expected, float).astype(dtype), np.float64)
    np.testing.assert_array_equal(result == 0, expected == 0)
    eps = 4 * float(jnp.finfo(dtype).eps)
    close = np.isclose(result, expected, rtol=eps, atol=eps * size, equal_nan=True)
    assert close.all(), (result[~close], expected[~close])
    assert not np.any(np.signbit(result) & (result == 0)), "a zero is -0.0"


def x64_if(dtype):
    return jax.enable_x64(jnp.dtype(dtype).itemsize == 8)


def strength_type(dtype):
    return np.float64 if dtype == "float64" else np.float32


class ScalarReferenceTest(chex.TestCase):
    """With and without jit, in every float type."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(name=list(ELEMENTWISE), dtype=FLOATS)
    def test_edge_cases_and_random_numbers(self, name, dtype):
        operator, scalar = ELEMENTWISE[name]
        values = EDGES + np.random.default_rng(0).normal(size=60).tolist()
        pairs = [(v, d) for v in values for d in STRENGTHS]
        with x64_if(dtype):
            x = jnp.asarray(np.array([v for v, _ in pairs]), dtype)
            d = np.array([d for _, d in pairs], strength_type(dtype))
            result = self.variant(operator)(x, d)
            expected = [scalar(v, s) for v, s in zip(x.tolist(), d.tolist())]
            assert_matches(result, expected, dtype)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters(
        ("default_float16", None, "float16"),
        ("default_bfloat16", None, "bfloat16"),
        ("default_float32", None, "float32"),
        ("default_float64", None, "float64"),
        ("one_kernel", (0, 1), "float32"),
        ("input_channel", (-1, 0, 1), "float32"),
        ("one_axis", 2, "float32"),
        ("whole_leaf", (0, 1, 2, 3), "float32"),
        ("no_axis", (), "float32"),
    )
    def test_groups_of_a_convolution(self, axes, dtype):
        with x64_if(dtype):
            kernel = np.random.default_rng(1).normal(size=(3, 2, 4, 5))
            kernel *= np.linspace(0.1, 2.0, 20).reshape(4, 5)  # some groups die, some live
            kernel = jnp.asarray(kernel, dtype)
            d = strength_type(dtype)(0.5)
            operator = functools.partial(prox.prox_group_lasso, axes=axes)
            result = self.variant(operator)(kernel, d)
            inside = (0, 1, 2) if axes is None else np.atleast_1d(axes).astype(int) % 4
            strengths = np.full([1 if a in inside else n for a, n in enumerate(kernel.shape)], d)
            expected = over_groups(kernel, strengths, inside)
            assert_matches(result, expected, dtype, size=np.abs(np.asarray(kernel, float)))

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(dtype=FLOATS)
    def test_groups_of_edge_cases(self, dtype):
        groups = [(0.0, -0.0), (3.0, 4.0), (-0.0, 1.0), (1e-3, -1e-3), (math.inf, 1.0)]
        groups += [(-math.inf, 0.0), (math.nan, 1.0)]
        pairs = [(group, d) for group in groups for d in STRENGTHS]
        with x64_if(dtype):
            x = jnp.asarray(np.array([group for group, _ in pairs]), dtype)
            d = np.array([[d] for _, d in pairs], strength_type(dtype))
            result = self.variant(by_row)(x, d)
            assert_matches(
                result,
                over_groups(x, d, (1,)),
                dtype,
                size=np.fmin(np.abs(np.asarray(x, float)), 4.0),
            )


@pytest.mark.parametrize("operator", ALL.values(), ids=ALL)
def test_a_result_too_small_for_float16_is_zero_without_a_sign(operator):
    x = jnp.full((1, 1), -1e-3, jnp.float16)
    least = float(prox.magnitude(prox.prox_l1)(x)[0, 0])
    result = np.asarray(jax.jit(operator)(x, np.float32(least * (1 - 1e-6))))
    assert not np.any(np.signbit(result) & (result == 0))


# --- pytrees ------------------------------------------------------------------------------------


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def tree():
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "conv": Layer(draw(3, 3, 2, 4), draw(4)),
        "head": [draw(6, 3), jnp.asarray(0.7, jnp.bfloat16)],
        "absent": None,
    }


STRENGTH_TREES = {
    "a scalar": (0.3, [0.3, 0.3, 0.3, 0.3]),
    "an array scalar": (jnp.float32(0.3), [0.3, 0.3, 0.3, 0.3]),
    "the structure of x": (
        {"conv": Layer(0.1, 0.2), "head": [0.3, jnp.float32(0.4)], "absent": None},
        [0.1, 0.2, 0.3, 0.4],
    ),
    "a prefix": ({"conv": 0.1, "head": [0.3, 0.4], "absent": 0.0}, [0.1, 0.1, 0.3, 0.4]),
}


@pytest.mark.parametrize("name", ["l1", "elastic_net", "group_lasso"])
@pytest.mark.parametrize("case", STRENGTH_TREES)
def test_a_pytree_is_mapped_leaf_by_leaf(name, case):
    operator = ALL[name]
    strength, expanded = STRENGTH_TREES[case]
    x = tree()
    result = jax.jit(lambda x: operator(x, strength))(x)
    assert jax.tree.structure(result) == jax.tree.structure(x)
    chex.assert_trees_all_equal_shapes_and_dtypes(result, x)
    for leaf, z, d in zip(jax.tree.leaves(x), jax.tree.leaves(result), expanded):
        leaf = np.asarray(leaf, float)
        if name == "group_lasso":
            axes = range(leaf.ndim - 1)
            expected = over_groups(leaf, np.full((1,) * len(axes) + leaf.shape[-1:], d), axes)
        else:
            scalar = ELEMENTWISE[name][1]
            expected = np.reshape([scalar(v, d) for v in leaf.ravel().tolist()], leaf.shape)
        assert_matches(z, expected, z.dtype, size=np.abs(leaf))


def test_a_strength_for_each_channel():
    kernel = tree()["conv"].kernel
    d = np.array([0.0, 0.1, 0.5, 9.0], np.float32)
    for operator, scalar in (ELEMENTWISE["l1"], ELEMENTWISE["l0"]):
        result = np.asarray(jax.jit(operator)(kernel, d))
        expected = [scalar(v, d[i % 4]) for i, v in enumerate(np.ravel(kernel).tolist())]
        np.testing.assert_allclose(result.ravel(), expected, rtol=1e-6)
    expected = over_groups(kernel, d.reshape(1, 1, 1, 4), (0, 1, 2))
    np.testing.assert_allclose(jax.jit(prox.prox_group_lasso)(kernel, d), expected, rtol=1e-5)


def test_groups_are_those_of_a_leaf():
    """A leaf's result does not depend on its neighbours, and the default group is a channel."""
    x = {"large": jnp.full((2, 3), 10.0), "small": jnp.full((2, 3), 0.1)}
    result = prox.prox_group_lasso(x, 0.5)
    assert not np.any(result["small"])
    np.testing.assert_allclose(result["large"], 9.5, rtol=1e-6)
    one_channel = jnp.full((2, 3), 10.0).at[:, 1].set(0.1)
    assert (prox.prox_group_lasso(one_channel, 0.5) == 0).tolist() == [[False, True, False]] * 2


def test_integers_become_floats_and_empty_leaves_stay():
    assert prox.prox_l1(jnp.array([-3, 2])).tolist() == [-2.0, 1.0]
    assert prox.prox_l1(-3, 1) == -2.0
    assert prox.prox_l1({}, 1.0) == {}
    for operator in ALL.values():
        assert jax.jit(operator)(jnp.zeros((0, 4)), 1.0).shape == (0, 4)


# --- derivatives --------------------------------------------------------------------------------


def jacobians(name, x, d):
    """The closed forms: of the flattened result by the flattened x, and by d."""
    flat, alive = x.ravel(), np.abs(x.ravel()) > d
    if name == "l1":
        return np.diag(alive * 1.0), -np.sign(flat) * alive
    if name == "non_negative_l1":
        return np.diag((flat > d) * 1.0), -1.0 * (flat > d)
    if name == "elastic_net":
        scale = 1 + 0.5 * d
        shrunk = np.sign(flat) * np.maximum(np.abs(flat) - d, 0)
        return np.diag(alive / scale), (-np.sign(flat) * alive * scale - shrunk * 0.5) / scale**2
    if name == "l0":
        return np.diag((np.abs(flat) > math.sqrt(2 * d)) * 1.0), 0 * flat
    index = np.arange(x.size).reshape(x.shape)
    groups = index.T if name == "group_lasso" else index
    by_x, by_d = np.zeros((x.size, x.size)), np.zeros(x.size)
    for group in groups:
        v, root = flat[group], math.sqrt(len(group))
        norm = math.sqrt(np.sum(v * v))
        if norm > d * root:
            ratio = d * root / norm
            by_x[np.ix_(group, group)] = (1 - ratio) * np.eye(len(v)) + ratio * np.outer(v, v) / (
                norm * norm
            )
            by_d[group] = -root * v / norm
    return by_x, by_d


@pytest.mark.parametrize("jacobian", [jax.jacrev, jax.jacfwd], ids=["reverse", "forward"])
@pytest.mark.parametrize("name", ALL)
def test_jacobian(name, jacobian):
    x = np.array([[0.9, -2.0, 0.0, 0.1], [-1.5, 0.2, 0.0, -0.2], [0.4, 3.0, 0.0, 0.05]])
    d = 0.45
    with jax.enable_x64(True):
        by_x, by_d = jax.jit(jacobian(ALL[name], argnums=(0, 1)))(jnp.asarray(x), jnp.asarray(d))
        want_x, want_d = jacobians(name, x, d)
        np.testing.assert_allclose(np.reshape(by_x, (12, 12)), want_x, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(np.ravel(by_d), want_d, rtol=1e-12, atol=1e-14)


# --- what makes an operator proximal ------------------------------------------------------------


def penalty(name, z):
    if name == "l0":
        return np.count_nonzero(z)
    if name == "l1":
        return np.sum(np.abs(z))
    if name == "non_negative_l1":
        return np.sum(z) if np.all(z >= 0) else math.inf
    if name == "elastic_net":
        return np.sum(np.abs(z) + 0.25 * z * z)
    axis = 0 if name == "group_lasso" else 1
    return np.sum(np.linalg.norm(z, axis=axis)) * math.sqrt(z.shape[axis])


COMPILED = {name: jax.jit(operator) for name, operator in ALL.items()} | {
    "elastic_net_no_l2": jax.jit(functools.partial(prox.prox_elastic_net, l2=0.0)),
    "group_of_one": jax.jit(functools.partial(prox.prox_group_lasso, axes=())),
}


def apply(name, x, d):
    """The operator in float64."""
    with jax.enable_x64(True):
        return np.asarray(COMPILED[name](jnp.asarray(x), jnp.asarray(d)))


@pytest.mark.parametrize("d", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_no_other_point_has_a_smaller_objective(name, d):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 3))

    def objective(z):
        return 0.5 * np.sum((z - x) ** 2) + d * penalty(name, z)

    best = apply(name, x, d)
    least = objective(best)
    others = [x, 0 * x, np.where(best == 0, 1e-3, best), np.where(np.abs(best) < 0.5, 0, best)]
    for scale in (1e-6, 1e-3, 0.1, 1.0):
        others += list(best + scale * rng.normal(size=(200, 4, 3)))
        others += list(best * (1 + scale * rng.normal(size=(200, 4, 3))))
    others += [np.abs(other) for other in others]
    # One rounding of the objective is allowed for; next to the minimum it is flat.
    assert min(map(objective, others)) >= least - 4 * np.finfo(float).eps * least


@pytest.mark.parametrize("name", CONVEX)
def test_subgradient_condition(name):
    """x - z = d g for a subgradient g of the penalty at z: necessary and sufficient."""
    d, x = 0.4, np.random.default_rng(4).normal(size=(40, 3))
    z = apply(name, x, d)
    g = (x - z) / d
    if name in ("group_lasso", "group_lasso_rows"):
        axis = 0 if name == "group_lasso" else 1
        root = math.sqrt(x.shape[axis])
        norm = np.linalg.norm(z, axis=axis, keepdims=True)
        assert np.all(np.linalg.norm(g, axis=axis, keepdims=True)[norm == 0] <= root)
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(g, np.where(norm > 0, root * z / norm, g), rtol=1e-12)
        return
    quadratic = 0.5 * z if name == "elastic_net" else 0
    np.testing.assert_allclose(g[z != 0], (np.sign(z) + quadratic)[z != 0], rtol=1e-12)
    assert np.all(g[z == 0] <= 1)
    if name != "non_negative_l1":
        assert np.all(g[z == 0] >= -1)
    assert np.any(z == 0)
    assert np.any(z != 0)


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("name", CONVEX)
def test_minimizers_are_fixed_points_of_every_step_size(name, step):
    """The minimizer w of 1/2 ||w - b||^2 + d penalty(w) is where the proximal gradient rests."""
    d, b = 0.4, np.random.default_rng(5).normal(size=(40, 3))
    w = apply(name, b, d)
    np.testing.assert_allclose(apply(name, w - step * (w - b), step * d), w, atol=1e-14)


points = hnp.arrays(
    np.float64,
    (4, 3),
    # Squares of what is smaller underflow in a group's norm.
    elements=st.floats(-1e3, 1e3).map(lambda v: v if abs(v) > 1e-100 else 0.0),
)
strengths = st.floats(0, 1e3, allow_subnormal=False)
with_examples = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("name", CONVEX)
@with_examples
@hypothesis.given(x=points, y=points, d=strengths)
def test_firmly_non_expansive(name, x, y, d):
    """||Px - Py||^2 <= <Px - Py, x - y>, from which ||Px - Py|| <= ||x - y|| follows."""
    moved, apart = apply(name, x, d) - apply(name, y, d), x - y
    slack = 1e-12 * (1 + np.max(np.abs(x)) + np.max(np.abs(y))) ** 2
    assert np.sum(moved * moved) <= np.sum(moved * apart) + slack
    assert np.linalg.norm(moved) <= np.linalg.norm(apart) * (1 + 1e-12) + math.sqrt(slack)


@pytest.mark.parametrize("name", [name for name in ALL if name != "non_negative_l1"])
@with_examples
@hypothesis.given(x=points, d=strengths)
def test_odd(name, x, d):
    np.testing.assert_array_equal(apply(name, -x, d), 0.0 - apply(name, x, d))


@pytest.mark.parametrize("name", ALL)
@with_examples
@hypothesis.given(x=points, d=strengths)
def test_shrinks_without_changing_a_sign(name, x, d):
    z = apply(name, x, d)
    assert np.all(np.abs(z) <= np.abs(x))
    assert np.all((z == 0) | (np.sign(z) == np.sign(x)))
    assert not np.any(np.signbit(z) & (z == 0))
    if name != "non_negative_l1":
        np.testing.assert_array_equal(apply(name, x, 0.0), x)


@with_examples
@hypothesis.given(x=points, d=strengths)
def test_moreau_decomposition(x, d):
    """x - prox is the projection on the dual ball: a box for L1, a Euclidean ball for groups."""
    tolerance = 1e-12 * (1 + np.max(np.abs(x)))
    np.testing.assert_allclose(x - apply("l1", x, d), np.clip(x, -d, d), atol=tolerance)
    norm = np.linalg.norm(x, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ball = np.where(norm > 2 * d, x * (2 * d / norm), x)
    np.testing.assert_allclose(x - apply("group_lasso", x, d), ball, atol=tolerance)


@with_examples
@hypothesis.given(x=points, d=strengths)
def test_special_cases_agree(x, d):
    l1, tolerance = apply("l1", x, d), 1e-12 * (1 + d)
    np.testing.assert_array_equal(apply("elastic_net_no_l2", x, d), l1)
    np.testing.assert_array_equal(apply("non_negative_l1", np.abs(x), d), np.abs(l1))
    np.testing.assert_allclose(apply("group_of_one", x, d), l1, rtol=1e-14, atol=tolerance)


# --- magnitude and lift -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ALL)
def test_magnitude_is_the_least_strength_that_gives_zero(name, dtype):
    """operator(x, d) == 0 exactly where d >= magnitude(x), one float below it included."""
    operator, of = jax.jit(ALL[name]), jax.jit(prox.magnitude(ALL[name]))
    rng = np.random.default_rng(6)
    with x64_if(dtype):
        x = rng.normal(size=(5, 400)) * 10.0 ** rng.integers(-4, 2, size=(1, 400))
        x = x if name != "group_lasso_rows" else x.T
        x = jnp.asarray(np.where(rng.random(x.shape) < 0.1, 0.0, x), dtype)
        magnitude = of(x)
        assert magnitude.shape == x.shape
        assert magnitude.dtype == strength_type(dtype)
        # A strength applies to a whole group; the kept axis has one entry.
        least = np.asarray(magnitude)
        least = least[:1] if name == "group_lasso" else least
        least = least[:, :1] if name == "group_lasso_rows" else least
        below = np.maximum(np.nextafter(least, -np.inf), 0).astype(least.dtype)
        above = np.nextafter(least, np.inf).astype(least.dtype)
        for d in (least, below, above, least * 0, np.full_like(least, 0.3)):
            zero = np.asarray(operator(x, d)) == 0
            expected = np.broadcast_to(d >= least, x.shape)
            # An entry of a living group may be zero itself, and one in 16 bits round to it.
            mistaken = (zero != expected) & ~((x == 0) & ~expected)
            if jnp.finfo(dtype).bits == 16:
                mistaken &= ~(zero & ~expected & (np.abs(least - d) < least * 1e-3))
            assert not mistaken.any()


@pytest.mark.parametrize("d", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("name", ALL)
def test_lift_is_undone_by_the_operator(name, d):
    w = np.random.default_rng(7).normal(size=(6, 5))
    w = np.where(np.abs(w) < 0.3, 0, w)
    w = np.abs(w) if name == "non_negative_l1" else w
    if name == "l0":  # its values are zero or beyond sqrt(2 d); no point is sent in between
        w = np.where(np.abs(w) > math.sqrt(2 * d), w, 0)
    with jax.enable_x64(True):
        lifted = jax.jit(prox.lift(ALL[name]))(jnp.asarray(w), jnp.asarray(d))
    result = apply(name, lifted, d)
    np.testing.assert_allclose(result, w, rtol=0, atol=4e-15)
    np.testing.assert_array_equal(result == 0, w == 0)


def test_lift_is_undone_exactly_where_the_sums_are_exact():
    w = jnp.asarray(np.random.default_rng(8).integers(-8, 9, size=(5, 5)) / 8, jnp.float32)
    for operator in (prox.prox_l1, functools.partial(prox.prox_elastic_net, l2=4.0)):
        np.testing.assert_array_equal(operator(prox.lift(operator)(w, 0.25), 0.25), w)


def test_a_partial_hands_its_keywords_to_magnitude_and_lift():
    x = jnp.array([[3.0, 4.0], [0.0, 1.0]])
    rows = functools.partial(functools.partial(prox.prox_group_lasso, axes=0), axes=1)
    np.testing.assert_allclose(
        prox.magnitude(rows)(x), [[5 / math.sqrt(2)] * 2, [1 / math.sqrt(2)] * 2], rtol=1e-6
    )
    lifted = prox.lift(functools.partial(prox.prox_elastic_net, l2=3.0))(jnp.array([2.0]), 1.0)
    assert lifted.tolist() == [9.0]


# --- an operator of the user's own --------------------------------------------------------------


def firm(x, d, *, ratio=2.0):
    """Firm thresholding: zero up to d, the identity beyond ratio * d, linear in between."""
    return jax.tree.map(
        lambda x: jnp.clip(ratio * (jnp.abs(x) - d) / (ratio - 1), 0, jnp.abs(x)) * jnp.sign(x), x
    )


def test_registered_operator_prunes_to_a_named_sparsity():
    mine = functools.partial(firm, ratio=3.0)
    with pytest.raises(ValueError, match=r"operator: .*firm.*register\("):
        prox.magnitude(mine)
    with pytest.raises(ValueError, match=r"operator: .*firm.*register\("):
        lats_optax.soft_threshold(lats_optax.target_sparsity(0.5, 0.1, 4), operator=mine)
    prox.register(
        firm,
        magnitude=lambda x, ratio=2.0: jnp.abs(x),
        lift=lambda w, d, ratio=2.0: jnp.where(
            jnp.abs(w) >= ratio * d, w, (jnp.abs(w) * (ratio - 1) / ratio + d) * jnp.sign(w)
        ),
    )
    params = {"kernel": jnp.asarray(np.random.default_rng(9).normal(size=(10, 10)), jnp.float32)}
    gradients = jax.tree.map(jnp.zeros_like, params)

    tx = lats_optax.soft_threshold(lats_optax.target_sparsity(0.7, 0.1, 4), operator=mine)
    state, w = tx.init(params), params
    for _ in range(4):
        updates, state = jax.jit(tx.update)(gradients, state, w)
        w = optax.apply_updates(w, updates)
    assert lats_optax.sparsity(w).zeros == 70

    tx = lats_optax.soft_threshold(0.2, operator=mine)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    chex.assert_trees_all_close(optax.apply_updates(params, updates), params, rtol=1e-5)


def test_an_unknown_operator_is_lifted_to_itself():
    w = jnp.array([1.0, -2.0])
    np.testing.assert_array_equal(prox.lift(lambda x, d: x)(w, 0.5), w)


# --- bad input ----------------------------------------------------------------------------------

X = jnp.ones((3, 4))
BAD_INPUT = {
    "negative strength": (lambda op: op(X, -0.5), ValueError, "strength: -0.5"),
    "negative NumPy strength": (
        lambda op: op(X, np.array([1.0, -2.0, 1.0, 1.0])),
        ValueError,
        r"strength: \[ ?1. -2.",
    ),
    "negative in a tree": (
        lambda op: op({"a": X, "b": X}, {"a": 1.0, "b": -3}),
        ValueError,
        "strength: -3",
    ),
    "other keys": (lambda op: op({"a": X}, {"b": 1.0}), ValueError, "strength: .*'b'.*'a'"),
    "too deep": (lambda op: op({"a": X}, {"a": {"b": 1.0}}), ValueError, "strength: the structure"),
    "other length": (lambda op: op([X, X], [1.0]), ValueError, "strength: the structure"),
    "other shape": (lambda op: op(X, np.ones(3)), ValueError, r"strength: .*\(3,\).*\(\d, 4\)"),
    "larger shape": (lambda op: op(X, np.ones((2, 3, 4))), ValueError, r"strength: .*\(2, 3, 4\)"),
    "complex": (lambda op: op(X.astype(complex), 1.0), TypeError, "x: complex64"),
    "complex in a tree": (lambda op: op([X, X * 1j], 1.0), TypeError, "x: complex64"),
}


@pytest.mark.parametrize(
    "operator",
    [prox.prox_l1, prox.prox_non_negative_l1, elastic, prox.prox_group_lasso, prox.prox_l0],
    ids=["l1", "non_negative_l1", "elastic_net", "group_lasso", "l0"],
)
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(operator, case):
    call, error, message = BAD_INPUT[case]
    with pytest.raises(error, match=message):
        call(operator)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (2, "axes: 2 is not an axis of a leaf with 2 dimensions"),
        ((0, -3), "axes: -3 is not an axis of a leaf with 2 dimensions"),
        ((0, -2), r"axes: \(0, -2\) names an axis of a leaf with 2 dimensions twice"),
        (0.5, "axes: 0.5 is not an axis of a leaf with 2 dimensions"),
    ],
)
def test_bad_axes(axes, message):
    with pytest.raises(ValueError, match=message):
        prox.prox_group_lasso(X, 1.0, axes=axes)
    with pytest.raises(ValueError, match=message):
        prox.magnitude(functools.partial(prox.prox_group_lasso, axes=axes))(X)


def test_bad_strength_within_a_group():
    with pytest.raises(ValueError, match=r"strength: .*\(3, 4\).*\(1, 4\)"):
        prox.prox_group_lasso(X, np.ones((3, 4)), axes=0)


def test_bad_l2():
    with pytest.raises(ValueError, match=r"l2: -1\.0"):
        prox.prox_elastic_net(X, 1.0, l2=-1.0)
