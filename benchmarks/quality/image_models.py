"""The networks of the image tasks, small enough for one core: from the zoo's blocks and neurons."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lats_optax.models.layers import KAIMING_FAN_IN, Maker, batch_norm
from lats_optax.models.resnet import ResidualBlock, basic
from lats_optax.models.sew_resnet import SEWBlock
from lats_optax.models.spiking import SpikingLayer


class LeNet(nn.Module):
    """LeNet-300-100: three dense layers, relu between them, He initialization."""

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, 28, 28, 1) to logits (batch, 10)."""
        del train
        dense = partial(nn.Dense, kernel_init=KAIMING_FAN_IN)
        x = images.reshape(len(images), -1)
        x = nn.relu(dense(300, name="hidden1")(x))
        x = nn.relu(dense(100, name="hidden2")(x))
        return dense(10, name="classifier")(x)


class SmallResNet(nn.Module):
    """A stem with strides of 2, then one residual block a width: maps of 14, 7 and 4."""

    widths: Sequence[int] = (12, 24, 48)

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, 28, 28, 1) to logits (batch, 10)."""
        conv, norm = layers(train)
        x = conv(self.widths[0], (3, 3), 2, name="stem")(images)
        x = nn.relu(norm(name="stem_norm")(x))
        for index, width in enumerate(self.widths, 1):
            block = basic(width, 1 if index == 1 else 2)
            x = ResidualBlock(block, conv, norm, name=f"block{index}")(x)
        return classifier(x)


class SmallSpikingNet(nn.Module):
    """Convolutions with strides of 2 and spikes after each, an SEW block, logits averaged.

    The neurons are integrate-and-fire, as in the zoo's SEW ResNets. The first convolution sees the
    same image at every step and is computed once.
    """

    widths: Sequence[int] = (12, 24, 48)
    steps: int = 4

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, 28, 28, 1) to logits (batch, 10)."""
        conv, norm = layers(train)
        x = norm(name="norm1")(conv(self.widths[0], (3, 3), 2, name="conv1")(images))
        x = SpikingLayer(name="neuron1")(jnp.broadcast_to(x, (self.steps, *x.shape)))
        for index, width in enumerate(self.widths[1:], 2):
            x = norm(name=f"norm{index}")(conv(width, (3, 3), 2, name=f"conv{index}")(x))
            x = SpikingLayer(name=f"neuron{index}")(x)
        x = SEWBlock(basic(self.widths[-1]), conv, norm, SpikingLayer, name="block")(x)
        return classifier(x).mean(axis=0)


def layers(train: bool) -> tuple[Maker, Maker]:
    """What makes a network's convolutions and normalizations."""
    return convolution, batch_norm(train, jnp.float32, None)


def classifier(x: Array) -> Array:
    """The mean over positions, then a dense layer: (…, height, width, channels) -> (…, 10)."""
    return nn.Dense(10, kernel_init=KAIMING_FAN_IN, name="classifier")(x.mean(axis=(-3, -2)))


def convolution(
    features: int, kernel_size: tuple[int, int], strides: int = 1, *, name: str
) -> nn.Conv:
    """The zoo's bias-free convolution, computed as one matrix product.

    On one core of a CPU that is ten times faster than XLA's own convolutions, gradients included.
    """
    return nn.Conv(
        features,
        kernel_size,
        strides,
        padding=[(size // 2, size // 2) for size in kernel_size],
        use_bias=False,
        kernel_init=KAIMING_FAN_IN,
        conv_general_dilated=as_matrix_product,
        name=name,
    )


def as_matrix_product(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **unused: Any,
) -> Array:
    """A convolution as `lax.conv_general_dilated` has it, without dilation and without groups.

    Args:
      x: (batch, height, width, channels).
      kernel: (height, width, channels, features).
      strides: in both directions.
      padding: before and after, in both directions.
      **unused: what a Flax layer gives in addition, at its defaults.
    """
    del unused
    height, width, channels, features = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, rows, columns = (
        x.shape[0],
        *((x.shape[axis + 1] - kernel.shape[axis]) // strides[axis] + 1 for axis in (0, 1)),
    )
    patches = [
        x[:, i : i + (rows - 1) * strides[0] + 1 : strides[0]][
            :, :, j : j + (columns - 1) * strides[1] + 1 : strides[1]
        ]
        for i in range(height)
        for j in range(width)
    ]
    flat = jnp.concatenate(patches, axis=-1).reshape(-1, height * width * channels)
    return (flat @ kernel.reshape(-1, features)).reshape(batch, rows, columns, features)
