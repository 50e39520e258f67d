"""Whole training runs and threshold tables of the published PyTorch code, reproduced in float64.

The recordings are described in `tests/reference/README.md`. The network is written out here in
plain JAX, so that nothing but the optimizer of this library is under test.
"""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lats_optax
from lats_optax.compatibility import enable_x64
from tests import matrix, versions

REFERENCE = Path(__file__).parent / "reference"
CONVOLUTIONS = ("conv1", "conv2", "fc")
NORMS = ("bn1", "bn2")
# Seen: 1e-15 on losses, 7e-15 on weights. A weight closest to the threshold is 2e-7 away from it.
TOLERANCE = 1e-9


@functools.cache
def recording(name):
    with np.load(REFERENCE / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


# --- the network --------------------------------------------------------------------------------


def convolve(x, kernel, stride=1):
    pad = (kernel.shape[-1] - 1) // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
    )


def normalize(x, norm):
    mean = x.mean((0, 2, 3), keepdims=True)
    variance = x.var((0, 2, 3), keepdims=True)
    scale, bias = (norm[key][:, None, None] for key in ("weight", "bias"))
    return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias


def loss_of(params, images, labels, smoothing):
    x = jax.nn.relu(normalize(convolve(images, params["conv1"]), params["bn1"]))
    x = jax.nn.relu(normalize(convolve(x, params["conv2"], stride=2), params["bn2"]))
    logits = convolve(x.mean((2, 3), keepdims=True), params["fc"])[:, :, 0, 0]
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean()


def first_params(run):
    params = {name: jnp.asarray(run[f"init/{name}.weight"]) for name in CONVOLUTIONS}
    norms = {
        name: {key: jnp.asarray(run[f"init/{name}.{key}"]) for key in ("weight", "bias")}
        for name in NORMS
    }
    return params | norms


# --- the runs -----------------------------------------------------------------------------------


