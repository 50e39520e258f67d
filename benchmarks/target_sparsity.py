"""Naming the sparsity against searching for the threshold: accuracy of an MLP on digits.

    python -m benchmarks.target_sparsity

For each sparsity: `target_sparsity`, one run a seed, and `lats_threshold` with the final threshold
that a bisection of nine rounds found for that sparsity. All seeds train at once under `vmap`.
"""

import argparse
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from sklearn.datasets import load_digits

import lats_optax

STEPS, BATCH, TRAINING, WIDTHS = 1000, 64, 1400, (64, 128, 128, 10)
LEARNING_RATE = optax.cosine_decay_schedule(0.1, STEPS)


def digits() -> tuple[jax.Array, jax.Array]:
    """Images and labels in a fixed random order; the first 1,400 are for training."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = data.images.reshape(-1, 64)[order] / 16
    return jnp.asarray(images, jnp.float32), jnp.asarray(data.target[order])


def train(threshold: object, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Test accuracy and sparsity after one run."""
    images, labels = digits()
    keys = jax.random.split(jax.random.key(seed), len(WIDTHS))
    params = [
        {"kernel": math.sqrt(2 / m) * jax.random.normal(key, (m, n)), "bias": jnp.zeros(n)}
        for key, m, n in zip(keys, WIDTHS, WIDTHS[1:])
    ]
    tx = optax.chain(optax.sgd(LEARNING_RATE, momentum=0.9), lats_optax.soft_threshold(threshold))

    def logits(params: list, x: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ params[-1]["kernel"] + params[-1]["bias"]

    def loss(params: list, rows: jax.Array) -> jax.Array:
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(
                logits(params, images[rows]), labels[rows]
            )
        )

    def step(carry: tuple, count: jax.Array) -> tuple:
        params, state = carry
        rows = jax.random.randint(jax.random.fold_in(keys[-1], count), (BATCH,), 0, TRAINING)
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))
    right = jnp.argmax(logits(params, images[TRAINING:]), axis=-1) == labels[TRAINING:]
    kernels = jnp.concatenate([layer["kernel"].ravel() for layer in params])
    return jnp.mean(right), jnp.mean(kernels == 0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args()
    seeds = jnp.arange(options.seeds)

    @jax.jit
    def with_final(final: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = lats_optax.lats_threshold(LEARNING_RATE, STEPS, final=1.0)
        return jax.vmap(lambda seed: train(lambda count: final * shape(count), seed))(seeds)

    def row(name: str, accuracy: jax.Array, sparsity: jax.Array) -> None:
        error = np.std(accuracy) / math.sqrt(options.seeds)
        print(f"{name:<34} {np.mean(sparsity):8.2%}  {np.mean(accuracy):7.2%} ± {error:.2%}")

    print(f"{'MLP on digits, ' + str(options.seeds) + ' seeds':<34} sparsity  test accuracy")
    row("dense", *with_final(jnp.asarray(0.0)))
    for target in (0.8, 0.9, 0.95, 0.98):
        closed = lats_optax.target_sparsity(target, LEARNING_RATE, STEPS)
        row(
            f"target_sparsity({target})", *jax.jit(jax.vmap(lambda s, c=closed: train(c, s)))(seeds)
        )
        low, high = 1e-3, 10.0
        for _ in range(9):
            middle = math.sqrt(low * high)
            accuracy, sparsity = with_final(jnp.asarray(middle))
            low, high = (middle, high) if np.mean(sparsity) < target else (low, middle)
        row(f"lats_threshold, found final={middle:.3f}", accuracy, sparsity)


if __name__ == "__main__":
    main()
