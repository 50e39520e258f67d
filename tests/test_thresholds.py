"""Threshold schedules against plain-Python sums and integrals, and the maps to L1 and back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax import (
    epoch_lats_threshold,
    l1_from_threshold,
    lats_threshold,
    pgh_threshold,
    s_lats_threshold,
    threshold_from_l1,
)
from lats_optax.compatibility import enable_x64
from tests import matrix

STEPS = 400


# --- learning rates: the schedule, and the same in scalar arithmetic ----------------------------


def cosine(t, steps):
    return 0.5 * (1 + math.cos(math.pi * min(t, steps) / steps))


def stepwise(t):
    """A schedule that no tracer can enter: Python's own `if` and `math`."""
    if t < 50:
        return 0.3 * (t + 1) / 50
    return 0.3 * math.exp(-t / 100) if t % 2 else 0.1


SCHEDULES = {
    "number": (0.1, lambda t: 0.1),
    "constant": (optax.constant_schedule(0.1), lambda t: 0.1),
    "cosine": (optax.cosine_decay_schedule(0.1, STEPS), lambda t: 0.1 * cosine(t, STEPS)),
    "warm-up, cosine": (
        optax.warmup_cosine_decay_schedule(0.0, 0.256, 50, STEPS),
        lambda t: 0.256 * t / 50 if t < 50 else 0.256 * cosine(t - 50, STEPS - 50),
    ),
    "join": (
        optax.join_schedules(
            [optax.linear_schedule(0.5, 0.1, 100), optax.constant_schedule(0.02)], [100]
        ),
        lambda t: 0.5 - 0.004 * t if t < 100 else 0.02,
    ),
    "piecewise": (
        optax.piecewise_constant_schedule(0.1, {100: 0.1, 300: 0.5}),
        lambda t: 0.1 if t < 100 else 0.01 if t < 300 else 0.005,
    ),
    "exponential": (
        optax.exponential_decay(0.1, 30, 0.7),
        lambda t: 0.1 * 0.7 ** (t / 30),
    ),
    "python if": (stepwise, stepwise),
}
any_schedule = pytest.mark.parametrize("name", SCHEDULES)


def scalar_sums(rate, steps):
    """Exactly rounded prefix sums: entry t is the sum of rate(s) over s < t."""
    rates = [rate(t) for t in range(steps)]
    return np.array([math.fsum(rates[:t]) for t in range(steps + 1)])


@pytest.mark.cover
@any_schedule
def test_lats_is_the_share_of_the_learning_rate_that_is_spent(name):
    schedule, scalar = SCHEDULES[name]
    sums = scalar_sums(scalar, STEPS)
    threshold = lats_threshold(schedule, STEPS, 0.02)
    assert threshold.steps == STEPS
    np.testing.assert_allclose(threshold.table, 0.02 * sums / sums[-1], rtol=1e-12)
    assert threshold(0) == 0
    assert threshold(STEPS) == 0.02


@any_schedule
def test_lats_with_an_l1_profile(name):
    schedule, scalar = SCHEDULES[name]
    sums = scalar_sums(lambda t: scalar(t) * 0.01 ** (t / STEPS), STEPS)
    threshold = lats_threshold(schedule, STEPS, 0.02, l1=lambda x: 0.01**x)
    np.testing.assert_allclose(threshold.table, 0.02 * sums / sums[-1], rtol=1e-12)


@any_schedule
def test_threshold_from_l1_sums_coefficient_times_learning_rate(name):
    schedule, scalar = SCHEDULES[name]
    for l1, scalar_l1 in ((3e-3, lambda t: 3e-3), (stepwise, stepwise)):
        sums = scalar_sums(lambda t, mu=scalar_l1: scalar(t) * mu(t), STEPS)
        threshold = threshold_from_l1(l1, schedule, STEPS, initial=0.01)
        np.testing.assert_allclose(threshold.table, 0.01 + sums, rtol=1e-12)


