"""The metric of a Gram matrix: what the solvers have in common.

Here belong products with block-diagonal Gram matrices, damping, inverses and the least squares of
survivors.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Of the mean of the diagonal, as SparseGPT has it.
DAMPING = 0.01


def diagonal(gram: jax.Array) -> jax.Array:
    """The diagonal of Gram matrices [groups, blocks, size, size], as [groups, inputs, 1]."""
    found = jnp.diagonal(gram, axis1=-2, axis2=-1)
    return found.reshape(gram.shape[0], -1, 1)


def damped(gram: jax.Array, damping: float = DAMPING) -> jax.Array:
    """The Gram matrices with a part of the mean of each group's diagonal added to it.

    One that is zero everywhere becomes the identity.
    """
    mean = jnp.mean(diagonal(gram), axis=1)[..., None, None]
    return gram + jnp.where(mean > 0, damping * mean, 1.0) * jnp.eye(gram.shape[-1])


def times(gram: jax.Array, w: jax.Array) -> jax.Array:
    """``G W``, for W [groups, inputs, outputs]."""
    groups, blocks, size, _ = gram.shape
    parts = w.reshape(groups, blocks, size, -1)
    found = jnp.einsum("gbij,gbjn->gbin", gram, parts, precision=lax.Precision.HIGHEST)
    return found.reshape(w.shape)


def error(gram: jax.Array, w: jax.Array, w0: jax.Array) -> jax.Array:
    """The squared error of the outputs, ``||X (W - W0)||^2``."""
    return jnp.sum((w - w0) * times(gram, w - w0))


def unit(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gram matrices in units in which the diagonal is 1, and these units, [groups, inputs, 1].

    In the units d the weights are ``d W``: their magnitudes are Wanda's scores.
    """
    size = jnp.sqrt(diagonal(gram))
    parts = size.reshape(*gram.shape[:2], -1)
    return gram / (parts[..., :, None] * parts[..., None, :]), size


def inverse(gram: jax.Array, shift: Any) -> jax.Array:
    """``(G + shift I)^-1``, by Cholesky."""
    eye = jnp.broadcast_to(jnp.eye(gram.shape[-1]), gram.shape)
    factor = lax.linalg.cholesky(gram + shift * eye)
    half = lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    return jnp.einsum("gbki,gbkj->gbij", half, half, precision=lax.Precision.HIGHEST)


def geometric_mean(gram: jax.Array) -> jax.Array:
    """The geometric mean of the eigenvalues of each group, ``det(G)^(1/n)``: [groups, 1, 1]."""
    factors = jnp.diagonal(lax.linalg.cholesky(gram), axis1=-2, axis2=-1)
    return jnp.exp(2 * jnp.mean(jnp.log(factors), axis=(1, 2)))[:, None, None]


def refit(gram: jax.Array, w: jax.Array, w0: jax.Array, alive: jax.Array, steps: int) -> jax.Array:
    """The least squares of the survivors: ``argmin ||X (W - W0)||^2`` over W with these zeros.

    Conjugate gradients, all outputs at once, each with zeros of its own: the error falls with every
    step. ``gram`` has a diagonal of 1, so that it needs no preconditioner.

    Args:
      gram: float32 [groups, blocks, size, size], positive definite.
      w: float32 [groups, inputs, outputs], where to begin.
      w0: what is to be met, of the same shape.
      alive: bools, of the same shape.
      steps: number of products with the Gram matrix, but one.
    """
    w = jnp.where(alive, w, 0.0)
    left = jnp.where(alive, times(gram, w0 - w), 0.0)

    def step(_: Any, state: Any) -> Any:
        w, left, way, norm = state
        image = jnp.where(alive, times(gram, way), 0.0)
        length = norm / jnp.maximum(jnp.sum(way * image, axis=1, keepdims=True), _TINY)
        w, left = w + length * way, left - length * image
        after = jnp.sum(left * left, axis=1, keepdims=True)
        return w, left, left + after / jnp.maximum(norm, _TINY) * way, after

    norm = jnp.sum(left * left, axis=1, keepdims=True)
    return lax.fori_loop(0, steps, step, (w, left, left, norm))[0]


_TINY = 1e-30
