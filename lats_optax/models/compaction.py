"""A smaller dense model with the outputs of one of which channels are zero, constant or not read.

Here belongs what may be cut, where constants go that are cut, and the report. How channels flow
through a model is in `graph.py`, `wiring.py` and `sequential.py`.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lats_optax.models.graph import (
    Arrays,
    Fixed,
    Function,
    Graph,
    Join,
    Layer,
    Linear,
    Mask,
    Node,
    Norm,
    PerChannel,
    Vector,
)
from lats_optax.models.sequential import wire_sequential
from lats_optax.models.wiring import WIRED, wire


@dataclass(frozen=True)
class LayerReport:
    """One convolution or dense layer.

    Attributes:
      layer: its path.
      before: channels of its output.
      after: those that are left.
      parameters_before: entries of its kernel and bias.
      parameters_after: those that are left.
      stays: why channels are left that compute nothing: reason -> how many.
    """

    layer: str
    before: int
    after: int
    parameters_before: int
    parameters_after: int
    stays: Mapping[str, int]


@dataclass(frozen=True)
class CompactReport:
    """What was cut, and what could not be; ``str()`` is the table.

    Attributes:
      layers: one entry for each convolution and dense layer that can be cut, in their order.
      fixed: the other layers that have to keep all channels that they read and write -> why.
      parameters_before: entries of all parameters.
      parameters_after: those that are left.
    """

    layers: tuple[LayerReport, ...]
    fixed: Mapping[str, str]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        """The table."""
        names = max(len(name) for name in ["all parameters", *(row.layer for row in self.layers)])
        head = f"{'layer':<{names}}  {'channels':>14}  {'parameters':>25}  stay, computing nothing"
        rule = "-" * len(head)
        lines = [head, rule]
        for row in self.layers:
            stays = "; ".join(f"{count}: {reason}" for reason, count in row.stays.items())
            lines.append(
                f"{row.layer:<{names}}  {_arrow(row.before, row.after, 14)}  "
                f"{_arrow(row.parameters_before, row.parameters_after, 25)}  {stays}"
            )
        total = _arrow(self.parameters_before, self.parameters_after, 25)
        lines += [rule, f"{'all parameters':<{names}}  {'':>14}  {total}"]
        lines += [
            f"{name} keeps all that it reads and writes: {why}" for name, why in self.fixed.items()
        ]
        return "\n".join(line.rstrip() for line in lines)


class Compacted(NamedTuple):
    """What `compact` returns.

    Attributes:
      model: of the class of the one that was given, with fewer channels.
      variables: ``{"params": …, "batch_stats": …}``, NumPy arrays of the dtypes that were given.
      report: what was cut.
    """

    model: Any
    variables: dict[str, Any]
    report: CompactReport


def compact(
    model: nn.Module, variables: Mapping[str, Any], *, sample: Any = None, multiple_of: int = 1
) -> Compacted:
    """A physically smaller model with the same outputs in evaluation, to float tolerance.

    A channel is cut where, in every layer that shares it (a residual stream, a depth-wise
    convolution, a normalisation), it is the same number whatever the input is, or nobody reads it.
    Behind a normalisation that number is rarely zero: it goes into the bias, or the mean of the
    normalisation, of what read it. What cannot take it up (a convolution that is padded with zeros,
    a classifier without a bias) keeps one constant channel that stands for all of them.

    The model that comes back can be trained on, saved and, if it is of the zoo, built again:
    ``models.create(**models.describe(model))``. In training it is not the same as before: there,
    constant channels are normalised by the batch.

    Args:
      model: one of the zoo's, or a ``flax.linen.Sequential`` of convolutions, dense layers, batch
        normalisation in evaluation and functions. Other modules keep their channels.
      variables: ``{"params": …, "batch_stats": …}``, with zeros for what has been pruned.
      sample: an input of a ``Sequential``, or a ``jax.ShapeDtypeStruct`` of one; a batch of one is
        enough. The zoo needs none.
      multiple_of: what the channels of each layer are rounded up to, but not beyond what it had,
        by keeping some that compute nothing. Hardware multiplies whole tiles, so that a layer of 38
        channels may take longer than one of 48: `benchmarks/compaction.py` measures it.

    Returns:
      A `Compacted`.

    Raises:
      ValueError: ``model`` is of a class of which the wiring is not known; ``variables`` are not
        those of the model, or not finite; a ``Sequential`` has no sample, or cannot be run on it;
        layers would be left without a channel; ``multiple_of`` < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
      >>> x = jnp.array([[1.0, -2.0, 3.0]])
      >>> variables = model.init(jax.random.key(0, impl="rbg"), x)
      >>> kernel = variables["params"]["layers_0"]["kernel"]
      >>> variables["params"]["layers_0"]["kernel"] = kernel.at[:, 1:3].set(0)
      >>> small = compact(model, variables, sample=x)
      >>> print(small.report)
      layer             channels   parameters  stay, computing nothing
      ...
      >>> bool(jnp.allclose(small.model.apply(small.variables, x), model.apply(variables, x)))
      True
    """
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of!r}; allowed: a whole number of 1 or more.")
    arrays = _checked(model, variables, sample)
    # Variances below zero, or numbers that overflow, become NaN: channels that vary.
    with np.errstate(all="ignore"):
        if isinstance(model, nn.Sequential):
            wiring = wire_sequential(model, arrays, sample)
        else:
            wiring = wire(model, arrays)  # type: ignore[arg-type]
        graph = wiring.graph
        while True:
            cut = _Cut(graph, arrays)
            _refuse_empty(cut)
            cut.round_up(multiple_of)
            broken = cut.broken()
            if not broken:
                break
            graph = graph.fix(broken)
        folded = _fold(cut, arrays)
    small, keep = dict(folded), cut.keep
    for node in graph.nodes.values():
        small |= node.cut(folded, keep)
    report = _report(cut, arrays, small)
    tree = traverse_util.unflatten_dict(small, sep="/")  # type: ignore[no-untyped-call]
    return Compacted(wiring.rebuild(keep), tree, report)


def _checked(model: nn.Module, variables: Mapping[str, Any], sample: Any) -> dict[str, np.ndarray]:
    """The variables by path, after comparing them with those that the model would make."""
    known = type(model) in WIRED
    if not known and type(model) is not nn.Sequential:
        names = ", ".join(kind.__name__ for kind in [*WIRED, nn.Sequential])
        raise ValueError(f"model is {type(model).__name__}; allowed: {names}.")
    if not isinstance(variables, Mapping):
        raise ValueError(f"variables is {variables!r}; allowed: a dict with params in it.")
    unboxed = nn.meta.unbox(variables)
    flat = traverse_util.flatten_dict(unboxed, sep="/")  # type: ignore[no-untyped-call]
    arrays = {path: np.array(leaf) for path, leaf in flat.items()}
    if known:
        first = arrays.get(f"params/{next(iter(model.plan()))}/kernel", np.zeros((3, 0)))
        channels = first.shape[-2] if first.ndim > 1 else 3
        init = partial(model.init, train=False)
        sample = np.zeros((1, 32, 32, channels), np.float32) if sample is None else sample
    elif sample is None:
        raise ValueError("sample is None; allowed with a Sequential: an input, or its shape.")
    else:
        init = partial(model.init)
    try:
        shapes = jax.eval_shape(init, jax.random.key(0), sample)
    except Exception as error:
        raise ValueError(f"sample: the model cannot be called with it: {error}") from error
    wanted = traverse_util.flatten_dict(shapes, sep="/")  # type: ignore[no-untyped-call]
    problems = [f"{path} is missing" for path in wanted if path not in arrays]
    for path, array in arrays.items():
        if path not in wanted:
            problems.append(f"{path} is unknown, {array.shape}")
        elif array.shape != wanted[path].shape:
            problems.append(f"{path} is {array.shape}, wanted {wanted[path].shape}")
        elif not np.isfinite(np.asarray(array, np.float64)).all():
            problems.append(f"{path} is not finite")
    if problems:
        problems.sort()
        raise ValueError("\n  ".join(["variables do not fit the model:", *problems]))
    return arrays


# --- what is cut --------------------------------------------------------------------------------

# A constant stands for others if it is not much smaller than the largest of them: it is rounded.
_STRONG = 1 / 16


class _Cut:
    """Which channels of a graph are kept, and why.

    Attributes:
      values: of each node's channels, the number that it is whatever the input; NaN if it varies.
      live: which of them vary and are read, on some way to the output.
      spaces: of each node's channels, the number of the space that it shares with other nodes': a
        space is kept or cut as a whole.
      keep: which channels of each node are kept.
      reasons: of the spaces that are kept whether or not anything in them is live, why.
    """

    def __init__(self, graph: Graph, arrays: Arrays) -> None:
        self.graph, self.arrays = graph, arrays
        self.values: dict[str, Vector] = {}
        for name, node in graph.nodes.items():
            inputs = [self.values[source] for source in node.sources]
            known = node.constants(inputs, arrays)
            # What overflows is left alone.
            self.values[name] = np.where(np.isfinite(known), known, np.nan)
        self.live = self._live()
        self.spaces, self._count = _spaces(graph)
        self.reasons: dict[int, str] = {}
        self._kept = np.zeros(self._count, bool)
        for node in graph.nodes.values():
            if isinstance(node, Fixed):
                for name in (node.name, *node.sources):
                    self._keep(self.spaces[name], _why(node, name))
        for name, live in self.live.items():
            self._kept[self.spaces[name][live]] = True
        while self._keep_constants():
            pass

    @property
    def keep(self) -> dict[str, Mask]:
        return {name: self._kept[spaces] for name, spaces in self.spaces.items()}

    def round_up(self, multiple: int) -> None:
        """Keeps more channels, so that those of each layer are a multiple, or all."""
        settled = False
        while not settled:
            settled = True
            for name, node in self.graph.nodes.items():
                cut = np.flatnonzero(~self._kept[self.spaces[name]])
                missing = min(-(node.channels - len(cut)) % multiple, len(cut))
                if isinstance(node, Layer) and missing:
                    spaces = self.spaces[name][cut[:missing]]
                    self._keep(spaces, f"for a multiple of {multiple}")
                    settled = False

    def broken(self) -> dict[str, str]:
        """Functions that do something else with fewer channels, and what to say of them."""
        keep, found = self.keep, {}
        for name, node in self.graph.nodes.items():
            if isinstance(node, Function) and node.survives is not None:
                inputs = keep[node.sources[0]]
                if not node.survives(inputs, keep[name]):
                    found[name] = f"it is made for {len(inputs)} channels"
        return found

    def lost(self, node: Node) -> Vector:
        """The constants of its source that it reads no more, 0 for every other channel."""
        (source,) = node.sources
        values, cut = self.values[source], ~self._kept[self.spaces[source]]
        return np.where(cut & ~np.isnan(values), values, 0.0)

    def absorber(self, node: Node) -> tuple[str, int] | None:
        """An array to which a change of this node's constants can go, and with which sign."""
        if isinstance(node, Layer) and node.bias:
            return f"params/{node.name}/bias", 1
        reader = self.graph.only_reader(node.name)
        if isinstance(reader, Norm):
            return f"batch_stats/{reader.name}/mean", -1
        if isinstance(reader, Join) and reader.adds:
            for other in reader.sources:
                path = f"params/{other}/bias"
                alone = self.graph.only_reader(other) is reader
                if other != node.name and alone and path in self.arrays:
                    return path, 1
        return None

    def strength(self, node: Node) -> Vector:
        """How well each channel of its source could stand for those that are lost: 0 to 1.

        All zeros if nothing is lost that this node cannot take up.
        """
        values, lost = self.values[node.sources[0]], self.lost(node)
        if not lost.any():
            return lost
        if isinstance(node, Linear):
            own = self._kept[self.spaces[node.name]]
            lost = np.where(node.reads(own, self.arrays, len(lost)), lost, 0.0)
            taken = not node.padded and self.absorber(node) is not None
        elif isinstance(node, Function) and node.movable:
            taken = self.absorber(node) is not None
        else:
            taken = True
        if taken or not lost.any():
            return np.zeros(len(lost))
        found = np.minimum(np.abs(np.nan_to_num(values)) / np.abs(lost).max(), 1)
        return np.where(found < _STRONG, 0.0, found)

    def stand_in(self, node: Node) -> int | None:
        """The channel of its source that stands for those that are lost; None if none has to."""
        strength = self.strength(node) * self._kept[self.spaces[node.sources[0]]]
        return int(strength.argmax()) if strength.any() else None

    def _live(self) -> dict[str, Mask]:
        live: dict[str, Mask] = {}
        for name, node in reversed(self.graph.nodes.items()):
            read = np.zeros(node.channels, bool)
            for reader in self.graph.readers[name]:
                read |= reader.reads(live[reader.name], self.arrays, node.channels)
            live[name] = np.isnan(self.values[name]) & read
        return live

    def _keep(self, spaces: np.ndarray, reason: str) -> None:
        for space in np.unique(spaces[~self._kept[spaces]]).tolist():
            self.reasons[space] = reason
        self._kept[spaces] = True

    def _keep_constants(self) -> bool:
        """Keeps what readers need that cannot take up constants; False if nothing is missing."""
        needy: dict[str, Vector] = {}
        for name, node in self.graph.nodes.items():
            if isinstance(node, Linear | Function):
                strength = self.strength(node)
                if isinstance(node, Function) and strength.any():
                    # It has no arrays by which one channel could stand for another.
                    lost = self.lost(node) != 0
                    self._keep(self.spaces[node.sources[0]][lost], f"{name} brings it on")
                    return True
                if strength.any() and self.stand_in(node) is None:
                    needy[name] = strength
        found = bool(needy)
        while needy:
            # The space that serves most readers of its residual stream best.
            scores = np.zeros(self._count)
            for name, strength in needy.items():
                np.add.at(scores, self._inputs(name), strength)
            best = int(scores.argmax())
            served = [n for n, s in needy.items() if s[self._inputs(n) == best].any()]
            more = f" and {len(served) - 1} more" if len(served) > 1 else ""
            self._keep(np.array([best]), f"stands for the constants of {served[0]}{more}")
            needy = {name: s for name, s in needy.items() if name not in served}
        return found

    def _inputs(self, name: str) -> np.ndarray:
        return self.spaces[self.graph.nodes[name].sources[0]]


