"""The model zoo: Flax modules, one file an architecture. They know nothing of pruning.

Classifiers of images are made by name (`create`); a language model, `Llama`, from a `LlamaConfig`,
which comes with its weights (`lats_optax.torch.hugging_face.load`, `lats_optax.torch.gguf.load`).
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

try:
    import flax.linen as nn
except ImportError as error:
    raise ImportError(
        f"lats_optax.models needs flax ({error}): pip install 'lats-optax[models]'"
    ) from error
import jax.numpy as jnp
from jax.typing import DTypeLike

from lats_optax.checks.options import check_choice
from lats_optax.models.digits import DigitsCNN
from lats_optax.models.llama import DecoderLayer, Llama, LlamaConfig
from lats_optax.models.mobilenet import MobileNetV1
from lats_optax.models.resnet import CifarResNet, ResNet
from lats_optax.models.sew_resnet import SEWResNet
from lats_optax.models.spiking import Neuron, Surrogate
from lats_optax.models.vgg import VGG16BN
from lats_optax.models.vit import VisionTransformer

__all__ = [
    "VGG16BN",
    "CifarResNet",
    "DecoderLayer",
    "DigitsCNN",
    "Llama",
    "LlamaConfig",
    "MobileNetV1",
    "Neuron",
    "ResNet",
    "SEWResNet",
    "Surrogate",
    "VisionTransformer",
    "create",
    "describe",
    "in_zoo",
]

_MODELS: dict[str, partial[Any]] = {
    "digits-cnn": partial(DigitsCNN),
    **{f"resnet{depth}": partial(ResNet, depth=depth) for depth in (18, 34, 50, 101)},
    **{f"resnet{depth}": partial(CifarResNet, depth=depth) for depth in (20, 32, 56)},
    "mobilenet-v1": partial(MobileNetV1),
    "vgg16-bn": partial(VGG16BN),
    **{f"sew-resnet{depth}": partial(SEWResNet, depth=depth) for depth in (18, 34, 50)},
    **{f"vit-{size}": partial(VisionTransformer, size=size) for size in ("tiny", "small", "base")},
}


def create(
    name: str,
    *,
    num_classes: int,
    dtype: DTypeLike = jnp.float32,
    axis_name: str | None = None,
    **options: Any,
) -> nn.Module:
    """Builds a classifier of images of the zoo.

    Args:
      name: which model.
      num_classes: number of logits.
      dtype: of the computation, ``jnp.bfloat16`` for mixed precision; parameters and batch
        statistics stay float32, and so are the logits.
      axis_name: mapped axis over which batch statistics are averaged; ``None`` leaves to each
        device the statistics of its own part of the batch.
      **options: attributes of that model's class, such as ``classifier_bias`` of a ResNet or
        ``neuron`` of a SEW ResNet; values as `describe` gives them will do.

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
    if isinstance(options.get("neuron"), Mapping):
        options["neuron"] = _neuron(options["neuron"])
    return model(num_classes=num_classes, dtype=dtype, axis_name=axis_name, **options)


def describe(model: nn.Module) -> dict[str, Any]:
    """What `create` needs to build a model again, as values that JSON can hold.

    All options are there, those that have their default too; ``axis_name``, which belongs to the
    program that runs the model, is not.

    Args:
      model: a model of the zoo.

    Returns:
      ``{"name": …, "num_classes": …, "dtype": …, **options}``: the arguments of `create`, made of
      strings, numbers, bools, None, lists and dicts.

    Raises:
      ValueError: the model is not one of the zoo.

    Example:
      >>> describe(create("resnet20", num_classes=10, dtype=jnp.bfloat16))
      {'name': 'resnet20', 'num_classes': 10, 'dtype': 'bfloat16', 'width': 1.0, ...}
    """
    name = _name(model)
    if name is None:
        names = ", ".join(repr(name) for name in _MODELS)
        raise ValueError(f"model is {type(model).__name__}, not one of the zoo: {names}")
    left_out = {"parent", "name", "axis_name", "num_classes", "dtype", *_MODELS[name].keywords}
    fields = [f.name for f in dataclasses.fields(model) if f.name not in left_out]
    options = {option: _plain(getattr(model, option)) for option in fields}
    num_classes, dtype = (getattr(model, option) for option in ("num_classes", "dtype"))
    return {"name": name, "num_classes": num_classes, "dtype": jnp.dtype(dtype).name, **options}


def in_zoo(model: nn.Module) -> bool:
    """Whether `describe` knows the model.

    >>> in_zoo(create("resnet20", num_classes=10)), in_zoo(nn.Dense(3))
    (True, False)
    """
    return _name(model) is not None


def _name(model: nn.Module) -> str | None:
    for name, known in _MODELS.items():
        settled = known.keywords.items()
        if type(model) is known.func and all(getattr(model, k) == v for k, v in settled):
            return name
    return None


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _neuron(values: Mapping[str, Any]) -> Neuron:
    for kind, given in (("neuron", values), ("surrogate", values.get("surrogate", {}))):
        fields = dataclasses.fields(Neuron if kind == "neuron" else Surrogate)
        for key in given:
            check_choice(f"a value of the {kind}", key, [field.name for field in fields])
    return Neuron(**{**values, "surrogate": Surrogate(**values.get("surrogate", {}))})
