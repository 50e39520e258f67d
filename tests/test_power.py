"""Rescaled operators and thresholds that anneal, against loops over single weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.strategies import floats

from lats_optax import prox
from lats_optax.compatibility import enable_x64
from tests.properties import shrink

X = np.random.default_rng(7).normal(size=(6, 5))
X[0, :2] = 0.0, 3.0
OPERATORS = {"l1": prox.prox_l1, "power": prox.prox_power(3), "elastic_net": prox.ElasticNet(0.5)}
each = pytest.mark.parametrize("name", OPERATORS)


@pytest.fixture(autouse=True, scope="module")
def in_double_precision():
    with enable_x64(True):
        yield


def rescaled(name, x, d, most=2.0):
    """As it is written, one weight at a time."""
    w = shrink(name, x, d)
    pairs = list(zip(x.ravel().tolist(), w.ravel().tolist()))
    factor = math.fsum(a * b for a, b in pairs) / math.fsum(b * b for _, b in pairs)
    return w * min(factor, most)


@pytest.mark.cover
@each
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_values_are_those_of_a_loop(name, dtype):
    x = jnp.asarray(X).astype(dtype)
    got = prox.Rescaled(OPERATORS[name])({"a": x}, 0.7)["a"]
    assert got.dtype == x.dtype
    want = rescaled(name, np.asarray(x, float), 0.7)
    np.testing.assert_array_equal(got == 0, want == 0)
    close = 8 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, float), want, rtol=close, atol=0)


@pytest.mark.parametrize("most", [1.0, 1.2, math.inf])
def test_the_factor_is_bounded(most):
    got = prox.Rescaled(prox.prox_l1, most)(X, 1.5)
    np.testing.assert_allclose(got, rescaled("l1", X, 1.5, most), rtol=1e-12)
    # Without a bound the factor is above all of these.
    assert np.max(np.abs(rescaled("l1", X, 1.5, math.inf))) > 1.2 * (np.max(np.abs(X)) - 1.5)


@each
def test_no_other_factor_comes_nearer(name):
    got = np.asarray(prox.Rescaled(OPERATORS[name], math.inf)(X, 0.7))
    distances = [np.sum(np.square(X - factor * got)) for factor in (1.0, 0.99, 1.01)]
    assert min(distances) == distances[0]


@each
def test_a_threshold_of_zero_changes_nothing(name):
    got = prox.Rescaled(OPERATORS[name])(jnp.asarray(X, jnp.float32), 0.0)
    np.testing.assert_array_equal(got, X.astype(np.float32))


@pytest.mark.parametrize("d", [4.0, np.inf])
def test_where_nothing_survives_there_are_positive_zeros(d):
    got = np.asarray(prox.Rescaled(prox.prox_l1)(-np.abs(X), d))
    np.testing.assert_array_equal(got, 0.0)
    assert not np.signbit(got).any()


@pytest.mark.parametrize("name", ["l1", "power"])
def test_a_weight_that_dies_changes_the_others_by_little(name):
    operator = prox.Rescaled(OPERATORS[name])
    x = np.sort(np.abs(X), axis=None)[-9:]
    before, after = (np.asarray(operator(x, x[1] * (1 + by))) for by in (-1e-9, 1e-9))
    assert np.count_nonzero(before) == np.count_nonzero(after) + 1
    np.testing.assert_allclose(before, after, rtol=0, atol=0.005)


def test_magnitudes_are_those_of_the_operator():
    for operator in (prox.prox_l0, prox.prox_non_negative_l1, prox.prox_power(3)):
        np.testing.assert_array_equal(
            prox.Rescaled(operator).magnitude(jnp.asarray(X)), operator.magnitude(jnp.asarray(X))
        )


@pytest.mark.slow
def test_groups_are_rescaled_together():
    got = np.asarray(prox.Axes(prox.Rescaled(prox.prox_l1), axes=1)(X, 0.8))
    rms = np.sqrt(np.mean(X * X, axis=1))
    want = rescaled("l1", rms, 0.8)
    assert 0 < np.count_nonzero(want) < len(want)
    np.testing.assert_allclose(got, X * (want / rms)[:, None], rtol=1e-12)


@pytest.mark.parametrize("wrap", [lambda operator: operator, prox.Rescaled])
def test_an_annealed_threshold_begins_as_soft_and_ends_as_the_second_power(wrap):
    operator = wrap(prox.prox_annealed(10))
    at = jax.jit(lambda count, x: operator.at(count)(x, 0.7))
    for count, same in ((0, prox.prox_l1), (10, prox.prox_power(2)), (11, prox.prox_power(2))):
        np.testing.assert_allclose(at(count, X), wrap(same)(X, 0.7), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(operator(X, 0.7), wrap(prox.prox_power(2))(X, 0.7), rtol=1e-12)


@pytest.mark.slow
@settings(deadline=None, derandomize=True)
@given(floats(0, 1e30), floats(0, 1e30), floats(0, 1), floats(0.1, 10))
def test_laws_of_the_annealed_threshold(size, d, x, factor):
    operator = prox.prox_annealed(1).at(x)
    w = float(operator(size, d))
    assert 0 <= w <= size
    assert (w == 0) == (size <= d) or size - d < 1e-300
    if w > 0:
        # It scales with its argument, and its preimage gives the argument back.
        np.testing.assert_allclose(operator(factor * size, factor * d), factor * w, rtol=1e-6)
        np.testing.assert_allclose(operator.preimage(jnp.array(w), d), size, rtol=1e-6)


@pytest.mark.parametrize("most", [0.9, -1.0, math.nan, "2", None])
def test_bad_bounds(most):
    with pytest.raises(ValueError, match=r"^most: .* is not allowed; allowed are numbers >= 1"):
        prox.Rescaled(prox.prox_l1, most)
