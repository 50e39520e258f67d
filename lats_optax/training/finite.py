"""What has left the numbers: losses, gradients and states that are infinite or not a number.

Here belongs what a run looks at to find out, and what it says.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax import masks


class NonFiniteError(RuntimeError):
    """Training has left the numbers: a loss or a parameter is infinite or not a number."""


def means(window: Sequence[Mapping[str, Any]], step: int, skips: bool = False) -> dict[str, float]:
    """Means of the metrics of the steps up to one.

    Args:
      window: of each step, scalars by name.
      step: the last one, from 1.
      skips: whether steps that are not finite were skipped: these are left out, and counted as
        `skipped_steps`.

    Raises:
      NonFiniteError: a metric is not finite; with `skips`, at none of the steps are all finite.

    >>> means([{"loss": 1.0}, {"loss": float("nan")}, {"loss": 3.0}], step=9, skips=True)
    {'loss': 2.0, 'skipped_steps': 1.0}
    >>> means([{"loss": 1.0}, {"loss": float("nan")}], step=9)
    Traceback (most recent call last):
    lats_optax.training.finite.NonFiniteError: the loss is nan at step 9
    """
    steps = jax.device_get(list(window))
    wrong = [[name for name in found if not np.isfinite(found[name])] for found in steps]
    good = [found for found, names in zip(steps, wrong) if not names]
    if not skips and len(good) < len(steps):
        at = next(index for index, names in enumerate(wrong) if names)
        name = max(wrong[at], key=lambda name: name == "loss")
        called = name.replace("_", " ")
        number = step - len(steps) + 1 + at
        raise NonFiniteError(f"the {called} is {steps[at][name]} at step {number}")
    if not good:
        raise NonFiniteError(
            f"at none of the steps {step - len(steps) + 1} to {step} are the loss and the "
            "gradients finite"
        )
    found = {name: float(np.mean([one[name] for one in good])) for name in good[0]}
    return found | ({"skipped_steps": float(len(steps) - len(good))} if skips else {})


def non_finite_paths(tree: Any) -> list[str]:
    """The paths of arrays with values that are not finite."""
    leaves = _finite(jax.tree.leaves(tree))
    return [name for name, finite in zip(jax.tree.leaves(masks.paths(tree)), leaves) if not finite]


@jax.jit
def _finite(leaves: list[Any]) -> list[jax.Array]:
    return [jnp.all(jnp.isfinite(leaf)) for leaf in leaves]
