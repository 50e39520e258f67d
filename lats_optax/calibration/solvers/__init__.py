"""Solvers of one layer: ``solver(w, gram, budget) -> w`` with zeros, pure functions.

``w`` is float32 [groups, inputs, outputs], ``gram`` is float32 [groups, blocks, size, size], block
diagonal along the inputs, and ``budget`` one of `budgets.py`. Dense layers have one group. Each
minimizes ``||X (W - W0)||^2``, in its own way.
"""

from collections.abc import Callable
from typing import Any

import jax

from lats_optax.calibration.budgets import Budget
from lats_optax.calibration.solvers.lasso import lasso
from lats_optax.calibration.solvers.lats import lats
from lats_optax.calibration.solvers.magnitude import magnitude
from lats_optax.calibration.solvers.sparsegpt import sparsegpt
from lats_optax.calibration.solvers.wanda import wanda

Solver = Callable[[jax.Array, jax.Array, Budget], Any]

METHODS: dict[str, Solver] = {
    "lasso": lasso,
    "lats": lats,
    "magnitude": magnitude,
    "sparsegpt": sparsegpt,
    "wanda": wanda,
}

__all__ = ["METHODS", "Solver", "lasso", "lats", "magnitude", "sparsegpt", "wanda"]