def _why(node: Fixed, name: str) -> str:
    return node.reason if node.name in (name, "output") else f"{node.name} reads it"


def _spaces(graph: Graph) -> tuple[dict[str, np.ndarray], int]:
    """The number of the space of each node's channels, and how many spaces there are."""
    starts, total = {}, 0
    for name, node in graph.nodes.items():
        starts[name] = total
        total += node.channels
    ties = [np.zeros((2, 0), int)]
    for name, node in graph.nodes.items():
        own = np.arange(node.channels)
        for source in node.sources:
            if isinstance(node, Norm | PerChannel | Join):
                ties.append(np.stack([starts[name] + own, starts[source] + own]))
            elif isinstance(node, Function) and not node.movable:
                made = node.places >= 0
                other = starts[source] + node.places[made]
                ties.append(np.stack([starts[name] + own[made], other]))
    ends = np.concatenate(ties, axis=1)
    matrix = coo_array((np.ones(ends.shape[1]), tuple(ends)), shape=(total, total))
    count, labels = connected_components(matrix, directed=False)
    found = {
        name: labels[start : start + graph.nodes[name].channels] for name, start in starts.items()
    }
    return found, count


def _refuse_empty(cut: _Cut) -> None:
    nodes = cut.graph.nodes.items()
    keep = cut.keep
    empty = [name for name, node in nodes if isinstance(node, Layer) and not keep[name].any()]
    if empty:
        raise ValueError(
            f"variables leave no channel in {', '.join(empty)}: what the model computes does not "
            "depend on these layers. Allowed: at least one channel in each that is not zero and is "
            "read; prune these layers less, or leave them out."
        )