def learning_rate(strategy, run):
    peak, steps, epochs = float(run["peak_lr"]), int(run["steps"]), int(run["epochs"])
    if strategy != "lats":
        return optax.cosine_decay_schedule(peak, steps)
    by_epoch = optax.cosine_decay_schedule(peak, epochs)
    return lambda count: by_epoch(count // int(run["steps_per_epoch"]))


def threshold(strategy, run):
    final, steps = float(run["final_threshold"]), int(run["steps"])
    if strategy == "s_lats":
        return lats_optax.s_lats_threshold(steps, final)
    if strategy == "lats":
        epochs, steps_per_epoch = int(run["epochs"]), int(run["steps_per_epoch"])
        return lats_optax.epoch_lats_threshold(epochs, steps_per_epoch, final)
    if strategy == "pgh":
        return lats_optax.pgh_threshold(steps, final, float(run["beta"]))
    return final


def start(strategy, run, tx):
    """The first parameters and state; the recording begins with the latent weights."""
    params = first_params(run)
    state = tx.init(params)
    if strategy == "constant":
        latent = {name: params[name] for name in CONVOLUTIONS}
        latent |= {name: versions.tree.get(state, "latent")[name] for name in NORMS}
        state = versions.tree.set(state, latent=latent)
        final = float(run["final_threshold"])
        params |= lats_optax.prox.prox_l1({name: params[name] for name in CONVOLUTIONS}, final)
    return params, state


def trained(strategy):
    """Losses, thresholds, latent weights and parameters after every step, as NumPy arrays."""
    run = recording(f"trajectory_{strategy}")
    steps, batch = int(run["steps"]), int(run["batch_size"])
    with enable_x64(True):
        tx = lats_optax.soft_threshold(
            threshold(strategy, run),
            inner=optax.chain(
                optax.add_decayed_weights(float(run["weight_decay"])),
                optax.sgd(learning_rate(strategy, run), momentum=float(run["momentum"])),
            ),
        )
        images, labels = jnp.asarray(run["images"]), jnp.asarray(run["labels"])
        smoothing = float(run["label_smoothing"])

        def step(carry, t):
            params, state = carry
            rows = (t * batch + jnp.arange(batch)) % len(images)
            loss, gradients = jax.value_and_grad(loss_of)(
                params, images[rows], labels[rows], smoothing
            )
            updates, state = tx.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            seen = {name: versions.tree.get(state, name) for name in ("threshold", "latent")}
            return (params, state), seen | {"loss": loss, "params": params}

        @jax.jit
        def train(params, state):
            return jax.lax.scan(step, (params, state), jnp.arange(steps))[1]

        return run, jax.device_get(train(*start(strategy, run, tx)))


def assert_close(actual, recorded, what):
    np.testing.assert_allclose(actual, recorded, rtol=0, atol=TOLERANCE, err_msg=what)


@pytest.mark.parametrize("strategy", matrix.fast(["s_lats", "lats", "pgh", "constant"], ["lats"]))
def test_trajectory(strategy):
    run, history = trained(strategy)
    assert_close(history["threshold"], run["thresholds"], "thresholds")
    assert_close(history["loss"], run["losses"], "losses")
    for step in (1, 60, 120):
        params, latent = jax.tree.map(
            lambda leaves, step=step: leaves[step - 1], (history["params"], history["latent"])
        )
        for name in CONVOLUTIONS:
            recorded = run[f"step{step}/sparse/{name}"]
            np.testing.assert_array_equal(params[name] == 0, recorded == 0, f"zeros of {name}")
            assert_close(params[name], recorded, f"{name} after step {step}")
            assert_close(latent[name], run[f"step{step}/latent/{name}"], f"latent {name}")
        for name, key in itertools.product(NORMS, ("weight", "bias")):
            assert_close(params[name][key], run[f"step{step}/bn/{name}.{key}"], f"{name}.{key}")
    assert lats_optax.sparsity(params).sparsity == float(run["final_sparsity"])


# --- the threshold tables -----------------------------------------------------------------------

TABLES = {
    "s_lats": lambda run, steps: lats_optax.s_lats_threshold(steps, 1.0),
    **{
        f"pgh_beta_{beta}": lambda run, steps, beta=beta: lats_optax.pgh_threshold(steps, 1.0, beta)
        for beta in (0.1, 0.01, 0.001)
    },
}


@pytest.mark.parametrize("key", TABLES)
def test_closed_forms_are_the_published_ones(key):
    run = recording("thresholds")
    schedule = TABLES[key](run, int(run["N"]))
    np.testing.assert_allclose(schedule(run["n"]), run[key], rtol=0, atol=1e-9)


def test_epoch_lats_is_the_published_one():
    run = recording("thresholds")
    epochs, steps_per_epoch = int(run["lats_epochs"]), int(run["lats_steps_per_epoch"])
    schedule = lats_optax.epoch_lats_threshold(epochs, steps_per_epoch, 1.0)
    after_step = schedule(1 + np.arange(epochs * steps_per_epoch))
    np.testing.assert_allclose(after_step, run["lats_after_step"], rtol=0, atol=1e-9)
    assert schedule(0) == 0


# --- the closed forms are what prefix sums of the true learning rate give -----------------------


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch"),
    matrix.fast([(1, 5), (6, 20), (90, 7), (1000, 1)], [(1, 5), (1000, 1)]),
)
def test_epoch_lats_is_the_prefix_sum_exactly(epochs, steps_per_epoch):
    cosine = optax.cosine_decay_schedule(0.256, epochs)
    steps = epochs * steps_per_epoch
    summed = lats_optax.lats_threshold(lambda t: cosine(t // steps_per_epoch), steps, 0.02)
    closed = lats_optax.epoch_lats_threshold(epochs, steps_per_epoch, 0.02)
    counts = np.arange(steps + 1)
    np.testing.assert_allclose(closed(counts), summed(counts), rtol=1e-12, atol=1e-12)


def test_s_lats_is_the_limit_of_many_steps():
    """The closed form is an integral; the sum approaches it as 1 / steps."""
    gaps = []
    for steps in (100, 1000, 10_000):
        summed = lats_optax.lats_threshold(optax.cosine_decay_schedule(0.1, steps), steps, 1.0)
        closed = lats_optax.s_lats_threshold(steps, 1.0)
        gaps.append(np.max(np.abs(summed.table - closed.table)))
    assert gaps[-1] < 1e-4
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 10, rtol=0.05)


@pytest.mark.parametrize("beta", [0.001, 0.1, 10.0])
def test_pgh_is_the_limit_of_many_steps(beta):
    gaps = []
    for steps in (100, 1000, 10_000):
        rate = optax.cosine_decay_schedule(0.1, steps)
        summed = lats_optax.lats_threshold(rate, steps, 1.0, l1=lambda x: beta**x)
        closed = lats_optax.pgh_threshold(steps, 1.0, beta)
        gaps.append(np.max(np.abs(summed.table - closed.table)))
    assert gaps[-1] < 1e-3
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 10, rtol=0.1)
