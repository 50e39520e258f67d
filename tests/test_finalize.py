"""`finalize`: the weights that every kind of state stands for, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax import finalize, prox, soft_threshold, target_sparsity
from lats_optax.masks import select
from tests import matrix, versions

SGD = optax.sgd(0.1, momentum=0.9)
GROUPS = prox.Axes(axes=0)


def start(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (6, 8), dtype), "bias": jnp.zeros(8, dtype)},
        "second": [jax.random.normal(keys[1], (8, 4), dtype)],
    }


def trained(tx, params=None, steps=6):
    """Parameters, state and the average of the parameters, after some steps of noise."""
    params = start() if params is None else params
    state, average = jax.jit(tx.init)(params), params

    @jax.jit
    def step(params, state, average, key):
        leaves, tree = jax.tree.flatten(params)
        keys = jax.tree.unflatten(tree, list(jax.random.split(key, len(leaves))))
        slopes = jax.tree.map(lambda k, w: jax.random.normal(k, w.shape, w.dtype), keys, params)
        updates, state = tx.update(slopes, state, params)
        params = optax.apply_updates(params, updates)

        def mean(a, w):
            return (0.5 * a + 0.5 * w).astype(a.dtype)

        return params, state, jax.tree.map(mean, average, params)

    for key in jax.random.split(jax.random.key(1), steps):
        params, state, average = step(params, state, average, key)
    return params, state, average


def grows(operator=None, **options):
    return soft_threshold(lambda count: 0.2 * count, operator=operator, **options)


KERNELS = {"first": {"kernel": "a", "bias": "b"}, "second": "b"}
TRANSFORMS = {
    "chain": (optax.chain(SGD, grows()), None),
    "inner": (grows(inner=SGD), None),
    "closed loop": (optax.chain(SGD, soft_threshold(target_sparsity(0.6, 0.1, 6))), None),
    "each layer": (
        optax.chain(SGD, soft_threshold(target_sparsity(lats_optax.erdos_renyi(0.6), 0.1, 6))),
        None,
    ),
    "frozen": (optax.chain(SGD, grows(freeze_after=3)), None),
    "at the freeze": (optax.chain(SGD, grows(freeze_after=6)), None),
    "a layer": (optax.chain(SGD, grows(mask=select("first/kernel"))), None),
    "MultiSteps": (optax.MultiSteps(optax.chain(SGD, grows()), 2), None),
    "masked": (
        optax.chain(SGD, optax.masked(grows(), {"first": True, "second": False})),
        None,
    ),
    "partition": (
        versions.partition(
            {"a": optax.chain(SGD, grows()), "b": optax.chain(SGD, grows(mask=True))}, KERNELS
        ),
        None,
    ),
    "inject_hyperparams": (
        optax.chain(SGD, optax.inject_hyperparams(soft_threshold)(threshold=0.3)),
        None,
    ),
    "apply_if_finite": (optax.apply_if_finite(optax.chain(SGD, grows()), 3), None),
    "groups": (optax.chain(SGD, grows(GROUPS)), GROUPS),
    "groups, closed loop": (
        optax.chain(SGD, soft_threshold(target_sparsity(0.5, 0.1, 6), operator=GROUPS)),
        GROUPS,
    ),
    "non-negative": (
        optax.chain(SGD, grows(prox.prox_non_negative_l1)),
        prox.prox_non_negative_l1,
    ),
    "l0": (optax.chain(SGD, grows(prox.prox_l0)), prox.prox_l0),
}


def assert_is_the_sparse_tree(found, params):
    def check(new, w):
        new, w = np.asarray(new, np.float64), np.asarray(w, np.float64)
        np.testing.assert_array_equal(new == 0, w == 0)
        assert not np.signbit(new[new == 0]).any()
        np.testing.assert_allclose(new, w, rtol=1e-5, atol=1e-6)

    jax.tree.map(check, found, params)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert jax.tree.map(lambda w: w.dtype, found) == jax.tree.map(lambda w: w.dtype, params)


@pytest.mark.parametrize("name", matrix.fast(TRANSFORMS, ["inner"]))
def test_every_state(name):
    tx, operator = TRANSFORMS[name]
    params, state, average = trained(tx)
    assert lats_optax.sparsity(params).zeros > 4
    assert_is_the_sparse_tree(finalize(params, state, operator=operator), params)

    kept = finalize(params, state, average=average, operator=operator)
    for new, a, w in zip(*map(jax.tree.leaves, (kept, average, params))):
        if w.ndim > 1 or name == "partition":  # which prunes the bias too
            np.testing.assert_array_equal(new, np.where(w == 0, 0.0, a))
        else:
            np.testing.assert_array_equal(new, a)


@pytest.mark.parametrize("dtype", matrix.fast([jnp.bfloat16, jnp.float16], [jnp.bfloat16]))
@pytest.mark.parametrize("latent_dtype", matrix.fast([None, jnp.float32], [jnp.float32]))
def test_sixteen_bits(dtype, latent_dtype):
    tx = optax.chain(SGD, grows(latent_dtype=latent_dtype))
    params, state, _ = trained(tx, start(dtype))
    found = finalize(params, state)
    for new, w in zip(jax.tree.leaves(found), jax.tree.leaves(params)):
        assert new.dtype == dtype
        np.testing.assert_array_equal(np.asarray(new == 0), np.asarray(w == 0))
        np.testing.assert_allclose(new.astype(float), w.astype(float), rtol=0.02, atol=0.02)


def test_the_weights_are_those_of_the_formula_and_not_their_rounded_sum():
    params, state, _ = trained(TRANSFORMS["chain"][0])
    found = finalize(params, state)
    theta = np.asarray(state[1].latent["first"]["kernel"])
    d = np.float32(state[1].threshold)
    expected = np.sign(theta) * np.maximum(np.abs(theta) - d, np.float32(0))
    np.testing.assert_array_equal(found["first"]["kernel"], expected)


@pytest.mark.slow
def test_nnx():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(SGD, grows()), wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, nnx.grad(lambda model: model(jnp.ones((1, 6))).sum())(model))
    params = nnx.state(model, nnx.Param)
    assert_is_the_sparse_tree(finalize(params, optimizer.opt_state), params)


def test_a_state_without_its_types():
    """As Orbax restores one that it is given no tree for."""
    params, state, _ = trained(TRANSFORMS["chain"][0])
    plain = {
        key: jax.device_get(value)
        for key, value in state[1]._asdict().items()
        if key not in ("control", "inner_state")
    }
    plain["latent"] = {
        "first": {"kernel": plain["latent"]["first"]["kernel"], "bias": None},
        "second": {"0": plain["latent"]["second"][0]},
    }
    assert_is_the_sparse_tree(finalize(params, [None, plain]), params)


# --- what is refused ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    return trained(TRANSFORMS["chain"][0])


@pytest.mark.slow
def test_zeros_that_differ(run):
    params, state, average = run
    kernel, second = params["first"]["kernel"], params["second"][0]
    zeros, weights = np.argwhere(kernel == 0), np.argwhere(kernel != 0)
    changed = kernel.at[tuple(zeros[0])].set(1e-30)
    changed = changed.at[tuple(weights[0])].set(0.0).at[tuple(weights[1])].set(0.0)
    alive = int((second == 0).sum())
    wrong = {"first": {**params["first"], "kernel": changed}, "second": [jnp.ones((8, 4))]}
    with pytest.raises(ValueError, match="not those of the state") as caught:
        finalize(wrong, state)
    assert (
        "first/kernel: 3 of 48 weights differ (2 zero in params alone, 1 in the state alone); "
        f"second/0: {alive} of 32 weights differ (0 zero in params alone, {alive} in the state "
        "alone)"
    ) in str(caught.value)
    with pytest.raises(ValueError, match="averaged ones as average="):
        finalize(average, state)
    with pytest.raises(ValueError, match="not those of the state"):
        finalize(params, state, operator=prox.prox_l0)


@pytest.mark.slow
def test_a_state_of_another_step(run):
    params, _, _ = run
    _, state, _ = trained(TRANSFORMS["chain"][0], steps=5)
    with pytest.raises(ValueError, match="not those of the state"):
        finalize(params, state)


def refusals(run):
    params, state, average = run
    short = {"first": params["first"]}
    long_average = {**average, "second": [jnp.ones((8, 5))]}
    wide = {**params, "second": [jnp.ones((8, 5))]}
    return {
        "dense": ((params, SGD.init(params)), {}, "opt_state: there is no state of soft_threshold"),
        "fewer layers": ((short, state), {}, "opt_state: its latent weights have second/0"),
        "wider": ((wide, state), {}, r"second/0 have shape \(8, 4\).*params, \(8, 5\)"),
        "average": ((params, state), {"average": short}, "average: its structure"),
        "wide average": (
            (params, state),
            {"average": long_average},
            r"average: second/0 has shape \(8, 5\)",
        ),
        "twice": (
            (params, (state, state)),
            {},
            "opt_state: two states have latent weights for first/kernel",
        ),
    }


@pytest.mark.parametrize(
    "name", ["dense", "fewer layers", "wider", "average", "wide average", "twice"]
)
def test_refusals(run, name):
    args, options, message = refusals(run)[name]
    with pytest.raises(ValueError, match=message):
        finalize(*args, **options)
