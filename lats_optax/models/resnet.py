"""Residual networks: ResNet-18 to -101 for ImageNet, ResNet-20 to -56 for CIFAR, and their block.

Here belong the plans of the architectures (which block has which convolutions) and what runs them;
spiking networks over the same plans are in `sew_resnet.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lats_optax.models.layers import (
    KAIMING_FAN_IN,
    Maker,
    Network,
    batch_norm,
    check_choice,
    check_images,
    convolution,
)


class ConvSpec(NamedTuple):
    """A convolution of a block: channels of its output, (height, width) of its kernel, strides."""

    features: int
    kernel_size: tuple[int, int]
    strides: int = 1


BlockSpec = tuple[ConvSpec, ...]


def basic(features: int, strides: int = 1) -> BlockSpec:
    """Two 3×3 convolutions; the first one strides.

    >>> basic(64, 2)[0].strides
    2
    """
    return ConvSpec(features, (3, 3), strides), ConvSpec(features, (3, 3))


def bottleneck(features: int, strides: int = 1) -> BlockSpec:
    """1×1 down, 3×3, 1×1 up to four times the features; the 3×3 strides ("v1.5").

    >>> [spec.features for spec in bottleneck(64)]
    [64, 64, 256]
    """
    return (
        ConvSpec(features, (1, 1)),
        ConvSpec(features, (3, 3), strides),
        ConvSpec(4 * features, (1, 1)),
    )


def stages(
    block: Callable[[int, int], BlockSpec], blocks: Sequence[int], width: int
) -> Iterator[tuple[str, BlockSpec]]:
    """The blocks of a network: channels double and maps halve from each stage to the next.

    Args:
      block: makes a block from features and strides: `basic` or `bottleneck`.
      blocks: how many there are in each stage.
      width: features of the first stage.

    Yields:
      For each block, its name and its convolutions.

    Example:
      >>> [name for name, _ in stages(basic, (1, 2), width=16)]
      ['stage1_block1', 'stage2_block1', 'stage2_block2']
    """
    for stage, count in enumerate(blocks):
        for index in range(count):
            strides = 2 if stage > 0 and index == 0 else 1
            yield f"stage{stage + 1}_block{index + 1}", block(width * 2**stage, strides)


PLANS = {
    18: (basic, (2, 2, 2, 2)),
    34: (basic, (3, 4, 6, 3)),
    50: (bottleneck, (3, 4, 6, 3)),
    101: (bottleneck, (3, 4, 23, 3)),
}
"""Depth of an ImageNet network -> its kind of block, and how many in each stage."""

CIFAR_PLANS = {20: 3, 32: 5, 56: 9}
"""Depth of a CIFAR network -> blocks in each of its three stages."""


def branch(
    x: Array, spec: BlockSpec, conv: Maker, norm: Maker, activate: Callable[[Array, str], Array]
) -> Array:
    """The convolutions of a block, each normalised, with activations between them.

    To be called in a compact method, whose module ``conv1``, ``norm1``, … then belong to.

    Args:
      x: (…, height, width, channels).
      spec: the convolutions.
      conv: makes a convolution from features, kernel size, strides and a name.
      norm: makes a normalisation from a name.
      activate: the activation, from its input and a name.

    Returns:
      What the last normalisation returns: (…, height / strides, width / strides, features).

    Example: `ResidualBlock`, below, is this with a shortcut.
    """
    for index, (features, kernel_size, strides) in enumerate(spec, 1):
        x = conv(features, kernel_size, strides, name=f"conv{index}")(x)
        x = norm(name=f"norm{index}")(x)
        if index < len(spec):
            x = activate(x, str(index))
    return x


def projection(x: Array, spec: BlockSpec, conv: Maker, norm: Maker) -> Array:
    """A shortcut to the shape that `branch` gives: a strided 1×1 convolution, normalised.

    To be called in a compact method, whose module ``shortcut`` and ``shortcut_norm`` then belong
    to: see `ResidualBlock`. Arguments and result are those of `branch`.
    """
    strides = max(layer.strides for layer in spec)
    return norm(name="shortcut_norm")(conv(spec[-1].features, (1, 1), strides, name="shortcut")(x))


def subsample_and_pad(x: Array, spec: BlockSpec) -> Array:
    """A shortcut to the shape that `branch` gives, without parameters ("option A" of the paper).

    Every ``strides``-th position, with zeros as the new channels, half of them on either side.

    >>> subsample_and_pad(jnp.ones((1, 4, 4, 2)), basic(4, 2))[0, 0]
    Array([[0., 1., 1., 0.], [0., 1., 1., 0.]], dtype=float32)
    """
    strides = max(layer.strides for layer in spec)
    new = spec[-1].features - x.shape[-1]
    x = x[..., ::strides, ::strides, :]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(new // 2, new - new // 2)])


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + branch(x)), with relu in the branch too.

    Attributes:
      spec: the convolutions of the branch.
      conv: makes a convolution from features, kernel size, strides and a name.
      norm: makes a normalisation from a name.
      project: whether a shortcut whose shape changes is a convolution, or else subsampled and
        padded with zeros.

    Example:
      >>> import jax
      >>> conv = partial(nn.Conv, use_bias=False)
      >>> block = ResidualBlock(basic(8, 2), conv, partial(nn.BatchNorm, use_running_average=True))
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), jnp.ones((1, 6, 6, 4)))[0].shape
      (1, 3, 3, 8)

    Source: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016).
    """

    spec: BlockSpec
    conv: Maker
    norm: Maker
    project: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (…, height, width, channels) to (…, height / strides, width / strides, features)."""
        y = branch(x, self.spec, self.conv, self.norm, lambda y, name: nn.relu(y))
        if x.shape == y.shape:
            return nn.relu(x + y)
        if self.project:
            return nn.relu(projection(x, self.spec, self.conv, self.norm) + y)
        return nn.relu(subsample_and_pad(x, self.spec) + y)


class ResNet(Network):
    """ResNet-18, -34, -50 or -101 for ImageNet, as the LATS code has it.

    A 7×7 convolution and a 3×3 maximum, both with strides of 2; four stages; the mean over
    positions; a classifier. Bottlenecks stride in their 3×3 convolution ("v1.5"). Kernels and the
    classifier are drawn Kaiming-normal: fan-in, for relu.

    Attributes:
      depth: 18, 34, 50 or 101; the others are those of `Network`.

    Raises:
      ValueError: another depth; as `Network`; images are not (batch, height ≥ 32, width ≥ 32,
        channels).

    Example:
      >>> import jax
      >>> model = ResNet(depth=50, num_classes=1000)
      >>> images = jnp.ones((2, 64, 64, 3))
      >>> init = partial(model.init_with_output, train=False)
      >>> logits, variables = jax.eval_shape(init, jax.random.key(0), images)
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      ((2, 1000), 25556032)

    Source: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016); v1.5 is
    torchvision's.
    """

    depth: int

    def __post_init__(self) -> None:
        """Checks the attributes."""
        check_choice("depth", self.depth, PLANS)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        check_images(images, least=32)
        conv = partial(convolution, dtype=self.dtype, kernel_init=KAIMING_FAN_IN)
        norm = batch_norm(train, self.dtype, self.axis_name)
        x = conv(self.channels(64), (7, 7), 2, name="stem")(images)
        x = max_pool(nn.relu(norm(name="stem_norm")(x)))
        for name, spec in stages(*PLANS[self.depth], width=self.channels(64)):
            x = ResidualBlock(spec, conv, norm, name=name)(x)
        return self.classify(x, KAIMING_FAN_IN)


class CifarResNet(Network):
    """ResNet-20, -32 or -56 for images of 32×32 pixels.

    A 3×3 convolution; three stages of basic blocks with 16, 32 and 64 features; the mean over
    positions; a classifier. Shortcuts have no parameters, as in the paper's experiments on
    CIFAR-10: where the shape changes they take every second position and pad the channels with
    zeros ("option A"). Kernels and the classifier are drawn Kaiming-normal: fan-in, for relu.

    Attributes:
      depth: 20, 32 or 56; the others are those of `Network`.

    Raises:
      ValueError: another depth; as `Network`; images are not (batch, height ≥ 4, width ≥ 4,
        channels).

    Example:
      >>> import jax
      >>> model = CifarResNet(depth=20, num_classes=10)
      >>> images = jnp.ones((2, 32, 32, 3))
      >>> init = partial(model.init_with_output, train=False)
      >>> logits, variables = jax.eval_shape(init, jax.random.key(0), images)
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      ((2, 10), 269712)

    Source: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section 4.2.
    """

    depth: int

    narrowest = 16

    def __post_init__(self) -> None:
        """Checks the attributes."""
        check_choice("depth", self.depth, CIFAR_PLANS)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        check_images(images, least=4)
        conv = partial(convolution, dtype=self.dtype, kernel_init=KAIMING_FAN_IN)
        norm = batch_norm(train, self.dtype, self.axis_name)
        x = nn.relu(norm(name="stem_norm")(conv(self.channels(16), (3, 3), name="stem")(images)))
        for name, spec in stages(basic, [CIFAR_PLANS[self.depth]] * 3, width=self.channels(16)):
            x = ResidualBlock(spec, conv, norm, project=False, name=name)(x)
        return self.classify(x, KAIMING_FAN_IN)


def max_pool(x: Array) -> Array:
    """The maximum of 3×3 positions at strides of 2, padded by one position on every side.

    >>> max_pool(jnp.ones((5, 1, 8, 8, 3))).shape
    (5, 1, 4, 4, 3)
    """
    # Flax pads one leading axis only; any others, such as time, are windows of 1.
    more = x.ndim - 4
    window, strides = (*(1,) * more, 3, 3), (*(1,) * more, 2, 2)
    padding = (*((0, 0),) * more, (1, 1), (1, 1))
    return nn.max_pool(x, window, strides, padding)  # type: ignore[no-untyped-call]
