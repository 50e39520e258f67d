"""Structured pruning: groups of weights that live and die together, in the terms of a layer.

Here belong the operators that `soft_threshold` takes for whole channels, filters and blocks, and
the group lasso that they have in common with `prox.prox_group_lasso`. Layouts are Flax's: the last
axis of a kernel counts outputs, the one before it inputs, and those before that, of a convolution,
are its taps.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lats_optax import leaves
from lats_optax.thresholds import check_steps


class GroupOperator(abc.ABC):
    """The proximal operator of the group lasso, for one partition of a leaf's weights into groups.

    For each group g of |g| weights:
    ``argmin_z 1/2 ||z - x_g||^2 + d sqrt|g| ||z|| = x_g max(1 - d sqrt|g| / ||x_g||, 0)``

    The least strength that zeroes a group, its magnitude, is the root of its mean square,
    ``||x_g|| / sqrt|g|``: groups of different sizes compete on equal terms under one threshold.
    """

    @abc.abstractmethod
    def sums(self, x: jax.Array) -> jax.Array:
        """The sum over each group of an array, in as many dimensions as the array has."""

    @abc.abstractmethod
    def sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """The number of weights of each group, int32; it broadcasts against the sums."""

    @abc.abstractmethod
    def spread(self, each: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """What the groups have, at their weights: an array that broadcasts against the shape."""

    def __call__(self, x: Any, strength: Any = 1.0) -> Any:
        """Apply the operator; arguments and errors are those of ``prox.prox_group_lasso``."""
        return leaves.over_leaves(self._shrink, x, strength)

    def count(self, w: jax.Array) -> tuple[int, jax.Array]:
        """How many groups an array has, and how many of them are wholly zero, int32."""
        alive = self.sums((w != 0).astype(jnp.int32))
        return alive.size, jnp.sum(alive == 0, dtype=jnp.int32)

    def root_mean_squares(self, x: jax.Array) -> jax.Array:
        """``||x_g|| / sqrt|g|`` of each group, in the shape of the sums."""
        squares = self.sums(jnp.square(x)) / self.sizes(x.shape).astype(x.dtype)
        # The square root has no derivative at zero; a zero group stays where it is.
        return jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares)))

    def lift(self, w: jax.Array, d: Any) -> jax.Array:
        """An x with ``operator(x, d) == w``; groups that are zero stay where they are."""
        rms = self.root_mean_squares(w)
        growth = jnp.where(rms == 0, 1.0, 1 + d / jnp.where(rms == 0, 1.0, rms))
        return w * self.spread(growth, w.shape)

    def _shrink(self, x: jax.Array, d: jax.Array) -> jax.Array:
        # The magnitude itself is compared with d, so that a threshold taken from the magnitudes
        # prunes the group that it was taken from.
        rms = self.root_mean_squares(x)
        leaves.check_broadcasts(d, rms.shape)
        excess = rms - d
        # (rms - d) / rms keeps its sign where 1 - d / rms would round to zero; where rms is
        # infinite only the latter has a value.
        safe = jnp.where(rms == 0, 1.0, rms)
        kept = jnp.where(jnp.isinf(rms), 1 - d / safe, excess / safe)
        dead, kept = (self.spread(each, x.shape) for each in (excess <= 0, kept))
        return jnp.where(dead, 0.0, leaves.positive_zero(x * kept))


@dataclass(frozen=True)
class GroupMagnitude:
    """The magnitudes under a group operator: of each weight, or of each group once."""

    operator: GroupOperator

    def __call__(self, x: jax.Array) -> jax.Array:
        """The magnitude of each weight, which is that of its group, in the shape of ``x``."""
        return jnp.broadcast_to(self.operator.spread(self.of_groups(x), x.shape), x.shape)

    def of_groups(self, x: jax.Array) -> jax.Array:
        """The magnitude of each group, in the shape of the operator's sums."""
        return self.operator.root_mean_squares(leaves.widen(leaves.as_real(x)))


