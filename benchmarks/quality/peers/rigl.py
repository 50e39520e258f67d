"""RigL: dynamic sparse training that grows where the dense gradient is largest.

Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134.

    drop = argmin_k |w| among the living,   grow = argmax_k |dL/dw| among the dead

:mod:`benchmarks.quality.peers.dynamic` says when, and how many.
"""

import jax.numpy as jnp
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
    """RigL around an optimizer.

    Args:
      optimizer: any optax optimizer.
      setting: the run.
      every: steps between two changes, the paper's Delta T; its default for ImageNet.
      fraction: the paper's alpha; its default.
      stop: the part of the run after which the topology stays. In the paper 25,000 of 32,000 steps.
    """
    return dynamic(
        optimizer,
        setting,
        lambda gradients, key: list(map(jnp.abs, gradients)),
        every=every,
        fraction=fraction,
        stop=stop,
    )
