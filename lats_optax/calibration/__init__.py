"""One-shot pruning of any JAX function: Gram matrices, and solvers of each layer's least squares.

`calibrate` finds the products of parameters with activations and accumulates Gram matrices;
`prune_with` prunes by them; `sequential` does both, block after block.
"""

from lats_optax.calibration import solvers
from lats_optax.calibration.batches import calibrate
from lats_optax.calibration.gram import Gram, Grams
from lats_optax.calibration.prune import Pruned, PrunedLayer, PruneReport, prune_with
from lats_optax.calibration.sequential import sequential

__all__ = [
    "Gram",
    "Grams",
    "PruneReport",
    "Pruned",
    "PrunedLayer",
    "calibrate",
    "prune_with",
    "sequential",
    "solvers",
]
