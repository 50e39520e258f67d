"""The closed loop: the named sparsity is reached, and the selection that it steers by is exact."""

import functools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import lats_optax
from lats_optax import lats_threshold, prox, soft_threshold
from lats_optax.compatibility import enable_x64
from lats_optax.quantile import kth_smallest
from lats_optax.target import Plan, control
from tests import matrix, versions

# The law of LATS to the last step, soft thresholding, and straight-through.
to_the_end = functools.partial(lats_optax.target_sparsity, law=lats_optax.constant_l1(), reach=1.0)
soft = functools.partial(soft_threshold, operator=prox.prox_l1, pruned_scale=1.0)

# --- trained models -----------------------------------------------------------------------------

TRAIN_STEPS, TRAINING = 150, 1400


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def mlp(params, x):
    return linear(params["out"], jax.nn.relu(linear(params["hidden"], x)))


def cnn(params, x):
    x = jax.lax.conv_general_dilated(
        x.reshape(-1, 8, 8, 1),
        params["conv"],
        window_strides=(2, 2),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return linear(params["out"], jax.nn.relu(x).reshape(len(x), -1))


SHAPES = {
    linear: {"bias": (10,), "kernel": (64, 10)},
    mlp: {
        "hidden": {"bias": (32,), "kernel": (64, 32)},
        "out": {"bias": (10,), "kernel": (32, 10)},
    },
    cnn: {"conv": (3, 3, 1, 16), "out": {"bias": (10,), "kernel": (256, 10)}},
}
OPTIMIZERS = {
    "sgd": (0.2, functools.partial(optax.sgd, momentum=0.9)),
    "adamw": (0.02, functools.partial(optax.adamw, weight_decay=1e-2)),
}


@functools.cache
def digits():
    data = load_digits()
    return np.asarray(data.data / 16, np.float32), data.target.astype(np.int32)


@functools.cache
def slopes_of(model):
    def loss(params, rows):
        inputs, labels = digits()
        logits = model(params, jnp.asarray(inputs)[rows])
        labels = jnp.asarray(labels)[rows]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.jit(jax.grad(loss))


def start(model, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(
            rng.normal(size=shape) * (len(shape) > 1) * np.sqrt(2 / np.prod(shape[:-1])),
            jnp.float32,
        ),
        SHAPES[model],
        is_leaf=lambda node: isinstance(node, tuple),
    )


def accuracy(model, params):
    inputs, labels = digits()
    return float((model(params, inputs[TRAINING:]).argmax(-1) == labels[TRAINING:]).mean())


RUNS = [
    *((mlp, "sgd", 1, target) for target in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)),
    *((mlp, "adamw", 2, target) for target in (0.8, 0.9, 0.98)),
    *((linear, "sgd", 0, target) for target in (0.5, 0.95, 0.99)),
    *((cnn, "sgd", 3, target) for target in (0.5, 0.9, 0.98)),
    (cnn, "adamw", 4, 0.95),
]


@pytest.mark.parametrize(
    ("model", "optimizer", "seed", "target"),
    matrix.fast(RUNS, [(mlp, "sgd", 1, 0.9), (linear, "sgd", 0, 0.99)]),
)
def test_a_trained_model_ends_at_its_target(model, optimizer, seed, target):
    peak, make = OPTIMIZERS[optimizer]
    rate = optax.cosine_decay_schedule(peak, TRAIN_STEPS)
    tx = optax.chain(make(rate), soft(to_the_end(target, rate, TRAIN_STEPS)))
    update = jax.jit(lambda slopes, state, params: tx.update(slopes, state, params))
    params = start(model, seed)
    state, rng = tx.init(params), np.random.default_rng(seed)
    thresholds = []
    for _ in range(TRAIN_STEPS):
        rows = rng.integers(TRAINING, size=64)
        updates, state = update(slopes_of(model)(params, rows), state, params)
        params = optax.apply_updates(params, updates)
        thresholds.append(float(versions.tree.get(state, "threshold")))
    # What had risen too far would have to fall, and revive weights, when nothing trains them more.
    assert max(thresholds) <= 1.005 * thresholds[-1]
    report = lats_optax.sparsity(params)
    assert report.zeros == round(target * report.size)
    # Chance is 0.1. Beyond nine tenths some of these models have fewer weights than classes.
    assert accuracy(model, params) > {0.5: 0.8, 0.8: 0.7, 0.9: 0.5}.get(target, 0.0)


