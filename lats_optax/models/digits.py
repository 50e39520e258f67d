"""A small residual network for 8×8 images, that a CPU trains in seconds."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from lats_optax.models.layers import batch_norm, check, check_images, pool_and_classify
from lats_optax.models.resnet import ResidualBlock, basic


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

    def __post_init__(self) -> None:
        """Checks the attributes."""
        check(self.num_classes >= 1, "num_classes", self.num_classes, "1 or more")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, 8, 8, channels) to logits (batch, num_classes)."""
        check_images(images, least=2)
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        # An epoch is 22 steps: statistics that forget over 100 would lag behind the weights.
        norm = batch_norm(train, self.dtype, self.axis_name)
        x = nn.relu(norm(name="stem_norm")(conv(self.width, (3, 3), name="stem")(images)))
        x = ResidualBlock(basic(2 * self.width, 2), conv, norm, name="block1")(x)
        x = ResidualBlock(basic(2 * self.width), conv, norm, name="block2")(x)
        return pool_and_classify(
            x,
            self.num_classes,
            dtype=self.dtype,
            use_bias=True,
            kernel_init=nn.initializers.lecun_normal(),
        )
