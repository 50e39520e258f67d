"""How channels flow through a network: nodes that `compact` reasons about, without their arrays.

Here belong the kinds of nodes and what each does to a channel whose value is known. Which
nodes an architecture has is in `wiring.py`; what is cut, in `plan.py`.
"""

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Arrays = Mapping[str, np.ndarray]
"""The variables of a model, by path: ``params/stem/kernel``."""

Vector = np.ndarray
"""A number for each channel: the value that it has at every position of every input, or NaN."""

Mask = np.ndarray
"""A bool for each channel."""


@dataclass(frozen=True)
class Node(abc.ABC):
    """Something that makes channels of those of its sources.

    Attributes:
      name: of its own, and the path of a layer with arrays.
      sources: the nodes that it reads.
      channels: of its output.
    """

    name: str
    sources: tuple[str, ...]
    channels: int

    @abc.abstractmethod
    def constants(self, inputs: Sequence[Vector], arrays: Arrays) -> Vector:
        """The values of its channels, from those of its sources."""

    def reads(self, live: Mask, arrays: Arrays, channels: int) -> Mask:
        """Which of the ``channels`` of a source it reads for those of its own that are live."""
        del arrays, channels
        return live

    def cut(self, arrays: Arrays, keep: Mapping[str, Mask]) -> dict[str, np.ndarray]:
        """Its arrays, by path, without the channels that are not kept."""
        names = [f"params/{self.name}/{leaf}" for leaf in ("scale", "bias")]
        names += [f"batch_stats/{self.name}/{leaf}" for leaf in ("mean", "var")]
        return {path: arrays[path][keep[self.name]] for path in names if path in arrays}

    def vector(self, arrays: Arrays, path: str, default: float) -> np.ndarray:
        """An array of its own in float64, one number a channel; the default where it lacks it."""
        return np.asarray(arrays.get(path, np.full(self.channels, default)), np.float64)


@dataclass(frozen=True)
class Pinned(Node):
    """What has to keep all of its channels, and those that it reads: an input, an output, a mixer.

    Attributes:
      reason: for the report, such as "it is the input's".
    """

    reason: str

    def constants(self, inputs: Sequence[Vector], arrays: Arrays) -> Vector:
        """None is known."""
        return np.full(self.channels, np.nan)

    def reads(self, live: Mask, arrays: Arrays, channels: int) -> Mask:
        """All."""
        return np.ones(channels, bool)

    def cut(self, arrays: Arrays, keep: Mapping[str, Mask]) -> dict[str, np.ndarray]:
        """Its arrays stay as they are."""
        return {}


@dataclass(frozen=True)
class Layer(Node):
    """A layer with a kernel.

    Attributes:
      padded: whether zeros are read beyond the borders, so that a constant input gives none.
      bias: whether it has one.
    """

    padded: bool
    bias: bool

    def kernel(self, arrays: Arrays) -> np.ndarray:
        """Its kernel, (window, inputs of its group, outputs), in float64."""
        array = np.asarray(arrays[f"params/{self.name}/kernel"], np.float64)
        return array.reshape(-1, *array.shape[-2:])

    def offset(self, arrays: Arrays) -> np.ndarray:
        """Its bias, or zeros."""
        return self.vector(arrays, f"params/{self.name}/bias", 0.0)

    def non_constant(self, x: Vector) -> Mask:
        """Which of the channels that it reads give no constant."""
        return np.isnan(x) | (self.padded & (x != 0))


@dataclass(frozen=True)
class Linear(Layer):
    """A convolution in one group, or a dense layer: kernel (…, inputs, outputs)."""

    def constants(self, inputs: Sequence[Vector], arrays: Arrays) -> Vector:
        """Known where no channel that varies has a weight."""
        (x,), weights = inputs, self.kernel(arrays)
        non_constant = self.non_constant(x)
        known = np.where(non_constant, 0.0, x) @ weights.sum(axis=0) + self.offset(arrays)
        return np.where((weights[:, non_constant] != 0).any(axis=(0, 1)), np.nan, known)

    def reads(self, live: Mask, arrays: Arrays, channels: int) -> Mask:
        """Those with a weight."""
        return (self.kernel(arrays)[..., live] != 0).any(axis=(0, 2))

    def cut(self, arrays: Arrays, keep: Mapping[str, Mask]) -> dict[str, np.ndarray]:
        """The kernel both ways, and the bias."""
        path = f"params/{self.name}/kernel"
        kernel = arrays[path][..., keep[self.sources[0]], :][..., keep[self.name]]
        return {path: kernel, **super().cut(arrays, keep)}


@dataclass(frozen=True)
class DepthwiseConv(Layer):
    """A depth-wise convolution: kernel (…, 1, channels)."""

    def constants(self, inputs: Sequence[Vector], arrays: Arrays) -> Vector:
        """Known where a channel does not vary, or has no weight."""
        (x,), weights = inputs, self.kernel(arrays)[:, 0]
        read = (weights != 0).any(axis=0)
        known = np.where(read, x, 0.0) * weights.sum(axis=0) + self.offset(arrays)
        return np.where(read & self.non_constant(x), np.nan, known)

    def reads(self, live: Mask, arrays: Arrays, channels: int) -> Mask:
        """Those with a weight."""
        return live & (self.kernel(arrays)[:, 0] != 0).any(axis=0)

    def cut(self, arrays: Arrays, keep: Mapping[str, Mask]) -> dict[str, np.ndarray]:
        """The kernel and the bias."""
        path = f"params/{self.name}/kernel"
        return {path: arrays[path][..., keep[self.name]], **super().cut(arrays, keep)}