# --- the loop -----------------------------------------------------------------------------------


def still(tx, params, steps):
    """Thresholds and last parameters where every gradient is zero."""
    update = jax.jit(tx.update)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    thresholds = []
    for _ in range(steps):
        updates, state = update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        thresholds.append(float(state.threshold))
    return thresholds, params


RATES = {
    "cosine": optax.cosine_decay_schedule(0.1, 30),
    "ends_at_zero": optax.cosine_decay_schedule(0.1, 29),
    "zero_for_a_while": optax.cosine_decay_schedule(0.1, 20),
    "warm_up_from_zero": optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, 30),
    "zero_in_the_middle": lambda count: jnp.where((count > 10) & (count < 20), 0.0, 0.1),
    "of_python": lambda count: 0.1 if count < 10 else 0.01,
}


@pytest.mark.cover("learning rates")
@pytest.mark.parametrize("rate", matrix.fast(RATES.values(), 1), ids=RATES)
def test_where_the_quantile_stands_still_it_is_lats(rate):
    weights = jax.random.normal(jax.random.key(0), (10, 20))
    tx = soft(to_the_end(0.9, rate, 30))
    thresholds, pruned = still(tx, weights, 33)
    final = np.sort(np.abs(np.ravel(weights)))[180 - 1]
    lats = lats_threshold(rate, 30, float(final))
    np.testing.assert_allclose(thresholds[:29], lats(np.arange(1, 30)), rtol=2e-5, atol=1e-7)
    # The last one is the quantile itself, and it stays.
    assert thresholds[29:] == [float(final)] * 4
    assert int(jnp.sum(pruned == 0)) == 180


