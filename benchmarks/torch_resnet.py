"""ResNet in PyTorch and its training step, the peer that `train_throughput` is measured against.

    python -m benchmarks.torch_resnet --model resnet50 --batch-size 128 --image-size 224

It waits for a number of steps on each line of its input and answers with the seconds that they
took, so that another process can take turns with it. One of its own, because PyTorch and JAX may
want different versions of CUDA's libraries. Its settings are those of the JAX step: batch
normalization in float32, label smoothing, SGD with momentum and weight decay on everything; on a
GPU channels last, automatic mixed precision and `torch.compile`. With a `--threshold` every
convolution and the classifier threshold their weights when they run, as the published code does.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

DEPTHS = {
    "resnet18": (1, (2, 2, 2, 2)),
    "resnet34": (1, (3, 4, 6, 3)),
    "resnet50": (4, (3, 4, 6, 3)),
    "resnet101": (4, (3, 4, 23, 3)),
}
"""Model -> how much wider the end of a block is than its middle, and blocks in each stage."""


def soft(weight: Tensor, threshold: Tensor) -> Tensor:
    """What a layer runs on: sign(w) relu(|w| - d).

    Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity" (ICML
      2020), equation 3.
    """
    return torch.sign(weight) * functional.relu(torch.abs(weight) - threshold)


def threshold_in_layers(model: nn.Module, value: float) -> None:
    """Makes every convolution and linear layer of a model run on its thresholded weight.

    Args:
      model: changed in place; its parameters stay where they are, under another name.
      value: d, which a layer has as a buffer.
    """

    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("threshold", torch.tensor(value))

        def forward(self, weight: Tensor) -> Tensor:
            return soft(weight, self.threshold)

    for layer in list(model.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(layer, "weight", Soft())


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    """A convolution without bias, then batch normalization."""
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_in", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    """A residual block, basic (expansion 1) or a bottleneck that strides in its 3×3 (4)."""

    def __init__(self, inputs: int, width: int, expansion: int, stride: int):
        super().__init__()
        outputs = width * expansion
        sizes = [(3, stride), (3, 1)] if expansion == 1 else [(1, 1), (3, stride), (1, 1)]
        channels = [inputs, *[width] * (len(sizes) - 1), outputs]
        layers: list[nn.Module] = []
        for index, (size, step) in enumerate(sizes):
            layers += [conv_norm(channels[index], channels[index + 1], size, step), nn.ReLU()]
        self.branch = nn.Sequential(*layers[:-1])
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """relu(shortcut(x) + branch(x))."""
        return functional.relu(self.shortcut(x) + self.branch(x))


def resnet(name: str, num_classes: int = 1000) -> nn.Sequential:
    """ResNet-18 to -101, v1.5, with a classifier without bias.

    Source: He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016).
    """
    expansion, blocks = DEPTHS[name]
    layers: list[nn.Module] = [conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for index in range(count):
            layers.append(Block(inputs, width, expansion, 2 if stage and not index else 1))
            inputs = width * expansion
    classifier = nn.Linear(inputs, num_classes, bias=False)
    nn.init.kaiming_normal_(classifier.weight, mode="fan_in", nonlinearity="relu")
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace, compiled: bool
) -> Callable[[], Tensor]:
    """One step on a batch that stays: forward, backward, update; returns the loss, not fetched."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        fused=images.is_cuda,
    )
    half = options.dtype == "bfloat16"

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=half):
            logits = model(images)
            return functional.cross_entropy(logits, labels, label_smoothing=options.label_smoothing)

    run = torch.compile(loss_of) if compiled else loss_of

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = run(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def build(options: argparse.Namespace, device: torch.device) -> tuple[Callable[[], Tensor], str]:
    """A step that has run, and a word on how it was made: compiled if that works here."""
    torch.manual_seed(0)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (options.batch_size,), device=device)
    model = resnet(options.model)
    if options.threshold:
        threshold_in_layers(model, options.threshold)
    model = model.to(device, memory_format=torch.channels_last)
    note = "as asked for"
    if options.compile:
        try:
            step = training_step(model, images, labels, options, compiled=True)
            step()
            return step, "compiled"
        except Exception as error:  # whatever keeps a compiler from working on this machine
            note = f"torch.compile failed: {type(error).__name__}"
    step = training_step(model, images, labels, options, compiled=False)
    step()
    return step, f"eager, {note}"


def main() -> None:
    """Answer one line for each line that comes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=DEPTHS, default="resnet50")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--learning-rate", type=float, default=0.256)
    parser.add_argument("--momentum", type=float, default=0.875)
    parser.add_argument("--weight-decay", type=float, default=2.0**-15)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--threshold", type=float, default=0.0, help="0: a dense network")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    answer = sys.stdout
    sys.stdout = sys.stderr  # so that nothing else that prints is taken for an answer

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    step, made = build(options, device)

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=answer, flush=True)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    reply(device=name, version=torch.__version__, made=made)
    for line in sys.stdin:
        wait()
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        wait()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
        reply(seconds=seconds, peak_bytes=peak)


if __name__ == "__main__":
    main()
