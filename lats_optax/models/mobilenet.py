"""MobileNet-V1: convolutions that are separated into a depth-wise and a point-wise one."""

from functools import partial

import flax.linen as nn
from jax import Array

from lats_optax.models.layers import (
    KAIMING_FAN_IN,
    TORCH_DEFAULT,
    Maker,
    Network,
    batch_norm,
    check_images,
    convolution,
)

# Features and strides of the thirteen separable convolutions, at width 1.
_PLAN = (
    (64, 1),
    *((128, 2), (128, 1)),
    *((256, 2), (256, 1)),
    *((512, 2), *((512, 1),) * 5),
    *((1024, 2), (1024, 1)),
)


class SeparableConv(nn.Module):
    """A 3×3 convolution of each channel alone, then a 1×1 one; each normalized, then relu.

    Attributes:
      features: channels of the output.
      conv: makes a convolution from features, kernel size, strides, groups and a name.
      norm: makes a normalization from a name.
      strides: of the depth-wise convolution.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> conv = partial(convolution, dtype="float32", kernel_init=TORCH_DEFAULT)
      >>> block = SeparableConv(8, conv, batch_norm(False, "float32", None), strides=2)
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 6, 6, 4)))[0].shape
      (1, 3, 3, 8)

    Source: Howard et al., "MobileNets" (arXiv 1704.04861), section 3.1.
    """

    features: int
    conv: Maker
    norm: Maker
    strides: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (…, height, width, channels) to (…, height / strides, width / strides, features)."""
        channels = x.shape[-1]
        x = self.conv(channels, (3, 3), self.strides, groups=channels, name="depthwise")(x)
        x = nn.relu(self.norm(name="depthwise_norm")(x))
        x = self.conv(self.features, (1, 1), name="pointwise")(x)
        return nn.relu(self.norm(name="pointwise_norm")(x))


class MobileNetV1(Network):
    """MobileNet-V1, as the LATS code has it: relu without a ceiling, and no dropout.

    A 3×3 convolution with strides of 2, thirteen separable convolutions, the mean over positions
    (so that images may have any size), a classifier. Kernels are drawn as PyTorch does by default,
    uniformly on ±1/√fan_in; the classifier Kaiming-normal: fan-in, for relu.

    Attributes: those of `Network`; ``width`` is α in the paper (1, 0.75, 0.5 or 0.25).

    Raises:
      ValueError: as `Network`; images are not (batch, height ≥ 32, width ≥ 32, channels).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = MobileNetV1(num_classes=1000)
      >>> init = partial(model.init_with_output, train=False)
      >>> logits, variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 64, 64, 3)))
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      ((2, 1000), 4230976)

    Source: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision
    Applications" (arXiv 1704.04861).
    """

    narrowest = 32

    @nn.nowrap
    def plan(self) -> dict[str, int]:
        """Channels of the stem and of each point-wise convolution; depth-wise ones keep theirs."""
        separable = {f"block{i}/pointwise": features for i, (features, _) in enumerate(_PLAN, 1)}
        return {layer: self.channels(n) for layer, n in {"stem": 32, **separable}.items()}

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        check_images(images, least=32)
        channels = self.channels_of()
        conv = partial(convolution, dtype=self.dtype, kernel_init=TORCH_DEFAULT)
        norm = batch_norm(train, self.dtype, self.axis_name)
        x = conv(channels["stem"], (3, 3), 2, name="stem")(images)
        x = nn.relu(norm(name="stem_norm")(x))
        for index, (_, strides) in enumerate(_PLAN, 1):
            features = channels[f"block{index}/pointwise"]
            x = SeparableConv(features, conv, norm, strides, name=f"block{index}")(x)
        return self.classify(x, KAIMING_FAN_IN)
