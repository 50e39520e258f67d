"""Peers that are rows of the family: the property that defines each of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from benchmarks.quality.peers import family
from benchmarks.quality.peers.base import Setting
from lats_optax import prox

STEPS, RATE = 40, 0.1
TARGET = 0.9


def start():
    return {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(20, 15)), jnp.float32)}


def run(make, target=TARGET, **arguments):
    """Weights, latent weights and thresholds after each step, under noisy gradients."""
    setting = Setting(target, STEPS, optax.cosine_decay_schedule(RATE, STEPS), lats_optax.prunable)
    tx = make(optax.sgd(setting.learning_rate), setting, **arguments)
    params, noise = start(), np.random.default_rng(1).normal(size=(STEPS, 20, 15))
    center = np.random.default_rng(2).normal(size=(20, 15))
    state, update = tx.init(params), jax.jit(tx.update)
    record = []
    for step in range(STEPS):
        gradients = {"kernel": jnp.asarray(params["kernel"] - center + noise[step], jnp.float32)}
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        latent = optax.tree.get(state, "latent")["kernel"]
        d = float(optax.tree.get(state, "threshold"))
        record.append((np.asarray(params["kernel"]), np.asarray(latent), d))
    return record


def cubic_zeros(step, first, last):
    x = np.clip((step + 1 - first) / (last - first), 0, 1)
    return round(TARGET * (1 - (1 - x) ** 3) * 300)


@pytest.mark.slow
def test_gradual_magnitude_follows_the_cubic_curve_and_moves_nothing_that_is_pruned():
    record = run(family.gradual_magnitude)
    for step, (w, latent, _) in enumerate(record):
        alive = w != 0
        assert (~alive).sum() == cubic_zeros(step, 0, 30)
        np.testing.assert_allclose(w[alive], latent[alive], rtol=1e-5)
        if 0 < step < 30:
            before, latent_before, _ = record[step - 1]
            np.testing.assert_array_equal(latent[before == 0], latent_before[before == 0])
        if step >= 30:
            np.testing.assert_array_equal(alive, record[29][0] != 0)


@pytest.mark.slow
def test_dpf_keeps_what_survives_and_moves_what_is_pruned():
    record = run(family.ste_magnitude)
    revived = 0
    for step, (w, latent, _) in enumerate(record):
        assert (w == 0).sum() == cubic_zeros(step, 0, 30)
        np.testing.assert_allclose(w[w != 0], latent[w != 0], rtol=1e-5)
        if step:
            before, latent_before, _ = record[step - 1]
            assert np.all(latent[before == 0] != latent_before[before == 0])
            revived += np.sum((before == 0) & (w != 0))
    assert revived > 0


def test_st3_rescales_what_survives_and_starts_at_a_twentieth():
    record = run(family.st3)
    assert not np.any(record[1][0] == 0)
    for step in (5, 12, 25, 39):
        w, latent, d = record[step]
        assert (w == 0).sum() == cubic_zeros(step, 2, 20)
        for column, theta in zip(w.T, latent.T):
            kept = np.abs(theta) > d
            r = np.abs(theta)[kept].sum() / np.abs(theta).sum()
            soft = np.sign(theta) * np.maximum(np.abs(theta) - d, 0)
            np.testing.assert_allclose(column, soft * 1.01 / (r + 0.01), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("target", "scale"), [(0.9, 1.0), (0.98, 0.5)])
def test_feather_is_the_cubic_power_and_halves_pruned_updates_above_95(target, scale):
    record = run(family.feather, target=target)
    center = np.random.default_rng(2).normal(size=(20, 15))
    noise = np.random.default_rng(1).normal(size=(STEPS, 20, 15))
    rate = optax.cosine_decay_schedule(RATE, STEPS)
    for step in (15, 25, 39):
        (w_before, latent_before, _), (w, latent, d) = record[step - 1], record[step]
        dead = w_before == 0
        moved = -float(rate(step)) * (w_before - center + noise[step])
        expected = latent_before + np.where(dead, scale, 1.0) * moved
        np.testing.assert_allclose(latent, expected, rtol=1e-4, atol=1e-5)
        alive = np.abs(latent) > d
        size = np.cbrt(np.maximum(np.abs(latent) ** 3 - d**3, 0))
        np.testing.assert_allclose(w, np.where(alive, np.sign(latent) * size, 0), atol=2e-3)
    assert (record[-1][0] == 0).sum() == round(target * 300)


def test_lats_has_a_constant_l1_coefficient_and_ends_at_its_knob():
    record = run(family.lats, knob=0.7)
    rates = np.array([float(optax.cosine_decay_schedule(RATE, STEPS)(t)) for t in range(STEPS)])
    thresholds = np.array([0.0] + [d for _, _, d in record])
    l1 = np.diff(thresholds)[:-2] / rates[:-2]
    np.testing.assert_allclose(l1, l1[0], rtol=1e-3)
    assert thresholds[-1] == pytest.approx(0.7)
    w, latent, d = record[-1]
    np.testing.assert_allclose(w, prox.prox_l1(latent, d), atol=1e-6)
