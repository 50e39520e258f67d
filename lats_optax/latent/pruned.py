"""What becomes of the update of a pruned weight: all of it, a part, nothing, or a bounded part.

Here belongs the third choice of the family, beside the operator and the law: how a weight that is
zero in the model moves in the latent weights, and so whether it comes back.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from lats_optax.array_types import Array, Float, Scalar
from lats_optax.checks.numbers import check_above, is_number
from lats_optax.operators.leaves import compute_dtype
from lats_optax.operators.stacked import check_stacked_axes


@runtime_checkable
class PrunedUpdate(Protocol):
    """A rule for the updates of pruned weights: a pure function of one array's updates."""

    def __call__(
        self, update: Float[Array, "*shape"], w: Float[Array, "*shape"], /
    ) -> Float[Array, "*shape"]:
        """The updates that the latent weights get.

        Args:
          update: that of each weight.
          w: the weights of the model, 0 where they are pruned.

        Returns:
          Updates in the dtype of ``update`` or a wider one, other than it only where ``w`` is 0.
        """


@dataclass(frozen=True)
class Scaled:
    """One factor on the updates of all pruned weights.

    Attributes:
      factor: 1 is straight-through, 0 leaves pruned weights where they are; perhaps traced.
    """

    factor: Scalar

    def __call__(
        self, update: Float[Array, "*shape"], w: Float[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """``factor * update`` where w is 0."""
        if isinstance(self.factor, float) and self.factor == 1:
            return update
        return jnp.where(w == 0, self.factor * update, update)


STRAIGHT_THROUGH = Scaled(1.0)
"""Pruned weights move as all others do."""


@dataclass(frozen=True)
class Bounded:
    """The rule that :func:`bounded` makes; its arguments are the attributes."""

    most: float
    axis: int
    stacked_axes: int = 0

    def __call__(
        self, update: Float[Array, "*shape"], w: Float[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """``min(1, most ||w|| / ||u||) u`` where w is 0, with the norms of an output."""
        wide = compute_dtype(update.dtype)
        layers = self.stacked_axes
        if w.ndim < layers + 2 * bool(layers):
            raise ValueError(
                f"pruned_scale: bounded(stacked_axes={layers}) needs {layers + 2} dimensions or "
                f"more and was given {w.ndim}; give what is not stacked a transform of its own, by "
                "optax.partition"
            )
        within = range(layers, w.ndim)
        output = layers if self.axis == 0 else w.ndim - 1
        axes = tuple(axis for axis in within if axis != output) or tuple(within)
        pruned = w == 0
        update = update.astype(wide)
        u = jnp.where(pruned, update, 0)
        moved = jnp.sum(u * u, axis=axes, keepdims=True)
        allowed = jnp.sum(jnp.square(w.astype(wide)), axis=axes, keepdims=True) * self.most**2
        # Where nothing is alive at all there is nothing to go by: the array begins at zero.
        over = (moved > allowed) & (jnp.sum(allowed) > 0)
        ratio = jnp.where(over, allowed / jnp.where(over, moved, 1), 1)
        # The square root has no derivative at zero.
        factor = jnp.where(ratio == 0, 0, jnp.sqrt(jnp.where(ratio == 0, 1, ratio)))
        return jnp.where(pruned, factor * u, update)


def bounded(most: float = 0.1, *, axis: int = -1, stacked_axes: int = 0) -> Bounded:
    """Pruned weights move by no more than a part of what is alive in their output.

    ``u' = min(1, most ||w|| / ||u||) u``

    u are the updates of an output's pruned weights, and w is what its living weights are. A batch
    normalization makes an output's scale irrelevant to the loss, so the gradient with respect to
    its weights is in proportion to ``1 / ||w||``, up to the ``1 / sqrt(epsilon)`` of an output that
    is wholly zero. Straight through, the pruned weights of an output that is nearly dead would grow
    past all living weights of the network, and take their places: at 98 % and above whole layers of
    small residual networks die of it, the classifier's among them. Where gradients are of ordinary
    size the bound changes little.

    Args:
      most: the largest part, > 0. ``math.inf`` is straight-through.
      axis: of the outputs in a kernel: -1, as Flax and Haiku have it, or 0, as Equinox and PyTorch
        have it. An array of one dimension is one output.
      stacked_axes: how many leading axes stack layers, as those of ``flax.linen.scan`` do, so that
        each layer's outputs are bounded by themselves. The axis is that of one layer.

    Returns:
      A rule for the ``pruned_scale`` of :func:`lats_optax.soft_threshold`. An output that is wholly
      zero stays so, unless the whole array is.

    Raises:
      ValueError: ``most`` is not a number > 0, ``axis`` is neither -1 nor 0, or ``stacked_axes`` is
        not a whole number >= 0. From ``update``, an array with no layer behind its stacked axes.

    Example:
      >>> updates, w = jnp.array([[0.3], [0.4], [1.0]]), jnp.array([[0.0], [0.0], [2.0]])
      >>> bounded(0.125)(updates, w)
      Array([[0.15],
             [0.2 ],
             [1.  ]], dtype=float32)

    Source: this library; a bound by the norm of the weights is the idea of You et al., "Large batch
    training of convolutional networks" (2017).
    """
    if axis not in (-1, 0):
        raise ValueError(f"axis: {axis!r} is not allowed; allowed are -1 and 0")
    most = check_above("most", most, 0, infinite=True)
    return Bounded(most, axis, check_stacked_axes(stacked_axes))


def as_pruned_update(value: Any) -> PrunedUpdate:
    """A rule as it is; a number in [0, 1] as a factor.

    Raises:
      ValueError: it is neither.

    Example:
      >>> as_pruned_update(0.5)
      Scaled(factor=0.5)
    """
    if callable(value):
        return value
    if isinstance(value, jax.core.Tracer):
        return Scaled(value)
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(
            f"pruned_scale: {value!r} is not allowed; allowed are numbers in [0, 1] and rules such "
            "as lats_optax.bounded()"
        )
    return Scaled(float(value))
