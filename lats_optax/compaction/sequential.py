"""How a plain sequence of layers is wired: its convolutions, dense layers, norms and functions.

Here belongs what is found out about a ``flax.linen.Sequential``. Functions of which nothing is
known (activations, pooling, flattening, anyone's lambda) are run on numbers to see what they do.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lats_optax.compaction.graph import (
    Arrays,
    Builder,
    Function,
    Mask,
    Pinned,
    Vector,
)
from lats_optax.compaction.wiring import Wiring

LayerFunction = Callable[[Any], Any]


def wire_sequential(model: nn.Sequential, arrays: Arrays, sample: Any) -> Wiring:
    """The wiring of a sequence.

    Args:
      model: layers one after the other, in evaluation; sequences may be nested.
      arrays: its variables by path, of the right shapes.
      sample: what it is called with: its shape and dtype.

    Returns:
      Its `Wiring`.

    Raises:
      ValueError: a layer cannot be run in evaluation, or returns something that is no array.

    Example:
      >>> model = nn.Sequential([nn.Dense(4), nn.relu])
      >>> arrays = {"params/layers_0/kernel": np.ones((3, 4)), "params/layers_0/bias": np.ones(4)}
      >>> graph = wire_sequential(model, arrays, jax.ShapeDtypeStruct((1, 3), "float32")).graph
      >>> [type(node).__name__ for node in graph.nodes.values()]
      ['Pinned', 'Linear', 'Function', 'Pinned']
    """
    build = Builder(arrays)
    x, shape = build.images(sample.shape[-1]), sample
    layers = list(_layers(model))
    uses = Counter(id(layer) for _, layer in layers if isinstance(layer, nn.Module))
    paths: dict[int, str] = {}
    for path, layer in layers:
        # A module that comes twice has the name, and the arrays, of its first place.
        own = paths.setdefault(id(layer), path) if isinstance(layer, nn.Module) else path
        if type(layer) is nn.BatchNorm and layer.use_running_average is not True:
            raise ValueError(
                f"{own} (BatchNorm) normalizes with the statistics of the batch; allowed: "
                "use_running_average=True, as in evaluation."
            )
        run = _runner(layer, own, arrays)
        after = _shape(run, shape, f"{own} ({_kind(layer)})")
        if uses[id(layer)] > 1:
            reason = "its parameters are used in more than one place"
            x = build.add(Pinned(path, (x,), after.shape[-1], reason))
        else:
            x = _wire(build, layer, path, x, _Probe(run, shape, after))
        shape = after
    build.output(x)
    graph = build.graph()
    sizes = {
        name: node.channels for name, node in graph.nodes.items() if not isinstance(node, Pinned)
    }

    def rebuild(keep: Mapping[str, Mask]) -> nn.Module:
        kept = {name: int(keep[name].sum()) for name in sizes}
        changed = {name: count for name, count in kept.items() if count != sizes[name]}
        return _rebuilt(model, "", changed)

    return Wiring(graph, rebuild)


def _layers(model: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for index, layer in enumerate(model.layers):
        path = f"{prefix}layers_{index}"  # whatever name the layer was given
        if type(layer) is nn.Sequential:
            yield from _layers(layer, f"{path}/")
        else:
            yield path, layer


def _rebuilt(model: nn.Sequential, prefix: str, changed: Mapping[str, int]) -> nn.Sequential:
    layers = []
    for index, layer in enumerate(model.layers):
        path = f"{prefix}layers_{index}"
        if type(layer) is nn.Sequential:
            layer = _rebuilt(layer, f"{path}/", changed)
        elif path in changed and isinstance(layer, nn.Dense):
            layer = layer.clone(features=changed[path])
        elif path in changed and isinstance(layer, nn.Conv):
            groups = 1 if layer.feature_group_count == 1 else changed[path]
            layer = layer.clone(features=changed[path], feature_group_count=groups)
        layers.append(layer)
    return model.clone(layers=layers)


# --- one layer ----------------------------------------------------------------------------------


def _wire(build: Builder, layer: Any, path: str, x: str, probe: "_Probe") -> str:
    """Adds a layer's node; returns its name."""
    channels, features = build.channels(x), probe.after.shape[-1]

    def pinned(reason: str) -> str:
        return build.add(Pinned(path, (x,), features, reason))

    if type(layer) is nn.Dense:
        return build.linear(x, path, padded=False)
    if type(layer) is nn.Conv:
        groups = layer.feature_group_count
        if layer.mask is not None:
            return pinned("its kernel has a mask")
        if groups == 1:
            return build.linear(x, path, padded=_pads(layer))
        if groups == channels == features:
            return build.depthwise_conv(x, path, padded=_pads(layer))
        return pinned(f"its {groups} groups of channels have to stay equal")
    if type(layer) is nn.BatchNorm:
        if layer.axis not in (-1, len(probe.before.shape) - 1):
            return pinned(f"it normalizes axis {layer.axis}, not the last")
        return build.norm(x, path, layer.epsilon)
    if not jnp.issubdtype(probe.before.dtype, jnp.floating):
        return pinned("it takes integers")
    channel_index = probe.channel_index()
    if channel_index is None:
        return pinned("it mixes channels")
    node = Function(
        path,
        (x,),
        features,
        probe.constants(channel_index),
        channel_index,
        channelwise=probe.channelwise,
    )
    return build.add(node)