@pytest.mark.cover("learning rates")
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("growth", [0.7, -0.2])
@pytest.mark.parametrize("rate", [0.1, optax.cosine_decay_schedule(0.1, 60)], ids=["flat", "cos"])
def test_where_the_quantile_moves_with_the_learning_rate_the_l1_coefficient_is_constant(
    rate, growth, every
):
    steps = 60
    tx = soft(to_the_end(0.5, rate, steps, update_every=every))
    rates = np.array([float(rate(t)) if callable(rate) else rate for t in range(steps)])
    w = jnp.linspace(3.0, 10.0, 20).reshape(4, 5)
    state, update = tx.init(w), jax.jit(tx.update)
    thresholds = [0.0]
    for eta in rates:
        updates, state = update(jnp.full(w.shape, growth * eta), state, w)
        w = optax.apply_updates(w, updates)
        thresholds.append(float(state.threshold))
    l1 = np.diff(thresholds) / rates
    # From the first look at the line on, and to where float32 can tell a difference.
    settled = slice(every + 1, np.searchsorted(-rates, -0.05 * rates[0]))
    np.testing.assert_allclose(l1[settled], l1[steps // 2], rtol=2e-3)
    assert int(jnp.sum(w == 0)) == 10


@pytest.mark.cover("learning rates")
@pytest.mark.parametrize("every", [1, 4, 7])
@pytest.mark.parametrize("rate", RATES.values(), ids=RATES)
def test_the_forecast_is_that_of_a_loop(rate, every):
    """The smaller slope of two: since the first step, and over half the learning rate left."""
    steps = 30
    rates = [float(rate(t)) for t in range(steps)]
    # Speeds up, and slows down.
    quantiles = [1 + t**2 / 100 + 3 * max(t - 12, 0) ** (1 / 3) for t in range(steps)]
    tx = soft(to_the_end(0.5, rate, steps, update_every=every))
    w = jnp.array([[1.0, 1.0], [1.0, 2.0]])
    state, update = tx.init(w), jax.jit(tx.update)
    threshold, slope, aim, last, spent_at_last = 0.0, 0.0, 0.0, 0.0, 0.0
    theta = 1.0
    for t in range(steps):
        updates, state = update(jnp.full((2, 2), quantiles[t] - theta), state, w)
        w, theta = optax.apply_updates(w, updates), quantiles[t]
        spent, left = sum(rates[1 : t + 1]), sum(rates[t + 1 :])
        if t % every == 0 or t == steps - 1:
            between = spent - spent_at_last
            if t > 0 and between > 0:
                window = max(between, min(spent, left / 2))
                slope += between / window * ((theta - last) / between - slope)
            mean = (theta - quantiles[0]) / spent if spent else 0.0
            aim, last, spent_at_last = theta + left * min(slope, mean), theta, spent
        rho = 1.0 if t == steps - 1 else rates[t] / (rates[t] + left) if rates[t] else 0.0
        threshold = max(threshold + rho * (aim - threshold), 0.0)
        assert float(state.threshold) == pytest.approx(threshold, rel=2e-4), t
    assert float(state.threshold) == pytest.approx(quantiles[-1])


@pytest.mark.parametrize("every", matrix.fast([1, 2, 7, 10, 1000], [7]))
def test_the_quantile_is_selected_when_due_and_at_the_last_step(every):
    steps = 10
    tx = soft(to_the_end(0.5, 0.1, steps, update_every=every))
    update = jax.jit(tx.update)
    w = jnp.arange(1.0, 9.0).reshape(2, 4)
    state = tx.init(w)
    for count in range(steps + 2):
        # Every latent weight grows by one, and the quantile with them.
        updates, state = update(jnp.ones((2, 4)), state, w)
        w = optax.apply_updates(w, updates)
        last = count if count >= steps - 1 else count - count % every
        assert float(state.control.quantile) == 4 + last + 1
    assert float(state.threshold) == 16
    assert int(jnp.sum(w == 0)) == 4


@pytest.mark.slow
def test_the_last_threshold_is_the_quantile_whatever_the_last_rate():
    rate = optax.piecewise_constant_schedule(0.1, {3: 0.0})
    tx = soft(to_the_end(0.5, rate, 6))
    w = jnp.arange(1.0, 9.0).reshape(2, 4)
    state, update = tx.init(w), jax.jit(tx.update)
    for _ in range(6):
        # The weights move on, as under an optimizer with a learning rate of its own.
        updates, state = update(jnp.ones((2, 4)), state, w)
        w = optax.apply_updates(w, updates)
    assert float(state.threshold) == 4 + 6
    assert int(jnp.sum(w == 0)) == 4


def selections(threshold, steps):
    """At which steps the quantile is selected again, seen from a latent weight that grows."""
    update = jax.jit(
        jax.vmap(
            lambda count: threshold.update(
                count,
                jnp.zeros(()),
                lats_optax.TargetSparsityState(
                    *[jnp.full((), -1.0)] * 3, *[jnp.asarray(steps)] * 2
                ),
                [jnp.array([[1.0, 2.0]])],
                prox.prox_l1,
            )
        )
    )
    _, state = update(jnp.arange(steps))
    return np.flatnonzero(np.asarray(state.quantile) == 1)


@pytest.mark.parametrize(
    ("steps", "every"), matrix.fast([(1, 1), (199, 1), (600, 3), (30_000, 150)], [(1, 1), (600, 3)])
)
def test_how_often_the_quantile_is_selected_by_default(steps, every):
    due = selections(to_the_end(0.5, 0.1, steps), steps + 5)
    # Who trains on after the last step stays at the target.
    after = range(steps, steps + 5)
    np.testing.assert_array_equal(due, sorted({*range(0, steps, every), steps - 1, *after}))


@pytest.mark.cover
@pytest.mark.parametrize("size", matrix.fast([1, 2, 3, 10], [1]))
@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.99])
def test_tiny_models(size, target):
    w = jnp.linspace(1.0, 2.0, size)[None]
    for steps in (1, 2):
        _, pruned = still(soft(to_the_end(target, 0.1, steps)), w, steps)
        zeros = int(jnp.sum(pruned == 0))
        assert abs(zeros - target * size) <= 1
        assert zeros < size


@pytest.mark.slow
def test_a_target_of_zero_prunes_nothing():
    w = jnp.array([[1e-30, -1.0, 2.0]])
    thresholds, after = still(soft(to_the_end(0, 0.1, 3)), w, 3)
    assert thresholds == [0, 0, 0]
    np.testing.assert_array_equal(after, w)