# --- where constants go -------------------------------------------------------------------------


def _fold(cut: _Cut, arrays: Arrays) -> dict[str, np.ndarray]:
    """The arrays, of full size, with what the constants contributed that are cut."""
    folded = dict(arrays)

    def change(path: str, amount: np.ndarray) -> None:
        wide = np.asarray(folded[path], np.float64) + amount
        folded[path] = wide.astype(arrays[path].dtype)

    for node in cut.graph.nodes.values():
        if not (isinstance(node, Linear) or (isinstance(node, Function) and node.movable)):
            continue
        lost = cut.lost(node)
        if not lost.any():
            continue
        stand_in = cut.stand_in(node)
        if stand_in is not None and isinstance(node, Linear):
            value = cut.values[node.sources[0]][stand_in]
            kernel = np.asarray(arrays[f"params/{node.name}/kernel"], np.float64)
            amount = np.zeros_like(kernel)
            amount[..., stand_in, :] = np.tensordot(kernel, lost / value, axes=(-2, 0))
            change(f"params/{node.name}/kernel", amount)
            continue
        absorber = cut.absorber(node)
        if absorber is not None and not (isinstance(node, Linear) and node.padded):
            path, sign = absorber
            if isinstance(node, Linear):
                shift = lost @ node.kernel(arrays).sum(axis=0)
            else:
                assert isinstance(node, Function)
                shift = np.append(lost, 0.0)[node.places]
            change(path, sign * shift)
    return folded