@dataclass(frozen=True)
class Norm(Node):
    """Batch normalization in evaluation: (x − mean) / √(var + epsilon) · scale + bias."""

    epsilon: float

    def constants(self, inputs: Sequence[Vector], arrays: Arrays) -> Vector:
        """Known where its input is, or is not looked at."""
        scale = self.vector(arrays, f"params/{self.name}/scale", 1.0)
        bias = self.vector(arrays, f"params/{self.name}/bias", 0.0)
        mean = self.vector(arrays, f"batch_stats/{self.name}/mean", 0.0)
        var = self.vector(arrays, f"batch_stats/{self.name}/var", 1.0)
        known = (inputs[0] - mean) / np.sqrt(var + self.epsilon) * scale + bias
        return np.where(scale == 0, bias, known)

    def reads(self, live: Mask, arrays: Arrays, channels: int) -> Mask:
        """Those that are scaled by anything but zero."""
        return live & (self.vector(arrays, f"params/{self.name}/scale", 1.0) != 0)


@dataclass(frozen=True)
class Function(Node):
    """What makes each channel of one channel of its source, or of none: relu, pooling, flattening.

    Attributes:
      function: the values of its channels from those of its source.
      channel_index: for each channel, which one of the source it is made of; −1: of none.
      reindexable: whether the model holds ``channel_index``, so that it can change and neither side
        ties the other; else a channel and those made of it stay or go together.
      channelwise: tells whether it does the same with a part of its channels, given which of the
        source's and which of its own are left; None: it does.
    """

    function: Callable[[Vector], Vector]
    channel_index: np.ndarray
    reindexable: bool = False
    channelwise: Callable[[Mask, Mask], bool] | None = None

    def constants(self, inputs: Sequence[Vector], arrays: Arrays) -> Vector:
        return self.function(inputs[0])

    def reads(self, live: Mask, arrays: Arrays, channels: int) -> Mask:
        """Those that it is made of."""
        read = np.zeros(channels, bool)
        read[self.channel_index[live & (self.channel_index >= 0)]] = True
        return read


@dataclass(frozen=True)
class Elementwise(Node):
    """Two sources combined channel by channel.

    Attributes:
      combine: the values of its channels from those of its sources.
      adds: whether that is a sum.
    """

    combine: Callable[[Vector, Vector], Vector]
    adds: bool = True

    def constants(self, inputs: Sequence[Vector], arrays: Arrays) -> Vector:
        return self.combine(*inputs)


class Graph:
    """Nodes in an order in which sources come first."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        """Takes the nodes, in their order."""
        self.nodes = {node.name: node for node in nodes}
        self.readers: dict[str, list[Node]] = {name: [] for name in self.nodes}
        for node in self.nodes.values():
            for source in node.sources:
                self.readers[source].append(node)

    def fix(self, reasons: Mapping[str, str]) -> "Graph":
        """The graph with some nodes `Pinned`, for reasons given by their names."""
        return Graph(
            Pinned(node.name, node.sources, node.channels, reasons[node.name])
            if node.name in reasons
            else node
            for node in self.nodes.values()
        )

    def only_reader(self, name: str) -> Node | None:
        """The reader of a node that has one."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 else None


class Builder:
    """Adds node after node; each method returns the name of its node.

    Example:
      >>> arrays = {"params/a/kernel": np.ones((1, 1, 3, 8)), "params/b/kernel": np.ones((8, 2))}
      >>> build = Builder(arrays)
      >>> hidden = build.apply(build.linear(build.images(3), "a"), "a_relu", lambda x: x)
      >>> _ = build.output(build.linear(hidden, "b"))
      >>> [(name, node.channels) for name, node in build.graph().nodes.items()]
      [('input', 3), ('a', 8), ('a_relu', 8), ('b', 2), ('output', 2)]
    """

    def __init__(self, arrays: Arrays) -> None:
        """Takes the arrays, for their shapes."""
        self._arrays, self._nodes = arrays, dict[str, Node]()

    def add(self, node: Node) -> str:
        """Any node."""
        self._nodes[node.name] = node
        return node.name

    def channels(self, name: str) -> int:
        """Channels of a node."""
        return self._nodes[name].channels

    def images(self, channels: int) -> str:
        """The input."""
        return self.add(Pinned("input", (), channels, "it is the input's"))

    def output(self, source: str) -> str:
        """The output."""
        return self.add(Pinned("output", (source,), self.channels(source), "it is the output's"))

    def linear(self, source: str, layer: str, padded: bool | None = None) -> str:
        """A convolution or dense layer; padded as in PyTorch by default: kernels wider than 1."""
        return self._layer(Linear, source, layer, padded)

    def depthwise_conv(self, source: str, layer: str, padded: bool | None = None) -> str:
        """A depth-wise convolution; padding as of `linear`."""
        return self._layer(DepthwiseConv, source, layer, padded)

    def _layer(self, kind: type[Layer], source: str, layer: str, padded: bool | None) -> str:
        *window, _, features = self._arrays[f"params/{layer}/kernel"].shape
        if padded is None:
            padded = any(size > 1 for size in window)
        bias = f"params/{layer}/bias" in self._arrays
        return self.add(kind(layer, (source,), features, padded, bias))

    def norm(self, source: str, layer: str, epsilon: float = 1e-5) -> str:
        """Batch normalization."""
        return self.add(Norm(layer, (source,), self.channels(source), epsilon))

    def apply(self, source: str, name: str, constants: Callable[[Vector], Vector]) -> str:
        """A function of each channel alone."""
        channel_index = np.arange(self.channels(source))
        node = Function(name, (source,), len(channel_index), constants, channel_index)
        return self.add(node)

    def graph(self) -> Graph:
        """What has been built."""
        return Graph(self._nodes.values())