@pytest.mark.slow
def test_ties_are_pruned_together():
    w = jnp.array([[1.0, -2.0, 2.0, 2.0, 3.0]])
    _, after = still(soft(to_the_end(0.4, 0.1, 1)), w, 1)
    np.testing.assert_array_equal(after, [[0, 0, 0, 0, 1]])


def test_what_is_not_pruned_does_not_count():
    params = {"bias": jnp.full(100, 1e-3), "kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
    _, after = still(soft(to_the_end(0.5, 0.1, 1)), params, 1)
    assert int(jnp.sum(after["kernel"] == 0)) == 5
    np.testing.assert_array_equal(after["bias"], params["bias"])


@pytest.mark.cover
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("target", "axes"),
    matrix.fast([(0.3, None), (0.5, 1), (0.9, (0,)), (0.5, (0, 1))], [(0.9, (0,)), (0.5, (0, 1))]),
)
def test_groups_end_within_one_group_of_the_target(target, axes, dtype):
    w = jax.random.normal(jax.random.key(3), (12, 10)).astype(dtype)
    operator = prox.Axes(axes=axes)
    _, after = still(soft_threshold(to_the_end(target, 0.1, 2), operator=operator), w, 2)
    zeros = np.asarray(after == 0)
    group = {None: 12, (0,): 12, 1: 10, (0, 1): 120}[axes]
    # The group in which the quantile lies goes as a whole, but the last one stays.
    assert zeros.sum() == min(group * int(np.ceil(round(target * 120) / group)), 120 - group)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(target=1.0), "^target: 1.0 is not allowed"),
        (dict(target=-0.1), "^target: -0.1 is not allowed"),
        (dict(target=95), "^target: 95 is not allowed"),
        (dict(target=float("nan")), "^target: nan"),
        (dict(target="0.9"), "^target: '0.9'"),
        (dict(target=None), "^target: None"),
        (dict(steps=0), "^steps: 0 is not allowed; allowed are whole numbers >= 1"),
        (dict(steps=-3), "^steps: -3"),
        (dict(steps=2.5), "^steps: 2.5"),
        (dict(steps="10"), "^steps: '10'"),
        (dict(update_every=0), "^update_every: 0"),
        (dict(update_every=1.5), "^update_every: 1.5"),
        (dict(learning_rate=0.0), "^learning_rate: it is zero at all of the 10 steps"),
        (dict(learning_rate=-0.1), "^learning_rate: -0.1 at step 0"),
        (dict(learning_rate=float("nan")), "^learning_rate: nan at step 0"),
        (dict(learning_rate=lambda t: 0.1 - 0.02 * t), r"^learning_rate: -0.0\d+ at step 6"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        to_the_end(**{"target": 0.9, "learning_rate": 0.1, "steps": 10} | arguments)


@pytest.mark.parametrize("target", [np.float32(0.5), jnp.asarray(0.5), 0])
def test_numbers_of_any_library_are_taken(target):
    to_the_end(target, jnp.asarray(0.1), np.int64(10))


# --- the selection ------------------------------------------------------------------------------

SHAPES_OF_ARRAYS = st.lists(
    st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=3
)
NUMBERS = {
    "float32": st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-40, 3.4e38]),
        st.floats(width=32, allow_subnormal=False),
    ),
    "bfloat16": st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, np.nan, 1e-40]), st.integers(-300, 300)
    ),
    "float64": st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, np.inf, np.nan, 5e-324, 1.0 + 2**-52, 1.8e308]),
        st.floats(allow_subnormal=False),
    ),
}


def by_partition(arrays, rank):
    magnitudes = np.abs(np.concatenate([np.ravel(array) for array in arrays]))
    return np.partition(magnitudes, rank - 1)[rank - 1] if rank else 0.0


@functools.cache
def selections_of(dtype):
    """A program: arrays of two fixed shapes -> the answers for some ranks."""
    wide = np.float64 if dtype == "float64" else np.float32
    return jax.jit(lambda *arrays: [kth_smallest(arrays, rank, dtype=wide) for rank in RANKS])


RANKS = (0, 1, 2, 9, 16, 17)


