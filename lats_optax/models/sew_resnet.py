"""SEW ResNet: residual networks of spiking neurons, joined spike element by spike element."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer

from lats_optax.checks.options import check, check_choice
from lats_optax.models.layers import (
    KAIMING_FAN_OUT,
    TORCH_DEFAULT,
    Maker,
    batch_norm,
    check_images,
    convolution,
)
from lats_optax.models.resnet import (
    IDENTITY,
    PLANS,
    PROJECTION,
    BlockSpec,
    ResidualNetwork,
    Stage,
    branch,
    max_pool,
    projection,
    stages,
)
from lats_optax.models.spiking import Neuron, SpikingLayer

CONNECTIONS: dict[str, Callable[[Array, Array], Array]] = {
    "ADD": lambda shortcut, y: shortcut + y,
    "AND": lambda shortcut, y: shortcut * y,
    "IAND": lambda shortcut, y: shortcut * (1 - y),
}
"""How a block joins its shortcut and its branch."""


class SEWBlock(nn.Module):
    """connect(shortcut(x), branch(x)), in which both ends of the branch are spikes.

    As a `ResidualBlock`, with spiking neurons after every normalization, the last one and the
    shortcut's included, and none after the connection:

        ADD   shortcut + branch        AND   shortcut · branch        IAND   shortcut · (1 − branch)

    Attributes:
      spec: the convolutions of the branch.
      conv: makes a convolution from features, kernel size, strides and a name.
      norm: makes a normalization from a name.
      spike: makes a layer of neurons from a name.
      connection: ``"ADD"``, ``"AND"`` or ``"IAND"``.
      shortcut: ``"identity"`` or ``"projection"``; ``None``: the identity where the shape stays.

    Raises:
      ValueError: the connection or the shortcut is not one of these.

    Example:
      >>> from lats_optax.models.resnet import basic
      >>> conv = partial(nn.Conv, use_bias=False)
      >>> norm = partial(nn.BatchNorm, use_running_average=True)
      >>> block = SEWBlock(basic(8, 2), conv, norm, SpikingLayer)
      >>> x = jnp.ones((3, 1, 6, 6, 4))
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), x)[0].shape
      (3, 1, 3, 3, 8)

    Source: Fang et al., "Deep Residual Learning in Spiking Neural Networks" (NeurIPS 2021).
    """

    spec: BlockSpec
    conv: Maker
    norm: Maker
    spike: Maker
    connection: str = "ADD"
    shortcut: str | None = None

    def __post_init__(self) -> None:
        """Checks the connection and the shortcut."""
        check_choice("connection", self.connection, CONNECTIONS)
        check_choice("shortcut", self.shortcut, [None, IDENTITY, PROJECTION])
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps (steps, batch, height, width, channels) to (steps, batch, …, features)."""

        def spike(y: Array, name: str) -> Array:
            return self.spike(name=f"neuron{name}")(y)

        y = branch(x, self.spec, self.conv, self.norm, spike)
        y = spike(y, str(len(self.spec)))
        if (self.shortcut or (IDENTITY if x.shape == y.shape else PROJECTION)) == PROJECTION:
            x = projection(x, self.spec, self.conv, self.norm)
            x = self.spike(name="shortcut_neuron")(x)
        return CONNECTIONS[self.connection](x, y)


class SEWResNet(ResidualNetwork, kw_only=True):
    """SEW ResNet-18, -34 or -50 for ImageNet: an image is shown for some steps, logits averaged.

    The plan is `ResNet`'s. The first convolution sees real numbers, the same at every step, so it
    is computed once. Batch statistics are over steps and batch together. Kernels are drawn
    Kaiming-normal, fan-out; the classifier, as PyTorch does by default, uniformly on ±1/√fan_in.

    With ``mutable=["intermediates"]`` each layer of neurons reports its ``firing_rate``, and the
    network ``logits_per_step``, (steps, batch, num_classes).

    Attributes:
      depth: 18, 34 or 50.
      time_steps: T in the paper, the steps for which the image is shown.
      connection: ``"ADD"``, ``"AND"`` or ``"IAND"``: see `SEWBlock`.
      neuron: what all neurons do.
      stem: ``"imagenet"``, a 7×7 convolution and a 3×3 maximum, both with strides of 2; or
        ``"cifar"``, a 3×3 convolution that strides neither, so that 32×32 images end on 4×4 maps.
      classifier_bias: the published code's classifier adds one.

    The others are those of `Network`; potentials are float32 under any ``dtype``.

    Raises:
      ValueError: an attribute is not one of these, or images are not (batch, height ≥ 32,
        width ≥ 32, channels), 8 for the small stem.

    Example:
      >>> model = SEWResNet(depth=18, num_classes=100)
      >>> init = partial(model.init_with_output, train=False)
      >>> logits, variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 64, 64, 3)))
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
      ((2, 100), 11227812)

    Source: Fang et al., "Deep Residual Learning in Spiking Neural Networks" (NeurIPS 2021).
    """

    depth: int
    time_steps: int = 4
    connection: str = "ADD"
    neuron: Neuron = Neuron()
    stem: str = "imagenet"
    classifier_bias: bool = True

    def __post_init__(self) -> None:
        """Checks the attributes."""
        check_choice("depth", self.depth, [18, 34, 50])
        check(self.time_steps >= 1, "time_steps", self.time_steps, "1 or more")
        check_choice("connection", self.connection, CONNECTIONS)
        known = isinstance(self.neuron, Neuron)
        check(known, "neuron", self.neuron, "a Neuron, such as Neuron('if')")
        check_choice("stem", self.stem, ["imagenet", "cifar"])
        super().__post_init__()

    @nn.nowrap
    def default_blocks(self) -> Iterator[Stage]:
        """The blocks as the plan has them."""
        return stages(*PLANS[self.depth], width=self.channels(64))

    @nn.compact
    def __call__(self, images: Array, train: bool) -> Array:
        """Maps images (batch, height, width, channels) to logits (batch, num_classes)."""
        small = self.stem == "cifar"
        check_images(images, least=8 if small else 32)
        conv = partial(convolution, dtype=self.dtype, kernel_init=KAIMING_FAN_OUT)
        norm = batch_norm(train, self.dtype, self.axis_name)
        spike = partial(SpikingLayer, self.neuron)
        features = self.channels_of()["stem"]
        kernel_size, strides = ((3, 3), 1) if small else ((7, 7), 2)
        x = norm(name="stem_norm")(conv(features, kernel_size, strides, name="stem")(images))
        x = spike(name="stem_neuron")(jnp.broadcast_to(x, (self.time_steps, *x.shape)))
        x = x if small else max_pool(x)
        for name, spec, shortcut in self.blocks():
            x = SEWBlock(spec, conv, norm, spike, self.connection, shortcut, name=name)(x)
        logits = self.classify(x, TORCH_DEFAULT, _uniform(x.shape[-1]))
        self.sow("intermediates", "logits_per_step", logits)
        return logits.mean(axis=0)


def _uniform(fan_in: int) -> Initializer:
    """Draws a bias as PyTorch does by default: uniformly on ±1/√fan_in."""
    bound = fan_in**-0.5

    def draw(key: Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Array:
        del out_sharding  # a bias lies wherever its layer does
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw
