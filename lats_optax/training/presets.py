"""Runs that have a name: what each does, where its settings are from, and whether it was run."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lats_optax.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PruneConfig,
    TrainConfig,
)


class Preset(NamedTuple):
    """A run with a name.

    Attributes:
      summary: what it does, its time and accuracy; a line of `lats-train --help`.
      notes: where its settings are from, and what differs there; more of its own `--help`.
      config: the run.
    """

    summary: str
    notes: str
    config: TrainConfig

    @property
    def description(self) -> str:
        """The command, the summary and the notes."""
        return f"lats-train {self.config.workdir.name}: {self.summary}\n\n{self.notes}"


class _Family(NamedTuple):
    """Runs that differ in what is pruned and how alone.

    Attributes:
      what: the task, for summaries.
      notes: where the settings are from.
      dense: the dense run.
      sparsity: of the sparse runs.
      exclude: what stays dense in them.
    """

    what: str
    notes: str
    dense: TrainConfig
    sparsity: float
    exclude: tuple[str, ...] = ()


class _Method(NamedTuple):
    """A way to prune: fields of `PruneConfig`, none for a dense run."""

    what: str
    notes: str = ""
    fields: Mapping[str, Any] = {}


_IMAGENET = TrainConfig(
    data=DataConfig(name="imagenet2012", batch_size=256),
    optimizer=OptimizerConfig(
        learning_rate=0.256,
        momentum=0.875,
        weight_decay=0.000030517578125,
        warmup_epochs=5,
        lr_update="epoch",
    ),
    label_smoothing=0.1,
    epochs=100,
    log_every=100,
    eval_every=1,
    checkpoint_every=1,
)
_CIFAR = TrainConfig(
    data=DataConfig(name="cifar10", batch_size=128),
    optimizer=OptimizerConfig(learning_rate=0.1, momentum=0.9, weight_decay=1e-4),
    epochs=160,
    eval_every=1,
    checkpoint_every=1,
)
_FASHION_MNIST = TrainConfig(
    data=DataConfig(name="fashion_mnist", batch_size=128),
    model=ModelConfig("resnet20", width=0.25),
    optimizer=OptimizerConfig(learning_rate=0.1, momentum=0.9, weight_decay=1e-4),
    epochs=5,
    eval_every=1,
    checkpoint_every=1,
)
_ADAMW = OptimizerConfig(
    name="adamw",
    learning_rate=1e-3,
    weight_decay=0.1,
    clip_norm=1.0,
    decay_norm=False,
    warmup_epochs=8,
)
_FASHION_MNIST_VIT = dataclasses.replace(
    _FASHION_MNIST,
    model=ModelConfig("vit-tiny", width=0.5, depth=4, patch_size=4),
    optimizer=dataclasses.replace(_ADAMW, warmup_epochs=1),
    epochs=10,
)
_SPIKING = OptimizerConfig(learning_rate=0.1, momentum=0.9, lr_update="epoch")

_CODE = "the published code, https://github.com/Yanqi-Chen/LATS"
_NO_IMAGENET = """

Not run here: ImageNet was not at hand, so the accuracy that it reaches is not known. What differs
from the published run: batch normalization sees the whole batch rather than each GPU's part, and
what an epoch has left after its last whole batch goes into the next. Published in float32; on TPUs
and recent GPUs add --model.dtype bfloat16."""
_NO_CIFAR = """

Not run here: CIFAR-10 was not at hand, so the accuracy that it reaches is not known. Not a
published run of this method: the sparsity is a choice of ours."""
_HE = f"""Settings: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), section
4.2, but for a cosine over 160 epochs where they drop the learning rate twice in 164.{_NO_CIFAR}"""

_RESNET50 = _Family(
    "ResNet-50 on ImageNet",
    f"Settings: configs/reparam/resnet50-*.yaml and README of {_CODE}.{_NO_IMAGENET}",
    dataclasses.replace(_IMAGENET, model=ModelConfig("resnet50")),
    sparsity=0.9,
)
_RESNET50_1024 = _RESNET50._replace(
    what="ResNet-50 on ImageNet at batch 1024",
    dense=dataclasses.replace(
        _RESNET50.dense,
        data=DataConfig(name="imagenet2012", batch_size=1024),
        optimizer=dataclasses.replace(_IMAGENET.optimizer, learning_rate=0.512),
    ),
)
_MOBILENET = _Family(
    "MobileNet-V1 on ImageNet",
    f"Settings: configs/reparam/mobilenetv1-*.yaml and README of {_CODE}.{_NO_IMAGENET}",
    dataclasses.replace(_IMAGENET, model=ModelConfig("mobilenet-v1")),
    sparsity=0.8,
)
_SEW = _Family(
    "spiking SEW ResNet-18 on ImageNet",
    'Settings: the paper, "A Unified Framework for Soft Threshold Pruning" (ICLR 2023); its code '
    f"has no spiking networks. The classifier stays dense.{_NO_IMAGENET}",
    dataclasses.replace(
        _IMAGENET,
        model=ModelConfig("sew-resnet18", time_steps=4, connection="ADD", neuron="if"),
        optimizer=_SPIKING,
        label_smoothing=0.0,
        epochs=320,
    ),
    sparsity=0.9,
    exclude=("classifier",),
)
_VIT = _Family(
    "ViT-S/16 on ImageNet",
    'Settings: Beyer, Zhai and Kolesnikov, "Better plain ViT baselines for ImageNet-1k" (arXiv '
    "2205.01580), and its code, configs/vit_s16_i1k.py of "
    "https://github.com/google-research/big_vision: 90 epochs at batch 1024, 10,000 steps of "
    "warm-up, which are 8 epochs, and a weight decay of 1e-4 for each step at the peak, which "
    """AdamW has as 0.1 times its rate.