@dataclass(frozen=True)
class Axes(GroupOperator):
    """Groups that span given axes of a leaf, as ``prox.prox_group_lasso`` names them."""

    axes: int | Sequence[int] | None = None

    def sums(self, x: jax.Array) -> jax.Array:
        """As :class:`GroupOperator` has it."""
        return jnp.sum(x, axis=self._within(x.ndim), keepdims=True)

    def sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """As :class:`GroupOperator` has it."""
        size = math.prod(shape[axis] for axis in self._within(len(shape)))
        return np.full((1,) * len(shape), size, np.int32)

    def spread(self, each: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """As :class:`GroupOperator` has it."""
        return each

    def _within(self, ndim: int) -> tuple[int, ...]:
        if self.axes is None:
            return tuple(range(ndim - 1))
        axes = tuple(np.atleast_1d(self.axes).tolist())
        for axis in axes:
            if not (isinstance(axis, int) and -ndim <= axis < ndim):
                raise ValueError(f"axes: {axis} is not an axis of a leaf with {ndim} dimensions")
        if len({axis % ndim for axis in axes}) != len(axes):
            raise ValueError(f"axes: {axes} names an axis of a leaf with {ndim} dimensions twice")
        return tuple(axis % ndim for axis in axes)


@dataclass(frozen=True)
class Tiles(GroupOperator):
    """Groups that are tiles of a kernel's (input, output) matrix, at one tap of it or at all.

    Attributes:
      name: what errors and ``repr`` call it.
      rows: inputs in a tile; None: all.
      columns: outputs in a tile; None: all.
      all_taps: whether the taps of a convolution lie in one group, or in one each.
      least_dimensions: of the leaves that it is for.
    """

    name: str
    rows: int | None
    columns: int | None
    all_taps: bool
    least_dimensions: int = 2

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"lats_optax.groups.{self.name}"

    def sums(self, x: jax.Array) -> jax.Array:
        """As :class:`GroupOperator` has it."""
        self._check(x.shape)
        whole = tuple(range(x.ndim - 2)) if self.all_taps else ()
        whole += (x.ndim - 2,) * (self.rows is None) + (x.ndim - 1,) * (self.columns is None)
        totals = jnp.sum(x, axis=whole, keepdims=True)
        window = (*(1,) * (x.ndim - 2), self.rows or 1, self.columns or 1)
        if max(window) == 1:
            return totals
        # Not by a reshape to (…, tiles, rows, tiles, columns): accelerators lay out an array by its
        # last two axes, and would pad sides of 4 to ones of 128.
        ragged = [(0, -size % side) for size, side in zip(totals.shape, window)]
        return lax.reduce_window(totals, np.zeros((), x.dtype), lax.add, window, window, ragged)

    def sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """As :class:`GroupOperator` has it."""
        self._check(shape)
        taps = math.prod(shape[:-2]) if self.all_taps else 1
        inputs, outputs = _sides(shape[-2], self.rows), _sides(shape[-1], self.columns)
        sizes = taps * np.outer(inputs, outputs).astype(np.int32)
        return sizes.reshape((1,) * (len(shape) - 2) + sizes.shape)

    def spread(self, each: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """As :class:`GroupOperator` has it."""
        for axis, side in ((len(shape) - 2, self.rows), (len(shape) - 1, self.columns)):
            if side is not None and side > 1:
                each = jnp.repeat(each, side, axis=axis)
                each = lax.slice_in_dim(each, 0, shape[axis], axis=axis)
        return each

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < self.least_dimensions:
            raise ValueError(
                f"{self.name} needs {self.least_dimensions} dimensions or more and was given "
                f"{len(shape)}"
            )


def output_channels() -> Tiles:
    """All that goes into one output: a unit of a dense layer, a 3-D filter of a convolution.

    A group is everything but the last axis. Layers that follow can drop an output that is zero,
    so this is what makes a dense model smaller. Leave out of the mask the layer that makes the
    logits: an output that it loses is a class that is never predicted.

    Batch normalization behind a layer makes the scale of an output irrelevant to the loss. Their
    magnitudes then lie close together, and most groups go in the last steps of the threshold: let
    it end early (``freeze_after``, ``lats_optax.freeze``) or before training
    (``lats_optax.prune_at_initialization``), so that there are steps left to learn without them.
    Near the threshold an output changes faster than running batch statistics follow: estimate
    these anew, on some batches, before the model is evaluated.

    Returns:
      An operator for ``soft_threshold``, for leaves of 2 dimensions or more.

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
    return Tiles("output_channels()", rows=None, columns=1, all_taps=True)


def input_channels() -> Tiles:
    """All that comes out of one input: everything but the second to last axis.

    The outputs of the layer before that nobody reads can be dropped there. A depth-wise
    convolution, and any other layer with one input channel, is one group as a whole: leave it out
    of the mask.

    Returns:
      An operator for ``soft_threshold``, for leaves of 2 dimensions or more.

    Example:
      >>> import jax.numpy as jnp
      >>> input_channels()(jnp.array([[5.0, -5.0], [0.1, 0.9]]), 1.0)
      Array([[ 4., -4.],
             [ 0.,  0.]], dtype=float32)

    Source: He et al., "Channel pruning for accelerating very deep neural networks" (ICCV 2017), for
    the structure.
    """
    return Tiles("input_channels()", rows=1, columns=None, all_taps=True)


def filters() -> Tiles:
    """The taps of a convolution that join one input to one output: whole 2-D filters.

    In a 1×1 convolution that is a single weight. A dense layer has no taps, and is an error rather
    than single weights by surprise: leave it out of the mask, or give it a transform of its own by
    ``optax.partition``.

    Returns:
      An operator for ``soft_threshold``, for leaves of 3 dimensions or more.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.ones((3, 3, 2, 4)).at[..., 0, 1].set(0.1)
      >>> filters()(kernel, 0.5)[1, 1]
      Array([[0.5, 0. , 0.5, 0.5],
             [0.5, 0.5, 0.5, 0.5]], dtype=float32)
    """
    return Tiles("filters()", rows=1, columns=1, all_taps=True, least_dimensions=3)


def blocks(rows: int, columns: int) -> Tiles:
    """Tiles of so many inputs by so many outputs, at each tap by itself.

    Hardware that multiplies matrices tile by tile can skip one that is zero: 1 × n and n × 1 for
    the vector units of CPUs, 4 × 4 or 16 × 16 for GPUs, 8 × 128 for TPUs. Where a layer's sides are
    not multiples of the tile's, the tiles at its end are smaller, and |g| is the number of weights
    that they have.

    Args:
      rows: inputs in a tile, >= 1.
      columns: outputs in a tile, >= 1.

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
    return Tiles(f"blocks({rows}, {columns})", rows=rows, columns=columns, all_taps=False)


def _sides(size: int, side: int | None) -> np.ndarray:
    """The sides of the tiles along an axis, or one number where they are equal."""
    if side is None or side >= size:
        return np.array([size])
    whole, rest = divmod(size, side)
    return np.array([side] * whole + [rest] if rest else [side])
