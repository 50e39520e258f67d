"""Proximal operators against scalar arithmetic in plain Python, calculus and convex analysis."""

import functools
import math
from dataclasses import dataclass
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
from lats_optax.compatibility import enable_x64
from tests import matrix

elastic = prox.ElasticNet(0.5)
by_column = prox.Axes()
by_row = prox.Axes(axes=1)
by_row_power = prox.Axes(prox.prox_power(3), axes=1)


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


def power(x, d, p):
    """The power threshold as it is written, in long double where a double would cancel."""
    if math.isnan(x) or math.isnan(d):
        return math.nan
    if abs(x) <= d:
        return math.nan if math.isinf(x) else 0.0
    if d == 0 or math.isinf(x) or math.isinf(p):
        return x
    wide = np.longdouble
    with np.errstate(under="ignore"):
        size = (wide(abs(x)) ** wide(p) - wide(d) ** wide(p)) ** (wide(1) / wide(p))
    return math.copysign(float(size), x)


def firm(x, d, gamma):
    if math.isnan(x) or math.isnan(d):
        return math.nan
    if abs(x) >= gamma * d and not (math.isinf(x) and math.isinf(d)):
        return x
    return soft(x, d) * gamma / (gamma - 1)


def scad(x, d, a):
    if math.isnan(x) or math.isnan(d):
        return math.nan
    if abs(x) <= 2 * d:
        return soft(x, d)
    return x if abs(x) >= a * d else ((a - 1) * x - math.copysign(a * d, x)) / (a - 2)


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
    "elastic_net_no_l2": (prox.ElasticNet(0.0), functools.partial(elastic_net, l2=0.0)),
    "l0": (prox.prox_l0, hard),
    "power_1": (prox.prox_power(1), soft),
    "power_3": (prox.prox_power(3), functools.partial(power, p=3)),
    "power_1.5": (prox.prox_power(1.5), functools.partial(power, p=1.5)),
    "power_inf": (prox.prox_power(math.inf), functools.partial(power, p=math.inf)),
    "firm": (prox.prox_firm(2.0), functools.partial(firm, gamma=2.0)),
    "scad": (prox.prox_scad(3.0), functools.partial(scad, a=3.0)),
}
CONVEX = {
    "l1": prox.prox_l1,
    "non_negative_l1": prox.prox_non_negative_l1,
    "elastic_net": elastic,
    "group_lasso": by_column,
    "group_lasso_rows": by_row,
}
ODD = {
    name: ELEMENTWISE[name][0]
    for name in ("l0", "power_3", "power_1.5", "power_inf", "firm", "scad")
}
ALL = CONVEX | ODD | {"group_power_rows": by_row_power}
FLOATS = ("float16", "bfloat16", "float32", "float64")

EDGES = [0.0, -0.0, 1e-3, 0.25, -0.25, 0.5, 1.0, -1.0, 1.375, -3.0, 1e4, math.inf, math.nan]
EDGES += [-value for value in EDGES[-3:-1]]
STRENGTHS = [0.0, 1e-3, 0.1, 0.25, 0.5, 1.0, 8.0, math.inf, math.nan]


