"""Trees of latent weights: `optax.MaskedNode` stands for the leaves that are not pruned."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lats_optax.array_types import Array, Float
from lats_optax.masks import is_dense


def map_pruned(function: Callable[..., Any], latent: Any, *rest: Any) -> Any:
    """A function of each latent leaf, and of the same leaves of other trees."""
    return jax.tree.map(
        lambda theta, *others: theta if is_dense(theta) else function(theta, *others),
        latent,
        *rest,
        is_leaf=is_dense,
    )


def is_latent(latent: Any, params: Any) -> Any:
    """Where there are latent weights: a tree of bools like the parameters."""
    return jax.tree.map(lambda theta, w: not is_dense(theta), latent, params, is_leaf=is_dense)


def where_latent(latent: Any, params: Any) -> Any:
    """The parameters with the latent weights in the place of the pruned ones."""
    return jax.tree.map(
        lambda theta, w: w if is_dense(theta) else theta, latent, params, is_leaf=is_dense
    )


def expand_threshold(threshold: Float[Array, "*layers"], latent: Any) -> Any:
    """The threshold of each pruned leaf, in a tree like the latent weights.

    Args:
      threshold: of :class:`SoftThresholdState`: a scalar, or one for each pruned leaf.
      latent: the latent weights of that state.

    Returns:
      A pytree of scalars, with `optax.MaskedNode` where ``latent`` has it.

    Example:
      >>> expand_threshold(jnp.array([0.5, 2.0]), {"a": jnp.ones(3), "b": jnp.ones(4)})
      {'a': Array(0.5, dtype=float32), 'b': Array(2., dtype=float32)}
    """
    if jnp.ndim(threshold) == 0:
        return map_pruned(lambda theta: threshold, latent)
    each = iter(range(len(threshold)))
    return map_pruned(lambda theta: threshold[next(each)], latent)
