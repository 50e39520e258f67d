"""Structured pruning: groups of weights that live and die together, in the terms of a layer.

Here belong the operators that `soft_threshold` takes for whole channels, filters and blocks. That
of n weights of every m is in `operators/n_of_m.py`; those of units that span leaves are in
`operators/units.py`.
Layouts are Flax's: the last axis of a kernel counts outputs, the one before it inputs, and those
before that, of a convolution, are its kernel positions. Where one array holds several layers, as
`flax.linen.scan` and `jax.vmap` stack them, the first axes count layers (`stacked_axes`).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from lats_optax.array_types import Array, Integer, Num, Shaped
from lats_optax.checks.numbers import check_steps
from lats_optax.operators import leaves
from lats_optax.operators.n_of_m import n_of_m
from lats_optax.operators.protocol import Elementwise, GroupOperator
from lats_optax.operators.stacked import check_stacked_axes
from lats_optax.operators.units import heads, hidden_units, units
from lats_optax.prox import prox_l1

__all__ = [
    "Tiles",
    "blocks",
    "filters",
    "heads",
    "hidden_units",
    "input_channels",
    "n_of_m",
    "output_channels",
    "units",
]


@dataclass(frozen=True)
class Tiles(GroupOperator):
    """Groups that are tiles of a kernel's (input, output) matrix, at one kernel position or at all.

    Attributes:
      shrinkage: what is applied to the root mean square of a group.
      name: of the function that makes it.
      rows: inputs in a tile; None: all.
      columns: outputs in a tile; None: all.
      all_positions: whether all kernel positions lie in one group, or in one each.
      least_dimensions: the fewest dimensions of one layer's leaf that it fits.
      stacked_axes: the number of leading axes that stack layers, which no group crosses.
    """

    name: str
    rows: int | None
    columns: int | None
    all_positions: bool
    least_dimensions: int = 2
    stacked_axes: int = 0

    def __repr__(self) -> str:
        """The call that makes it, with what differs from its defaults."""
        other = () if self.shrinkage == prox_l1 else (f"shrinkage={self.shrinkage!r}",)
        return f"lats_optax.groups.{self._call(*other)}"

    def _call(self, *more: str) -> str:
        sides = () if self.all_positions else (f"{self.rows}", f"{self.columns}")
        stacked = (f"stacked_axes={self.stacked_axes}",) if self.stacked_axes else ()
        return f"{self.name}({', '.join((*sides, *more, *stacked))})"

    def sums(self, x: Num[Array, "..."]) -> Num[Array, "..."]:
        """The sum over each tile, computed by a window where tiles have sides."""
        self._check(x.shape)
        whole = tuple(range(self.stacked_axes, x.ndim - 2)) if self.all_positions else ()
        whole += (x.ndim - 2,) * (self.rows is None) + (x.ndim - 1,) * (self.columns is None)
        totals = jnp.sum(x, axis=whole, keepdims=True)
        window = (*(1,) * (x.ndim - 2), self.rows or 1, self.columns or 1)
        if max(window) == 1:
            return totals
        # Not by a reshape to (…, tiles, rows, tiles, columns): accelerators lay out an array by its
        # last two axes, and would pad sides of 4 to ones of 128.
        ragged = [(0, -size % side) for size, side in zip(totals.shape, window)]

        def over_windows(totals: Array) -> Array:
            zero = np.zeros((), totals.dtype)
            return lax.reduce_window(totals, zero, lax.add, window, window, ragged)

        sums: Array = leaves.by_the_compiler(over_windows, totals)
        return sums

    def group_sizes(self, shape: tuple[int, ...]) -> Integer[np.ndarray, "..."]:
        """Tiles at the end of an axis may be smaller."""
        self._check(shape)
        positions = math.prod(shape[self.stacked_axes : -2]) if self.all_positions else 1
        inputs, outputs = _sides(shape[-2], self.rows), _sides(shape[-1], self.columns)
        sizes = positions * np.outer(inputs, outputs).astype(np.int32)
        return sizes.reshape((1,) * (len(shape) - 2) + sizes.shape)

    def expand(
        self, each: Shaped[Array, "*groups"], shape: tuple[int, ...]
    ) -> Shaped[Array, "..."]:
        """Each value repeated over its tile."""
        for axis, side in ((len(shape) - 2, self.rows), (len(shape) - 1, self.columns)):
            if side is not None and side > 1:
                each = jnp.repeat(each, side, axis=axis)
                each = lax.slice_in_dim(each, 0, shape[axis], axis=axis)
        return each

    def _check(self, shape: tuple[int, ...]) -> None:
        least = self.least_dimensions + self.stacked_axes
        if len(shape) < least:
            raise ValueError(
                f"{self._call()} needs {least} dimensions or more and was given {len(shape)}"
            )


def output_channels(*, shrinkage: Elementwise = prox_l1, stacked_axes: int = 0) -> Tiles:
    """All that goes into one output: a unit of a dense layer, a 3-D filter of a convolution.

    A group is everything but the last axis. Layers that follow can drop an output that is zero,
    so this is what makes a dense model smaller. Leave out of the mask the layer that makes the
    logits: an output that it loses is a class that is never predicted.

    Batch normalization behind a layer makes the scale of an output irrelevant to the loss, so the
    magnitudes lie close together. Near the threshold an output changes faster than running batch
    statistics follow: estimate these again, on some batches, before the model is evaluated.

    Args:
      shrinkage: what is applied to the root mean square of a group. Default:
        :data:`lats_optax.prox.prox_l1`, the group lasso. ``prox_power(3)`` leaves the groups that
        survive nearly as they are.
      stacked_axes: how many leading axes of a leaf stack layers, as those of ``flax.linen.scan``
        and of vmapped experts do. A group lies within one layer. Without it a stack of dense layers
        is taken for a 1-D convolution; ``init`` warns where biases or scales show it.

    Returns:
      An operator for ``soft_threshold``, for leaves of 2 dimensions or more, and so many more as
      stack layers.

    Raises:
      ValueError: ``stacked_axes`` is not a whole number >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[8.0, 0.5], [0.0, 0.5], [0.0, 0.5], [0.0, 0.5]])
      >>> output_channels()(kernel, 1.0)
      Array([[6., 0.],
             [0., 0.],
             [0., 0.],
             [0., 0.]], dtype=float32)

    Source: Li et al., "Pruning filters for efficient ConvNets" (ICLR 2017), for the structure; Yuan
    and Lin (2006) for the operator.
    """
    return _whole("output_channels", shrinkage, stacked_axes, rows=None, columns=1)


def input_channels(*, shrinkage: Elementwise = prox_l1, stacked_axes: int = 0) -> Tiles:
    """All that comes out of one input: everything but the second to last axis.

    The outputs of the layer before that nobody reads can be dropped there. A depth-wise
    convolution, and any other layer with one input channel, is one group as a whole: leave it out
    of the mask.

    Args:
      shrinkage: what is applied to the root mean square of a group. Default:
        :data:`lats_optax.prox.prox_l1`, the group lasso. ``prox_power(3)`` leaves the groups that
        survive nearly as they are.
      stacked_axes: how many leading axes stack layers, as in :func:`output_channels`.

    Returns:
      An operator for ``soft_threshold``, for leaves of 2 dimensions or more, and so many more as
      stack layers.

    Raises:
      ValueError: ``stacked_axes`` is not a whole number >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> input_channels()(jnp.array([[5.0, -5.0], [0.1, 0.9]]), 1.0)
      Array([[ 4., -4.],
             [ 0.,  0.]], dtype=float32)

    Source: He et al., "Channel pruning for accelerating very deep neural networks" (ICCV 2017), for
    the structure.
    """
    return _whole("input_channels", shrinkage, stacked_axes, rows=1, columns=None)


def filters(*, shrinkage: Elementwise = prox_l1, stacked_axes: int = 0) -> Tiles:
    """The kernel positions that join one input to one output: whole 2-D filters.

    In a 1×1 convolution that is a single weight. A dense layer has no kernel positions, so it is an
    error: leave it out of the mask, or give it a transform of its own by ``optax.partition``.

    Args:
      shrinkage: what is applied to the root mean square of a group. Default:
        :data:`lats_optax.prox.prox_l1`, the group lasso. ``prox_power(3)`` leaves the groups that
        survive nearly as they are.
      stacked_axes: how many leading axes stack layers, as in :func:`output_channels`.

    Returns:
      An operator for ``soft_threshold``, for leaves of 3 dimensions or more, and so many more as
      stack layers.

    Raises:
      ValueError: ``stacked_axes`` is not a whole number >= 0.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.ones((3, 3, 2, 4)).at[..., 0, 1].set(0.1)
      >>> filters()(kernel, 0.5)[1, 1]
      Array([[0.5, 0. , 0.5, 0.5],
             [0.5, 0.5, 0.5, 0.5]], dtype=float32)
    """
    return _whole("filters", shrinkage, stacked_axes, rows=1, columns=1, least_dimensions=3)


def blocks(rows: int, columns: int, *, shrinkage: Elementwise = prox_l1) -> Tiles:
    """Tiles of so many inputs by so many outputs, at each kernel position by itself.

    Hardware that multiplies matrices tile by tile can skip one that is zero: 1 × n and n × 1 for
    the vector units of CPUs, 4 × 4 or 16 × 16 for GPUs, 8 × 128 for TPUs. Where a layer's sides are
    not multiples of the tile's, the tiles at its end are smaller, and ``|g|`` is the number of
    weights that they have. Layers that are stacked along leading axes are tiled one by one.

    Args:
      rows: inputs in a tile, >= 1.
      columns: outputs in a tile, >= 1.
      shrinkage: as in :func:`output_channels`.

    Returns:
      An operator for ``soft_threshold``, for leaves of 2 dimensions or more.

    Raises:
      ValueError: a side that is not a whole number >= 1.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.array([[2.0, 2.0, 0.1], [2.0, 2.0, 0.1], [0.1, 0.1, 3.0]])
      >>> blocks(2, 2)(kernel, 1.0)
      Array([[1., 1., 0.],
             [1., 1., 0.],
             [0., 0., 2.]], dtype=float32)

    Source: Narang et al., "Block-sparse recurrent neural networks" (2017), for the structure.
    """
    rows, columns = check_steps(rows, "rows"), check_steps(columns, "columns")
    return Tiles(shrinkage, "blocks", rows=rows, columns=columns, all_positions=False)


def _whole(name: str, shrinkage: Elementwise, stacked_axes: Any, **tile: Any) -> Tiles:
    """Tiles that take in all kernel positions of a layer."""
    axes = check_stacked_axes(stacked_axes)
    return Tiles(shrinkage, name, all_positions=True, stacked_axes=axes, **tile)


def _sides(size: int, side: int | None) -> np.ndarray:
    """The sides of the tiles along an axis, or one number where they are equal."""
    if side is None or side >= size:
        return np.array([size])
    whole, rest = divmod(size, side)
    return np.array([side] * whole + [rest] if rest else [side])
