"""Fashion-MNIST as arrays on the device, and the problem of classifying it with a Flax module."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import lats_optax
from benchmarks.quality.training import Problem
from lats_optax.data.fashion_mnist import read_idx

DIRECTORY = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has the files."""

# Of the pixels of the training images, in [0, 1].
MEAN, STD = 0.2860, 0.3530
SCORED_AT_ONCE = 500


@cache
def device_data(directory: Path, validation: int) -> dict[str, Array]:
    """Images and labels to train on, and those held out: of validation, or with 0 the test set."""
    arrays = read_idx(directory)
    images, labels = arrays["train_images"], arrays["train_labels"]
    if validation:
        held_out = images[-validation:], labels[-validation:]
        images, labels = images[:-validation], labels[:-validation]
    else:
        held_out = arrays["test_images"], arrays["test_labels"]
    names = ("images", "labels", "held_out_images", "held_out_labels")
    return dict(zip(names, map(jnp.asarray, (images, labels, *held_out))))


def normalized(images: Array) -> Array:
    """Float32 (batch, 28, 28, 1) of mean 0 and variance 1 over the training set."""
    return ((images.astype(jnp.float32) / 255 - MEAN) / STD)[..., None]


def classification(
    directory: Path,
    split: str,
    model: Callable[[], nn.Module],
    *,
    epochs: int,
    batch: int,
    validation: int,
) -> Problem:
    """The problem of a Flax module that is called as the zoo's are.

    Each epoch is a permutation of its own; what does not fill a batch is left out.

    Args:
      directory: of the four files.
      split: ``"test"`` or ``"validation"``: what is scored. The latter is not trained on.
      model: makes the module.
      epochs: passes over the training images; each is one chunk.
      batch: images a step.
      validation: how many training images, the last ones, are held out for tuning.
    """
    # All tasks share the one copy for the test split.
    data = device_data(directory, validation if split == "validation" else 0)
    module, count = model(), len(data["labels"])
    per_epoch = count // batch

    def init(seed: int) -> tuple[Any, Any]:
        images = jnp.zeros((1, 28, 28, 1))
        variables = dict(
            jax.jit(module.init, static_argnames="train")(jax.random.key(seed), images, train=False)
        )
        return variables.pop("params"), variables

    def loss(params: Any, stats: Any, data: Any, rows: Array) -> tuple[Array, Any]:
        logits, stats = module.apply(
            {"params": params, **stats},
            normalized(data["images"][rows]),
            train=True,
            mutable=["batch_stats"],
        )
        labels = data["labels"][rows].astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), stats

    def score(params: Any, stats: Any, data: Any) -> Array:
        def right(images: Array) -> Array:
            logits = module.apply({"params": params, **stats}, normalized(images), train=False)
            return jnp.argmax(logits, axis=-1)

        found = lax.map(right, data["held_out_images"].reshape(-1, SCORED_AT_ONCE, 28, 28))
        return jnp.mean(found.ravel() == data["held_out_labels"])

    def rows(seed: int) -> np.ndarray:
        orders = [
            np.random.default_rng([seed, epoch]).permutation(count)[: per_epoch * batch]
            for epoch in range(epochs)
        ]
        return np.concatenate(orders).reshape(-1, batch).astype(np.int32)

    return Problem(
        data, init, loss, score, rows, lats_optax.prunable, epochs * per_epoch, chunks=epochs
    )
