"""A small residual network for 8×8 images, that a CPU trains in seconds."""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut, which is projected where the shape changes.

    Attributes:
      features: channels of the output.
      conv: makes a convolution from features, kernel size, strides and a name.
      norm: makes a normalisation from a name.
      strides: of the first convolution and of the projection.
    """

    features: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    strides: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (batch, height, width, channels) to (batch, height/strides, …, features)."""
        y = self.conv(self.features, (3, 3), self.strides, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.features, (3, 3), name="conv2")(y)
        y = self.norm(name="norm2")(y)
        if x.shape != y.shape:
            x = self.conv(self.features, (1, 1), self.strides, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class DigitsCNN(nn.Module):
    """A stem at 8×8, two residual blocks at 4×4, the mean over positions, a linear classifier.

    101,790 parameters at the default width. The maps stop at 4×4: XLA takes a path many times
    slower on CPUs for a map that is smaller than the kernel.

    Attributes:
      num_classes: number of logits.
      width: channels of the stem; the blocks have twice as many.
      dtype: of the computation; parameters, batch statistics and logits are float32.
      axis_name: mapped axis over which batch statistics are averaged, or ``None``.
    """

    num_classes: int
    width: int = 28
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, 8, 8, channels) to logits (batch, num_classes)."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            # An epoch is 22 steps: statistics that forget over 100 would lag behind the weights.
            momentum=0.9,
            dtype=self.dtype,
            axis_name=self.axis_name,
        )
        block = partial(ResidualBlock, 2 * self.width, conv, norm)
        x = nn.relu(norm(name="stem_norm")(conv(self.width, (3, 3), name="stem")(images)))
        x = block(strides=2, name="block1")(x)
        x = block(name="block2")(x)
        x = x.mean(axis=(1, 2))
        x = nn.Dense(self.num_classes, dtype=self.dtype, name="classifier")(x)
        return x.astype(jnp.float32)
