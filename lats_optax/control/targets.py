"""What a named sparsity asks for: how many weights are zero, of all together or of each layer.

Here belongs the way from the ``target`` that a user names to numbers of weights, and the errors of
one that cannot be met. How the threshold gets there is in `target.py`.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from lats_optax import masks
from lats_optax.array_types import Float, Integer
from lats_optax.checks.numbers import is_number
from lats_optax.control.schedules import is_schedule
from lats_optax.distributions import check_sparsity
from lats_optax.operators.parts import Part, TreeOperator, by_path, parts_of


class Targets(NamedTuple):
    """Sparsities, numbers of weights, and how many can be zero: of all together, or of each."""

    sparsity: Float[np.ndarray, "*layers"]
    sizes: Integer[np.ndarray, "*layers"]
    most: Integer[np.ndarray, "*layers"]

    def named(self, fraction: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n *layers"]:
        """The number of weights that parts of the target name, float64 [n] or [n, layers]."""
        shape = (-1, *(1,) * np.ndim(self.sizes))
        return np.rint(np.reshape(fraction, shape) * self.sparsity * self.sizes)

    def ranks(self, fraction: Float[np.ndarray, " n"]) -> Integer[np.ndarray, " n *layers"]:
        """The number of weights that are zero at parts of the target, uint32 [n] or [n, layers].

        At least one weight, or one group, survives: a target below 1 never means none at all.
        """
        return np.clip(self.named(fraction), 0, self.most).astype(np.uint32)


def named_zeros(target: Any, latent: Any, operator: TreeOperator) -> int:
    """How many zeros a target names in all; one weight, or group, survives where it names all.

    Args:
      target: as that of :func:`target_sparsity`.
      latent: the pruned weights, or their shapes.
      operator: that they are pruned by.

    >>> from lats_optax import prox
    >>> named_zeros(0.75, {"kernel": np.ones((2, 4))}, prox.prox_l1)
    6
    """
    return int(targets_of(check_target(target), latent, operator).named(np.ones(1)).sum())


def check_target(target: Any) -> Any:
    """A target as far as it can be checked before there are parameters."""
    if masks.is_function(target):
        if is_schedule(target):
            raise ValueError(
                "target: it is a schedule, count -> number; allowed are sparsities, trees of them "
                "and functions from parameters to such trees. The arguments are target_sparsity("
                "target, learning_rate, steps)"
            )
        return target
    for value in jax.tree.leaves(target) or [target]:
        check_sparsity("target", value)
    return float(target) if is_number(target) else target


def targets_of(target: Any, latent: Any, operator: TreeOperator) -> Targets:
    """What a checked target asks for of these weights, one entry or one for each layer.

    Raises:
      ValueError: a tree of targets of another structure; one that the groups cannot meet.
    """
    weights = by_path(latent)
    parts = parts_of(operator, weights)
    if isinstance(target, float):
        return _bounded(np.array(target), [list(parts)])
    if wide := [part for part in parts if len(part.names) > 1]:
        raise ValueError(
            f"target: one for each layer is not allowed where groups span layers, as those of "
            f"{', '.join(wide[0].names)} do; allowed is one for all"
        )
    tree = target(latent) if masks.is_function(target) else target
    named = jax.tree.leaves(masks.broadcast_prefix("target", tree, latent)) if weights else []
    checked = [check_sparsity(f"target of {name}", value) for name, value in zip(weights, named)]
    return _bounded(np.array(checked), [[part] for part in parts])


def _bounded(sparsity: Float[np.ndarray, "*layers"], lists: list[list[Part]]) -> Targets:
    """Targets of lists of parts, each of which can be met: one weight, or group, survives."""
    shape = np.shape(sparsity)
    sizes = np.array([sum(part.size for part in parts) for parts in lists], np.int64)
    most = np.array([sum(part.most for part in parts) for parts in lists], np.int64)
    for named, size, limit, parts in zip(np.ravel(sparsity), sizes, most, lists):
        if limit < size and np.rint(named * size) > limit:
            raise ValueError(
                f"target: {named} of {masks.some([name for part in parts for name in part.names])} "
                f"is not allowed under operator={parts[0].operator!r}; allowed are sparsities up "
                f"to {limit / size:g}"
            )
    largest = np.array(
        [max((part.largest_group for part in parts), default=1) for parts in lists], np.int64
    )
    most = np.maximum(np.minimum(most, sizes - largest), 0)
    return Targets(sparsity, sizes.reshape(shape), most.reshape(shape))
