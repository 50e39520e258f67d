"""The peer methods against NumPy: loops over float64, from the formulas of their papers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from benchmarks.quality.peers import acdc, one_shot, rigl, sparse_evolution, str_
from benchmarks.quality.peers.base import Setting, smallest_of_each, zero_moments
from tests import matrix

RATE, MOMENTUM, STEPS = 0.125, 0.5, 20
# In 3x3x2x4 + 5x4 + 6x5 = 122 weights Erdős–Rényi-kernel densities leave 12, 9 and 11, the sums of
# the sides, alive: 32 in all.
ALIVE = {"conv": 12, "dense": 9, "stem": 11}
TARGET = 90 / 122
SETTING = Setting(TARGET, STEPS, optax.constant_schedule(RATE), lats_optax.prunable)
SGD = optax.sgd(SETTING.learning_rate, momentum=MOMENTUM)
ADAMW = optax.adamw(SETTING.learning_rate, weight_decay=0.01)
DYNAMIC = {"every": 4, "fraction": 0.9, "stop": 0.8}
PHASES = {"warmup": 0.2, "phase": 0.1, "last_dense": 0.1, "last_compressed": 0.2}
METHODS = {
    "rigl": functools.partial(rigl.make, **DYNAMIC),
    "set": functools.partial(sparse_evolution.make, **DYNAMIC),
    "acdc": functools.partial(acdc.make, **PHASES),
    "one_shot": one_shot.make,
    "str": functools.partial(str_.make, decay=0.5),
}
# The dense phases of the run, w_t after t steps, by hand.
DENSE = {"acdc": {*range(4), 6, 7, 10, 11, 14, 15}, "one_shot": set(range(10))}


def start():
    rng = np.random.default_rng(3)
    shapes = {"bias": (4,), "conv": (3, 3, 2, 4), "dense": (5, 4), "stem": (6, 5)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@functools.cache
def pushes():
    """For each step, where the minimum of its loss lies."""
    rng = np.random.default_rng(7)
    return {
        name: rng.normal(size=w.shape) + 0.5 * rng.normal(size=(STEPS, *w.shape))
        for name, w in start().items()
    }


def one_step(tx, params, state, push):
    gradients = jax.tree.map(jnp.subtract, params, push)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def single(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def run_by_step(tx):
    """The parameters and the state after each step, the first ones included."""
    step = jax.jit(functools.partial(one_step, tx))
    trajectory = [(single(start()), tx.init(single(start())))]
    for count in range(STEPS):
        push = jax.tree.map(lambda x, t=count: x[t], single(pushes()))
        trajectory.append(step(*trajectory[-1], push))
    assert step._cache_size() == 1, "a step was compiled again"
    return trajectory


def run_by_scan(tx):
    """The same in one scan."""

    @jax.jit
    def scanned(carry, targets):
        def step(carry, push):
            carry = one_step(tx, *carry, push)
            return carry, carry

        return jax.lax.scan(step, carry, targets)[1]

    first = single(start()), tx.init(single(start()))
    later = jax.tree.map(np.asarray, scanned(first, single(pushes())))
    return [first, *(jax.tree.map(lambda x, t=t: x[t], later) for t in range(STEPS))]


@functools.cache
def run_of(method, optimizer):
    """A run that several tests look at: by step with SGD, in a scan with AdamW."""
    if optimizer == "sgd":
        return run_by_step(METHODS[method](SGD, SETTING))
    return run_by_scan(METHODS[method](ADAMW, SETTING))


def layers(tree):
    return {name: np.asarray(leaf) for name, leaf in tree.items() if name != "bias"}


def zeros(params):
    return sum(int(np.sum(w == 0)) for w in layers(params).values())


# --- all of them ----------------------------------------------------------------------------------


@pytest.mark.cover
@pytest.mark.parametrize("optimizer", matrix.fast(["sgd", "adamw"], ["sgd"]))
@pytest.mark.parametrize("method", matrix.fast(METHODS, ["acdc", "one_shot"]))
def test_a_run_ends_at_the_exact_number_of_zeros(method, optimizer):
    params, state = run_of(method, optimizer)[-1]
    assert all(np.all(np.isfinite(w)) for w in params.values())
    assert not np.any(params["bias"] == 0)
    if method == "str":
        supports = [np.abs(t) > sigmoid(s) for t, s in zip(state.latent, state.thresholds)]
        assert 0 < zeros(params) == sum(int(np.sum(~alive)) for alive in supports) < 122
    else:
        assert zeros(params) == 90
        for name, w in layers(params).items():
            np.testing.assert_array_equal(w != 0, state.support[name])


@pytest.mark.parametrize("method", METHODS)
def test_an_update_needs_parameters(method):
    tx = METHODS[method](SGD, SETTING)
    params = jax.tree.map(jnp.asarray, start())
    with pytest.raises(ValueError, match=r"^params: None"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(rigl.make, every=0), "^every: 0"),
        (functools.partial(rigl.make, stop=1.5), "^stop: 1.5"),
        (functools.partial(sparse_evolution.make, fraction=0.0), "^fraction: 0.0"),
        (functools.partial(one_shot.make, dense=2.0), "^dense: 2.0"),
        (functools.partial(acdc.make, warmup=0.8), "^warmup: 0.8"),
        (functools.partial(acdc.make, phase=0.01), "^boundaries: .* too short"),
    ],
)
def test_what_a_run_cannot_have_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(SGD, SETTING)


@pytest.mark.slow
def test_the_smallest_of_each_are_exact_where_scores_tie():
    scores = [
        jnp.array([[2.0, 1.0, 1.0], [1.0, jnp.inf, -0.5]]),
        jnp.array([-3.0, -jnp.inf, 3.0, -3.0, -4.0]),
        jnp.full(4, 0.0),
    ]
    select = jax.jit(smallest_of_each)
    chosen = select(scores, jnp.array([3, 3, 0]))
    np.testing.assert_array_equal(chosen[0], [[False, True, True], [False, False, True]])
    np.testing.assert_array_equal(chosen[1], [True, True, False, False, True])
    assert not np.any(chosen[2])
    scores = np.random.default_rng(0).normal(size=1000).round(1).astype(np.float32)
    for count in (1, 500, 1000):
        (chosen,) = select([jnp.asarray(scores)], jnp.array([count]))
        expected = np.argsort(scores, kind="stable")[:count]
        np.testing.assert_array_equal(np.flatnonzero(chosen), np.sort(expected))


# --- RigL and SET ---------------------------------------------------------------------------------


def moved(alive, count, fraction=0.9, last=16):
    return int(alive * fraction / 2 * (1 + np.cos(np.pi * count / last)))


def order(scores, among):
    """The indices of a bool array, from the smallest score to the largest."""
    return sorted(np.flatnonzero(among), key=lambda index: scores.flat[index])


def test_rigl_follows_algorithm_one():
    trajectory = run_of("rigl", "sgd")
    first = trajectory[0][1].support
    params, trace = start(), jax.tree.map(np.zeros_like, start())
    alive = {name: np.asarray(first[name]) for name in ALIVE} | {"bias": np.ones(4, bool)}
    regrown = 0
    for count in range(STEPS):
        for name, w in params.items():
            gradient, living = w - pushes()[name][count], alive[name]
            if count == 0:
                w[~living] = 0
            elif count in (4, 8, 12):
                if name == "bias":
                    continue
                k = moved(ALIVE[name], count)
                assert k > 0
                dropped = order(np.abs(w), living)[:k]
                kept = living.copy()
                kept.flat[dropped] = False
                grown = order(np.abs(gradient), ~kept)[-k:]
                alive[name] = kept.copy()
                alive[name].flat[grown] = True
                w[~alive[name]] = 0
                regrown += len(set(dropped) & set(grown))
                trace[name][alive[name] & ~living] = 0
            else:
                trace[name] = gradient * living + MOMENTUM * trace[name]
                w -= RATE * trace[name] * living
        after, state = trajectory[count + 1]
        for name, w in params.items():
            np.testing.assert_allclose(after[name], w, atol=1e-5)
            np.testing.assert_array_equal(state.support[name] & np.ones(w.shape, bool), alive[name])
    assert regrown, "the case in which a dropped weight keeps its value is not covered"


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_layers_keep_the_densities_of_erdos_renyi(method):
    for _, state in run_of(method, "adamw"):
        counts = {name: int(np.sum(x)) for name, x in layers(state.support).items()}
        assert counts == ALIVE


def test_set_drops_the_smallest_and_grows_what_is_dead():
    trajectory = run_of("set", "sgd")
    for count in range(1, STEPS):
        (params, before), (after, state) = trajectory[count : count + 2]
        for name, living in layers(before.support).items():
            living, next_living = living != 0, np.asarray(state.support[name])
            if count not in (4, 8, 12):
                np.testing.assert_array_equal(living, next_living)
                continue
            w, k = np.asarray(params[name]), moved(ALIVE[name], count)
            dropped = order(np.abs(w), living)[:k]
            lost = np.flatnonzero(living & ~next_living)
            assert set(lost) <= set(dropped)
            new = next_living & ~living
            assert np.sum(new) == len(lost) > 0
            np.testing.assert_array_equal(np.asarray(after[name])[new], 0)


@pytest.mark.slow
def test_set_is_reproducible_by_seed():
    params = {"stem": single(start())["stem"]}
    supports = []
    for seed in (0, 0, 1):
        tx = METHODS["set"](SGD, SETTING._replace(seed=seed))
        # The same first topology, so that only what grows is told apart.
        state = tx.init(params)._replace(count=jnp.int32(4), support={"stem": params["stem"] > 0.3})
        supports.append(jax.jit(tx.update)(params, state, params)[1].support["stem"])
    np.testing.assert_array_equal(supports[0], supports[1])
    assert np.any(supports[0] != supports[2])


def test_rigl_zeroes_the_moments_of_grown_weights_and_holds_the_others():
    trajectory = run_of("rigl", "adamw")
    (_, before), (_, after) = trajectory[4:6]
    for moment in ("mu", "nu"):
        old, new = (optax.tree.get(s.inner_state, moment) for s in (before, after))
        for name in ALIVE:
            grown = np.asarray(after.support[name] & ~before.support[name])
            assert np.any(grown)
            np.testing.assert_array_equal(new[name], np.where(grown, 0, old[name]))
        np.testing.assert_array_equal(new["bias"], old["bias"])
    counts = optax.tree.get_all_with_path(after.inner_state, "count")
    assert len(counts) == 2
    assert all(int(value) == 5 for _, value in counts)


def test_moments_are_found_in_a_chain():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.add_decayed_weights(0.1), SGD)
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    _, state = optimizer.update(params, optimizer.init(params), params)
    where = {"a": jnp.array([[True, False], [False, False]]), "b": jnp.asarray(False)}
    trace = optax.tree.get(zero_moments(optimizer, state, where), "trace")
    np.testing.assert_array_equal(trace["a"] == 0, where["a"])
    assert np.all(trace["b"] != 0)


# --- AC/DC and one-shot ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", DENSE)
def test_phases_against_numpy(method):
    trajectory = run_of(method, "sgd")
    params, trace = start(), jax.tree.map(np.zeros_like, start())
    alive = jax.tree.map(lambda w: np.ones(w.shape, bool), start())
    for count in range(STEPS):
        for name, w in params.items():
            gradient = (w - pushes()[name][count]) * alive[name]
            trace[name] = gradient + MOMENTUM * trace[name]
            params[name] = (w - RATE * trace[name]) * alive[name]
        was, is_dense = count in DENSE[method], count + 1 in DENSE[method]
        if was and not is_dense:
            magnitudes = np.concatenate([np.abs(params[name]).ravel() for name in ALIVE])
            threshold = np.sort(magnitudes)[90]
            for name in ALIVE:
                alive[name] = np.abs(params[name]) >= threshold
                params[name] = params[name] * alive[name]
        if is_dense and not was:
            alive = jax.tree.map(lambda w: np.ones(w.shape, bool), start())
            trace = jax.tree.map(np.zeros_like, start())
        after = trajectory[count + 1][0]
        # Where a dense phase begins the weights are still those of the compressed one.
        assert zeros(after) == (0 if is_dense and was else 90)
        for name, w in params.items():
            np.testing.assert_allclose(after[name], w, atol=1e-5)


def test_one_shot_revives_nothing():
    dead = [
        {name: w == 0 for name, w in layers(params).items()}
        for params, _ in run_of("one_shot", "adamw")
    ]
    assert not any(np.any(x) for x in dead[9].values())
    for later in dead[10:]:
        for name, x in later.items():
            np.testing.assert_array_equal(x, dead[10][name])


def test_decompression_restarts_adam_but_not_the_learning_rate():
    inner_state = run_of("acdc", "adamw")[6][1].inner_state
    assert not np.any(optax.tree.get(inner_state, "mu")["stem"])
    assert not np.any(optax.tree.get(inner_state, "nu")["bias"])
    counts = [int(value) for _, value in optax.tree.get_all_with_path(inner_state, "count")]
    assert sorted(counts) == [0, 6]


def test_default_phases_are_those_of_imagenet():
    expected = [10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 85]
    assert acdc.boundaries(100, 0.1, 0.05, 0.1, 0.15) == expected


# --- STR ------------------------------------------------------------------------------------------


def sigmoid(s):
    return 1 / (1 + np.exp(-s))


def soft(theta, s):
    return np.sign(theta) * np.maximum(np.abs(theta) - sigmoid(s), 0)


@pytest.mark.slow
def test_gradients_of_str_are_finite_differences_of_a_two_layer_loss():
    rng = np.random.default_rng(5)
    inputs, labels = rng.normal(size=(8, 5)), rng.normal(size=(8, 3))
    first = {"a": rng.normal(size=(5, 4)), "b": rng.normal(size=(4, 3))}

    def loss(weights, np=np):
        return np.sum((np.tanh(inputs @ weights["a"]) @ weights["b"] - labels) ** 2) / 8

    tx = str_.make(optax.sgd(1.0), SETTING, decay=0.0, s_init=-1.0)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), first)
    state = tx.init(params)
    # The first w are the given weights; here theta is put back so that some of them are dead.
    state = state._replace(latent=[params["a"], params["b"]])
    weights = {name: jnp.asarray(soft(x, -1.0), jnp.float32) for name, x in first.items()}
    gradients = jax.jit(jax.grad(functools.partial(loss, np=jnp)))(weights)
    _, after = jax.jit(tx.update)(gradients, state, weights)

    def at(variables):
        a, b, s, z = variables[:20], variables[20:32], *variables[32:]
        return loss({"a": soft(a.reshape(5, 4), s), "b": soft(b.reshape(4, 3), z)})

    variables = np.concatenate([first["a"].ravel(), first["b"].ravel(), [-1.0, -1.0]])
    wiggles = np.eye(len(variables)) * 1e-6
    expected = [(at(variables + e) - at(variables - e)) / 2e-6 for e in wiggles]
    moved = [*(x.ravel() for x in after.latent), *(s[None] for s in after.thresholds)]
    np.testing.assert_allclose(variables - np.concatenate(moved), expected, atol=2e-5)
    assert sum(np.sum(w == 0) for w in weights.values()) > 3


@pytest.mark.parametrize("decoupled", [False, True])
def test_str_against_numpy(decoupled):
    decay, s_init = 0.0625, -2.0
    tx = str_.make(SGD, SETTING, decay=decay, s_init=s_init, decoupled=decoupled)
    trajectory = run_by_step(tx)
    bias, *theta = (w for _, w in sorted(start().items()))
    theta = [w + sigmoid(s_init) * np.sign(w) for w in theta]
    variables = {"bias": bias, **dict(zip(ALIVE, theta))} | {(name, "s"): s_init for name in ALIVE}
    trace = dict.fromkeys(variables, 0.0)
    for count in range(STEPS):
        gradients = {"bias": variables["bias"] - pushes()["bias"][count]}
        for name in ALIVE:
            theta, s = variables[name], variables[name, "s"]
            alive = np.abs(theta) > sigmoid(s)
            g = (soft(theta, s) - pushes()[name][count]) * alive
            gradients[name] = g
            gradients[name, "s"] = -sigmoid(s) * (1 - sigmoid(s)) * np.sum(g * np.sign(theta))
        for key, x in variables.items():
            shrunk = decay * x if key != "bias" else 0.0
            trace[key] = MOMENTUM * trace[key] + gradients[key] + (0 if decoupled else shrunk)
            variables[key] = x - RATE * (trace[key] + (shrunk if decoupled else 0))
        after = trajectory[count + 1][0]
        np.testing.assert_allclose(after["bias"], variables["bias"], atol=1e-5)
        for name in ALIVE:
            w = soft(variables[name], variables[name, "s"])
            np.testing.assert_allclose(after[name], w, atol=1e-5)
            np.testing.assert_array_equal(after[name] == 0, w == 0)
    assert 10 < zeros(after) < 112


@pytest.mark.slow
def test_more_decay_of_str_is_more_zeros():
    counts = [zeros(run_by_step(str_.make(SGD, SETTING, decay=0.0))[-1][0])]
    counts.append(zeros(run_of("str", "sgd")[-1][0]))
    assert counts[0] < counts[1]


@pytest.mark.slow
def test_the_first_weights_of_str_are_the_given_ones():
    params, state = run_of("str", "sgd")[0]
    for theta, s, w in zip(state.latent, state.thresholds, layers(params).values()):
        np.testing.assert_allclose(str_.soft(theta, s), w, atol=1e-6)
