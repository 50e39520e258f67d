"""Measuring sparsity: per layer and in total, and the table that prints it."""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lats_optax import masks
from lats_optax.masks import MaskOrFunction


@dataclass(frozen=True)
class LayerSparsity:
    """One parameter array: its path and shape, how many entries it has and how many are zero."""

    path: str
    shape: tuple[int, ...]
    size: int
    zeros: int
    prunable: bool

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]."""
        return _fraction(self.zeros, self.size)


@dataclass(frozen=True)
class SparsityReport:
    """The sparsity of a model. Plain names speak of the prunable weights, ``total_`` of all.

    Attributes:
      layers: one entry for each parameter array, in the order of the tree.
    """

    layers: tuple[LayerSparsity, ...]

    @property
    def size(self) -> int:
        """Number of prunable weights."""
        return sum(layer.size for layer in self.layers if layer.prunable)

    @property
    def zeros(self) -> int:
        """Number of prunable weights that are zero."""
        return sum(layer.zeros for layer in self.layers if layer.prunable)

    @property
    def nonzeros(self) -> int:
        """Number of prunable weights that are not zero."""
        return self.size - self.zeros

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights, in [0, 1]."""
        return _fraction(self.zeros, self.size)

    @property
    def total_size(self) -> int:
        """Number of parameters, prunable or not."""
        return sum(layer.size for layer in self.layers)

    @property
    def total_zeros(self) -> int:
        """Number of parameters that are zero, prunable or not."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def total_sparsity(self) -> float:
        """Fraction of zeros among all parameters, in [0, 1]."""
        return _fraction(self.total_zeros, self.total_size)

    @property
    def wholly_zero(self) -> tuple[str, ...]:
        """Paths of the prunable layers of which nothing is left."""
        return tuple(
            layer.path
            for layer in self.layers
            if layer.prunable and layer.size and layer.zeros == layer.size
        )

    def __str__(self) -> str:
        """The table: prunable layers one by one, then the two totals and what deserves a look."""
        rows = [
            (layer.path, _shape(layer.shape), layer.size, layer.zeros)
            for layer in self.layers
            if layer.prunable
        ]
        rows.append(("prunable weights", "", self.size, self.zeros))
        rows.append(("all parameters", "", self.total_size, self.total_zeros))
        names = max(len(row[0]) for row in rows)
        shapes = max(max(len(row[1]) for row in rows), len("shape"))
        lines = [
            f"{'layer':<{names}}  {'shape':>{shapes}}  {'weights':>13}  {'non-zero':>13}  sparsity"
        ]
        for name, shape, size, zeros in rows:
            lines.append(
                f"{name:<{names}}  {shape:>{shapes}}  {size:>13,}  {size - zeros:>13,}  "
                f"{_fraction(zeros, size):8.2%}"
            )
        rule = "-" * len(lines[0])
        lines[1:1], lines[-2:-2] = [rule], [rule]
        if self.wholly_zero:
            lines.append(f"wholly zero: {', '.join(self.wholly_zero)}")
        if not self.size:
            lines.append("nothing was prunable")
        return "\n".join(lines)


def sparsity(params: Any, mask: MaskOrFunction = masks.prunable) -> SparsityReport:
    """Count the zeros of a model.

    Sparsity is the fraction of exact zeros, ``#{i: w_i = 0} / N``, over the prunable weights.

    Args:
      params: a pytree of arrays on any devices.
      mask: which leaves are prunable: a pytree of bools that matches the parameters, or a function
        that makes one from them.

    Returns:
      A :class:`SparsityReport`; ``str()`` of it is a table. It warns where nothing was prunable.

    Raises:
      ValueError: the mask is of another structure than the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> report = sparsity({"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]]), "bias": jnp.zeros(2)})
      >>> report.sparsity, round(report.total_sparsity, 3)
      (0.75, 0.833)
      >>> print(report)
      layer             shape        weights       non-zero  sparsity
      ---------------------------------------------------------------
      kernel              2×2              4              1    75.00%
      ---------------------------------------------------------------
      prunable weights                     4              1    75.00%
      all parameters                       6              1    83.33%
    """
    chosen = jax.tree.leaves(masks.resolve(mask, params))
    names = jax.tree.leaves(masks.paths(params))
    leaves = jax.tree.leaves(params)
    counts = jax.device_get([jnp.asarray(leaf).size - jnp.count_nonzero(leaf) for leaf in leaves])
    report = SparsityReport(
        tuple(
            LayerSparsity(name, tuple(jnp.shape(leaf)), int(jnp.size(leaf)), int(zeros), prunable)
            for name, leaf, zeros, prunable in zip(names, leaves, counts, chosen)
        )
    )
    if not report.size:
        warnings.warn(
            f"nothing is prunable: the mask selects none of {', '.join(names) or 'no parameters'}",
            stacklevel=2,
        )
    return report


def _fraction(zeros: int, size: int) -> float:
    return zeros / size if size else 0.0


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