def _pads(layer: nn.Conv) -> bool:
    """Whether the kernel meets zeros that are not of the input: beyond borders, or in between."""
    if np.any(np.asarray(layer.input_dilation or 1) != 1):
        return True
    padding: Any = layer.padding
    if isinstance(padding, str):
        wide = np.any(np.asarray(layer.kernel_size) != 1)
        return bool(wide) and padding not in ("VALID", "CIRCULAR", "REFLECT")
    sides = padding if isinstance(padding, Sequence) else [padding]
    return any(np.any(np.asarray(side) != 0) for side in sides)


def _runner(layer: Any, path: str, arrays: Arrays) -> LayerFunction:
    if not isinstance(layer, nn.Module):
        return layer
    own: dict[str, Any] = {}
    for name, array in arrays.items():
        collection, _, rest = name.partition("/")
        if rest.startswith(f"{path}/"):
            own[f"{collection}/{rest.removeprefix(f'{path}/')}"] = array
    variables = traverse_util.unflatten_dict(own, sep="/")  # type: ignore[no-untyped-call]
    return lambda x: layer.apply(variables, x)


def _shape(run: LayerFunction, before: Any, what: str) -> Any:
    try:
        after = jax.eval_shape(run, before)
    except Exception as error:
        raise ValueError(f"{what} cannot be run in evaluation: {error}") from error
    if not isinstance(after, jax.ShapeDtypeStruct) or not after.shape:
        raise ValueError(f"{what} returns {after}; allowed: an array whose last axis is channels.")
    return after


def _kind(layer: Any) -> str:
    return (
        type(layer).__name__
        if isinstance(layer, nn.Module)
        else getattr(layer, "__name__", repr(layer))
    )


# --- functions whose behavior is probed ---------------------------------------------------------


@dataclass(frozen=True)
class _Probe:
    """Finds out how channels go through a function, by running it.

    Attributes:
      run: the function.
      before: shape and dtype of its input.
      after: those of its output.
    """

    run: LayerFunction
    before: Any
    after: Any

    def draws(self) -> list[np.ndarray]:
        """Inputs of either sign and of several magnitudes, the same ones at every call."""
        rng = np.random.default_rng(0)
        scales = 10.0 ** rng.uniform(-1, 1.5, size=(4, *self.before.shape))
        return list(scales * rng.normal(size=scales.shape))

    def output(self, x: np.ndarray) -> np.ndarray:
        """What the function makes of an input, as (positions, channels)."""
        y = np.asarray(self.run(jnp.asarray(x, self.dtype)), np.float64)
        return y.reshape(-1, y.shape[-1])

    @property
    def dtype(self) -> Any:
        """That of the input, or float32 if that is shorter."""
        return jnp.promote_types(self.before.dtype, jnp.float32)

    def even(self, difference: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Whether numbers differ by rounding alone: sums are rounded according to their place."""
        return difference <= 16 * float(np.finfo(self.dtype).eps) * size

    def channel_index(self) -> np.ndarray | None:
        """For each channel of the output the one of the input that it is made of.

        None if there is one that is made of several, or of none that could be seen. Half of the
        channels are changed at a time: those whose number has a certain bit, then the others. What
        is made of one channel changes with one half, and all bits together are its number.
        """
        channels = self.before.shape[-1]
        first, second, *_ = self.draws()
        plain = self.output(first)
        channel_index = np.zeros(plain.shape[-1], int)
        for bit in range(max(1, (channels - 1).bit_length())):
            half = np.arange(channels) >> bit & 1 == 1
            sides = []
            for changed in (half, ~half):
                # NaN gets through where another number may round, or be cut, to the same; other
                # numbers get through where a comparison drops NaN.
                seen = np.isnan(self.output(np.where(changed, np.nan, first)))
                for other in (second, -first):
                    seen |= self.output(np.where(changed, other, first)) != plain
                sides.append(seen.any(axis=0))
            if (sides[0] == sides[1]).any():
                return None
            channel_index |= sides[0] << bit
        return channel_index if (channel_index < channels).all() else None

    def constants(self, channel_index: np.ndarray) -> Callable[[Vector], Vector]:
        """The function on constant maps: known where the result is the same at all positions."""

        def function(known: Vector) -> Vector:
            y = self.output(np.where(np.isnan(known), self.draws()[0], known))
            even = self.even(np.abs(y - y[0]).max(axis=0), np.abs(y).max(axis=0))
            return np.where(even & ~np.isnan(known[channel_index]), y[0], np.nan)

        return function

    def channelwise(self, inputs: Mask, outputs: Mask) -> bool:
        """Whether it does the same with a part of the channels."""
        if inputs.all() and outputs.all():
            return True
        for x in self.draws():
            try:
                part = self.output(x[..., inputs])
            except Exception:
                return False
            whole = self.output(x)[:, outputs]
            if part.shape != whole.shape:
                return False
            if not self.even(np.abs(part - whole), np.abs(whole).max(axis=0)).all():
                return False
        return True