@pytest.mark.parametrize("dtype", matrix.fast(NUMBERS, ["float32"]))
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_kth_smallest_of_any_numbers(dtype, data):
    values = np.asarray(data.draw(st.lists(NUMBERS[dtype], min_size=17, max_size=17)))
    with enable_x64(dtype == "float64"), np.errstate(over="ignore"):
        values = values.astype(jnp.dtype(dtype))
        got = selections_of(dtype)(values[:12].reshape(3, 4), values[12:])
        wide = values.astype(got[0].dtype)
        assert wide.dtype == (np.float64 if dtype == "float64" else np.float32)
    np.testing.assert_array_equal(got, [by_partition([wide], rank) for rank in RANKS])


@pytest.mark.slow
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(shapes=SHAPES_OF_ARRAYS, data=st.data())
def test_kth_smallest_of_any_shapes(shapes, data):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    rank = data.draw(st.integers(0, sum(array.size for array in arrays)))
    got = kth_smallest([jnp.asarray(array) for array in arrays], rank)
    np.testing.assert_array_equal(got, by_partition(arrays, rank))


def test_every_rank():
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-3, 4, size=(2, 3)).astype(np.float32), rng.normal(size=2)]
    arrays = [jnp.asarray(array, jnp.float32) for array in arrays]
    got = jax.jit(lambda: jnp.stack([kth_smallest(arrays, rank) for rank in range(9)]))()
    magnitudes = np.sort(np.abs(np.concatenate([np.ravel(a) for a in arrays])))
    np.testing.assert_array_equal(got, [0.0, *magnitudes])


@pytest.mark.slow
def test_kth_smallest_under_vmap_and_a_magnitude_of_its_own():
    x = jax.random.normal(jax.random.key(0), (3, 4, 5))
    select = jax.jit(jax.vmap(lambda x: kth_smallest([x[:2], x[2:]], 7, prox.prox_l0)))
    expected = np.sort(np.square(np.asarray(x)).reshape(3, -1) / 2, axis=1)[:, 6]
    np.testing.assert_array_equal(select(x), expected)


@pytest.mark.parametrize("spec", [("d",), (None, "d")])
def test_sharded_arrays_stay_where_they_are(spec):
    mesh = versions.auto_mesh((8,), ("d",))
    x = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    program = jax.jit(lambda x: kth_smallest([x], 1000)).lower(sharded).compile()
    assert float(program(sharded)) == by_partition([x], 1000)
    exchanged = re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-[a-z]+\(", program.as_text())
    assert exchanged
    # Counts alone go from device to device.
    assert max(np.prod([int(n) for n in shape.split(",") if n]) for shape in exchanged) <= 8 * 15


@pytest.mark.parametrize(("rank", "message"), [(-1, "rank: -1"), (5, "rank: 5 .* 0 … 4")])
def test_ranks_that_are_refused(rank, message):
    with pytest.raises(ValueError, match=message):
        kth_smallest([jnp.ones((2, 2))], rank)


def test_more_entries_than_32_bits_count():
    huge = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)
    with pytest.raises(ValueError, match="4294967296 entries are too many"):
        jax.eval_shape(lambda x: kth_smallest([x], 1), huge)


@pytest.mark.slow
def test_the_program_sorts_nothing_and_selects_within_a_conditional():
    tx = soft(to_the_end(0.9, 0.1, 1000, update_every=10))
    params = {"a": jnp.ones((32, 16)), "b": jnp.ones((3, 3, 4, 8))}
    program = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
    assert " sort(" not in program
    assert " conditional(" in program
    # The loop over the digits lies within a branch: the entry computation has none.
    entry = program[program.index("\nENTRY ") :].splitlines()
    loops = [line for line in entry if " while(" in line]
    # Older versions have one over the few steps that a selection may be due at.
    assert not [line for line in loops if "jit(searchsorted)" not in line]
    assert " while(" in program


# --- laws, and the controller without weights -----------------------------------------------------


LAWS = {
    "constant_l1": lats_optax.constant_l1(),
    "threshold_curve": lats_optax.threshold_curve(),
    "own_curve": lats_optax.threshold_curve(lambda x: x**2),
}


