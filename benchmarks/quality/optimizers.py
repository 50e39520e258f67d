"""Behind any optimizer: our default against the plain magnitude ramp, an MLP on digits.

    python -m benchmarks.quality.optimizers

The same weights, batches and steps for both, five seeds. The table has the mean test accuracy of
the dense run and of both sparse ones, and the mean of paired differences with its 95 % interval.
The images of scikit-learn are divided by a seed of their own, which nothing was tuned on.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import lats_optax
from benchmarks.quality.intervals import interval
from benchmarks.quality.methods import default, dense
from benchmarks.quality.peers.base import Setting
from benchmarks.quality.peers.family import gradual_magnitude

STEPS, BATCH, SIZES, SPLIT = 1500, 64, (64, 128, 128, 10), 17
# Weights of the same magnitude die together.
TIES = 3
METHODS = {"dense": dense, "ours": default, "magnitude": gradual_magnitude}
OPTIMIZERS: dict[str, tuple[float, Callable[..., Any]]] = {
    "sgd 0.1": (0.1, lambda rate: optax.sgd(rate, momentum=0.9)),
    "adamw 3e-3": (3e-3, optax.adamw),
    "adamw 1e-3": (1e-3, optax.adamw),
    "lion 3e-4": (3e-4, optax.lion),
    "rmsprop 1e-3": (1e-3, optax.rmsprop),
    "adafactor 1e-2": (1e-2, optax.adafactor),
    "muon 3e-3": (3e-3, optax.contrib.muon),
    "lamb 3e-3": (3e-3, optax.lamb),
}


@cache
def digits() -> tuple[jax.Array, ...]:
    """Training images, test images, training labels, test labels."""
    images, labels = load_digits(return_X_y=True)
    ink = (images / 16).astype(np.float32)
    parts = train_test_split(ink, labels, test_size=0.25, stratify=labels, random_state=SPLIT)
    return tuple(map(jnp.asarray, parts))


def accuracies(optimizer: str, method: str, target: float, seeds: int) -> list[float]:
    """Test accuracy after a run with each seed."""
    x, x_test, y, y_test = digits()
    peak, make_optimizer = OPTIMIZERS[optimizer]
    rate = optax.cosine_decay_schedule(peak, STEPS)
    setting = Setting(target, STEPS, rate, lats_optax.prunable)
    tx = METHODS[method](make_optimizer(rate), setting)

    def logits(params: Any, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, x[rows]), y[rows])
        return losses.mean()

    @jax.jit
    def run(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        *keys, order = jax.random.split(jax.random.key(seed), len(SIZES))
        params = [
            {"kernel": math.sqrt(2 / m) * jax.random.normal(key, (m, n)), "bias": jnp.zeros(n)}
            for key, (m, n) in zip(keys, itertools.pairwise(SIZES))
        ]

        def step(carry: Any, rows: jax.Array) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        batches = jax.random.randint(order, (STEPS, BATCH), 0, len(x))
        (params, _), _ = lax.scan(step, (params, tx.init(params)), batches)
        right = jnp.argmax(logits(params, x_test), axis=-1) == y_test
        zeros = sum(jnp.sum(layer["kernel"] == 0) for layer in params)
        return jnp.mean(right), zeros

    results = [run(jnp.asarray(seed)) for seed in range(seeds)]
    size = sum(m * n for m, n in itertools.pairwise(SIZES))
    wanted = 0 if method == "dense" else round(target * size)
    for _, zeros in results:
        if not wanted <= int(zeros) <= wanted + TIES:
            raise RuntimeError(f"{optimizer}, {method}: {zeros} zeros, and not {wanted}")
    return [float(accuracy) for accuracy, _ in results]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    print("| optimizer | dense | sparsity | ours | magnitude ramp | difference |")
    print("|---|---|---|---|---|---|")
    for optimizer in OPTIMIZERS:
        dense_mean = np.mean(accuracies(optimizer, "dense", 0.5, options.seeds))
        for target in (0.9, 0.95):
            ours = accuracies(optimizer, "ours", target, options.seeds)
            ramp = accuracies(optimizer, "magnitude", target, options.seeds)
            found = interval([100 * (a - b) for a, b in zip(ours, ramp)])
            print(
                f"| {optimizer} | {dense_mean:.2%} | {target:.0%} | {np.mean(ours):.2%} | "
                f"{np.mean(ramp):.2%} | {found.mean:+.2f} ± {found.half_width:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
