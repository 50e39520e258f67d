"""The transforms within what optax wraps around them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lats_optax import prox, soft_threshold, target_sparsity
from tests import matrix, versions
from tests.properties import (
    FEW,
    STEPS,
    Case,
    assert_close,
    assert_same,
    cosine,
    dense_start,
    gradients,
    run,
)

# Of the fast suite a schedule, a target, a proximal step and a support.
few = pytest.mark.parametrize("case", matrix.fast(FEW, FEW[:2] + FEW[-2:]), ids=str)


def drive(tx, params, steps=STEPS, gradients=gradients, **extra_args):
    """Parameters and state after some steps; the gradients are those of the table's cases."""

    @jax.jit
    def step(params, state, count):
        updates, state = tx.update(gradients(params, count), state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for count in range(steps):
        params, state = step(params, state, count)
    return params, state


@pytest.mark.cover
@few
def test_masked_and_partition(case):
    params = case.start()
    part = {"dense": params["dense"]}
    alone, _ = drive(case.make(part), part)
    masked = optax.chain(
        optax.masked(case.make(), {"conv": False, "dense": True}),
        optax.masked(optax.set_to_zero(), {"conv": True, "dense": False}),
    )
    partition = versions.partition(
        {"pruned": case.make(), "still": optax.set_to_zero()}, {"conv": "still", "dense": "pruned"}
    )
    for wrapped in (masked, partition):
        both, _ = drive(wrapped, params)
        assert_close(both["dense"], alone["dense"])
        assert_same(both["conv"], params["conv"])


@pytest.mark.parametrize(
    "conv", [{"kernel": True}, True, False], ids=["of_the_leaf", "of_the_layer", "false"]
)
def test_a_mask_of_all_parameters_under_masked(conv):
    params = dense_start()
    mask = {"conv": conv, "dense": {"kernel": True, "bias": False}}
    tx = optax.masked(soft_threshold(0.1, mask=mask), {"conv": False, "dense": True})
    latent = tx.init(params).inner_state.latent
    assert latent["conv"] == latent["dense"]["bias"] == optax.MaskedNode()
    updates, _ = tx.update(params, tx.init(params), params)
    assert_same(updates["conv"], params["conv"])


@pytest.mark.cover
@pytest.mark.parametrize("case", matrix.fast([case for case in FEW if not case.narrow], 2), ids=str)
def test_multi_steps_is_a_larger_batch(case):
    def mean_of_two(params, count):
        pair = gradients(params, 2 * count), gradients(params, 2 * count + 1)
        return jax.tree.map(lambda a, b: (a + b) / 2, *pair)

    large, _ = drive(case.make(), case.start(), gradients=mean_of_two)
    small, state = drive(optax.MultiSteps(case.make(), 2), case.start(), 2 * STEPS)
    assert int(state.gradient_step) == STEPS
    assert_close(small, large)


@pytest.mark.cover
@few
def test_apply_if_finite_leaves_everything_as_it_was(case):
    tx = optax.apply_if_finite(case.make(), max_consecutive_errors=3)
    update = jax.jit(tx.update)
    params = case.start()
    state = tx.init(params)
    for count in range(STEPS):
        slopes = gradients(params, count)
        bad = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan), slopes)
        updates, rejected = update(bad, state, params)
        assert_same(rejected.inner_state, state.inner_state)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
        updates, state = update(slopes, rejected, params)
        params = optax.apply_updates(params, updates)
    assert_close(params, run(case).params[-1])


@pytest.mark.parametrize(
    "accumulated", matrix.fast([False, True], [False]), ids=["plain", "multi_steps"]
)
def test_wider_updates_than_parameters_under_a_conditional(accumulated):
    # float32 gradients of bfloat16 parameters: both branches must give updates of one type.
    tx = optax.apply_if_finite(soft_threshold(0.1, latent_dtype=jnp.float32), 3)
    tx = optax.MultiSteps(tx, 2) if accumulated else tx
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), dense_start())
    updates, _ = jax.jit(tx.update)(dense_start(), tx.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}


# --- inject_hyperparams -------------------------------------------------------------------------


def test_an_injected_threshold_can_be_changed_between_steps():
    tx = optax.inject_hyperparams(soft_threshold)(threshold=0.1)
    params = dense_start()
    state, update = tx.init(params), jax.jit(tx.update)
    zeros = jax.tree.map(jnp.zeros_like, params)
    for threshold in (0.1, 0.5, 0.2):
        state.hyperparams["threshold"] = jnp.asarray(threshold)
        updates, state = update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        assert float(state.inner_state.threshold) == pytest.approx(threshold)
        np.testing.assert_allclose(
            params["dense"]["kernel"],
            prox.prox_l1(state.inner_state.latent["dense"]["kernel"], threshold),
            atol=1e-6,
        )
    assert update._cache_size() == 1


@pytest.mark.parametrize("threshold", matrix.fast(["float", "target"], ["target"]))
def test_injection_changes_nothing(threshold):
    case = Case(threshold=threshold)
    # An operator is a function too, which would be taken for a schedule.
    injected = optax.inject_hyperparams(soft_threshold, static_args="operator")(
        threshold=case.strength(), operator=prox.prox_l1
    )
    params, state = drive(optax.chain(case.optimizer(), injected), case.start())
    assert_close(params, run(case).params[-1])
    assert_close(state[-1].inner_state, case.own_state(run(case).states[-1]))


