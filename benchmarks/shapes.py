"""Parameter shapes of published models, for benchmarks that need no forward pass."""


def resnet50(num_classes: int = 1000) -> dict[str, tuple[int, ...]]:
    """ResNet-50 v1.5 with a bias-free classifier: 160 arrays, 25,556,032 numbers.

    Args:
      num_classes: rows of the classifier.

    Returns:
      Shapes by name; convolutions are height × width × in × out.

    Source: He et al., "Deep Residual Learning for Image Recognition" (2016), table 1.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, size: int, inputs: int, outputs: int) -> None:
        shapes[f"{name}/kernel"] = (size, size, inputs, outputs)
        shapes[f"{name}/norm/scale"] = shapes[f"{name}/norm/bias"] = (outputs,)

    convolution("stem", 7, 3, 64)
    inputs = 64
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3)), start=1):
        for block in range(blocks):
            name = f"stage{stage}/block{block}"
            convolution(f"{name}/reduce", 1, inputs, width)
            convolution(f"{name}/spatial", 3, width, width)
            convolution(f"{name}/expand", 1, width, 4 * width)
            if block == 0:
                convolution(f"{name}/shortcut", 1, inputs, 4 * width)
            inputs = 4 * width
    shapes["classifier/kernel"] = (inputs, num_classes)
    return shapes