@pytest.mark.slow
def test_prefix_sums_of_a_long_run():
    steps = 100_000
    scalar = [0.256 * cosine(t, steps) for t in range(steps)]
    threshold = lats_threshold(optax.cosine_decay_schedule(0.256, steps), steps, 0.02)
    total = math.fsum(scalar)
    for t in (1, 2, 999, 50_000, 99_998, 99_999, 100_000):
        assert threshold(t) == pytest.approx(0.02 * math.fsum(scalar[:t]) / total, rel=1e-12)


@pytest.mark.slow
def test_lats_does_not_depend_on_the_size_of_the_learning_rate():
    one = lats_threshold(optax.cosine_decay_schedule(1.0, 100), 100, 0.02)
    small = lats_threshold(optax.cosine_decay_schedule(1e-6, 100), 100, 0.02)
    np.testing.assert_allclose(one.table, small.table, rtol=1e-12)
    np.testing.assert_array_equal(lats_threshold(0.1, 10, 0.0).table, 0)


# --- closed forms -------------------------------------------------------------------------------


def integral(f, upper, intervals=2000):
    """Simpson's rule over [0, upper] in plain Python."""
    h = upper / (2 * intervals)
    values = [f(k * h) for k in range(2 * intervals + 1)]
    inner = 4 * math.fsum(values[1:-1:2]) + 2 * math.fsum(values[2:-1:2])
    return h / 3 * (values[0] + inner + values[-1])


@pytest.mark.parametrize("n", [0, 1, 37, 50, 99, 100])
def test_s_lats_is_the_integral_of_a_cosine(n):
    expected = integral(lambda x: 1 + math.cos(math.pi * x), n / 100)
    assert s_lats_threshold(100, 0.5)(n) == pytest.approx(0.5 * expected, rel=1e-10)


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.1, 0.999, 1 - 1e-12, 1.0, 1 + 1e-9, 1.5, 10, 1e4])
def test_pgh_is_the_integral_of_a_cosine_times_a_power(beta):
    def density(x):
        return beta**x * (1 + math.cos(math.pi * x))

    threshold = pgh_threshold(100, 0.5, beta)
    total = integral(density, 1.0)
    for n in (0, 1, 37, 50, 99, 100):
        expected = 0.5 * integral(density, n / 100) / total
        assert threshold(n) == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert np.all(threshold.increments > 0)


def test_pgh_with_a_constant_penalty_is_s_lats():
    np.testing.assert_allclose(
        pgh_threshold(500, 0.02, 1.0).table, s_lats_threshold(500, 0.02).table, rtol=1e-12
    )


