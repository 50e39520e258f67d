"""N:M methods of the quality benchmark: the pattern, and what defines each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from benchmarks.quality import patterns as comparison
from benchmarks.quality.peers import patterns
from benchmarks.quality.peers.base import Setting

STEPS, RATE, DECAY = 20, 0.125, 0.25
METHODS = {
    "soft": patterns.soft,
    "hard": patterns.hard,
    "one-shot": patterns.one_shot,
    "sr-ste": patterns.sr_ste,
}


def start():
    rng = np.random.default_rng(5)
    return {"kernel": jnp.asarray(rng.normal(size=(8, 5)).astype(np.float32)), "bias": jnp.ones(5)}


def steps_of(method, target, **how):
    """Parameters and state after each step towards a minimum of its own."""
    setting = Setting(target, STEPS, optax.constant_schedule(RATE), lats_optax.prunable)
    tx = METHODS[method](optax.sgd(RATE), setting, **how)
    minima = np.random.default_rng(6).normal(size=(STEPS, 8, 5)).astype(np.float32)
    params = start()
    state = tx.init(params)

    @jax.jit
    def step(params, state, minimum):
        gradients = {"kernel": params["kernel"] - minimum, "bias": jnp.zeros(5)}
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    for minimum in minima:
        params, state = step(params, state, minimum)
        yield params, state, minimum


def alive(params):
    """How many of every four weights along the inputs are not zero."""
    return np.count_nonzero(np.asarray(params["kernel"]).reshape(2, 4, 5), axis=1)


@pytest.mark.parametrize("target", patterns.PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_ends_with_n_of_every_m(method, target):
    *_, (params, _, _) = steps_of(method, target)
    assert (alive(params) == patterns.PATTERNS[target][0]).all()
    np.testing.assert_array_equal(params["bias"], np.ones(5))


def test_one_shot_is_dense_to_the_middle_and_then_keeps_its_support():
    supports = [np.asarray(params["kernel"]) != 0 for params, _, _ in steps_of("one-shot", 0.5)]
    assert all(support.all() for support in supports[: STEPS // 2 - 1])
    for support in supports[STEPS // 2 + 1 :]:
        np.testing.assert_array_equal(support, supports[-1])


def test_sr_ste_is_the_rule_of_its_paper():
    def largest(theta):
        groups = np.abs(theta).reshape(2, 4, 5)
        return (np.argsort(np.argsort(groups, axis=1), axis=1) >= 2).reshape(8, 5)

    w = theta = np.asarray(start()["kernel"], np.float64)
    for params, _, minimum in steps_of("sr-ste", 0.5, decay=DECAY):
        theta = theta - RATE * (w - minimum + DECAY * np.where(largest(theta), 0, theta))
        w = np.where(largest(theta), theta, 0)
        np.testing.assert_allclose(params["kernel"], w, atol=1e-5)


def test_sr_ste_starts_from_the_weights_that_it_is_given():
    params, *_ = next(iter(steps_of("sr-ste", 0.5)))
    assert (alive(params) == 2).all()


def test_a_quick_comparison_has_the_patterns_of_one_task(tmp_path):
    quick = [task for task in comparison.load(tmp_path).tasks.values() if task.quick_sparsities]
    assert [(task.name, task.quick_sparsities) for task in quick] == [("lenet", (0.5, 0.75))]
