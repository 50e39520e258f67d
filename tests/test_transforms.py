"""What the transforms compute: against the oracle, zero by zero; frozen and given supports."""

import dataclasses

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import lats_optax
from lats_optax import keep_support, soft_threshold
from tests import matrix, versions
from tests.properties import CASES, flat, kinds, oracle, run, shrink


def follows_the_oracle(case, record):
    eps = float(jnp.finfo(case.dtype).eps)
    for step, (w, theta, d) in enumerate(oracle(case, record.params[0], record.gradients), 1):
        before, got = flat(record.params[step - 1]), flat(record.params[step])
        for name, expected in w.items():
            np.testing.assert_array_equal(got[name] == 0, expected == 0, err_msg=f"{step} {name}")
            # w' is rounded, w' - w is, and so is their sum.
            slack = 2 * eps * np.maximum(np.abs(before[name]), np.abs(expected)) + 1e-6
            if case.operator in ("power", "annealed", "rescaled") and name in theta:
                # Next to the threshold these are steep: dw/dtheta = (theta / w)^(p - 1), p <= 6.
                steep = np.abs(theta[name]) / np.where(expected == 0, np.inf, np.abs(expected))
                slack = slack * (1 + steep**5)
            assert np.all(np.abs(got[name] - expected) <= slack), (step, name)
        if case.kind == "soft_threshold":
            state = case.own_state(record.states[step])
            assert int(state.count) == step
            np.testing.assert_allclose(float(state.threshold), d, rtol=1e-5)
            latent = flat(state.latent)
            assert latent.keys() == theta.keys()
            for name, expected in theta.items():
                np.testing.assert_allclose(latent[name], expected, rtol=2e-6, atol=2e-6)


def prunes_to_positive_zeros(case, record):
    for params in record.params[1:]:
        for leaf in jax.tree.leaves(params):
            assert not np.any(np.signbit(leaf) & (np.asarray(leaf) == 0))
    # Neither nothing nor everything, or the other properties would say little.
    assert 0 < lats_optax.sparsity(record.params[-1]).sparsity < 1


def runs_on_the_thresholded_latent_weights(case, record):
    if case.kind != "soft_threshold" or case.operator != "l1":
        pytest.skip("the formula is that of the L1 operator over latent weights")
    for step in range(1, len(record.params)):
        state = case.own_state(record.states[step])
        w, before = flat(record.params[step]), flat(record.params[step - 1])
        for name, theta in flat(state.latent).items():
            # float64 holds float32 differences without rounding: the zeros are exact.
            expected = shrink("l1", theta, float(state.threshold))
            np.testing.assert_array_equal(w[name] == 0, expected == 0)
            larger = np.maximum(abs(before[name]), abs(w[name]))
            assert np.all(abs(w[name] - expected) <= 2 * float(jnp.finfo(case.dtype).eps) * larger)


def compiles_once_and_keeps_types(case, record):
    assert record.step._cache_size() == 1
    assert kinds(record.params[-1]) == kinds(record.params[0])
    assert kinds(record.states[-1]) == kinds(record.states[0])
    if case.kind == "soft_threshold":
        threshold = case.own_state(record.states[-1]).threshold
        assert threshold.dtype == jnp.float32
        assert not threshold.weak_type


PROPERTIES = [
    follows_the_oracle,
    prunes_to_positive_zeros,
    runs_on_the_thresholded_latent_weights,
    compiles_once_and_keeps_types,
]


# Each argument of a transform in each of its values.
COVERED = matrix.cover([dataclasses.asdict(case).items() for case in CASES])


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if number in COVERED else pytest.mark.slow)
        for number, case in enumerate(CASES)
    ],
    ids=str,
)
def test_property(case, holds):
    holds(case, run(case))


# --- every float that there is ------------------------------------------------------------------

# For each type of w the least and the largest exponent of its weights. XLA on CPUs takes the
# subnormal numbers of float32 and bfloat16 for zero; those of float16 are weights.
EXPONENTS = {"float32": (-100, 100), "bfloat16": (-100, 100), "float16": (-24, 14)}
UNIT = st.floats(0, 1)