@pytest.mark.parametrize(("epochs", "batches"), [(1, 1), (1, 7), (2, 3), (6, 20), (300, 2)])
def test_epoch_lats_is_the_sum_of_a_cosine_by_epochs(epochs, batches):
    sums = scalar_sums(lambda t: cosine(t // batches, epochs), epochs * batches)
    threshold = epoch_lats_threshold(epochs, batches, 0.02)
    np.testing.assert_allclose(threshold.table, 0.02 * sums / sums[-1], rtol=1e-12, atol=1e-17)


FAMILY = {
    "lats": lambda steps: lats_threshold(optax.cosine_decay_schedule(0.1, steps), steps, 0.02),
    "s_lats": lambda steps: s_lats_threshold(steps, 0.02),
    "epoch_lats": lambda steps: epoch_lats_threshold(steps // 10, 10, 0.02),
    "pgh": lambda steps: pgh_threshold(steps, 0.02, 0.01),
    "from_l1": lambda steps: threshold_from_l1(0.01, 0.1, steps, initial=0.005),
}
any_threshold = pytest.mark.parametrize("name", FAMILY)


# --- calling a schedule -------------------------------------------------------------------------


@any_threshold
def test_thresholds_rise_and_stand_still_outside_the_run(name):
    threshold = FAMILY[name](100)
    assert np.all(threshold.increments >= 0)
    np.testing.assert_allclose(np.diff(threshold.table), threshold.increments, atol=1e-17)
    assert np.all(threshold(np.array([-1, -100])) == threshold(0))
    assert np.all(threshold(np.array([101, 10**9])) == threshold(100))
    assert np.all(threshold(jnp.array([-1, 0])) == np.float32(threshold(0)))
    assert np.all(threshold(jnp.array([100, 101, 2**31 - 1])) == np.float32(threshold(100)))
    assert repr(threshold).startswith("ThresholdSchedule(steps=100, ")


@any_threshold
def test_host_counts_give_float64_and_device_counts_the_default_float(name):
    threshold = FAMILY[name](100)
    table = threshold.table
    for count in (37, np.int32(37), np.int64(37)):
        assert isinstance(threshold(count), np.float64)
        assert threshold(count) == table[37]
    counts = np.arange(-5, 115).reshape(4, 30)
    np.testing.assert_array_equal(threshold(counts), table[np.clip(counts, 0, 100)])

    expected = table[np.clip(counts, 0, 100)].astype(np.float32)
    on_device = jnp.asarray(counts, jnp.int32)
    for result in (
        threshold(on_device),
        jax.jit(threshold)(on_device),
        jax.vmap(jax.vmap(threshold))(on_device),
        jax.jit(jax.vmap(jax.vmap(threshold)))(on_device),
    ):
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, expected)
    with enable_x64(True):
        result = jax.jit(threshold)(jnp.int32(37))
        assert result.dtype == jnp.float64
        assert result == table[37]


@any_threshold
def test_made_inside_a_trace(name):
    """A step may build its optimizer inside jit; the table is made in float64 all the same."""

    @jax.jit
    def inside(count):
        threshold = FAMILY[name](100)
        learning_rate = optax.cosine_decay_schedule(0.1, 100)
        return threshold(count), l1_from_threshold(threshold, learning_rate)(count)

    outside = FAMILY[name](100)
    d, l1 = inside(jnp.int32(60))
    assert d == np.float32(outside(60))
    expected = l1_from_threshold(outside, optax.cosine_decay_schedule(0.1, 100))(60)
    np.testing.assert_allclose(l1, expected, rtol=1e-6)


def test_does_not_compile_again_from_step_to_step():
    threshold = jax.jit(FAMILY["lats"](100))
    for count in range(3):
        threshold(jnp.int32(count))
    assert threshold._cache_size() == 1


# --- there and back again -----------------------------------------------------------------------

L1 = {
    "number": 3e-3,
    "linear": optax.linear_schedule(1e-2, 1e-4, STEPS),
    "python if": stepwise,
    "falls below zero": lambda t: 1e-3 * jnp.cos(2 * t / STEPS),
}


@pytest.mark.cover
@any_schedule
@pytest.mark.parametrize("l1", L1)
def test_l1_to_threshold_and_back(name, l1):
    schedule, scalar = SCHEDULES[name]
    threshold = threshold_from_l1(L1[l1], schedule, STEPS)
    back = l1_from_threshold(threshold, schedule)
    counts = np.arange(STEPS)
    moving = np.array([scalar(t) > 0 for t in range(STEPS)])
    with enable_x64(True):
        mu = L1[l1] if not callable(L1[l1]) else [float(L1[l1](t)) for t in range(STEPS)]
    expected = np.where(moving, mu, 0)
    np.testing.assert_allclose(back(counts), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(back)(jnp.asarray(counts)), expected, rtol=1e-6)
    assert back(7) == pytest.approx(expected[7], rel=1e-6)


@any_threshold
def test_threshold_to_l1_and_back(name):
    threshold, learning_rate = FAMILY[name](STEPS), optax.cosine_decay_schedule(0.1, STEPS)
    l1 = l1_from_threshold(threshold, learning_rate)
    back = threshold_from_l1(l1, learning_rate, STEPS, initial=threshold(0))
    np.testing.assert_allclose(back.table, threshold.table, rtol=1e-6)


@pytest.mark.parametrize("peak", matrix.fast(range(7, 57, 10), [17, 47]))
def test_a_threshold_that_returns_to_zero(peak):
    """Of a schedule that is not this library's; its sums end within rounding of zero."""
    threshold = optax.join_schedules(
        [optax.linear_schedule(0, peak / 70, peak), optax.linear_schedule(peak / 70, 0, 60 - peak)],
        [peak],
    )
    back = threshold_from_l1(l1_from_threshold(threshold, 0.1), 0.1, 60)
    with enable_x64(True):
        expected = [float(threshold(t)) for t in range(61)]
    np.testing.assert_allclose(back.table, expected, rtol=1e-6, atol=1e-15)
    assert np.all(back.table >= 0)


LONG = {
    "cosine to zero": optax.cosine_decay_schedule(0.256, 100_000),
    "warm-up from zero": optax.warmup_cosine_decay_schedule(0.0, 0.256, 5000, 100_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("initial", [0.0, 1.0])
def test_round_trip_of_a_long_run(name, initial):
    """Late increments are 1e-16 of the threshold; float32 under jit resolves them all the same."""
    steps, schedule = 100_000, LONG[name]
    counts = np.arange(steps)
    for threshold, mu in (
        (threshold_from_l1(2e-5, schedule, steps, initial=initial), np.full(steps, 2e-5)),
        (
            threshold_from_l1(lambda t: 1e-3 * 0.01 ** (t / steps), schedule, steps),
            1e-3 * 0.01 ** (counts / steps),
        ),
    ):
        mu[0] = 0 if name == "warm-up from zero" else mu[0]  # neither threshold nor rate moves
        l1 = l1_from_threshold(threshold, schedule)
        np.testing.assert_allclose(l1(counts), mu, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(l1)(jnp.asarray(counts)), mu, rtol=1e-6)
        assert [l1(t) for t in (-1, steps, steps + 9)] == [0, 0, 0]
        assert not np.any(jax.jit(l1)(jnp.array([-1, steps, steps + 9])))


@pytest.mark.parametrize("name", LONG)
def test_lats_of_a_long_run_has_a_constant_l1_coefficient(name):
    l1 = l1_from_threshold(lats_threshold(LONG[name], 100_000, 0.02), LONG[name])
    counts = np.arange(1, 100_000)
    np.testing.assert_allclose(l1(counts), l1(1), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(l1)(jnp.asarray(counts)), l1(1), rtol=1e-6)


@pytest.mark.slow
def test_l1_of_any_other_schedule():
    """Differenced in float64 on the host, in float32 on the device."""
    threshold = optax.linear_schedule(0.0, 0.5, 100)
    l1 = l1_from_threshold(threshold, lambda t: 0.1 / (t + 1))
    expected = 0.05 * (np.arange(100) + 1)
    np.testing.assert_allclose(l1(np.arange(100)), expected, rtol=1e-12)
    assert l1(100) == 0
    on_device = jax.jit(l1)(jnp.arange(100))
    assert on_device.dtype == jnp.float32
    np.testing.assert_allclose(on_device, expected, rtol=1e-4)
    np.testing.assert_allclose(jax.jit(l1)(jnp.int32(100)), 0)


@pytest.mark.slow
def test_threshold_that_moves_where_the_learning_rate_is_zero_has_no_l1():
    l1 = l1_from_threshold(s_lats_threshold(100, 0.02), lambda t: 0.1 * (t != 50))
    assert l1(50) == math.inf
    assert np.all(np.isfinite(np.delete(l1(np.arange(100)), 50)))
    with pytest.raises(ValueError, match="l1: inf at step 50 is not finite"):
        threshold_from_l1(l1, 0.1, 100)


# --- what each strategy means under a cosine learning rate --------------------------------------

MANY = 10_000
RATE = optax.cosine_decay_schedule(0.1, MANY)
X = (np.arange(MANY) + 0.5) / MANY
MIDDLE = slice(MANY // 100, -MANY // 100)


def implied(threshold):
    return l1_from_threshold(threshold, RATE)(np.arange(MANY))


@pytest.mark.slow
def test_a_constant_threshold_has_no_penalty():
    assert not np.any(implied(0.02))
    assert not np.any(implied(optax.constant_schedule(0.02)))


def test_lats_has_a_constant_penalty():
    np.testing.assert_allclose(
        implied(lats_threshold(RATE, MANY, 0.02)), 0.02 / (0.05 * (MANY + 1)), rtol=1e-9
    )
    closed = implied(s_lats_threshold(MANY, 0.02))
    np.testing.assert_allclose(closed[MIDDLE], 0.02 / (0.05 * MANY), rtol=0.01)


@pytest.mark.parametrize(
    ("strategy", "profile"),
    [
        (lambda t: 0.02 * t / MANY, lambda x: 1 / (1 + np.cos(np.pi * x))),
        (
            lambda t: 0.01 * (1 - jnp.cos(jnp.pi * t / MANY)),
            lambda x: np.tan(np.pi * x / 2),
        ),
        (pgh_threshold(MANY, 0.02, 0.01), lambda x: 0.01**x),
        (lats_threshold(RATE, MANY, 0.02, l1=lambda x: 0.01**x), lambda x: 0.01**x),
        (pgh_threshold(MANY, 0.02, 5.0), lambda x: 5.0**x),
    ],
    ids=["linear", "sine", "pgh", "lats with a profile", "pgh, growing"],
)
def test_profile_of_the_penalty(strategy, profile):
    ratio = implied(strategy)[MIDDLE] / profile(X)[MIDDLE]
    np.testing.assert_allclose(ratio, ratio[MANY // 2], rtol=0.02)


@pytest.mark.parametrize(
    "strategy",
    [lambda t: 0.02 * t / MANY, lambda t: 0.01 * (1 - jnp.cos(jnp.pi * t / MANY))],
    ids=["linear", "sine"],
)
def test_penalty_that_diverges_at_the_end(strategy):
    mu = implied(strategy)
    assert mu[-1] > 1000 * mu[MANY // 2]
    assert np.all(np.diff(mu[MANY // 2 :]) > 0)


# --- bad input ----------------------------------------------------------------------------------

BAD_STEPS = {0: "0", -3: "-3", 2.5: "2.5", math.inf: "inf", math.nan: "nan", True: "True"}
BAD_THRESHOLDS = {-0.1: "-0.1", math.inf: "inf", math.nan: "nan"}
TAKES_STEPS = {
    "lats": ("steps", lambda steps: lats_threshold(0.1, steps, 0.02)),
    "s_lats": ("steps", lambda steps: s_lats_threshold(steps, 0.02)),
    "pgh": ("steps", lambda steps: pgh_threshold(steps, 0.02, 0.1)),
    "from_l1": ("steps", lambda steps: threshold_from_l1(0.1, 0.1, steps)),
    "epochs": ("epochs", lambda steps: epoch_lats_threshold(steps, 10, 0.02)),
    "batches": ("steps_per_epoch", lambda steps: epoch_lats_threshold(10, steps, 0.02)),
}
TAKES_THRESHOLD = {
    "lats": ("final", lambda final: lats_threshold(0.1, 10, final)),
    "s_lats": ("final", lambda final: s_lats_threshold(10, final)),
    "pgh": ("final", lambda final: pgh_threshold(10, final, 0.1)),
    "epoch_lats": ("final", lambda final: epoch_lats_threshold(10, 10, final)),
    "from_l1": ("initial", lambda initial: threshold_from_l1(0.1, 0.1, 10, initial=initial)),
    "l1_from": ("threshold", lambda threshold: l1_from_threshold(threshold, 0.1)),
    "l1_from, rate": ("learning_rate", lambda rate: l1_from_threshold(0.1, rate)),
}
TAKES_RATE = {
    "lats": lambda rate: lats_threshold(rate, 10, 0.02),
    "lats with a profile": lambda rate: lats_threshold(rate, 10, 0.02, l1=lambda x: 1 - x),
    "from_l1": lambda rate: threshold_from_l1(0.1, rate, 10),
    "target": lambda rate: lats_optax.target_sparsity(0.9, rate, 10),
}
BAD_RATES = {
    "negative": (-0.1, "learning_rate: -0.1 at step 0"),
    "not finite": (math.inf, "learning_rate: inf at step 0"),
    "negative later": (lambda t: 0.5 - 0.25 * t, "learning_rate: -0.25 at step 3"),
    "not a number later": (
        lambda t: jnp.where(t == 4, jnp.nan, 0.1),
        "learning_rate: nan at step 4",
    ),
    "zero": (0.0, "learning_rate: it is zero at all of the 10 steps"),
    "zero schedule": (lambda t: 0 * t, "learning_rate: it is zero at all of the 10 steps"),
}
OTHERS = {
    "profile negative": (
        lambda: lats_threshold(0.1, 10, 0.02, l1=lambda x: 0.25 - x),
        r"l1: -0\.0\d+ at step 3; allowed are finite numbers >= 0",
    ),
    "profile not finite": (
        lambda: lats_threshold(0.1, 10, 0.02, l1=lambda x: np.where(x == 0.5, np.inf, x)),
        "l1: inf at step 5; allowed are finite numbers >= 0",
    ),
    "profile zero where the rate is not": (
        lambda: lats_threshold(lambda t: 0.1 * (t < 5), 10, 0.02, l1=lambda x: x >= 0.5),
        "l1: the profile is zero wherever the learning rate is not",
    ),
    "beta zero": (lambda: pgh_threshold(10, 0.02, 0.0), r"beta: 0\.0 .* finite numbers > 0"),
    "beta negative": (lambda: pgh_threshold(10, 0.02, -2), "beta: -2 .* finite numbers > 0"),
    "beta infinite": (lambda: pgh_threshold(10, 0.02, math.inf), "beta: inf .* finite numbers > 0"),
    "beta nan": (lambda: pgh_threshold(10, 0.02, math.nan), "beta: nan .* finite numbers > 0"),
    "l1 not finite": (lambda: threshold_from_l1(math.nan, 0.1, 10), "l1: nan at step 0 is not"),
    "l1 not finite later": (
        lambda: threshold_from_l1(lambda t: jnp.where(t == 7, jnp.inf, 0.0), 0.1, 10),
        "l1: inf at step 7 is not finite",
    ),
    "l1 too negative": (
        lambda: threshold_from_l1(lambda t: 1.0 - t, 0.5, 10, initial=0.25),
        r"l1: the threshold becomes -0\.75 at step 4; allowed are finite numbers >= 0",
    ),
}


@pytest.mark.parametrize("name", TAKES_STEPS)
@pytest.mark.parametrize("value", BAD_STEPS)
def test_bad_steps(name, value):
    argument, call = TAKES_STEPS[name]
    message = rf"^{argument}: {BAD_STEPS[value]} is not allowed; allowed are whole numbers >= 1"
    with pytest.raises(ValueError, match=message):
        call(value)


@pytest.mark.parametrize("name", TAKES_THRESHOLD)
@pytest.mark.parametrize("value", BAD_THRESHOLDS)
def test_bad_threshold(name, value):
    argument, call = TAKES_THRESHOLD[name]
    message = rf"^{argument}: {value} is not allowed; allowed are finite numbers >= 0"
    with pytest.raises(ValueError, match=message):
        call(value)


@pytest.mark.parametrize("name", TAKES_RATE)
@pytest.mark.parametrize("case", BAD_RATES)
def test_bad_learning_rate(name, case):
    rate, message = BAD_RATES[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        TAKES_RATE[name](rate)


@pytest.mark.parametrize("case", OTHERS)
def test_other_bad_input(case):
    call, message = OTHERS[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.parametrize("steps", [10, 10.0, np.int64(10), np.float32(10)])
def test_whole_numbers_of_any_type_are_steps(steps):
    assert lats_threshold(0.1, steps, 0.02).steps == 10
