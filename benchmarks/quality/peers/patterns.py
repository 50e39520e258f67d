"""N:M sparsity during training: our operator and its peers, as rows of the family.

The pattern follows from the target of a run: 2:4 at one half, 1:4 at three quarters.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lats_optax
from benchmarks.quality.peers.base import Schedule, Setting
from benchmarks.quality.peers.family import chained
from lats_optax import groups, prox

PATTERNS = {0.5: (2, 4), 0.75: (1, 4)}
"""Target sparsity -> n and m."""

# Larger than any weight, and finite: all but the n largest are zero.
_ALL = 1e30


def soft(optimizer: optax.GradientTransformation, setting: Setting) -> optax.GradientTransformation:
    """What the library recommends: the n largest stay, the others are soft-thresholded."""
    return _targeted(optimizer, setting, _pattern(setting))


def hard(optimizer: optax.GradientTransformation, setting: Setting) -> optax.GradientTransformation:
    """The same threshold, but the others are masked once they are below it."""
    return _targeted(optimizer, setting, _hard(setting))


def one_shot(
    optimizer: optax.GradientTransformation, setting: Setting
) -> optax.GradientTransformation:
    """Dense to the middle of the run, then the n largest of every m are kept and trained on.

    Source: Mishra et al., "Accelerating sparse deep neural networks" (2021), arXiv 2104.08378; here
    within the steps and the learning-rate schedule of one run.
    """
    half = max(setting.steps // 2, 1)
    return chained(
        optimizer,
        setting,
        _all_from(half),
        operator=_hard(setting),
        pruned_scale=0.0,
        freeze_after=half,
    )


def sr_ste(
    optimizer: optax.GradientTransformation, setting: Setting, *, decay: float = 2e-4
) -> optax.GradientTransformation:
    """SR-STE: N:M from the first step, straight-through gradients, and a decay of what is pruned.

    ``g' = g + decay (1 - mask) theta``, which keeps the support from changing all the time. Source:
    Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch" (ICLR
    2021), arXiv 2102.04010.

    Args:
      optimizer: the base optimizer.
      setting: the run.
      decay: of pruned latent weights.
    """
    operator = _hard(setting)

    def decayed(gradients: Any, latent: Any) -> Any:
        return jax.tree.map(
            lambda g, w, theta: g + decay * jnp.where(w == 0, theta, 0),
            gradients,
            operator(latent, _ALL),
            latent,
        )

    regularize = optax.masked(optax.stateless(decayed), setting.mask)
    return lats_optax.soft_threshold(
        _all_from(1),
        inner=optax.chain(regularize, optimizer),
        operator=operator,
        mask=setting.mask,
        pruned_scale=1.0,
    )


def _all_from(step: int) -> Schedule:
    """Prunes nothing before a step, so that the latent weights begin as the weights."""
    return lambda count: jnp.where(count >= step, _ALL, 0.0)


def _pattern(setting: Setting, **how: Any) -> Any:
    return groups.n_of_m(*PATTERNS[setting.target], **how)


def _hard(setting: Setting) -> Any:
    return _pattern(setting, shrinkage=prox.prox_power(math.inf))


def _targeted(
    optimizer: optax.GradientTransformation, setting: Setting, operator: Any
) -> optax.GradientTransformation:
    threshold = lats_optax.target_sparsity(setting.target, setting.learning_rate, setting.steps)
    return chained(optimizer, setting, threshold, operator=operator)
