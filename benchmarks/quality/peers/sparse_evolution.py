"""SET, sparse evolutionary training: dynamic sparse training that grows at random.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity
inspired by network science", Nature Communications 2018, arXiv 1707.04780.

    drop = argmin_k |w| among the living,   grow = k of the dead, at random

This is the form in which the RigL paper compares it: the cosine of
:mod:`benchmarks.quality.peers.dynamic` in place of a constant fraction, magnitudes in place of
positive and negative weights apart, grown weights that start at zero, and no changes at the end.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.quality.peers.base import Setting
from benchmarks.quality.peers.dynamic import dynamic


def make(
    optimizer: optax.GradientTransformation,
    setting: Setting,
    *,
    every: int = 100,
    fraction: float = 0.3,
    stop: float = 0.75,
) -> optax.GradientTransformationExtraArgs:
    """SET around an optimizer.

    Args:
      optimizer: any optax optimizer.
      setting: the run; its seed decides what grows.
      every: steps between two changes; once an epoch in the paper, here as in RigL.
      fraction: the paper's zeta; its default.
      stop: the part of the run after which the topology stays, as in RigL.
    """
    return dynamic(
        optimizer,
        setting,
        _at_random,
        every=every,
        fraction=fraction,
        stop=stop,
    )


def _at_random(gradients: list[jax.Array], key: jax.Array) -> list[jax.Array]:
    drawn = jax.random.uniform(key, sum(g.size for g in gradients))
    ends = np.cumsum([g.size for g in gradients])[:-1]
    return [x.reshape(g.shape) for x, g in zip(jnp.split(drawn, ends), gradients)]
