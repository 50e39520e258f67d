"""Wanda: magnitudes times the norms of the inputs."""

import jax
import jax.numpy as jnp

from lats_optax.calibration.budgets import Budget
from lats_optax.calibration.solvers.metric import diagonal


def wanda(w: jax.Array, gram: jax.Array, budget: Budget) -> jax.Array:
    """Zero the weights with the smallest ``|w_ij| ||X_i||``; the others stay.

    The paper compares the weights of one output with each other.

    Args:
      w: float32 [groups, inputs, outputs].
      gram: float32 [groups, blocks, size, size]; only the diagonal is used.
      budget: which weights compete, and how many become zero.

    Returns:
      What ``w`` is.

    Example:
      >>> from lats_optax.calibration.budgets import PerOutput
      >>> gram = jnp.diag(jnp.array([1.0, 100.0]))[None, None]
      >>> wanda(jnp.array([[[3.0, -1.0], [0.5, 2.0]]]), gram, PerOutput(1))
      Array([[[0. , 0. ],
              [0.5, 2. ]]], dtype=float32)

    Source: Sun et al., "A simple and effective pruning approach for large language models" (ICLR
    2024).
    """
    norms = jnp.sqrt(diagonal(gram))
    return jnp.where(budget.keep(jnp.abs(w) * norms), w, 0.0)