def assert_matches(result, expected, dtype, size=0.0, slack=0.0):
    """Equal to a few roundings of `dtype`, zero in the same places, and no zero has a sign.

    `size`: what the result is a difference of, where rounding is relative to that; `slack`: a
    relative difference that is allowed where it is more than a few roundings.
    """
    assert result.dtype == dtype
    result = np.asarray(result, np.float64)
    expected = np.asarray(np.asarray(expected, float).astype(dtype), np.float64)
    np.testing.assert_array_equal(result == 0, expected == 0)
    eps = max(4 * float(jnp.finfo(dtype).eps), slack)
    # NumPy's isclose takes tolerances of an array together with infinities from version 2 on.
    close = (result == expected) | (np.isnan(result) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        near = np.abs(result - expected) <= eps * (size + np.abs(expected))
    close |= near & np.isfinite(expected)
    assert close.all(), (result[~close], expected[~close])
    assert not np.any(np.signbit(result) & (result == 0)), "a zero is -0.0"


def x64_if(dtype):
    return enable_x64(jnp.dtype(dtype).itemsize == 8)


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
            # XLA's transcendental functions are a few roundings off.
            close = 1e-12 if name.startswith("power") and dtype == "float64" else 0.0
            assert_matches(result, expected, dtype, slack=close)

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
            operator = prox.Axes(axes=axes)
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


# Without jit each operation compiles alone, for each type: the fast suite does so for one.
for _name, _test in list(vars(ScalarReferenceTest).items()):
    if _name.endswith("__without_jit") and "float32" not in _name:
        setattr(ScalarReferenceTest, _name, pytest.mark.slow(_test))


@pytest.mark.parametrize("operator", ALL.values(), ids=ALL)
def test_a_result_too_small_for_float16_is_zero_without_a_sign(operator):
    x = jnp.full((1, 1), -1e-3, jnp.float16)
    least = float(prox.prox_l1.magnitude(x)[0, 0])
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


@pytest.mark.cover
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


@pytest.mark.slow
def test_groups_are_those_of_a_leaf():
    """A leaf's result does not depend on its neighbors, and the default group is a channel."""
    x = {"large": jnp.full((2, 3), 10.0), "small": jnp.full((2, 3), 0.1)}
    result = prox.prox_group_lasso(x, 0.5)
    assert not np.any(result["small"])
    np.testing.assert_allclose(result["large"], 9.5, rtol=1e-6)
    one_channel = jnp.full((2, 3), 10.0).at[:, 1].set(0.1)
    assert (prox.prox_group_lasso(one_channel, 0.5) == 0).tolist() == [[False, True, False]] * 2


@pytest.mark.slow
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
    if name.startswith("power"):
        p, safe = float(name.removeprefix("power_")), np.where(alive, np.abs(flat), 2 * d)
        if math.isinf(p):
            return np.diag(alive * 1.0), 0 * flat
        z = (safe**p - d**p) ** (1 / p)
        return np.diag(alive * (safe / z) ** (p - 1)), -np.sign(flat) * alive * (d / z) ** (p - 1)
    if name == "firm":
        inside = alive & (np.abs(flat) < 2 * d)
        return np.diag(np.where(inside, 2.0, alive * 1.0)), -2.0 * np.sign(flat) * inside
    if name == "scad":
        first, inside = (
            alive & (np.abs(flat) <= 2 * d),
            (np.abs(flat) > 2 * d) & (np.abs(flat) < 3 * d),
        )
        return (
            np.diag(np.where(inside, 2.0, alive * 1.0)),
            -np.sign(flat) * np.where(first, 1.0, 3.0 * inside),
        )
    if name == "group_power_rows":
        return group_power_jacobian(x, d)
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


def group_power_jacobian(x, d):
    """By central differences, in long double, of x_g (1 - (d / r)^3)^(1/3)."""
    wide = np.longdouble

    def value(flat, d):
        rows = flat.reshape(x.shape)
        r = np.sqrt(np.mean(rows * rows, axis=1, keepdims=True))
        alive = r > d
        factor = np.where(alive, 1 - (d / np.where(alive, r, 1)) ** 3, 0) ** (wide(1) / 3)
        return (rows * factor).ravel()

    flat, step = x.ravel().astype(wide), wide(1e-6)
    by_x = [
        (value(flat + step * unit, wide(d)) - value(flat - step * unit, wide(d))) / (2 * step)
        for unit in np.eye(x.size, dtype=wide)
    ]
    by_d = (value(flat, wide(d) + step) - value(flat, wide(d) - step)) / (2 * step)
    return np.array(by_x, float).T, np.array(by_d, float)


@pytest.mark.cover
@pytest.mark.parametrize("jacobian", [jax.jacrev, jax.jacfwd], ids=["reverse", "forward"])
@pytest.mark.parametrize("name", ALL)
def test_jacobian(name, jacobian):
    x = np.array([[0.9, -2.0, 0.0, 0.1], [-1.5, 0.2, 0.0, -0.2], [0.4, 3.0, 0.0, 0.05]])
    d = 0.45
    with enable_x64(True):
        by_x, by_d = jax.jit(jacobian(ALL[name], argnums=(0, 1)))(jnp.asarray(x), jnp.asarray(d))
        want_x, want_d = jacobians(name, x, d)
        close = {"rtol": 1e-12, "atol": 1e-14}
        if name == "group_power_rows":
            close = {"rtol": 1e-9, "atol": 1e-11}
        np.testing.assert_allclose(np.reshape(by_x, (12, 12)), want_x, **close)
        np.testing.assert_allclose(np.ravel(by_d), want_d, **close)


# --- what makes an operator proximal ------------------------------------------------------------


def penalty(name, z, d):
    """phi_d(z) / d."""
    size = np.abs(z)
    if name == "l0":
        return np.count_nonzero(z)
    if name == "power_inf":  # phi' = d - z up to d: hard thresholding at d
        return np.sum(np.where(size < d, d * size - size**2 / 2, d * d / 2)) / d
    if name.startswith("power"):
        return np.sum(power_penalty(size, d, float(name.removeprefix("power_")))) / d
    if name == "group_power_rows":
        return z.shape[1] * np.sum(power_penalty(np.sqrt(np.mean(z * z, axis=1)), d, 3.0)) / d
    if name == "firm":  # phi' = max(d - z / 2, 0)
        inner = np.minimum(size, 2 * d)
        return np.sum(d * inner - inner**2 / 4) / d
    if name == "scad":  # phi' = d up to d, then (3 d - z) / 2, then 0
        outer = np.clip(size, d, 3 * d)
        return np.sum(np.minimum(size, d) * d + (outer - d) * (6 * d - outer - d) / 4) / d
    if name == "l1":
        return np.sum(np.abs(z))
    if name == "non_negative_l1":
        return np.sum(z) if np.all(z >= 0) else math.inf
    if name == "elastic_net":
        return np.sum(np.abs(z) + 0.25 * z * z)
    axis = 0 if name == "group_lasso" else 1
    return np.sum(np.linalg.norm(z, axis=axis)) * math.sqrt(z.shape[axis])


def power_penalty(z, d, p):
    """The integral of (t^p + d^p)^(1/p) - t from 0 to z, by Gauss-Legendre on (0, 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t = np.multiply.outer(z, (nodes + 1) / 2)
    return z * ((((t**p + d**p) ** (1 / p) - t) @ weights) / 2)


COMPILED = {name: jax.jit(operator) for name, operator in ALL.items()} | {
    "elastic_net_no_l2": jax.jit(prox.ElasticNet(0.0)),
    "group_of_one": jax.jit(prox.Axes(axes=())),
}


def apply(name, x, d):
    """The operator in float64."""
    with enable_x64(True):
        return np.asarray(COMPILED[name](jnp.asarray(x), jnp.asarray(d)))


@pytest.mark.cover
@pytest.mark.parametrize("d", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("name", matrix.fast(ALL, [name for name in ALL if "power" not in name]))
def test_no_other_point_has_a_smaller_objective(name, d):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 3))

    def objective(z):
        return 0.5 * np.sum((z - x) ** 2) + d * penalty(name, z, d)

    best = apply(name, x, d)
    least = objective(best)
    others = [x, 0 * x, np.where(best == 0, 1e-3, best), np.where(np.abs(best) < 0.5, 0, best)]
    for scale in (1e-6, 1e-3, 0.1, 1.0):
        others += list(best + scale * rng.normal(size=(200, 4, 3)))
        others += list(best * (1 + scale * rng.normal(size=(200, 4, 3))))
    others += [np.abs(other) for other in others]
    # One rounding of the objective is allowed for; next to the minimum it is flat.
    # The integral of the power threshold's penalty is by quadrature.
    slack = 1e-11 if "power" in name else 4 * np.finfo(float).eps
    assert min(map(objective, others)) >= least - slack * least


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
@hypothesis.example(x=np.array([[0.75]]), d=2.0**-24)  # where 1 - (d/x)^3 rounds to above 1
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


@pytest.mark.cover
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", ALL)
def test_magnitude_is_the_least_strength_that_gives_zero(name, dtype):
    """operator(x, d) == 0 exactly where d >= magnitude(x), one float below it included."""
    operator, of = jax.jit(ALL[name]), jax.jit(ALL[name].magnitude)
    rng = np.random.default_rng(6)
    with x64_if(dtype):
        x = rng.normal(size=(5, 400)) * 10.0 ** rng.integers(-4, 2, size=(1, 400))
        x = x.T if name.endswith("rows") else x
        x = jnp.asarray(np.where(rng.random(x.shape) < 0.1, 0.0, x), dtype)
        magnitude = of(x)
        assert magnitude.dtype == strength_type(dtype)
        # A strength applies to a whole group; the kept axis has one entry.
        least = np.asarray(magnitude)
        sizes = np.broadcast_to(ALL[name].group_sizes(x.shape), least.shape)
        assert sizes.sum() == x.size
        assert np.broadcast_shapes(least.shape, x.shape) == x.shape
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


@pytest.mark.cover
@pytest.mark.parametrize("d", [0.0, 0.25, 2.0])
@pytest.mark.parametrize("name", ALL)
def test_the_operator_sends_the_preimage_to_the_weight(name, d):
    w = np.random.default_rng(7).normal(size=(6, 5))
    w = np.where(np.abs(w) < 0.3, 0, w)
    w = np.abs(w) if name == "non_negative_l1" else w
    if name in ("l0", "power_inf"):  # values are zero or beyond a bound; nothing goes in between
        w = np.where(np.abs(w) > (math.sqrt(2 * d) if name == "l0" else d), w, 0)
    with enable_x64(True):
        before = jax.jit(ALL[name].preimage)(jnp.asarray(w), jnp.asarray(d))
    result = apply(name, before, d)
    # Where d is larger than w, a rounding of the power's preimage is one of d.
    np.testing.assert_allclose(result, w, rtol=0, atol=1e-13 if "power" in name else 4e-15)
    np.testing.assert_array_equal(result == 0, w == 0)


@pytest.mark.slow
def test_the_preimage_is_exact_where_the_sums_are_exact():
    w = jnp.asarray(np.random.default_rng(8).integers(-8, 9, size=(5, 5)) / 8, jnp.float32)
    for operator in (prox.prox_l1, prox.ElasticNet(4.0)):
        np.testing.assert_array_equal(operator(operator.preimage(w, 0.25), 0.25), w)


@pytest.mark.parametrize("name", ["power_3", "power_1.5", "firm", "scad"])
def test_large_weights_are_hardly_shrunk(name):
    """Between soft and hard: survivors are at least as large as soft ones, and less than x."""
    x = np.linspace(1.001, 50.0, 400)
    z = apply(name, x, 1.0)
    assert np.all((z >= apply("l1", x, 1.0) * (1 - 1e-12)) & (z <= x))
    assert np.all(np.diff(z) > 0)
    assert x[-1] - z[-1] < 0.05 * 1.0 + 0.06 * (name == "power_1.5")


@pytest.mark.parametrize("x", [1 + 1e-7, 1 + 1e-4, 1.5, 100.0])
def test_the_power_threshold_is_accurate_next_to_the_threshold(x):
    x = np.float32(x)
    for p in (1.5, 3.0, 7.0):
        got = float(prox.prox_power(p)(jnp.asarray(x), jnp.float32(1.0)))
        assert got == pytest.approx(power(float(x), 1.0, p), rel=2e-6)


# --- an operator of the user's own --------------------------------------------------------------


@dataclass(frozen=True)
class Garrote(lats_optax.Elementwise):
    """The non-negative garrote, x - d^2 / x."""

    def shrink(self, x, d):
        dead = jnp.abs(x) <= d
        return jnp.where(dead, 0.0, x - d * d / jnp.where(dead, 1.0, x))

    def preimage(self, w, d):
        return (w + jnp.sign(w) * jnp.sqrt(w * w + 4 * d * d)) / 2


class Bare:
    """The same by the five methods of the protocol alone."""

    def at(self, count):
        return self

    def __call__(self, x, strength):
        return jax.tree.map(lambda leaf: Garrote().shrink(leaf, strength), x)

    def magnitude(self, x):
        return jnp.abs(x)

    def group_sizes(self, shape):
        return np.ones((1,) * len(shape), np.int32)

    def preimage(self, w, d):
        return Garrote().preimage(w, d)


@pytest.mark.slow
@pytest.mark.parametrize("operator", [Garrote(), Bare()], ids=["derived", "bare"])
def test_an_operator_of_ones_own_prunes_to_a_named_sparsity(operator):
    params = {"kernel": jnp.asarray(np.random.default_rng(9).normal(size=(10, 10)), jnp.float32)}
    gradients = jax.tree.map(jnp.zeros_like, params)

    tx = lats_optax.soft_threshold(lats_optax.target_sparsity(0.7, 0.1, 4), operator=operator)
    state, w = tx.init(params), params
    for _ in range(4):
        updates, state = jax.jit(tx.update)(gradients, state, w)
        w = optax.apply_updates(w, updates)
    assert lats_optax.sparsity(w).zeros == 70
    d = float(state.threshold)
    x = np.asarray(params["kernel"])
    np.testing.assert_allclose(
        w["kernel"], np.where(np.abs(x) > d, x - d * d / x, 0.0), rtol=1e-5, atol=1e-7
    )

    tx = lats_optax.soft_threshold(0.2, operator=operator)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    chex.assert_trees_all_close(optax.apply_updates(params, updates), params, rtol=1e-5)


@pytest.mark.slow
def test_a_plain_function_serves_where_its_values_are_enough():
    def halved(x, d):
        return jax.tree.map(lambda leaf: jnp.where(jnp.abs(leaf) <= d, 0.0, leaf / 2), x)

    params = jnp.array([[1.0, -3.0]])
    tx = lats_optax.soft_threshold(lambda count: 2.0 * (count > 0), operator=halved)
    updates, _ = tx.update(jnp.zeros((1, 2)), tx.init(params), params)
    assert optax.apply_updates(params, updates).tolist() == [[0.0, -1.5]]
    with pytest.raises(ValueError, match=r"^operator: .*halved.*plain function.*Elementwise"):
        lats_optax.soft_threshold(lats_optax.target_sparsity(0.5, 0.1, 4), operator=halved)


@pytest.mark.parametrize("operator", ["l1", 3])
def test_what_is_no_operator_is_refused(operator):
    with pytest.raises(ValueError, match=f"^operator: {operator!r} is not allowed"):
        lats_optax.soft_threshold(0.1, operator=operator)


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
    "other shape": (lambda op: op(X, np.ones(5)), ValueError, r"strength: .*\(5,\).*\(\d, \d\)"),
    "larger shape": (lambda op: op(X, np.ones((2, 3, 4))), ValueError, r"strength: .*\(2, 3, 4\)"),
    "complex": (lambda op: op(X.astype(complex), 1.0), TypeError, "x: complex64"),
    "complex in a tree": (lambda op: op([X, X * 1j], 1.0), TypeError, "x: complex64"),
}


@pytest.mark.cover
@pytest.mark.parametrize("operator", ALL.values(), ids=ALL)
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
        prox.Axes(axes=axes).magnitude(X)


def test_bad_strength_within_a_group():
    with pytest.raises(ValueError, match=r"strength: .*\(3, 4\).*\(1, 4\)"):
        prox.prox_group_lasso(X, np.ones((3, 4)), axes=0)


def test_bad_l2():
    with pytest.raises(ValueError, match=r"l2: -1\.0"):
        prox.prox_elastic_net(X, 1.0, l2=-1.0)


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (
            prox.prox_power,
            0.5,
            r"^p: 0\.5 is not allowed; allowed are numbers >= 1, inf among them",
        ),
        (prox.prox_power, math.nan, "^p: nan"),
        (prox.prox_power, "3", "^p: '3'"),
        (prox.prox_firm, 1.0, r"^gamma: 1\.0 is not allowed; allowed are finite numbers > 1"),
        (prox.prox_firm, math.inf, "^gamma: inf"),
        (prox.prox_scad, 2, "^a: 2 is not allowed; allowed are finite numbers > 2"),
        (prox.prox_scad, None, "^a: None"),
    ],
)
def test_bad_parameters(make, value, message):
    with pytest.raises(ValueError, match=message):
        make(value)
