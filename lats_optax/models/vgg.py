"""VGG-16 with batch normalisation, for images of 32×32 pixels."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from lats_optax.models.layers import (
    KAIMING_FAN_IN,
    batch_norm,
    check,
    check_images,
    convolution,
    pool_and_classify,
)

# Features, and how many convolutions have them, before each maximum over 2×2 positions.
_PLAN = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16BN(nn.Module):
    """Thirteen 3×3 convolutions, each normalised, in five stages; a single linear classifier.

    A maximum over 2×2 positions ends each stage and leaves one position of a 32×32 image; the
    classifier takes the mean over what is left of a larger one. The two wide linear layers of the
    original are left out, as is usual for images of that size. Kernels and the classifier are drawn
    Kaiming-normal: fan-in, for relu.

    Attributes:
      num_classes: number of logits.
      classifier_bias: whether the classifier adds a bias.
      dtype: of the computation; parameters, batch statistics and logits are float32.
      axis_name: mapped axis over which batch statistics are averaged, or ``None``.

    Raises:
      ValueError: ``num_classes`` < 1, or images are not (batch, height ≥ 32, width ≥ 32, channels).

    Example:
      >>> import jax
      >>> model = VGG16BN(num_classes=10)
      >>> init = partial(model.init_with_output, train=False)
      >>> logits, variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 32, 32, 3)))
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      ((2, 10), 14724032)

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition" (ICLR 2015), configuration D; for small images, Li et al., "Pruning Filters for
    Efficient ConvNets" (ICLR 2017).
    """

    num_classes: int
    classifier_bias: bool = False
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    def __post_init__(self) -> None:
        """Checks the attributes."""
        check(self.num_classes >= 1, "num_classes", self.num_classes, "1 or more")
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        check_images(images, least=32)
        conv = partial(convolution, dtype=self.dtype, kernel_init=KAIMING_FAN_IN)
        norm = batch_norm(train, self.dtype, self.axis_name)
        x = images
        for stage, (features, count) in enumerate(_PLAN, 1):
            for index in range(1, count + 1):
                name = f"stage{stage}_conv{index}"
                x = conv(features, (3, 3), name=name)(x)
                x = nn.relu(norm(name=f"{name}_norm")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))  # type: ignore[no-untyped-call]
        return pool_and_classify(
            x,
            self.num_classes,
            dtype=self.dtype,
            use_bias=self.classifier_bias,
            kernel_init=KAIMING_FAN_IN,
        )