@pytest.mark.parametrize("reach", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("name", LAWS)
def test_the_controller_follows_its_law_to_a_still_quantile(name, reach):
    """d_t = D (the law's curve) up to the horizon, and D from there on: no weights are needed."""
    steps, still = 40, 0.7
    rates = np.array([0.1 * (1 + math.cos(math.pi * t / steps)) for t in range(steps)])
    horizon = round(reach * steps)
    plan = Plan.of(LAWS[name], rates[:horizon], np.arange(steps))
    x = np.arange(1, horizon + 1) / horizon
    curve = {
        "constant_l1": np.cumsum(rates[:horizon]) / rates[:horizon].sum(),
        "threshold_curve": 1 - (1 - x) ** 3,
        "own_curve": x**2,
    }[name]
    d = jnp.zeros(())
    state = lats_optax.TargetSparsityState(d, d, d, jnp.asarray(steps), jnp.asarray(0))
    step = jax.jit(lambda t, d, state: control(plan, t, d, state, jnp.float32(still)))
    thresholds = []
    for t in range(steps):
        d, state = step(t, d, state)
        thresholds.append(float(d))
    np.testing.assert_allclose(thresholds[:horizon], still * curve, rtol=1e-5)
    np.testing.assert_allclose(thresholds[horizon - 1 :], still, rtol=1e-7)


def noisy(tx, steps, seed=0):
    """Zeros after each step of a run under noisy gradients."""
    w = jnp.asarray(np.random.default_rng(seed).normal(size=(20, 50)), jnp.float32)
    state, update = tx.init(w), jax.jit(tx.update)
    zeros = []
    for t in range(steps):
        noise = np.random.default_rng(t).normal(size=w.shape)
        updates, state = update(jnp.asarray(0.05 * noise, jnp.float32), state, w)
        w = optax.apply_updates(w, updates)
        zeros.append(int(jnp.sum(w == 0)))
    return zeros, state


@pytest.mark.cover
@pytest.mark.parametrize("law", [None, lats_optax.threshold_curve(), lats_optax.sparsity_curve()])
@pytest.mark.parametrize("freeze_after", matrix.fast([None, 27], [27]))
def test_a_target_is_reached_held_and_exact_at_the_end(law, freeze_after):
    target = lats_optax.target_sparsity(0.9, 0.1, 40, law=law, update_every=1)
    zeros, _ = noisy(soft_threshold(target, freeze_after=freeze_after), 44)
    assert zeros[19:] == [900] * 25
    assert zeros[9] < 900


@pytest.mark.slow
def test_between_selections_the_held_target_drifts_and_ends_exact():
    target = lats_optax.target_sparsity(0.9, 0.1, 40, update_every=7)
    zeros, _ = noisy(soft_threshold(target), 40)
    assert zeros[19] == zeros[39] == 900
    assert any(count != 900 for count in zeros[20:39])
    assert all(abs(count - 900) < 40 for count in zeros[20:])


@pytest.mark.parametrize("update_every", matrix.fast([1, 3], [3]))
def test_a_sparsity_curve_is_followed_at_every_selection(update_every):
    law = lats_optax.sparsity_curve(lambda x: x**0.5)
    target = lats_optax.target_sparsity(0.8, 0.1, 30, law=law, reach=1.0, update_every=update_every)
    zeros, _ = noisy(soft_threshold(target), 30)
    for t in range(0, 30, update_every):
        assert zeros[t] == round(0.8 * math.sqrt((t + 1) / 30) * 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(reach=0.0), r"^reach: 0\.0 is not allowed; allowed are numbers in \(0, 1\]"),
        (dict(reach=1.5), r"^reach: 1\.5"),
        (dict(reach="half"), "^reach: 'half'"),
        (dict(law=lats_optax.threshold_curve(lambda x: -x)), "^law: .* change by -0.2 at step 0"),
        (dict(law=lats_optax.threshold_curve(np.zeros_like)), "^law: .* not rise in any of the 5"),
        (dict(law=lats_optax.threshold_curve(lambda x: x / 0)), "^curve: .* not finite"),
        (dict(law=lats_optax.sparsity_curve(lambda x: 2 * x - 1)), r"^curve: -0\.6 at x = 0\.2"),
    ],
)
def test_laws_that_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message), np.errstate(all="ignore"):
        lats_optax.target_sparsity(0.9, 0.1, 10, **arguments)


def test_a_sparsity_curve_must_end_at_one():
    with pytest.raises(ValueError, match=r"^curve: it ends at 0\.5, and not at 1"):
        lats_optax.sparsity_curve(lambda x: x / 2)
