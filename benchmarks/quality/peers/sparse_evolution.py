"""SET, sparse evolutionary training: dynamic sparse training that grows at random.

Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity
inspired by network science", Nature Communications 2018, arXiv 1707.04780.

    drop = argmin_k |w| among the living,   grow = k of the dead, at random

This is the form in which the RigL paper compares it: the cosine of
:mod:`benchmarks.quality.peers.dynamic` in place of a constant fraction, magnitudes in place of
positive and negative weights apart, grown weights that start at zero, and no changes at the end.
Changes are as often as in RigL; in the SET paper they are once an epoch.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality.peers.dynamic import dynamic


def _at_random(gradients: list[jax.Array], key: jax.Array) -> list[jax.Array]:
    drawn = jax.random.uniform(key, sum(g.size for g in gradients))
    ends = np.cumsum([g.size for g in gradients])[:-1]
    return [x.reshape(g.shape) for x, g in zip(jnp.split(drawn, ends), gradients)]


make = partial(dynamic, growth=_at_random)
"""SET around an optimizer: `dynamic` with its growth; the setting's seed decides what grows."""