@pytest.fixture(scope="module", params=EXPONENTS)
def one_step(request):
    """The type of w, and (w, theta, d) -> (w', theta') of one step, its application within."""

    @jax.jit
    def step(w, theta, d):
        tx = soft_threshold(d, latent_dtype=jnp.float32)
        state = tx.init(w)._replace(latent=theta)
        updates, state = tx.update(jnp.zeros_like(w), state, w)
        return optax.apply_updates(w, updates), state.latent

    return request.param, step


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    exponents=hnp.arrays(float, (4, 4), elements=UNIT),
    signs=hnp.arrays(float, (4, 4), elements=st.sampled_from([1.0, -1.0, 0.0, 1.3, -1.7])),
    factors=hnp.arrays(float, (4, 4), elements=st.sampled_from([1.0, 1e-3, 1e-9, -1e-9, 0.0])),
    threshold=st.one_of(st.just(-1.0), UNIT),
)
def test_zeros_survive_the_application_of_the_update(
    one_step, exponents, signs, factors, threshold
):
    dtype, step = one_step
    low, high = EXPONENTS[dtype]
    w = jnp.asarray(signs * 2.0 ** (low + exponents * (high - low))).astype(dtype)
    d = np.float32(0 if threshold < 0 else 2.0 ** (low + threshold * (high - low)))
    # Weights that shrink by as much as 1e-9 in one step, under a threshold of any size.
    moved = np.asarray(w, float) * factors
    theta = (moved + np.sign(moved) * d).astype(np.float32)
    after, kept = step(w, jnp.asarray(theta), jnp.asarray(d))
    np.testing.assert_array_equal(kept, theta)
    left = np.maximum(np.abs(theta) - d, 0)
    # Subnormal numbers are zero to XLA. What is too small for float16 stays alive.
    pruned = left < 2.0**-126
    np.testing.assert_array_equal(np.asarray(after, float) == 0, pruned)
    assert not np.any(np.signbit(after) & pruned)


@pytest.mark.parametrize("latent_dtype", [None, jnp.float32])
def test_subnormal_weights_in_float16_stay_until_they_are_pruned(latent_dtype):
    w = jnp.array([[3e-5, -1e-5, 1.0]], jnp.float16)
    tx = soft_threshold(lambda count: jnp.where(count > 1, 0.5, 0.0), latent_dtype=latent_dtype)
    state, update = tx.init(w), jax.jit(tx.update)
    updates, state = update(jnp.zeros_like(w), state, w)
    after = optax.apply_updates(w, updates)
    np.testing.assert_array_equal(after, w)
    np.testing.assert_array_equal(state.latent, w)
    updates, state = update(jnp.zeros_like(w), state, after)
    assert (optax.apply_updates(after, updates) != 0).tolist() == [[False, False, True]]


# --- frozen and given supports ------------------------------------------------------------------

FROZEN_FROM, ALL_STEPS, STRONG, HEAVY = 4, 16, 0.95, 0.3


def noisy_problem():
    rng = np.random.default_rng(2)
    return rng.normal(size=(6, 6)), rng.normal(size=(ALL_STEPS, 6, 6))