def test_injection_with_every_other_argument_static():
    case = Case(threshold="lats", operator="group", freeze_after=3)
    static = ("threshold", "operator", "mask", "latent_dtype", "freeze_after")
    injected = optax.inject_hyperparams(soft_threshold, static_args=static)(
        threshold=case.strength(),
        operator=prox.Axes(),
        latent_dtype=jnp.float32,
        freeze_after=3,
    )
    params, _ = drive(optax.chain(case.optimizer(), injected), case.start())
    assert_close(params, run(case).params[-1])


@pytest.mark.slow
def test_injection_within_inner():
    case = Case(threshold="lats", inner=True)
    rate = optax.inject_hyperparams(case.bare)(inner=case.optimizer())
    params, _ = drive(rate, case.start())
    assert_close(params, run(case).params[-1])
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    tx = soft_threshold(0.0, inner=inner)
    state = tx.init(dense_start())
    state.inner_state.hyperparams["learning_rate"] = jnp.asarray(0.5)
    ones = jax.tree.map(jnp.ones_like, dense_start())
    updates, _ = tx.update(ones, state, dense_start())
    np.testing.assert_allclose(updates["dense"]["kernel"], -0.5, atol=1e-6)


# --- extra arguments ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "around", matrix.fast(["alone", "chain", "masked", "multi_steps"], ["chain", "multi_steps"])
)
def test_extra_arguments_reach_inner(around):
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5, cooldown=0)
    tx = soft_threshold(0.0, inner=optax.chain(optax.sgd(1.0), plateau))
    tx = {
        "alone": tx,
        "chain": optax.chain(optax.identity(), tx),
        "masked": optax.masked(tx, True),
        "multi_steps": optax.MultiSteps(tx, 1),
    }[around]
    params = dense_start()
    ones = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(tx.update)
    last = {}
    for name, values in {"falling": (4.0, 3.0, 2.0, 1.0), "rising": (1.0, 2.0, 3.0, 4.0)}.items():
        state = tx.init(params)
        for value in values:
            _, state = update(ones, state, params, value=jnp.asarray(value))
        last[name] = float(versions.tree.get(state, "scale"))
    assert last["falling"] == 1.0
    assert last["rising"] < 1.0
    with pytest.raises(TypeError, match="value"):
        tx.update(ones, tx.init(params), params)


@few
def test_unknown_extra_arguments_are_ignored(case):
    tx, params = case.make(), case.start()
    update = functools.partial(tx.update, value=1.0, anything=None)
    updates, _ = jax.eval_shape(update, params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


# --- looking into the state ---------------------------------------------------------------------


@few
def test_map_params_visits_what_is_like_the_parameters(case):
    tx, state, params = case.make(), run(case).states[-1], case.start()
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    seen = []
    mapped = versions.tree.map_params(
        tx,
        lambda leaf: seen.append(leaf.shape) or jnp.zeros_like(leaf),
        state,
        transform_non_params=lambda leaf: leaf + 1,
    )
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    own, before = case.own_state(mapped), case.own_state(state)
    if case.kind == "keep_support":
        assert set(seen) <= {*shapes, ()}
        return
    assert set(seen) <= set(shapes)
    assert int(own.count) == int(before.count) + 1
    if case.kind == "soft_threshold":
        assert isinstance(own.latent["dense"]["bias"], optax.MaskedNode)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(own.latent))
        np.testing.assert_allclose(own.threshold, before.threshold + 1, rtol=1e-6)


def test_map_params_under_wrappers():
    params = dense_start()
    for tx in (
        optax.masked(soft_threshold(0.1), {"conv": False, "dense": True}),
        versions.partition(
            {"a": soft_threshold(0.1), "b": optax.adam(0.1)}, {"conv": "b", "dense": "a"}
        ),
        optax.MultiSteps(soft_threshold(0.1, inner=optax.adam(0.1)), 2),
        optax.inject_hyperparams(soft_threshold)(threshold=0.1),
        soft_threshold(0.1, mask={"conv": {"kernel": False}, "dense": True}),
    ):
        state = tx.init(params)
        mapped = versions.tree.map_params(tx, jnp.negative, state)
        assert jax.tree.structure(mapped) == jax.tree.structure(state)
        latent = versions.tree.get(mapped, "latent")["dense"]["kernel"]
        np.testing.assert_array_equal(
            latent, -versions.tree.get(state, "latent")["dense"]["kernel"]
        )


@pytest.mark.parametrize("case", FEW[:4], ids=str)
def test_the_threshold_can_be_read(case):
    record = run(case)
    for state in record.states:
        threshold = versions.tree.get(state, "threshold")
        assert threshold.dtype == jnp.float32
        assert threshold.shape == ()
        assert threshold is case.own_state(state).threshold


@pytest.mark.slow
def test_the_threshold_of_a_closed_loop_can_be_set():
    tx = soft_threshold(target_sparsity(0.5, cosine, STEPS))
    params = dense_start()
    state = versions.tree.set(tx.init(params), threshold=jnp.asarray(2.0))
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zeros, state, params)
    magnitudes = np.sort(
        np.abs(
            np.concatenate(
                [np.ravel(params["conv"]["kernel"]), np.ravel(params["dense"]["kernel"])]
            )
        )
    )
    rates = [float(cosine(step)) for step in range(STEPS)]
    rho = rates[0] / sum(rates[: STEPS // 2])  # by then the target is reached
    expected = 2.0 + rho * (magnitudes[27 - 1] - 2.0)
    assert float(state.threshold) == pytest.approx(expected, rel=1e-5)
