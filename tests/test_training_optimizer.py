"""The optimizers that a run can name, against their equations written out in NumPy."""

import jax
import numpy as np
import optax
import pytest

from lats_optax.training.config import OptimizerConfig, PruneConfig, TrainConfig
from lats_optax.training.optimizer import make_optimizer
from tests import matrix, tiny

STEPS = 6
DENSE = PruneConfig()


def run(optimizer, prune=DENSE):
    """The weights after each step on gradients that are drawn."""
    config = TrainConfig(optimizer=optimizer, prune=prune, epochs=2)
    tx = make_optimizer(config, STEPS // 2).phases[0].transform
    params = {name: np.asarray(leaf) for name, leaf in first().items()}
    state, found = tx.init(params), []
    for step in range(STEPS):
        updates, state = jax.jit(tx.update)(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found, state


def first():
    rng = np.random.default_rng(0)
    draw = rng.normal(size=(12, 5)).astype(np.float32)
    return {"kernel": draw, "scale": np.full(5, 2.0, np.float32)}


def gradients(step):
    rng = np.random.default_rng(step + 1)
    draw = (3.0 if step % 2 else 0.1) * rng.normal(size=(12, 5)).astype(np.float32)
    return {"kernel": draw, "scale": np.ones(5, np.float32)}


def clipped(tree, most):
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in tree.values()))
    return {name: leaf * min(1.0, most / norm) for name, leaf in tree.items()}


def adamw(rate, decay, decayed, beta1=0.9, beta2=0.999, most=np.inf):
    """Loshchilov and Hutter, "Decoupled weight decay regularization" (2019), algorithm 2."""
    weights = {name: leaf.astype(np.float64) for name, leaf in first().items()}
    m, v = ({name: 0.0 for name in weights} for _ in range(2))
    for step in range(STEPS):
        eta = rate * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        for name, g in clipped(gradients(step), most).items():
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g**2
            m_hat, v_hat = m[name] / (1 - beta1 ** (step + 1)), v[name] / (1 - beta2 ** (step + 1))
            penalty = decay * weights[name] if name in decayed else 0.0
            weights[name] = weights[name] - eta * (m_hat / (np.sqrt(v_hat) + 1e-8) + penalty)
    return weights


def sgd(rate, momentum, most):
    weights = {name: leaf.astype(np.float64) for name, leaf in first().items()}
    velocity = {name: 0.0 for name in weights}
    for step in range(STEPS):
        eta = rate * 0.5 * (1 + np.cos(np.pi * step / STEPS))
        for name, g in clipped(gradients(step), most).items():
            velocity[name] = momentum * velocity[name] + g
            weights[name] = weights[name] - eta * velocity[name]
    return weights


CASES = {
    "adamw": (
        OptimizerConfig("adamw", 1e-2),
        lambda: adamw(1e-2, 0.0, ()),
    ),
    "adamw with decay": (
        OptimizerConfig("adamw", 1e-2, weight_decay=0.3, momentum=0.8, beta2=0.95),
        lambda: adamw(1e-2, 0.3, ("kernel", "scale"), 0.8, 0.95),
    ),
    "adamw without decay of scales, clipped": (
        OptimizerConfig("adamw", 1e-2, weight_decay=0.3, decay_norm=False, clip_norm=2.0),
        lambda: adamw(1e-2, 0.3, ("kernel",), most=2.0),
    ),
    "sgd, clipped": (
        OptimizerConfig(learning_rate=0.1, clip_norm=2.0),
        lambda: sgd(0.1, 0.9, 2.0),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_the_steps_of_its_equations(case):
    optimizer, oracle = CASES[case]
    found, _ = run(optimizer)
    for name, expected in oracle().items():
        np.testing.assert_allclose(found[-1][name], expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("decay_on", matrix.fast(["latent", "weights"], ["weights"]))
def test_a_named_sparsity_is_met_behind_adamw(decay_on):
    prune = PruneConfig(target_sparsity=0.75, weight_decay_on=decay_on)
    optimizer = OptimizerConfig("adamw", 1e-2, weight_decay=0.1, clip_norm=2.0)
    found, state = run(optimizer, prune)
    assert (found[-1]["kernel"] == 0).sum() == 45
    assert (np.asarray(found[-1]["scale"]) != 0).all()
    latent = optax.tree.get(state, "latent")["kernel"]
    assert (np.asarray(latent) != 0).all()


@pytest.mark.slow
def test_a_run_with_adamw_learns(tmp_path):
    optimizer = OptimizerConfig("adamw", 3e-2, weight_decay=1e-3, clip_norm=1.0)
    config = tiny.config(
        tmp_path / "run", optimizer=optimizer, prune=PruneConfig(target_sparsity=0.5), epochs=8
    )
    result = tiny.train(config, jax.devices()[:1])
    losses = [record["loss"] for record in result.metrics if record["split"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    assert result.sparsity.sparsity == pytest.approx(0.5, abs=0.01)