Not run here: ImageNet was not at hand, so the accuracy that it reaches is not known. It is not the
76.5 % published, for two parts are missing: RandAugment (2 operations of magnitude 10) and Mixup
(0.2). What else differs there: the mean over tokens in the place of a class token, fixed sine and
cosine positions, a hidden layer in the classifier, the approximate GELU, pixels from -1 to 1, and
99 % of the training images. On TPUs and recent GPUs add --model.dtype bfloat16.""",
    TrainConfig(
        data=DataConfig(name="imagenet2012", batch_size=1024),
        model=ModelConfig("vit-small"),
        optimizer=_ADAMW,
        epochs=90,
        log_every=100,
        eval_every=1,
        checkpoint_every=1,
    ),
    sparsity=0.8,
)
_RESNET20 = _Family(
    "ResNet-20 on CIFAR-10",
    _HE,
    dataclasses.replace(_CIFAR, model=ModelConfig("resnet20")),
    sparsity=0.9,
)
_RESNET32 = _RESNET20._replace(
    what="ResNet-32 on CIFAR-10",
    dense=dataclasses.replace(_CIFAR, model=ModelConfig("resnet32")),
)
_VGG16 = _Family(
    "VGG-16 on CIFAR-10",
    "Settings: those of the CIFAR-10 ResNets, with the weight decay of 5e-4 that is usual for VGG."
    + _NO_CIFAR,
    dataclasses.replace(
        _CIFAR,
        model=ModelConfig("vgg16-bn"),
        optimizer=dataclasses.replace(_CIFAR.optimizer, weight_decay=5e-4),
    ),
    sparsity=0.95,
)
_SEW_CIFAR = _Family(
    "spiking SEW ResNet-18 on CIFAR-10",
    "Settings: those on ImageNet, over 160 epochs at batch 128, with first layers for small "
    f"images. The classifier stays dense.{_NO_CIFAR}",
    dataclasses.replace(
        _CIFAR,
        model=dataclasses.replace(_SEW.dense.model, stem="cifar"),
        optimizer=_SPIKING,
    ),
    sparsity=0.9,
    exclude=_SEW.exclude,
)

_DENSE = _Method("dense")
_EXACT_LATS = _Method("LATS", fields={"schedule": "lats"})
_TARGET = _Method(
    "target_sparsity",
    " The sparsity is a choice of ours; its threshold and operator are the library's defaults.",
    {"schedule": "lats"},
)
_THRESHOLD = """

