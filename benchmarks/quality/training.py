"""The training run that all tasks share: one compiled scan over optimizer steps.

Here belongs what is the same for every model and every method; what a task trains is a `Problem`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import lats_optax
from benchmarks.quality.peers.base import Make, Schedule, Setting
from lats_optax.models.layers import MOMENTUM

RECALIBRATION_BATCHES = 50


class Outcome(NamedTuple):
    """What one run reached: its metric, and the zeros among its prunable weights."""

    value: float
    zeros: int
    size: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights, in [0, 1]."""
        return self.zeros / self.size


class Problem(NamedTuple):
    """What is trained, on which data.

    Attributes:
      data: arrays on the device, given back to ``loss`` and ``score``.
      init: seed -> (parameters, batch statistics); the latter are empty where there are none.
      loss: (parameters, batch statistics, data, rows) -> (loss, batch statistics), in training.
      score: (parameters, batch statistics, data) -> the metric, a scalar, on held-out data.
      rows: seed -> which rows of the data each step sees, int32 (steps, batch).
      mask: parameters -> a tree of bools, the prunable ones.
      steps: optimizer steps of a run.
      chunks: how many calls the steps are divided into; it divides ``steps``.
    """

    data: Any
    init: Callable[[int], tuple[Any, Any]]
    loss: Callable[[Any, Any, Any, Array], tuple[Array, Any]]
    score: Callable[[Any, Any, Any], Array]
    rows: Callable[[int], np.ndarray]
    mask: Callable[[Any], Any]
    steps: int
    chunks: int


def fit(
    problem: Problem,
    make: Make,
    optimizer: optax.GradientTransformation,
    learning_rate: Schedule,
    target: float,
    seed: int,
) -> Outcome:
    """Trains from the seed's weights on the seed's batches, then scores.

    Batch statistics are estimated again before the score, as the mean over training batches at the
    final weights.

    Args:
      problem: what is trained.
      make: the method.
      optimizer: the base optimizer, without pruning.
      learning_rate: its schedule, for methods that want to know it.
      target: the sparsity that the method is asked for.
      seed: of weights, batches and the method.

    Returns:
      The metric and the zeros of the final parameters.
    """
    params, stats = problem.init(seed)
    tx = make(optimizer, Setting(target, problem.steps, learning_rate, problem.mask, seed))

    def step(carry: Any, data: Any, rows: Array) -> Any:
        params, stats, state = carry
        gradients, stats = jax.grad(problem.loss, has_aux=True)(params, stats, data, rows)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), stats, state

    @jax.jit
    def train(carry: Any, data: Any, rows: Array) -> Any:
        return lax.scan(lambda carry, rows: (step(carry, data, rows), None), carry, rows)[0]

    rows = problem.rows(seed)
    carry = (params, stats, tx.init(params))
    for chunk in np.split(rows, problem.chunks):
        # Waiting here lets Ctrl-C in between two chunks.
        carry = jax.block_until_ready(train(carry, problem.data, chunk))
    params, stats, _ = carry
    if jax.tree.leaves(stats):
        stats = jax.jit(_recalibrate, static_argnums=0)(
            problem.loss, params, stats, problem.data, rows[:RECALIBRATION_BATCHES]
        )
    value = float(jax.jit(problem.score)(params, stats, problem.data))
    report = lats_optax.sparsity(params, problem.mask)
    return Outcome(value, report.zeros, report.size)


def _recalibrate(loss: Any, params: Any, stats: Any, data: Any, rows: Array) -> Any:
    # Running statistics that start at zero have 1 − MOMENTUM of the batch's after one batch.
    zero = jax.tree.map(jnp.zeros_like, stats)
    found = lax.map(lambda batch: loss(params, zero, data, batch)[1], jnp.asarray(rows))
    return jax.tree.map(lambda leaf: leaf.mean(axis=0) / (1 - MOMENTUM), found)
