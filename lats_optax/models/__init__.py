"""The model zoo, by name: Flax modules, one file an architecture. They know nothing of pruning."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from lats_optax.models.digits import DigitsCNN
from lats_optax.models.layers import check_choice
from lats_optax.models.mobilenet import MobileNetV1
from lats_optax.models.resnet import CifarResNet, ResNet
from lats_optax.models.sew_resnet import SEWResNet
from lats_optax.models.spiking import Neuron, Surrogate
from lats_optax.models.vgg import VGG16BN

__all__ = [
    "VGG16BN",
    "CifarResNet",
    "DigitsCNN",
    "MobileNetV1",
    "Neuron",
    "ResNet",
    "SEWResNet",
    "Surrogate",
    "create",
]

_MODELS: dict[str, partial[Any]] = {
    "digits-cnn": partial(DigitsCNN),
    **{f"resnet{depth}": partial(ResNet, depth=depth) for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}": partial(CifarResNet, depth=depth) for depth in (20, 32, 56)},
    "mobilenet-v1": partial(MobileNetV1),
    "vgg16-bn": partial(VGG16BN),
    **{f"sew-resnet{depth}": partial(SEWResNet, depth=depth) for depth in (18, 34, 50)},
}


def create(
    name: str,
    *,
    num_classes: int,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
    **options: Any,
) -> nn.Module:
    """Builds a model of the zoo.

    Args:
      name: which model.
      num_classes: number of logits.
      dtype: of the computation, ``jnp.bfloat16`` for mixed precision; parameters and batch
        statistics stay float32, and so are the logits.
      axis_name: mapped axis over which batch statistics are averaged; ``None`` leaves to each
        device the statistics of its own part of the batch.
      **options: attributes of that model's class, such as ``classifier_bias`` of a ResNet or
        ``neuron`` of a SEW ResNet.

    Returns:
      A module that is called as ``apply(variables, images, train, mutable=["batch_stats"])``, with
      images (batch, height, width, channels), and returns logits (batch, num_classes).

    Raises:
      ValueError: there is no model of that name; it has no such option; a value is not allowed.

    Example:
      >>> import jax
      >>> model = create("digits-cnn", num_classes=10)
      >>> images = jnp.zeros((2, 8, 8, 1))
      >>> key = jax.random.key(0, impl="rbg")  # on CPUs, compiles in a third of the time
      >>> variables = model.init(key, images, train=False)
      >>> model.apply(variables, images, train=False).shape
      (2, 10)
    """
    if name not in _MODELS:
        known = ", ".join(repr(known) for known in _MODELS)
        raise ValueError(f"model {name!r} is not known; known are {known}")
    model = _MODELS[name]
    settled = {"num_classes", "dtype", "axis_name", "parent", "name", *model.keywords}
    fields = [field.name for field in dataclasses.fields(model.func)]  # type: ignore[arg-type]
    for option in options:
        check_choice(f"an option of {name!r}", option, [f for f in fields if f not in settled])
    return model(num_classes=num_classes, dtype=dtype, axis_name=axis_name, **options)
