"""What the arrays of the zoo are called in published PyTorch code.

Here belong names and layouts, one `Form` an architecture; `weights.py` moves arrays by them.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn

from lats_optax.models.mobilenet import MobileNetV1
from lats_optax.models.resnet import CifarResNet, ResNet
from lats_optax.models.sew_resnet import SEWResNet
from lats_optax.models.vgg import VGG16BN
from lats_optax.models.vit import VisionTransformer

_ENDS = {"stem": "conv1", "stem_norm": "bn1", "stem_neuron": "sn1", "classifier": "fc"}
_KINDS = {"conv": "conv", "norm": "bn", "neuron": "sn"}
_SHORTCUTS = {
    "shortcut": "downsample.0",
    "shortcut_norm": "downsample.1",
    "shortcut_neuron": "downsample_sn",
}
_SEPARABLE = {"depthwise": 0, "depthwise_norm": 1, "pointwise": 3, "pointwise_norm": 4}
# Where each stage begins in torchvision's list of layers, relu and maxima included.
_VGG_STARTS = (0, 7, 14, 24, 34)
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "tau_logit": "w",
    **{leaf: leaf for leaf in ("cls_token", "pos_embed")},
}


def _residual(layer: str) -> str:
    block, _, part = layer.rpartition("/")
    if not block:
        return _ENDS[part]
    stage, index = block.removeprefix("stage").split("_block")
    name = _SHORTCUTS.get(part) or _KINDS[part[:-1]] + part[-1]
    return f"layer{stage}.{int(index) - 1}.{name}"


def _residual_linear(layer: str) -> str:
    return "linear" if layer == "classifier" else _residual(layer)


def _mobilenet(layer: str) -> str:
    block, _, part = layer.rpartition("/")
    if not block:
        return {"stem": "model.0.0", "stem_norm": "model.0.1"}.get(part) or _ENDS[part]
    return f"model.{block.removeprefix('block')}.{_SEPARABLE[part]}"


def _vgg(layer: str) -> str:
    if layer == "classifier":
        return layer
    stage, index = layer.removeprefix("stage").removesuffix("_norm").split("_conv")
    place = _VGG_STARTS[int(stage) - 1] + 3 * (int(index) - 1)
    return f"features.{place + layer.endswith('_norm')}"


def _vit(layer: str) -> str:
    ends = {"patch_embed": "patch_embed.proj", "classifier": "head"}
    in_block = re.sub(r"^block(\d+)/", lambda block: f"blocks.{int(block[1]) - 1}/", layer)
    return ends.get(layer) or in_block.replace("/", ".")


def _any_image(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    return 32


def _vit_image(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The size of square images with as many patches as there are positions."""
    tables = [shape for name, shape in shapes.items() if name.endswith("pos_embed")]
    # What does not fit is found later, against the size that timm has.
    rows = math.isqrt(tables[0][1]) if tables and len(tables[0]) == 3 else 14
    return max(rows, 1) * int(model.patch_size)


class Form(NamedTuple):
    """How PyTorch code has an architecture.

    Attributes:
      layouts: whose code; the first is the one that is written where none is named. They differ in
        the classifier alone: of ``"lats"`` it is a 1×1 convolution, else a linear layer.
      module: the layer's path in the zoo -> the module's in PyTorch.
      note: what an error adds for someone whose weights do not fit.
      image: from the model and the shapes of its arrays, by path or by name, height and width of
        images that it takes.
    """

    layouts: tuple[str, ...]
    module: Callable[[str], str]
    note: str = ""
    image: Callable[[Any, Mapping[str, tuple[int, ...]]], int] = _any_image

    def name(self, path: str) -> str:
        """The name of an array in a state dict, from its path in the variables.

        >>> form = form_of(ResNet(depth=18, num_classes=10))
        >>> form.name("batch_stats/stage2_block1/shortcut_norm/mean")
        'layer2.0.downsample.1.running_mean'
        """
        layer, _, leaf = path.partition("/")[2].rpartition("/")
        module = self.module(layer)
        return f"{module}.{_LEAVES[leaf]}" if module else _LEAVES[leaf]


_FORMS: dict[type[nn.Module], Form] = {
    ResNet: Form(("torchvision", "lats"), _residual),
    MobileNetV1: Form(("lats",), _mobilenet),
    CifarResNet: Form(("akamaster",), _residual_linear),
    SEWResNet: Form(("spikingjelly",), _residual),
    VGG16BN: Form(
        ("torchvision",),
        _vgg,
        "This VGG16BN is the one for small images: the features of torchvision's vgg16_bn without "
        "the biases of its convolutions (subtracted from the running_mean that follows, such a "
        "bias changes nothing), and one linear layer, classifier, instead of three.",
    ),
    VisionTransformer: Form(
        ("timm",),
        _vit,
        "A VisionTransformer has what timm's vit_tiny_patch16_224 and its larger kin have: a class "
        "token, learned positions, a norm before the classifier. Its depth and patch_size have to "
        "be those of the weights, and its images have to be square.",
        _vit_image,
    ),
}


def form_of(model: nn.Module) -> Form:
    """The form of a model.

    Raises:
      ValueError: published PyTorch code has no such architecture.

    Example:
      >>> form_of(MobileNetV1(num_classes=10)).layouts
      ('lats',)
    """
    if type(model) not in _FORMS:
        known = ", ".join(form.__name__ for form in _FORMS)
        raise ValueError(
            f"model is {type(model).__name__}, which has no PyTorch form; allowed: {known}."
        )
    return _FORMS[type(model)]
