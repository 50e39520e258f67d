"""Magnitude pruning: the smallest weights become zero."""

import jax
import jax.numpy as jnp

from lats_optax.calibration.budgets import Budget


def magnitude(w: jax.Array, gram: jax.Array, budget: Budget) -> jax.Array:
    """Zero the weights with the smallest ``|w|``; the others stay.

    Args:
      w: float32 [groups, inputs, outputs].
      gram: float32 [groups, blocks, size, size]; not used.
      budget: which weights compete, and how many become zero.

    Returns:
      What ``w`` is.

    Example:
      >>> from lats_optax.calibration.budgets import PerLayer
      >>> magnitude(jnp.array([[[3.0, -1.0], [0.5, 2.0]]]), jnp.eye(2)[None, None], PerLayer(2))
      Array([[[3., 0.],
              [0., 2.]]], dtype=float32)

    Source: Han et al., "Learning both weights and connections" (NeurIPS 2015).
    """
    del gram
    return jnp.where(budget.keep(jnp.abs(w)), w, 0.0)
