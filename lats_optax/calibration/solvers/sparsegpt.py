"""SparseGPT: optimal brain surgeon, a row of the weights after the other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lats_optax.calibration.budgets import Budget, Pattern
from lats_optax.calibration.solvers.metric import damped

_BLOCK = 128


def sparsegpt(w: jax.Array, gram: jax.Array, budget: Budget) -> jax.Array:
    """Zero weights by the error that it costs, and let the inputs that follow make up for it.

    With ``H = G + 0.01 mean(diag G) I`` and U, the upper Cholesky factor of its inverse, the inputs
    are gone through in order, in blocks of 128. In each block the weights with the smallest
    ``w^2 / U_jj^2`` become zero; under a pattern these are chosen m inputs at a time. Then, input
    by input, ``w_k -= (w_j - z_j) / U_jj U_jk`` for all k > j, z the pruned row.

    Args:
      w: float32 [groups, inputs, outputs].
      gram: float32 [groups, blocks, size, size].
      budget: which weights compete within a block, and how many become zero in all.

    Returns:
      What ``w`` is.

    Example:
      >>> from lats_optax.calibration.budgets import PerOutput
      >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])[None, None]
      >>> w = sparsegpt(jnp.array([[[0.5], [1.0]]]), gram, PerOutput(1))
      >>> f"{w[0, 0, 0]:.3f} {w[0, 1, 0]:.3f}"
      '0.000 1.446'

    Source: Frantar and Alistarh, "SparseGPT" (ICML 2023), algorithm 1.
    """
    groups, blocks, size, _ = gram.shape
    m = budget.m if isinstance(budget, Pattern) else 1
    width = max(_BLOCK - _BLOCK % m, m)
    steps = -(-size // width)
    stops = np.minimum(np.arange(1, steps + 1) * width, size)
    ends = np.concatenate([at * size + stops for at in range(blocks)])
    zeros = budget.divided(ends)
    zeros = zeros.reshape(blocks, steps, *zeros.shape[1:])
    parts = w.reshape(groups, blocks, size, -1)
    # Silent inputs cost nothing.
    silent = jnp.diagonal(gram, axis1=-2, axis2=-1)[..., None] == 0
    parts = jnp.where(silent, 0.0, parts)
    factors = _factor(damped(gram))
    done = [
        _one(parts[:, at], factors[:, at], budget, zeros[at], width, steps) for at in range(blocks)
    ]
    return jnp.stack(done, axis=1).reshape(w.shape)


def _factor(h: jax.Array) -> jax.Array:
    """The upper U with ``H^-1 = U^T U``: the inverse of H's own factor from the other end."""
    flipped = lax.linalg.cholesky(jnp.flip(h, (-2, -1)))
    eye = jnp.broadcast_to(jnp.eye(h.shape[-1]), h.shape)
    lower = lax.linalg.triangular_solve(flipped, eye, left_side=True, lower=True)
    return jnp.flip(lower, (-2, -1))


def _one(
    w: jax.Array, factor: jax.Array, budget: Budget, zeros: jax.Array, width: int, steps: int
) -> jax.Array:
    """One block of a block-diagonal Gram matrix: w is [groups, size, outputs]."""
    size = w.shape[1]
    more = steps * width - size
    # What is added at the end is never pruned, and nothing depends on it.
    w = jnp.pad(w, ((0, 0), (0, more), (0, 0)))
    factor = jnp.pad(factor, ((0, 0), (0, more), (0, more)))
    pivots = jnp.pad(jnp.diagonal(factor, axis1=1, axis2=2)[:, :size], ((0, 0), (0, more)))
    pivots = jnp.where(jnp.arange(size + more) < size, pivots, 1.0)[..., None]
    padding = (jnp.arange(size + more) >= size)[None, :, None]

    def block(w: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        number, zeros = step
        start = number * width
        rows = lax.dynamic_slice_in_dim(w, start, width, 1)
        pivot = lax.dynamic_slice_in_dim(pivots, start, width, 1)
        added = lax.dynamic_slice_in_dim(padding, start, width, 1)
        factor_rows = lax.dynamic_slice_in_dim(factor, start, width, 1)
        inner = lax.dynamic_slice_in_dim(factor_rows, start, width, 2)

        def scores(rows: jax.Array, pivot: jax.Array) -> jax.Array:
            return jnp.square(rows / pivot)

        keep = jnp.ones(rows.shape, bool)
        if not isinstance(budget, Pattern):
            keep = budget.keep(jnp.where(added, jnp.inf, scores(rows, pivot)), zeros)

        def column(j: jax.Array, state: Any) -> Any:
            rows, keep, errors = state
            if isinstance(budget, Pattern):
                keep = lax.cond(
                    j % budget.m == 0, lambda: _of_m(rows, pivot, keep, j), lambda: keep
                )
            row = lax.dynamic_slice_in_dim(rows, j, 1, 1)
            alive = lax.dynamic_slice_in_dim(keep, j, 1, 1)
            error = jnp.where(alive, 0.0, row) / lax.dynamic_slice_in_dim(pivot, j, 1, 1)
            ways = lax.dynamic_slice_in_dim(inner, j, 1, 1)
            rows = rows - jnp.swapaxes(ways, 1, 2) * error
            return rows, keep, lax.dynamic_update_slice_in_dim(errors, error, j, 1)

        def _of_m(rows: jax.Array, pivot: jax.Array, keep: jax.Array, j: jax.Array) -> jax.Array:
            assert isinstance(budget, Pattern)
            some = lax.dynamic_slice_in_dim(rows, j, budget.m, 1)
            its = lax.dynamic_slice_in_dim(pivot, j, budget.m, 1)
            return lax.dynamic_update_slice_in_dim(keep, budget.keep(scores(some, its)), j, 1)

        rows, keep, errors = lax.fori_loop(
            0, width, column, (rows, keep, jnp.zeros(rows.shape, rows.dtype))
        )
        after = jnp.arange(size + more)[None, None, :] >= start + width
        change = jnp.einsum(
            "gjk,gjn->gkn",
            jnp.where(after, factor_rows, 0.0),
            errors,
            precision=lax.Precision.HIGHEST,
        )
        w = lax.dynamic_update_slice_in_dim(w - change, jnp.where(keep, rows, 0.0), start, 1)
        return w, None

    w, _ = lax.scan(block, w, (jnp.arange(steps), zeros))
    return w[:, :size]