The sparsity is a choice of ours. As published, with the final threshold D that Appendix I of the
paper gives for a sparsity: --prune.target-sparsity None --prune.final-threshold D."""
# The paper's: soft thresholding, with a threshold that rises to the last step.
_PAPER = {"operator": "soft"}
_LATS = _Method(
    "LATS",
    f"{_THRESHOLD} The threshold rises as a cosine that moves once an epoch does.",
    _PAPER | {"schedule": "epoch-lats"},
)
_S_LATS = _Method(
    "S-LATS",
    f"{_THRESHOLD} The threshold rises as if the cosine moved at every step.",
    _PAPER | {"schedule": "s-lats"},
)
_PGH = _Method(
    "PGH",
    f"{_THRESHOLD} The published command names no beta, and the default of its code, 0, has no "
    "logarithm: 0.01 is a choice of ours too.",
    _PAPER | {"schedule": "pgh", "beta": 0.01},
)

_RUNS = {
    "imagenet-resnet50-dense": (_RESNET50, _DENSE),
    "imagenet-resnet50-lats": (_RESNET50, _LATS),
    "imagenet-resnet50-s-lats": (_RESNET50, _S_LATS),
    "imagenet-resnet50-s-lats-1024": (_RESNET50_1024, _S_LATS),
    "imagenet-resnet50-pgh": (_RESNET50, _PGH),
    "imagenet-mobilenet-v1-dense": (_MOBILENET, _DENSE),
    "imagenet-mobilenet-v1-lats": (_MOBILENET, _LATS),
    "imagenet-mobilenet-v1-s-lats": (_MOBILENET, _S_LATS),
    "imagenet-sew-resnet18-dense": (_SEW, _DENSE),
    "imagenet-sew-resnet18-lats": (_SEW, _LATS),
    "imagenet-sew-resnet18-s-lats": (_SEW, _S_LATS),
    "imagenet-vit-s16-dense": (_VIT, _DENSE),
    "imagenet-vit-s16-target": (_VIT, _TARGET),
    "cifar10-resnet20-dense": (_RESNET20, _DENSE),
    "cifar10-resnet20-lats": (_RESNET20, _EXACT_LATS),
    "cifar10-resnet32-dense": (_RESNET32, _DENSE),
    "cifar10-resnet32-lats": (_RESNET32, _EXACT_LATS),
    "cifar10-vgg16-dense": (_VGG16, _DENSE),
    "cifar10-vgg16-lats": (_VGG16, _EXACT_LATS),
    "cifar10-sew-resnet18-dense": (_SEW_CIFAR, _DENSE),
    "cifar10-sew-resnet18-lats": (_SEW_CIFAR, _EXACT_LATS),
}


def _preset(name: str, family: _Family, method: _Method) -> Preset:
    prune, how = PruneConfig(), method.what
    if method.fields:
        prune = PruneConfig(family.sparsity, exclude=family.exclude, **method.fields)
        how = f"{family.sparsity:.0%} sparse by {method.what}"
    config = dataclasses.replace(family.dense, workdir=Path("runs") / name, prune=prune)
    return Preset(f"{family.what}, {how}; not run here.", family.notes + method.notes, config)


_DATA = (
    "The data first: lats-prepare fashion_mnist --from DIR, where DIR has the four files that "
    "Debian's package dataset-fashion-mnist puts into /usr/share/datasets/fashion-mnist; without "
    "--from it downloads them."
)

PRESETS: dict[str, Preset] = {
    "digits": Preset(
        "a small residual network on 8×8 digits, dense; 15 s on two CPU cores, accuracy 99.3 %.",
        "Sparse: lats-train digits --prune.target-sparsity 0.95.",
        TrainConfig(workdir=Path("runs/digits")),
    ),
    "digits-lats": Preset(
        "the same with 95 % of the weights zero; 15 s on two CPU cores, accuracy 99.2 %.",
        "Another sparsity: lats-train digits-lats --prune.target-sparsity 0.9.\n\n"
        "To train on what it leaves, without shrinkage: lats-train digits "
        "--init-from runs/digits-lats/model.safetensors --prune.mode fine-tuning "
        "--optimizer.learning-rate 0.03 --workdir runs/fine-tuned.",
        TrainConfig(workdir=Path("runs/digits-lats"), prune=PruneConfig(target_sparsity=0.95)),
    ),
    "fashion-mnist": Preset(
        "ResNet-20, a quarter as wide, on Fashion-MNIST, dense; 17 CPU minutes, accuracy 87.9 %.",
        f"{_DATA}\n\nThe run took 31 minutes by the clock, on two CPU cores that other programs "
        "kept busy. Sparse: lats-train fashion-mnist-lats.",
        dataclasses.replace(_FASHION_MNIST, workdir=Path("runs/fashion-mnist")),
    ),
    "fashion-mnist-lats": Preset(
        "the same with 95 % of the weights zero.",
        f"{_DATA}\n\nAnother sparsity: lats-train fashion-mnist-lats --prune.target-sparsity 0.9.",
        dataclasses.replace(
            _FASHION_MNIST,
            workdir=Path("runs/fashion-mnist-lats"),
            prune=PruneConfig(target_sparsity=0.95),
        ),
    ),
    "fashion-mnist-vit": Preset(
        "a vision transformer (4 blocks of 96 channels, 4×4 patches) on Fashion-MNIST, dense; ten "
        "epochs of 6 CPU minutes.",
        f"{_DATA}\n\nAdamW, as of imagenet-vit-s16-dense. Sparse: lats-train "
        "fashion-mnist-vit-target.",
        dataclasses.replace(_FASHION_MNIST_VIT, workdir=Path("runs/fashion-mnist-vit")),
    ),
    "fashion-mnist-vit-target": Preset(
        "the same with 90 % of the weights zero.",
        f"{_DATA}\n\nAnother sparsity: lats-train fashion-mnist-vit-target "
        "--prune.target-sparsity 0.8.",
        dataclasses.replace(
            _FASHION_MNIST_VIT,
            workdir=Path("runs/fashion-mnist-vit-target"),
            prune=PruneConfig(target_sparsity=0.9),
        ),
    ),
} | {name: _preset(name, *run) for name, run in _RUNS.items()}
