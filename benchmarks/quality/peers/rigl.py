"""RigL: dynamic sparse training that grows where the dense gradient is largest.

Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134.

    drop = argmin_k |w| among the living,   grow = argmax_k |dL/dw| among the dead

:mod:`benchmarks.quality.peers.dynamic` says when, and how many.
"""

from functools import partial

import jax.numpy as jnp

from benchmarks.quality.peers.dynamic import dynamic

make = partial(dynamic, growth=lambda gradients, key: list(map(jnp.abs, gradients)))
"""RigL around an optimizer: `dynamic` with its growth."""
