"""What networks are built from: their base class, convolutions, normalization, and checks.

Here belongs what is padded, normalized or initialized as PyTorch does it, so that published weights
and settings carry over.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from lats_optax.checks.options import check, check_choice

Maker = Callable[..., nn.Module]
"""What blocks are given to make their layers with: a module's class, some arguments settled."""

# PyTorch draws Kaiming weights from a normal distribution that is not truncated, and its default
# weights from the uniform one on ±1/√fan_in, whose variance is 1/(3 fan_in).
KAIMING_FAN_IN = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
KAIMING_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
TORCH_DEFAULT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

# Beyond all published ones: wider layers are a slip of the keyboard.
_WIDEST = 1000

MOMENTUM = 0.9
"""What running batch statistics keep of themselves at each step of training."""


def convolution(
    features: int,
    kernel_size: tuple[int, int],
    strides: int = 1,
    *,
    dtype: DTypeLike,
    kernel_init: Initializer,
    groups: int = 1,
    name: str,
) -> nn.Conv:
    """A bias-free convolution whose padding is the same on all sides, as PyTorch's.

    A map of n positions becomes one of ⌈n / strides⌉. Flax's ``"SAME"`` gives that size too, but at
    strides of 2 it pads even maps on the far side only: other numbers come out.

    Args:
      features: channels of the output.
      kernel_size: (height, width), both odd.
      strides: in both directions.
      dtype: of the computation; the kernel is float32.
      kernel_init: what the kernel, (height, width, channels / groups, features), is drawn from.
      groups: into which the channels are divided; as many as channels: depth-wise.
      name: of the layer.

    Returns:
      A layer from (…, height, width, channels) to (…, ⌈height / strides⌉, ⌈width / strides⌉,
      features).

    Example:
      >>> import jax
      >>> conv = convolution(8, (3, 3), 2, dtype="float32", kernel_init=KAIMING_FAN_IN, name="c")
      >>> jax.eval_shape(conv.init_with_output, jax.random.key(0), jnp.ones((1, 5, 4, 3)))[0].shape
      (1, 3, 2, 8)
    """
    return nn.Conv(
        features,
        kernel_size,
        strides,
        padding=[(size // 2, size // 2) for size in kernel_size],
        feature_group_count=groups,
        use_bias=False,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )


def batch_norm(train: bool, dtype: DTypeLike, axis_name: str | None) -> partial[nn.BatchNorm]:
    """Batch normalization that waits for its name: y = scale · (x − mean) / √(var + 1e-5) + bias.

    In training, mean and variance are the batch's, and the running ones go a tenth of the way
    towards them; in evaluation they are the running ones. Unlike PyTorch's, the running variance is
    that of the batch without Bessel's correction.

    Args:
      train: whether the batch's own statistics are used.
      dtype: of the result; statistics are computed in float32 at least, and kept in float32.
      axis_name: mapped axis over which the batch's statistics are averaged, or ``None``.

    Returns:
      A maker of layers, called with ``name=``.

    Example:
      >>> batch_norm(train=True, dtype="bfloat16", axis_name=None)(name="norm").momentum
      0.9
    """
    return partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=MOMENTUM,
        epsilon=1e-5,
        dtype=dtype,
        axis_name=axis_name,
    )


class Network(nn.Module, kw_only=True):
    """The base class of the zoo: the fields of every network, and its classifier.

    Attributes:
      num_classes: number of logits.
      width: multiplier of all channel counts, which are then rounded.
      classifier_bias: whether the classifier adds a bias.
      dtype: of the computation; parameters, batch statistics and logits are float32.
      axis_name: mapped axis over which batch statistics are averaged, or ``None``.
      features: how many channels a layer has, by its path such as ``stage1_block1/conv1``, in the
        place of the plan's; ``None``: the plan's, as those of layers that are not named.

    Raises:
      ValueError: ``num_classes`` < 1, or a width that leaves a layer without channels; ``features``
        names a layer that is not in the plan, or gives one less than one channel.

    Example:
      >>> import jax
      >>> class Head(Network):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         return self.classify(x, KAIMING_FAN_IN)
      >>> x = jnp.ones((2, 7, 7, 64), jnp.bfloat16)
      >>> jax.eval_shape(Head(num_classes=10).init_with_output, jax.random.key(0), x)[0]
      ShapeDtypeStruct(shape=(2, 10), dtype=float32)
    """

    num_classes: int
    width: float = 1.0
    classifier_bias: bool = False
    dtype: DTypeLike = jnp.float32
    axis_name: str | None = None
    features: Mapping[str, int] | None = None

    narrowest: ClassVar[int] = 64
    """Channels of the narrowest layer at width 1."""

    def __post_init__(self) -> None:
        """Checks the attributes."""
        check(self.num_classes >= 1, "num_classes", self.num_classes, "1 or more")
        least = 1 / self.narrowest
        check(least <= self.width <= _WIDEST, "width", self.width, f"{least} to {_WIDEST}")
        if self.features is not None:
            known = isinstance(self.features, Mapping)
            check(known, "features", self.features, "channels of layers, by their paths")
            # A module is hashed with its attributes.
            self.features = FrozenDict(self.features)  # type: ignore[no-untyped-call]
        super().__post_init__()
        for layer, features in (self.features or {}).items():
            check_choice("a layer of features", layer, self.plan())
            whole = isinstance(features, int) and not isinstance(features, bool)
            check(whole and features >= 1, f"features of {layer}", features, "1 or more")

    @nn.nowrap
    def plan(self) -> dict[str, int]:
        """Channels of each convolution that may be told its own, by path, at this width."""
        return {}

    @nn.nowrap
    def channels_of(self) -> dict[str, int]:
        """Channels of each convolution of the plan, as ``features`` has them or else the plan."""
        return {**self.plan(), **(self.features or {})}

    @nn.nowrap
    def channels(self, count: int) -> int:
        """How many channels a layer has that has ``count`` at width 1."""
        return round(count * self.width)

    def classify(
        self, x: Array, kernel_init: Initializer, bias_init: Initializer = nn.initializers.zeros
    ) -> Array:
        """The mean over positions, then a linear layer named ``classifier``.

        Args:
          x: (…, height, width, channels).
          kernel_init: what the classifier's kernel, (channels, num_classes), is drawn from.
          bias_init: what its bias, (num_classes,), is drawn from.

        Returns:
          Logits (…, num_classes), as `logits`.
        """
        return self.logits(x.mean(axis=(-3, -2)), kernel_init, bias_init)

    def logits(
        self, x: Array, kernel_init: Initializer, bias_init: Initializer = nn.initializers.zeros
    ) -> Array:
        """A linear layer named ``classifier``; arguments are those of `classify`, but for ``x``.

        Args:
          x: (…, channels).
          kernel_init: what the kernel is drawn from.
          bias_init: what the bias is drawn from.

        Returns:
          Logits (…, num_classes), in float32 or, where ``dtype`` is float64, in that.
        """
        logits = nn.Dense(
            self.num_classes,
            use_bias=self.classifier_bias,
            dtype=self.dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            name="classifier",
        )(x)
        return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def check_images(images: Array, least: int) -> None:
    """Raises ValueError unless images are (batch, height, width, channels) and large enough.

    Args:
      images: what a model was called with.
      least: fewest pixels in height and in width: the product of the model's strides, below which
        its last maps would hold padding only.

    Example:
      >>> check_images(jnp.zeros((2, 3, 224, 224)), 32)
      Traceback (most recent call last):
      ValueError: images have shape (2, 3, 224, 224); allowed: (batch, height, width, channels) with
      height and width of at least 32.
    """
    if images.ndim != 4 or min(images.shape[1:3]) < least:
        raise ValueError(
            f"images have shape {images.shape}; allowed: (batch, height, width, channels) with "
            f"height and width of at least {least}."
        )
