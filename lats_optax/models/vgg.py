"""VGG-16 with batch normalization, for images of 32×32 pixels."""

from functools import partial

import flax.linen as nn
from jax import Array

from lats_optax.models.layers import (
    KAIMING_FAN_IN,
    Network,
    batch_norm,
    check_images,
    convolution,
)

# Features, and how many convolutions have them, before each maximum over 2×2 positions.
_PLAN = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16BN(Network):
    """Thirteen 3×3 convolutions, each normalized, in five stages; a single linear classifier.

    A maximum over 2×2 positions ends each stage and leaves one position of a 32×32 image; the
    classifier takes the mean over what is left of a larger one. The two wide linear layers of the
    original are left out, as is usual for images of that size. Kernels and the classifier are drawn
    Kaiming-normal: fan-in, for relu.

    Attributes: those of `Network`.

    Raises:
      ValueError: as `Network`; images are not (batch, height ≥ 32, width ≥ 32, channels).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = VGG16BN(num_classes=10)
      >>> init = partial(model.init_with_output, train=False)
      >>> logits, variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 32, 32, 3)))
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      ((2, 10), 14724032)

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition" (ICLR 2015), configuration D; for small images, Li et al., "Pruning Filters for
    Efficient ConvNets" (ICLR 2017).
    """

    @nn.nowrap
    def plan(self) -> dict[str, int]:
        """Channels of the thirteen convolutions."""
        return {
            f"stage{stage}_conv{index}": self.channels(features)
            for stage, (features, count) in enumerate(_PLAN, 1)
            for index in range(1, count + 1)
        }

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        check_images(images, least=32)
        conv = partial(convolution, dtype=self.dtype, kernel_init=KAIMING_FAN_IN)
        norm = batch_norm(train, self.dtype, self.axis_name)
        x, channels = images, self.channels_of()
        for stage, (_, count) in enumerate(_PLAN, 1):
            for index in range(1, count + 1):
                name = f"stage{stage}_conv{index}"
                x = conv(channels[name], (3, 3), name=name)(x)
                x = nn.relu(norm(name=f"{name}_norm")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))  # type: ignore[no-untyped-call]
        return self.classify(x, KAIMING_FAN_IN)
