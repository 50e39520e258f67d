"""Which matrix a product takes from a parameter, and the activations that it multiplies.

Here belong the products: `dot_general` with any axes, and convolutions by their patches.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from lats_optax.analysis.jaxprs import shape
from lats_optax.analysis.views import Joined, Lost, Source, View, matrix

# The matrices of a product, [batch, inputs, outputs] each, and what they are multiplied with,
# [batch, samples, inputs]; or why there are none.
Matched = list[tuple[View, jax.Array]] | str


def _dot(eqn: JaxprEqn, place: int, source: Source, other: jax.Array) -> Matched:
    """A product of arrays whose operand number ``place`` is made of parameters."""
    contracted, batch = eqn.params["dimension_numbers"]
    inputs, samples = contracted[place], contracted[1 - place]
    own, its = batch[place], batch[1 - place]
    columns = _free(len(shape(eqn.invars[place])), inputs, own)
    free = _free(other.ndim, samples, its)
    activations = _arranged(other, its, free, samples)

    def one(view: View) -> tuple[View, jax.Array]:
        return matrix(view, own, inputs, columns), activations * view.scale

    if isinstance(source, Joined):
        if source.axis not in columns:
            return "concatenated along its inputs"
        return [one(view) for view in source.pieces]
    if isinstance(source, Lost):
        return f"{source.reason} stands before its product"
    assert isinstance(source, View)
    return [one(source)]


def _convolution(eqn: JaxprEqn, place: int, source: Source, other: jax.Array) -> Matched:
    """A convolution whose kernel is a parameter; its groups are the batch."""
    numbers = eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    if isinstance(source, Lost):
        return f"{source.reason} stands before its product"
    if not isinstance(source, View) or place != 1 or eqn.params["batch_group_count"] != 1:
        return "a convolution of another kind than images with a kernel"
    outputs, inputs, *positions = numbers.rhs_spec
    sizes = shape(eqn.invars[place])
    count = sizes[outputs]

    def arrange(kernel: jax.Array) -> jax.Array:
        ordered = jnp.transpose(kernel, (*positions, inputs, outputs))
        split = ordered.reshape(-1, groups, count // groups)
        return jnp.transpose(split, (1, 0, 2))

    view = source.then(("kernel", numbers.rhs_spec, groups), arrange)
    view = dataclasses.replace(view, grouped=True)
    found = patches(
        jnp.transpose(other, numbers.lhs_spec),
        [sizes[axis] for axis in positions],
        eqn.params["window_strides"],
        eqn.params["padding"],
        eqn.params["lhs_dilation"],
        eqn.params["rhs_dilation"],
        groups,
    )
    return [(view, found * source.scale)]


PRODUCTS: dict[str, Callable[[JaxprEqn, int, Source, Any], Matched]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
}


def patches(
    images: jax.Array,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    window_dilation: Sequence[int],
    groups: int,
) -> jax.Array:
    """What a kernel is multiplied with, position by position.

    Args:
      images: [images, channels, *positions].
      window: the kernel's size along each axis.
      strides: of the window.
      padding: before and after each axis; it may be negative.
      dilation: of the images: zeros between their entries.
      window_dilation: of the kernel.
      groups: of channels.

    Returns:
      [groups, images * outputs, window * channels / groups], float as the images.

    Example:
      >>> x = jnp.arange(4.0).reshape(1, 1, 4)
      >>> patches(x, [2], [1], [(0, 0)], [1], [1], 1)[0]
      Array([[0., 1.],
             [1., 2.],
             [2., 3.]], dtype=float32)
    """
    count, channels, *_ = images.shape
    config = [(0, 0, 0), (0, 0, 0)]
    config += [(low, high, step - 1) for (low, high), step in zip(padding, dilation)]
    padded = lax.pad(images, jnp.zeros((), images.dtype), config)
    spans = [(size - 1) * step + 1 for size, step in zip(window, window_dilation)]
    taken = []
    for position in itertools.product(*map(range, window)):
        starts = [at * step for at, step in zip(position, window_dilation)]
        stops = [
            start + size - span + 1 for start, size, span in zip(starts, padded.shape[2:], spans)
        ]
        taken.append(
            lax.slice(padded, (0, 0, *starts), (count, channels, *stops), (1, 1, *strides))
        )
    # [window, images, channels, *outputs] -> [groups, images, *outputs, window, channels of one]
    whole = jnp.stack(taken)
    split = whole.reshape(len(taken), count, groups, channels // groups, -1)
    ordered = jnp.transpose(split, (2, 1, 4, 0, 3))
    return ordered.reshape(groups, -1, len(taken) * (channels // groups))


def _free(dimensions: int, *used: Sequence[int]) -> tuple[int, ...]:
    taken = {*itertools.chain(*used)}
    return tuple(axis for axis in range(dimensions) if axis not in taken)


def _arranged(x: jax.Array, *groups: Sequence[int]) -> jax.Array:
    """The array with one axis for each group of axes."""
    sides = [math.prod(x.shape[axis] for axis in axes) for axes in groups]
    return jnp.transpose(x, [*itertools.chain(*groups)]).reshape(sides)
