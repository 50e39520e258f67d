"""Early pruning and pruning at initialization, against NumPy and against one transform for all."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax import freeze, keep_support, prune_at_initialization, soft_threshold
from tests import matrix, versions
from tests.properties import cosine, dense_start, flat, gradients, shrink

SEARCH, AFTER = 3, 4
SGD = optax.chain(optax.add_decayed_weights(0.25), optax.sgd(cosine, momentum=0.5))
THRESHOLDS = {
    "lats": lats_optax.lats_threshold(cosine, SEARCH, 0.3),
    "pgh": lats_optax.lats_threshold(cosine, SEARCH, 0.3, l1=lambda x: 0.01**x),
    "target": lats_optax.target_sparsity(0.7, cosine, SEARCH),
    "layers": lats_optax.target_sparsity(lats_optax.erdos_renyi(0.6), cosine, SEARCH),
}
KEEP = keep_support(lats_optax.support)
CONV = {"conv": {"kernel": "a"}, "dense": {"bias": "b", "kernel": "b"}}


def chained(soft):
    return optax.chain(SGD, soft(None))


def around(soft):
    return soft(SGD)


def masked(soft):
    mask = {"conv": {"kernel": True}, "dense": {"bias": False, "kernel": False}}
    return optax.chain(SGD, optax.masked(soft(None), mask))


def partitioned(soft):
    adam = optax.adam(0.01)
    return versions.partition({"a": optax.chain(SGD, soft(None)), "b": adam}, CONV)


WRAPPERS = {"chained": chained, "inner": around, "masked": masked, "partition": partitioned}


def kept(inner):
    return KEEP if inner is None else optax.chain(inner, KEEP)


def run(tx, params, state, steps):
    @jax.jit
    def step(params, state, count):
        updates, state = tx.update(gradients(params, count), state, params)
        return optax.apply_updates(params, updates), state

    for count in steps:
        params, state = step(params, state, count)
    return params, state


@pytest.mark.parametrize(
    ("wrapper", "threshold"),
    matrix.fast(
        [("chained", name) for name in THRESHOLDS]
        + [("inner", "lats"), ("inner", "target"), ("masked", "lats"), ("partition", "target")],
        [("chained", "lats"), ("masked", "lats")],
    ),
)
def test_two_transforms_do_what_freeze_after_does_in_one(wrapper, threshold):
    wrap, threshold = WRAPPERS[wrapper], THRESHOLDS[threshold]
    one = wrap(lambda inner: soft_threshold(threshold, inner=inner, freeze_after=SEARCH))
    search = wrap(lambda inner: soft_threshold(threshold, inner=inner))
    frozen, start = wrap(kept), dense_start()
    expected, _ = run(one, start, one.init(start), range(SEARCH + AFTER))

    params, state = run(search, start, search.init(start), range(SEARCH))
    zeros = {name: leaf == 0 for name, leaf in flat(params).items()}
    assert any(map(np.any, zeros.values()))
    state = freeze(state, frozen, params)
    shapes = jax.eval_shape(frozen.init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert versions.tree.get(state, "latent") is None
    params, state = run(frozen, params, state, range(SEARCH, SEARCH + AFTER))
    for name, leaf in flat(params).items():
        np.testing.assert_array_equal(leaf == 0, zeros[name])
        np.testing.assert_allclose(leaf, flat(expected)[name], atol=1e-6)


@pytest.mark.slow
def test_survivors_train_on_without_shrinkage_by_plain_sgd():
    """The oracle: loops over NumPy float64, from the formulas."""
    rate, momentum, final = 0.125, 0.5, 0.3
    start = np.asarray(dense_start()["dense"]["kernel"], float)
    noise = np.random.default_rng(0).normal(size=(SEARCH + AFTER, *start.shape))
    sgd = optax.sgd(rate, momentum=momentum)
    search = optax.chain(sgd, soft_threshold(lats_optax.lats_threshold(rate, SEARCH, final)))
    frozen = optax.chain(sgd, KEEP)

    w = theta = start
    trace = np.zeros_like(w)
    params = jnp.asarray(start, jnp.float32)
    tx, state = search, search.init(params)
    for t, push in enumerate(noise):
        if t == SEARCH:
            alive, theta = w != 0, w
            tx, state = frozen, freeze(state, frozen, params)
        updates, state = tx.update(params - jnp.asarray(push, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        trace = w - push + momentum * trace
        theta = theta - rate * trace
        w = shrink("l1", theta, final * (t + 1) / SEARCH) if t < SEARCH else theta * alive
        np.testing.assert_array_equal(np.asarray(params) == 0, w == 0)
        np.testing.assert_allclose(params, w, atol=1e-6)
    assert 0 < alive.sum() < alive.size


@pytest.mark.slow
def test_freezing_is_a_pure_function():
    search, frozen, params = optax.chain(SGD, soft_threshold(0.3)), kept(SGD), dense_start()
    params, state = run(search, params, search.init(params), range(2))
    jitted = jax.jit(lambda state, params: freeze(state, frozen, params))(state, params)
    jax.tree.map(np.testing.assert_array_equal, jitted, freeze(state, frozen, params))


@pytest.mark.parametrize(
    ("search", "frozen", "message"),
    [
        (chained, lambda: SGD, "^frozen: there is no keep_support"),
        (chained, lambda: optax.chain(optax.adam(0.1), KEEP), "^frozen: it is not the transform"),
        (around, lambda: KEEP, "^frozen: it is not .* that is optax.chain"),
        (lambda soft: SGD, lambda: kept(SGD), "^frozen: it is not the transform of the search"),
        (chained, lambda: optax.chain(KEEP, SGD), "^frozen: it is not the transform"),
        (chained, lambda: optax.chain(SGD, keep_support({"conv": True})), "^support: its struct"),
    ],
)
def test_another_transform_is_refused(search, frozen, message):
    params = dense_start()
    state = search(lambda inner: soft_threshold(0.3, inner=inner)).init(params)
    with pytest.raises(ValueError, match=message):
        freeze(state, frozen(), params)


@pytest.mark.slow
def test_a_state_of_other_parameters_is_refused():
    params = dense_start()
    state = chained(lambda inner: soft_threshold(0.3, inner=inner)).init(params)
    wider = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), params)
    with pytest.raises(ValueError, match=r"^state: .* shape .* where params give"):
        freeze(state, kept(SGD), wider)


# --- pruning at initialization --------------------------------------------------------------------


def quadratic(params, batch):
    return 0.5 * jnp.sum((params["kernel"] - batch) ** 2)


def initial():
    return {"kernel": dense_start()["dense"]["kernel"]}


def batches(count):
    return np.random.default_rng(1).normal(size=(count, *initial()["kernel"].shape))


def search(rate=0.1, steps=5):
    threshold = lats_optax.lats_threshold(rate, steps, 0.5)
    return optax.chain(optax.sgd(rate), soft_threshold(threshold))


def test_the_support_is_that_of_a_search_in_numpy():
    rate, final, steps = 0.1, 0.5, 5
    params = initial()
    before = np.array(params["kernel"])
    # More batches than are needed: what is left belongs to the caller.
    source = iter(np.float32(batches(7)))
    found = prune_at_initialization(quadratic, params, source, search(), steps)
    assert len(list(source)) == 2
    w = theta = before.astype(float)
    for t, batch in enumerate(batches(steps)):
        theta = theta - rate * (w - batch)
        w = shrink("l1", theta, final * (t + 1) / steps)
    np.testing.assert_array_equal(found["kernel"], w != 0)
    assert 0 < (w != 0).sum() < w.size
    np.testing.assert_array_equal(params["kernel"], before)


def test_training_from_scratch_keeps_the_support():
    params = initial()
    found = prune_at_initialization(quadratic, params, np.float32(batches(5)), search(), 5)
    masked = lats_optax.apply_support(params, found)
    np.testing.assert_array_equal(masked["kernel"], np.where(found["kernel"], params["kernel"], 0))
    tx = optax.chain(SGD, keep_support(found))
    trained, _ = run(tx, masked, tx.init(masked), range(4))
    np.testing.assert_array_equal(trained["kernel"] != 0, found["kernel"])


@pytest.mark.slow
def test_layers_left_out_by_expression_stay_whole():
    params = initial() | {"head": jnp.zeros((2, 2))}
    mask = lats_optax.select(exclude="head")
    target = lats_optax.target_sparsity(0.5, 0.1, 5)
    tx = optax.chain(optax.sgd(0.1), soft_threshold(target, mask=mask))
    found = prune_at_initialization(quadratic, params, np.float32(batches(5)), tx, 5, mask=mask)
    assert found["head"].shape == ()
    assert found["head"]
    assert int(jnp.sum(~found["kernel"])) == 15


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(steps=0), "^steps: 0 is not allowed"),
        (dict(batches=batches(2)), "^batches: they end after 2 of the 5 steps"),
        (dict(batches=[]), "^batches: they end after 0 of the 5 steps"),
        (dict(mask={"other": True}), "^mask: its structure"),
        (dict(transform=search(1e30)), "^transform: after 5 steps .* not finite"),
    ],
)
def test_a_search_that_cannot_be_is_refused(change, message):
    arguments = dict(
        loss=quadratic,
        params=initial(),
        batches=itertools.cycle(batches(5)),
        transform=search(),
        steps=5,
    )
    with pytest.raises(ValueError, match=message):
        prune_at_initialization(**(arguments | change))
