"""Residual networks: ResNet-18 to -101 for ImageNet, ResNet-20 to -56 for CIFAR, and their block.

Here belong the plans of the architectures (which block has which convolutions) and what runs them;
spiking networks over the same plans are in `sew_resnet.py`.
"""

import abc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array

from lats_optax.checks.options import check, check_choice
from lats_optax.models.layers import (
    KAIMING_FAN_IN,
    Maker,
    Network,
    batch_norm,
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


IDENTITY, PROJECTION, PADDING = SHORTCUTS = ("identity", "projection", "padding")
"""How a block's input reaches its end: as it is; by `projection`; by `subsample_and_pad`."""


class Stage(NamedTuple):
    """A block of a network: its name, its convolutions, and which of `SHORTCUTS` it has."""

    name: str
    spec: BlockSpec
    shortcut: str


def stages(
    block: Callable[[int, int], BlockSpec],
    blocks: Sequence[int],
    width: int,
    *,
    changing: str = PROJECTION,
) -> Iterator[Stage]:
    """The blocks of a network: channels double and maps halve from each stage to the next.

    Args:
      block: makes a block from features and strides: `basic` or `bottleneck`.
      blocks: how many there are in each stage.
      width: features of the first stage, and of what enters it.
      changing: the shortcut of blocks whose output has another shape than their input.

    Yields:
      For each block, its name, its convolutions and its shortcut.

    Example:
      >>> [(name, shortcut) for name, _, shortcut in stages(basic, (1, 2), width=16)]
      [('stage1_block1', 'identity'), ('stage2_block1', 'projection'),
       ('stage2_block2', 'identity')]
    """
    before = width
    for stage, count in enumerate(blocks):
        for index in range(count):
            strides = 2 if stage > 0 and index == 0 else 1
            spec = block(width * 2**stage, strides)
            same = strides == 1 and before == spec[-1].features
            yield Stage(f"stage{stage + 1}_block{index + 1}", spec, IDENTITY if same else changing)
            before = spec[-1].features


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
    """The convolutions of a block, each normalized, with activations between them.

    To be called in a compact method, whose module ``conv1``, ``norm1``, … then belong to.

    Args:
      x: (…, height, width, channels).
      spec: the convolutions.
      conv: makes a convolution from features, kernel size, strides and a name.
      norm: makes a normalization from a name.
      activate: the activation, from its input and a name.

    Returns:
      What the last normalization returns: (…, height / strides, width / strides, features).

    Example: `ResidualBlock`, below, is this with a shortcut.
    """
    for index, (features, kernel_size, strides) in enumerate(spec, 1):
        x = conv(features, kernel_size, strides, name=f"conv{index}")(x)
        x = norm(name=f"norm{index}")(x)
        if index < len(spec):
            x = activate(x, str(index))
    return x


def projection(x: Array, spec: BlockSpec, conv: Maker, norm: Maker) -> Array:
    """A shortcut to the shape that `branch` gives: a strided 1×1 convolution, normalized.

    To be called in a compact method, whose module ``shortcut`` and ``shortcut_norm`` then belong
    to: see `ResidualBlock`. Arguments and result are those of `branch`.
    """
    strides = max(layer.strides for layer in spec)
    return norm(name="shortcut_norm")(conv(spec[-1].features, (1, 1), strides, name="shortcut")(x))


def subsample_and_pad(
    x: Array, spec: BlockSpec, channel_index: Sequence[int] | None = None
) -> Array:
    """A shortcut to the shape that `branch` gives, without parameters ("option A" of the paper).

    Every ``strides``-th position, with zeros as the new channels: half of them on either side, or
    as ``channel_index`` says, which has for each channel of the output that of the input, or −1.

    >>> subsample_and_pad(jnp.ones((1, 4, 4, 2)), basic(4, 2))[0, 0]
    Array([[0., 1., 1., 0.], [0., 1., 1., 0.]], dtype=float32)
    >>> subsample_and_pad(jnp.ones((1, 4, 4, 2)), basic(3, 2), (1, -1, 0))[0, 0]
    Array([[1., 0., 1.], [1., 0., 1.]], dtype=float32)
    """
    strides = max(layer.strides for layer in spec)
    x = x[..., ::strides, ::strides, :]
    leading = [(0, 0)] * (x.ndim - 1)
    if channel_index is not None:
        # A channel of zeros at the end: where −1 points.
        return jnp.pad(x, [*leading, (0, 1)])[..., np.array(channel_index)]
    new = spec[-1].features - x.shape[-1]
    return jnp.pad(x, [*leading, (new // 2, new - new // 2)])


def padded_channel_index(inputs: int, outputs: int) -> tuple[int, ...]:
    """The default ``channel_index`` of `subsample_and_pad`: −1 for a new channel.

    >>> padded_channel_index(2, 4)
    (-1, 0, 1, -1)
    """
    before = (outputs - inputs) // 2
    return tuple(i - before if 0 <= i - before < inputs else -1 for i in range(outputs))


class ResidualBlock(nn.Module):
    """relu(shortcut(x) + branch(x)), with relu in the branch too.

    Attributes:
      spec: the convolutions of the branch.
      conv: makes a convolution from features, kernel size, strides and a name.
      norm: makes a normalization from a name.
      shortcut: one of `SHORTCUTS`; ``None``: the identity where the shape stays, else a
        projection.
      channel_index: of a padded shortcut, the channels as `subsample_and_pad` takes them.

    Raises:
      ValueError: the shortcut is not one of these.

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
    shortcut: str | None = None
    channel_index: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Checks the shortcut."""
        check_choice("shortcut", self.shortcut, [None, *SHORTCUTS])
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (…, height, width, channels) to (…, height / strides, width / strides, features)."""
        y = branch(x, self.spec, self.conv, self.norm, lambda y, name: nn.relu(y))
        shortcut = self.shortcut or (IDENTITY if x.shape == y.shape else PROJECTION)
        if shortcut == PROJECTION:
            x = projection(x, self.spec, self.conv, self.norm)
        elif shortcut == PADDING:
            x = subsample_and_pad(x, self.spec, self.channel_index)
        return nn.relu(x + y)


class ResidualNetwork(Network, abc.ABC):
    """A stem of the narrowest channels, then residual blocks that the plan or ``features`` size.

    Attributes: those of `Network`; a subclass says with ``default_blocks`` which blocks it has.

    Raises:
      ValueError: as `Network`; ``features`` has other channels at the two ends of an identity.
    """

    def __post_init__(self) -> None:
        """Checks that the blocks fit together."""
        super().__post_init__()
        self.blocks()

    @nn.nowrap
    @abc.abstractmethod
    def default_blocks(self) -> Iterable[Stage]:
        """The blocks as the plan has them."""

    @nn.nowrap
    def plan(self) -> dict[str, int]:
        """Channels of the stem and of the convolutions of the blocks; projections have the last's.

        >>> plan = ResNet(depth=18, num_classes=10).plan()
        >>> plan["stem"], plan["stage4_block2/conv2"], len(plan)
        (64, 512, 17)
        """
        return {"stem": self.channels(self.narrowest)} | {
            f"{name}/conv{index}": layer.features
            for name, spec, _ in self.default_blocks()
            for index, layer in enumerate(spec, 1)
        }

    @nn.nowrap
    def blocks(self) -> list[Stage]:
        """The blocks as ``features`` has them; their shortcuts are those of the plan."""
        channels, before, blocks = self.channels_of(), "stem", []
        for block in self.default_blocks():
            names = [f"{block.name}/conv{index}" for index in range(1, len(block.spec) + 1)]
            layers = zip(block.spec, names)
            spec = tuple(layer._replace(features=channels[name]) for layer, name in layers)
            if block.shortcut == IDENTITY:
                inputs, outputs = channels[before], channels[names[-1]]
                allowed = f"{inputs}, as many as {before} has, for the two are added"
                check(outputs == inputs, f"features of {names[-1]}", outputs, allowed)
            blocks.append(block._replace(spec=spec))
            before = names[-1]
        return blocks


class ResNet(ResidualNetwork):
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

    @nn.nowrap
    def default_blocks(self) -> Iterator[Stage]:
        """The blocks as the plan has them."""
        return stages(*PLANS[self.depth], width=self.channels(64))

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        check_images(images, least=32)
        conv = partial(convolution, dtype=self.dtype, kernel_init=KAIMING_FAN_IN)
        norm = batch_norm(train, self.dtype, self.axis_name)
        x = conv(self.channels_of()["stem"], (7, 7), 2, name="stem")(images)
        x = max_pool(nn.relu(norm(name="stem_norm")(x)))
        for name, spec, shortcut in self.blocks():
            x = ResidualBlock(spec, conv, norm, shortcut, name=name)(x)
        return self.classify(x, KAIMING_FAN_IN)


class CifarResNet(ResidualNetwork):
    """ResNet-20, -32 or -56 for images of 32×32 pixels.

    A 3×3 convolution; three stages of basic blocks with 16, 32 and 64 features; the mean over
    positions; a classifier. Shortcuts have no parameters, as in the paper's experiments on
    CIFAR-10: where the shape changes they take every second position and pad the channels with
    zeros ("option A"). Kernels and the classifier are drawn Kaiming-normal: fan-in, for relu.

    Attributes:
      depth: 20, 32 or 56; the others are those of `Network`.
      channel_index: where a padded shortcut takes its channels from, by the name of its block, as
        `subsample_and_pad` takes it; ``None``: as in the paper.

    Raises:
      ValueError: another depth; as `Network`; images are not (batch, height ≥ 4, width ≥ 4,
        channels); the channels in ``features`` or ``channel_index`` do not fit together.

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
    channel_index: Mapping[str, Sequence[int]] | None = None

    narrowest = 16

    def __post_init__(self) -> None:
        """Checks the attributes."""
        check_choice("depth", self.depth, CIFAR_PLANS)
        if self.channel_index is not None:
            known = isinstance(self.channel_index, Mapping)
            check(
                known,
                "channel_index",
                self.channel_index,
                "numbers of channels, by the names of blocks",
            )
            # Lists, as a file has them, could not be hashed.
            channel_index = {block: tuple(own) for block, own in self.channel_index.items()}
            self.channel_index = FrozenDict(channel_index)  # type: ignore[no-untyped-call]
        super().__post_init__()
        self._check_channel_index()

    @nn.nowrap
    def default_blocks(self) -> Iterator[Stage]:
        """The blocks as the plan has them."""
        blocks = [CIFAR_PLANS[self.depth]] * 3
        return stages(basic, blocks, width=self.channels(16), changing=PADDING)

    @nn.nowrap
    def channel_index_of(self) -> dict[str, Sequence[int]]:
        """Of each block with a padded shortcut, where its channels are taken from."""
        found, inputs = {}, self.channels_of()["stem"]
        for name, spec, shortcut in self.blocks():
            outputs = spec[-1].features
            if shortcut == PADDING:
                found[name] = (self.channel_index or {}).get(name) or padded_channel_index(
                    inputs, outputs
                )
            inputs = outputs
        return found

    @nn.nowrap
    def _check_channel_index(self) -> None:
        known, inputs = self.channel_index_of(), self.channels_of()["stem"]
        for block in self.channel_index or {}:
            check_choice("a block of channel_index", block, known)
        for name, spec, _ in self.blocks():
            outputs = spec[-1].features
            if name in known:
                named = f"channel_index of {name}", (self.channel_index or {}).get(name)
                if named[1] is None:
                    allowed = f"{outputs} of them, for {inputs} channels do not fit into {outputs}"
                    check(inputs <= outputs, *named, allowed)
                right = len(known[name]) == outputs and all(
                    isinstance(i, int) and -1 <= i < inputs for i in known[name]
                )
                check(right, *named, f"{outputs} numbers from -1 to {inputs - 1}")
            inputs = outputs

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        check_images(images, least=4)
        conv = partial(convolution, dtype=self.dtype, kernel_init=KAIMING_FAN_IN)
        norm = batch_norm(train, self.dtype, self.axis_name)
        x = conv(self.channels_of()["stem"], (3, 3), name="stem")(images)
        x = nn.relu(norm(name="stem_norm")(x))
        for name, spec, shortcut in self.blocks():
            channel_index = (self.channel_index or {}).get(name)
            x = ResidualBlock(spec, conv, norm, shortcut, channel_index, name=name)(x)
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