# Chained under bfloat16 is missing: optax's own momentum is then rounded to bfloat16.
@pytest.mark.cover
@pytest.mark.parametrize(
    ("inner", "dtype"),
    [(False, jnp.float32), (True, jnp.float32), (True, jnp.bfloat16)],
    ids=["chained", "inner", "inner_bfloat16"],
)
@pytest.mark.parametrize("threshold", ["schedule", "target"])
def test_frozen_survivors_follow_plain_sgd_and_zeros_stay(threshold, inner, dtype):
    threshold = {
        "schedule": lats_optax.lats_threshold(0.1, FROZEN_FROM, 0.5),
        "target": lats_optax.target_sparsity(0.6, 0.1, FROZEN_FROM),
    }[threshold]
    optimizer = optax.chain(optax.add_decayed_weights(HEAVY), optax.sgd(0.05, momentum=STRONG))
    options = dict(
        freeze_after=FROZEN_FROM,
        latent_dtype=jnp.float32,
        operator=lats_optax.prox.prox_l1,
        pruned_scale=1.0,
    )
    if inner:
        tx = soft_threshold(threshold, inner=optimizer, **options)
    else:
        tx = optax.chain(optimizer, soft_threshold(threshold, **options))

    @jax.jit
    def step(w, state, slope):
        updates, state = tx.update(slope, state, w)
        return optax.apply_updates(w, updates), state

    start, slopes = noisy_problem()
    w = jnp.asarray(start, dtype)
    state, theta, trace = tx.init(w), np.asarray(w, float), np.zeros(w.shape)
    for t, slope in enumerate(jnp.asarray(slopes, dtype)):
        if t == FROZEN_FROM:
            alive = np.asarray(w, float) != 0
            theta = shrink("l1", theta, float(versions.tree.get(state, "threshold")))
            assert 0 < alive.sum() < alive.size
        decayed = theta if inner or t >= FROZEN_FROM else np.asarray(w, float)
        trace = STRONG * trace + np.asarray(slope, float) + HEAVY * decayed
        theta = theta - 0.05 * trace
        w, state = step(w, state, slope)
        if t >= FROZEN_FROM:
            theta = np.where(alive, theta, 0.0)
            assert float(versions.tree.get(state, "threshold")) == 0
            np.testing.assert_array_equal(np.asarray(w, float) != 0, alive)
            np.testing.assert_allclose(versions.tree.get(state, "latent"), theta, atol=5e-6)
            slack = dict(atol=5e-6) if dtype == jnp.float32 else dict(atol=2**-7, rtol=2**-7)
            np.testing.assert_allclose(np.asarray(w, float), theta, **slack)


@pytest.mark.slow
def test_a_frozen_survivor_that_lands_on_zero_moves_on():
    tx = soft_threshold(0.0, freeze_after=1)
    w = jnp.array([[1.0, 0.0]])
    state = tx.init(w)
    for move in (0.0, -1.0, 0.5):
        updates, state = tx.update(jnp.full((1, 2), move), state, w)
        w = optax.apply_updates(w, updates)
        assert (w != 0).tolist() == [[True, False]]
    np.testing.assert_allclose(w, [[0.5, 0.0]])


@pytest.mark.parametrize("operator", ["prox_non_negative_l1", "prox_elastic_net", "prox_l0"])
def test_frozen_zeros_stay_under_other_operators(operator):
    tx = soft_threshold(0.5, freeze_after=2, operator=getattr(lats_optax.prox, operator))
    start, slopes = noisy_problem()
    w, update = jnp.asarray(start, jnp.float32), jax.jit(tx.update)
    state, dead = tx.init(w), np.zeros(w.shape, bool)
    for t, slope in enumerate(slopes):
        updates, state = update(jnp.asarray(slope, jnp.float32), state, w)
        w = optax.apply_updates(w, updates)
        assert np.all(np.asarray(w)[dead] == 0)
        if t >= 1:
            dead = np.asarray(w == 0)


@pytest.mark.cover
@pytest.mark.parametrize("update_dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_given_zeros_stay_under_momentum_and_decay(dtype, update_dtype):
    start, slopes = noisy_problem()
    kernel = jnp.asarray(np.where(abs(start) < 0.5, 0.0, start), dtype)
    params = {"kernel": kernel, "dense": kernel + 1, "dead": kernel}
    support = {"kernel": kernel != 0, "dense": jnp.array(True), "dead": False}
    optimizer = optax.chain(optax.add_decayed_weights(HEAVY), optax.sgd(0.05, momentum=STRONG))
    tx = optax.chain(optimizer, keep_support(support))
    plain, plain_state = params, optimizer.init(params)
    state, update = tx.init(params), jax.jit(tx.update)
    for slope in jnp.asarray(slopes, update_dtype):
        slope = dict.fromkeys(params, slope)
        updates, state = update(slope, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["kernel"] != 0, support["kernel"])
        assert not np.any(params["dead"])
        assert not np.any(np.signbit(params["dead"]))
        updates, plain_state = jax.jit(optimizer.update)(slope, plain_state, plain)
        plain = optax.apply_updates(plain, updates)
        np.testing.assert_array_equal(params["dense"], plain["dense"])
    # What a survivor does depends on itself alone.
    alive = np.asarray(support["kernel"])
    np.testing.assert_array_equal(
        np.asarray(params["kernel"])[alive], np.asarray(plain["kernel"])[alive]
    )
