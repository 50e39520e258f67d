"""A small residual network for 8×8 images, that a CPU trains in seconds."""

from functools import partial

import flax.linen as nn
from jax import Array

from lats_optax.models.layers import batch_norm, check_images
from lats_optax.models.resnet import (
    IDENTITY,
    PROJECTION,
    ResidualBlock,
    ResidualNetwork,
    Stage,
    basic,
)


class DigitsCNN(ResidualNetwork):
    """A stem at 8×8, two residual blocks at 4×4, the mean over positions, a linear classifier.

    The stem has 28 channels and the blocks 56: 101,790 parameters for ten classes. The maps stop at
    4×4: XLA takes a path many times slower on CPUs for a map that is smaller than the kernel.

    Attributes: those of `Network`; the classifier has a bias by default.
    """

    classifier_bias: bool = True

    narrowest = 28

    @nn.nowrap
    def default_blocks(self) -> list[Stage]:
        """The blocks as the plan has them."""
        features = 2 * self.channels(28)
        return [
            Stage("block1", basic(features, 2), PROJECTION),
            Stage("block2", basic(features), IDENTITY),
        ]

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, 8, 8, channels) to logits (batch, num_classes)."""
        check_images(images, least=2)
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        # An epoch is 22 steps: statistics that forget over 100 would lag behind the weights.
        norm = batch_norm(train, self.dtype, self.axis_name)
        x = conv(self.channels_of()["stem"], (3, 3), name="stem")(images)
        x = nn.relu(norm(name="stem_norm")(x))
        for name, spec, shortcut in self.blocks():
            x = ResidualBlock(spec, conv, norm, shortcut, name=name)(x)
        return self.classify(x, nn.initializers.lecun_normal())
