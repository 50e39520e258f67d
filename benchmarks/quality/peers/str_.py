"""STR: soft thresholds that are trained, one for each layer.

Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", ICML 2020,
arXiv 2002.03231.

    w = sign(theta) relu(|theta| - sigmoid(s))
    dL/dtheta = dL/dw  where w != 0, else 0
    dL/ds     = -sigmoid'(s) * sum of sign(theta) dL/dw over w != 0

Weight decay on theta and s drives the sparsity: s starts far below zero, where nothing is pruned,
and decays towards zero. The method takes no target. The paper tunes two numbers for each sparsity,
the decay and the first s; here the first s is fixed and the decay is what a search moves.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.quality.peers.base import Setting, check_params, leaves_of, with_leaves
from lats_optax import masks


class StrState(NamedTuple):
    """What `make` remembers.

    Attributes:
      count: int32 scalar, the number of steps taken.
      latent: the prunable weights theta, a list of arrays in the order of the leaves.
      thresholds: s of each of them, a list of scalars.
      inner_state: the state of the optimizer of ``(weights, thresholds)``.
    """

    count: jax.Array  # type: ignore[assignment]  # tuple.count
    latent: list[jax.Array]
    thresholds: list[jax.Array]
    inner_state: Any


def soft(theta: jax.Array, s: jax.Array) -> jax.Array:
    """The weights that the model runs on."""
    return jnp.sign(theta) * jax.nn.relu(jnp.abs(theta) - jax.nn.sigmoid(s))


def make(
    optimizer: optax.GradientTransformation,
    setting: Setting,
    *,
    decay: float,
    s_init: float = -5.0,
    decoupled: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """STR around an optimizer, which moves theta, s and the weights that are not pruned.

    The parameters that ``init`` is given are the first w, theirs theta = w + sigmoid(s) sign(w).

    Args:
      optimizer: any optax optimizer. Its own weight decay, if any, adds to ``decay``; a mask in it
        must be a function, of ``(weights, thresholds)``.
      setting: the run; its target is not looked at.
      decay: the coefficient of the decay on theta and s. More decay, more zeros.
      s_init: the first s.
      decoupled: whether the decay is AdamW's, ``-= rate * decay * x`` behind the optimizer. By
        default it is added to the gradient, as in the paper, which trains with SGD.

    Returns:
      A gradient transformation with state :class:`StrState`.
    """
    inner = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> StrState:
        chosen = masks.resolve(setting.mask, params)
        weights = leaves_of(chosen, params)
        thresholds = [jnp.full((), s_init, w.dtype) for w in weights]
        latent = [w + jax.nn.sigmoid(s) * jnp.sign(w) for w, s in zip(weights, thresholds)]
        inner_state = inner.init((with_leaves(chosen, params, latent), thresholds))
        return StrState(jnp.zeros((), jnp.int32), latent, thresholds, inner_state)

    def update(
        gradients: Any, state: StrState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, StrState]:
        check_params(params)
        chosen = masks.resolve(setting.mask, params)
        variables = (state.latent, state.thresholds)
        _, pull_back = jax.vjp(lambda latent, s: list(map(soft, latent, s)), *variables)
        slopes = pull_back(leaves_of(chosen, gradients))
        if not decoupled:
            slopes = jax.tree.map(lambda g, x: g + decay * x, slopes, variables)
        (updates, of_thresholds), inner_state = inner.update(
            (with_leaves(chosen, gradients, slopes[0]), slopes[1]),
            state.inner_state,
            (with_leaves(chosen, params, state.latent), state.thresholds),
            **extra_args,
        )
        steps = (leaves_of(chosen, updates), of_thresholds)
        if decoupled:
            shrinkage = decay * setting.learning_rate(state.count)
            steps = jax.tree.map(lambda u, x: u - shrinkage * x, steps, variables)
        latent, thresholds = optax.apply_updates(variables, steps)
        differences = [
            soft(theta, s) - w for theta, s, w in zip(latent, thresholds, leaves_of(chosen, params))
        ]
        return (
            with_leaves(chosen, updates, differences),
            StrState(optax.safe_increment(state.count), latent, thresholds, inner_state),
        )

    return optax.GradientTransformationExtraArgs(init, update)
