"""What a pruning method is given, and what it makes of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

Schedule = Callable[[Any], Any]


class Setting(NamedTuple):
    """What is known of a run before it starts.

    Attributes:
      target: the sparsity over all prunable weights, in (0, 1).
      steps: optimizer steps of the run.
      learning_rate: count -> rate, the base optimizer's.
      mask: params -> a tree of bools: the prunable leaves.
      seed: of a method that draws at random.
    """

    target: float
    steps: int
    learning_rate: Schedule
    mask: Callable[[Any], Any]
    seed: int = 0


Make = Callable[[optax.GradientTransformation, Setting], optax.GradientTransformation]
"""Makes the whole transformation from the base optimizer.

Its updates, ``update(gradients, state, params)``, are applied by `optax.apply_updates`; the
parameters are then as sparse as the method has them at that step.
"""