# --- the report ---------------------------------------------------------------------------------


def _report(cut: _Cut, arrays: Arrays, small: Arrays) -> CompactReport:
    keep, writers, ends = cut.keep, _writers(cut), _ends(cut)
    layers, fixed = [], {}
    for name, node in cut.graph.nodes.items():
        if isinstance(node, Layer):
            idle = cut.spaces[name][keep[name] & ~cut.live[name]].tolist()
            sizes = [
                sum(tree[path].size for path in _paths(node) if path in tree)
                for tree in (arrays, small)
            ]
            stays = _stays(cut, idle, writers, ends)
            row = LayerReport(name, node.channels, int(keep[name].sum()), sizes[0], sizes[1], stays)
            layers.append(row)
        elif isinstance(node, Fixed) and name not in ("input", "output"):
            fixed[name] = node.reason
    counts = [
        sum(array.size for path, array in tree.items() if path.startswith("params/"))
        for tree in (arrays, small)
    ]
    return CompactReport(tuple(layers), fixed, counts[0], counts[1])


def _paths(layer: Layer) -> list[str]:
    return [f"params/{layer.name}/{leaf}" for leaf in ("kernel", "bias")]


def _stays(
    cut: _Cut, idle: list[int], writers: Mapping[int, list[str]], ends: Mapping[int, str]
) -> dict[str, int]:
    """Why some spaces are kept: reason -> how many of them."""
    found = Counter[str]()
    others = Counter[str]()
    written = 0
    for space in idle:
        if space in cut.reasons:
            found[cut.reasons[space]] += 1
        elif space in writers:
            written += 1
            others.update(writers[space])
        else:
            where = "at the borders " * isinstance(cut.graph.nodes[ends[space]], PerChannel)
            found[f"constant, but not {where}behind {ends[space]}"] += 1
    if written:
        most = [name for name, _ in others.most_common(2)]
        more = f", {len(others) - 2} more" if len(others) > 2 else ""
        found[f"written by {', '.join(most)}{more}"] = written
    return dict(found)


def _writers(cut: _Cut) -> dict[int, list[str]]:
    """Of each space, what writes something to it that varies and is read."""
    found: dict[int, list[str]] = {}
    for name, node in cut.graph.nodes.items():
        if isinstance(node, Linear) or (isinstance(node, Function) and node.movable):
            for space in cut.spaces[name][cut.live[name]].tolist():
                found.setdefault(space, []).append(name)
    return found


def _ends(cut: _Cut) -> dict[int, str]:
    """Of each space, the first node in which it varies."""
    found: dict[int, str] = {}
    for name, live in cut.live.items():
        found |= dict.fromkeys(cut.spaces[name][live].tolist(), name)  # live goes backwards
    return found


def _arrow(before: int, after: int, width: int) -> str:
    return f"{f'{before:,} → {after:,}' if before != after else f'{before:,}':>{width}}"
