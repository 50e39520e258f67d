"""How each architecture is wired: from a model to its graph, and from what is kept to a model.

Here belongs the wiring of each class of the zoo; plain sequences of layers, whose
functions have to be probed, are in `sequential.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lats_optax.compaction.graph import Arrays, Builder, Elementwise, Function, Graph, Mask, Vector
from lats_optax.models.digits import DigitsCNN
from lats_optax.models.layers import Network
from lats_optax.models.mobilenet import MobileNetV1
from lats_optax.models.resnet import (
    IDENTITY,
    PADDING,
    CifarResNet,
    ResidualNetwork,
    ResNet,
    Stage,
    padded_channel_index,
)
from lats_optax.models.sew_resnet import SEWResNet
from lats_optax.models.spiking import Neuron
from lats_optax.models.vgg import VGG16BN


@dataclass(frozen=True)
class Wiring:
    """A model as `compact` sees it.

    Attributes:
      graph: its nodes.
      rebuild: makes the smaller model, from which channels of each node are kept.
    """

    graph: Graph
    rebuild: Callable[[Mapping[str, Mask]], nn.Module]


def wire(model: Network, arrays: Arrays) -> Wiring:
    """The wiring of a model of the zoo.

    Args:
      model: one of `WIRED`.
      arrays: its variables by path, of the right shapes.

    Returns:
      Its `Wiring`.

    Example:
      >>> from lats_optax import models
      >>> model = models.create("digits-cnn", num_classes=10)
      >>> images = jnp.zeros((1, 8, 8, 1))
      >>> shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
      >>> params = jax.tree_util.tree_flatten_with_path(shapes)[0]
      >>> named = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in params}
      >>> wire(model, named).graph.nodes["block1/shortcut_norm"].sources
      ('block1/shortcut',)
    """
    build = Builder(arrays)
    x = build.images(arrays[f"params/{next(iter(model.plan()))}/kernel"].shape[-2])
    x = WIRED[type(model)](model, build, x, arrays)
    build.output(build.linear(build.apply(x, "mean", lambda c: c), "classifier"))
    graph = build.graph()
    return Wiring(graph, lambda keep: _rebuild(model, graph, keep))


def _rebuild(model: Any, graph: Graph, keep: Mapping[str, Mask]) -> nn.Module:
    kept = {layer: int(keep[layer].sum()) for layer in model.plan()}
    features = {layer: n for layer, n in kept.items() if n != model.plan()[layer]} or None
    if not isinstance(model, CifarResNet):
        return model.clone(features=features)
    channel_index = {}
    for node in graph.nodes.values():
        if isinstance(node, Function) and node.reindexable:
            source = keep[node.sources[0]]
            # Numbers of the source's channels after the cut; those that went, and none, are −1.
            moved = np.append(np.where(source, np.cumsum(source) - 1, -1), -1)
            own = tuple(moved[node.channel_index[keep[node.name]]].tolist())
            usual = (
                padded_channel_index(source.sum(), len(own)) if source.sum() <= len(own) else None
            )
            if own != usual:
                channel_index[node.name.removesuffix("/shortcut")] = own
    return model.clone(features=features, channel_index=channel_index or None)


def _relu(build: Builder, x: str) -> str:
    return build.apply(x, f"{x}_relu", lambda c: np.maximum(c, 0.0))


# --- architectures: each returns the node whose mean over positions is classified ---------------


def _mobilenet(model: MobileNetV1, build: Builder, x: str, arrays: Arrays) -> str:
    x = _relu(build, build.norm(build.linear(x, "stem"), "stem_norm"))
    for layer in list(model.plan())[1:]:
        block = layer.removesuffix("/pointwise")
        for make, part in ((build.depthwise_conv, "depthwise"), (build.linear, "pointwise")):
            x = make(x, f"{block}/{part}")
            x = _relu(build, build.norm(x, f"{block}/{part}_norm"))
    return x


def _vgg(model: VGG16BN, build: Builder, x: str, arrays: Arrays) -> str:
    # The maxima between stages pad nothing: a constant stays what it is.
    for layer in model.plan():
        x = _relu(build, build.norm(build.linear(x, layer), f"{layer}_norm"))
    return x


def _resnet(model: ResidualNetwork, build: Builder, x: str, arrays: Arrays) -> str:
    # The stem's maximum pads with −∞: a constant stays what it is.
    x = _relu(build, build.norm(build.linear(x, "stem"), "stem_norm"))
    for block in model.blocks():
        y = _branch(build, x, block, lambda y, name: _relu(build, y))
        if block.shortcut == PADDING:
            x = _padding(model, build, x, block)
        elif block.shortcut != IDENTITY:
            x = _projection(build, x, block)
        x = build.add(Elementwise(block.name, (x, y), build.channels(y), np.add))
        x = _relu(build, x)
    return x


def _sew_resnet(model: SEWResNet, build: Builder, x: str, arrays: Arrays) -> str:
    def spike(x: str, layer: str) -> str:
        tau_logit = arrays.get(f"params/{layer}/tau_logit")
        return build.apply(x, layer, lambda c: _spikes(model, c, tau_logit))

    x = spike(build.norm(build.linear(x, "stem"), "stem_norm"), "stem_neuron")
    for block in model.blocks():

        def between(y: str, index: str, block: Stage = block) -> str:
            return spike(y, f"{block.name}/neuron{index}")

        y = between(_branch(build, x, block, between), str(len(block.spec)))
        if block.shortcut != IDENTITY:
            x = spike(_projection(build, x, block), f"{block.name}/shortcut_neuron")
        combine, adds = _CONNECTIONS[model.connection], model.connection == "ADD"
        x = build.add(Elementwise(block.name, (x, y), build.channels(y), combine, adds))
    return x


def _branch(build: Builder, y: str, block: Stage, activate: Callable[[str, str], str]) -> str:
    for index in range(1, len(block.spec) + 1):
        y = build.norm(build.linear(y, f"{block.name}/conv{index}"), f"{block.name}/norm{index}")
        if index < len(block.spec):
            y = activate(y, str(index))
    return y


def _projection(build: Builder, x: str, block: Stage) -> str:
    return build.norm(build.linear(x, f"{block.name}/shortcut"), f"{block.name}/shortcut_norm")


def _padding(model: Any, build: Builder, x: str, block: Stage) -> str:
    channel_index = np.array(model.channel_index_of()[block.name])

    def constants(c: Vector) -> Vector:
        return np.append(c, 0.0)[channel_index]  # −1 is the zero at the end

    name = f"{block.name}/shortcut"
    return build.add(
        Function(name, (x,), len(channel_index), constants, channel_index, reindexable=True)
    )


def _times(a: Vector, b: Vector) -> Vector:
    return np.where((a == 0) | (b == 0), 0.0, a * b)


_CONNECTIONS: dict[str, Callable[[Vector, Vector], Vector]] = {
    "ADD": np.add,
    "AND": _times,
    "IAND": lambda shortcut, y: _times(shortcut, 1 - y),
}


def _spikes(model: SEWResNet, constants: Vector, tau_logit: np.ndarray | None) -> Vector:
    """Neurons that fire at every step, or at none, however their input is rounded."""
    known = np.where(np.isnan(constants), 0.0, constants)
    nudge = 1e-5 * np.maximum(np.abs(known), 1.0) * (known != 0)
    shown = np.concatenate([known - nudge, known, known + nudge])
    # Of few sizes, for each is a compilation.
    padded = np.zeros(1 << max(13, len(shown).bit_length()), np.float32)
    padded[: len(shown)] = shown
    rate = None if tau_logit is None else jax.nn.sigmoid(jnp.asarray(tau_logit, jnp.float32))
    spikes = np.asarray(_run(model.neuron, model.time_steps, padded, rate), np.float64)
    spikes = spikes[:, : len(shown)].reshape(-1, len(known))
    varies = np.isnan(constants) | (spikes != spikes[0]).any(axis=0)
    return np.where(varies, np.nan, spikes[0])


@partial(jax.jit, static_argnums=(0, 1))
def _run(neuron: Neuron, steps: int, inputs: Array, rate: Array | None) -> Array:
    return neuron(jnp.broadcast_to(inputs, (steps, *inputs.shape)), rate)[0]


WIRED: dict[type[nn.Module], Callable[[Any, Builder, str, Arrays], str]] = {
    ResNet: _resnet,
    CifarResNet: _resnet,
    DigitsCNN: _resnet,
    SEWResNet: _sew_resnet,
    MobileNetV1: _mobilenet,
    VGG16BN: _vgg,
}
"""The classes whose wiring is known."""
