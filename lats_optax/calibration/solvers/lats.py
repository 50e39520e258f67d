"""LATS for one layer: latent weights, a threshold by a law, and steps in the Gram matrix's metric.

Here belongs the library's own solver: the search for a support, and the least squares of its
weights.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lats_optax.calibration.budgets import Budget
from lats_optax.calibration.solvers.metric import (
    DAMPING,
    damped,
    geometric_mean,
    inverse,
    refit,
    times,
    unit,
)
from lats_optax.control.laws import cubic


@dataclass(frozen=True)
class Lats:
    """The solver, and how long it works.

    Attributes:
      steps: of the search, a product with a matrix of the size of the Gram matrix each.
      refit: steps of the least squares of the survivors, a product with the Gram matrix each.
      reach: the part of the search after which the sparsity is reached; then it is held.
      damping: added to the diagonal, as a part of its mean.
    """

    steps: int = 20
    refit: int = 8
    reach: float = 0.6
    damping: float = DAMPING

    def __call__(self, w: jax.Array, gram: jax.Array, budget: Budget) -> jax.Array:
        """The pruned weights, as :func:`lats` says."""
        gram, size = unit(damped(gram, self.damping))
        w0 = w * size
        w, alive = self.search(w0, gram, budget)
        return refit(gram, w, w0, alive, self.refit) / size

    def search(self, w0: jax.Array, gram: jax.Array, budget: Budget) -> tuple[jax.Array, jax.Array]:
        """Weights and support after the last step, in units of the diagonal."""
        reach = max(round(self.reach * self.steps), 1)
        penalty = geometric_mean(gram)
        solve = inverse(gram, penalty[..., None])
        goal = times(gram, w0)

        def step(count: jax.Array, state: Any) -> Any:
            w, dual = state
            latent = times(solve, goal + penalty * (w - dual)) + dual
            zeros = jnp.rint(cubic(jnp.minimum((count + 1) / reach, 1.0)) * budget.zeros)
            threshold = budget.bound(jnp.abs(latent), zeros)
            w = jnp.where(jnp.abs(latent) > threshold, latent, 0.0)
            return w, latent - w

        w, dual = lax.fori_loop(0, self.steps, step, (w0, jnp.zeros_like(w0)))
        return w, budget.keep(jnp.abs(w + dual))


def lats(w: jax.Array, gram: jax.Array, budget: Budget) -> jax.Array:
    """The least error of the outputs under a budget: a search by thresholding, then least squares.

    In units in which the damped Gram matrix G has a diagonal of 1, with latent weights theta::

        x      = (G + rho I)^-1 (G W0 + rho (w - u))     a proximal step on the squared error
        theta  = x + u
        w      = theta where |theta| > d, else 0         d: the quantile at the cubic curve
        u      = theta - w

    which is the alternating direction method. The sparsity rises along ``1 - (1 - t/T)^3`` and is
    then held. The survivors are fitted by conjugate gradients, all outputs at once.

    Which support the search settles on depends on rho: a dead weight of residual r has latent
    weight r / rho, and comes back where that is more than what lives. Without correlation the
    smallest weights should stay dead, so rho is 1; with it, others make up for them, and what comes
    back gains more. So rho is the geometric mean of the eigenvalues of G, ``det(G)^(1/n)``: 1 for
    inputs without correlation, and smaller the more correlated they are.

    Args:
      w: float32 [groups, inputs, outputs].
      gram: float32 [groups, blocks, size, size].
      budget: which weights compete, and how many become zero.

    Returns:
      What ``w`` is.

    Example:
      >>> from lats_optax.calibration.budgets import PerOutput
      >>> gram = jnp.array([[1.0, 0.9], [0.9, 1.0]])[None, None]
      >>> w = lats(jnp.array([[[0.5], [1.0]]]), gram, PerOutput(1))
      >>> f"{w[0, 0, 0]:.3f} {w[0, 1, 0]:.3f}"
      '0.000 1.446'

    Source: this library; the alternating direction method for pruning is that of Boža, "Fast and
    effective weight update for pruned large language models" (2024), conjugate gradients those of
    Meng et al., "ALPS" (NeurIPS 2024).
    """
    return Lats()(w, gram, budget)
