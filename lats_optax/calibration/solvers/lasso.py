"""The L1 path: least squares under an L1 penalty, up to a sparsity, then the refit."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lats_optax.calibration.budgets import Budget
from lats_optax.calibration.solvers.metric import damped, refit, times, unit
from lats_optax.control.laws import cubic
from lats_optax.prox import prox_l1

_STAGES, _STEPS, _REFIT = 8, 8, 15


def minimize_l1(
    gram: jax.Array, w0: jax.Array, l1: Any, steps: int, w: jax.Array | None = None
) -> jax.Array:
    """FISTA on ``1/2 ||X (W - W0)||^2 + l1 ||W||_1``, which falls with every step.

    ``V = S_(l1/L)(Y - G (Y - W0) / L)``, W the better of V and the W before it, and Y extrapolated
    from W by Nesterov's momentum.

    Args:
      gram: float32 [groups, blocks, size, size].
      w0: float32 [groups, inputs, outputs].
      l1: the coefficient >= 0, a scalar or an array that broadcasts against ``w0``.
      steps: how many.
      w: where to begin. Default (None): at ``w0``.

    Returns:
      What ``w0`` is.

    Example:
      >>> w = minimize_l1(jnp.eye(2)[None, None], jnp.array([[[3.0], [-0.5]]]), 1.0, 20)
      >>> f"{w[0, 0, 0]:.3f} {w[0, 1, 0]:.3f}"
      '2.000 0.000'

    Source: Beck and Teboulle, "A fast iterative shrinkage-thresholding algorithm" (2009); the
    monotone one, "Fast gradient-based algorithms for constrained total variation" (2009).
    """
    w = w0 if w is None else w
    rate = 1.0 / largest_eigenvalue(gram)

    def objective(w: jax.Array) -> jax.Array:
        away = w - w0
        return jnp.sum(0.5 * away * times(gram, away) + l1 * jnp.abs(w), axis=1, keepdims=True)

    def step(_: Any, state: Any) -> Any:
        w, extrapolated, count, least = state
        v = prox_l1(extrapolated - rate * times(gram, extrapolated - w0), l1 * rate)
        value = objective(v)
        best = jnp.where(value < least, v, w)
        following = (1 + jnp.sqrt(1 + 4 * count * count)) / 2
        extrapolated = best + count / following * (v - best) + (count - 1) / following * (best - w)
        return best, extrapolated, following, jnp.minimum(value, least)

    state = (w, w, jnp.ones(()), objective(w))
    return lax.fori_loop(0, steps, step, state)[0]


def lasso(w: jax.Array, gram: jax.Array, budget: Budget) -> jax.Array:
    """FISTA under an L1 penalty that rises until the budget is met, then the refit.

    In units in which the Gram matrix has a diagonal of 1. The penalty of a stage is what makes one
    proximal gradient step end on the cubic sparsity curve, ``1 - (1 - t/T)^3`` of the budget's
    zeros. What survives is fitted by least squares.

    Args:
      w: float32 [groups, inputs, outputs].
      gram: float32 [groups, blocks, size, size].
      budget: which weights compete, and how many become zero.

    Returns:
      What ``w`` is.

    Example:
      >>> from lats_optax.calibration.budgets import PerOutput
      >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])[None, None]
      >>> w = lasso(jnp.array([[[0.5], [1.0]]]), gram, PerOutput(1))
      >>> f"{w[0, 0, 0]:.3f} {w[0, 1, 0]:.3f}"
      '0.000 1.446'
    """
    gram, size = unit(damped(gram))
    w0 = w * size
    rate = 1.0 / largest_eigenvalue(gram)

    def moved(w: jax.Array) -> jax.Array:
        return jnp.abs(w - rate * times(gram, w - w0))

    def stage(count: jax.Array, w: jax.Array) -> jax.Array:
        zeros = jnp.rint(cubic((count + 1) / _STAGES) * budget.zeros)
        return minimize_l1(gram, w0, budget.bound(moved(w), zeros) / rate, _STEPS, w)

    w = lax.fori_loop(0, _STAGES, stage, w0)
    return refit(gram, w, w0, budget.keep(moved(w)), _REFIT) / size


def largest_eigenvalue(gram: jax.Array, steps: int = 30) -> jax.Array:
    """Five per cent more than what powers of the matrix give, for each group: [groups, 1, 1]."""

    def step(_: Any, v: jax.Array) -> jax.Array:
        following = times(gram, v)
        return following / jnp.linalg.norm(following, axis=1, keepdims=True)

    size = gram.shape[1] * gram.shape[2]
    start = jnp.broadcast_to(jnp.cos(jnp.arange(size) + 1.0)[:, None], (gram.shape[0], size, 1))
    v = lax.fori_loop(0, steps, step, start)
    return 1.05 * jnp.linalg.norm(times(gram, v), axis=1, keepdims=True)
