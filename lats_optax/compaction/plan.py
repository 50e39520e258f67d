"""Which channels of a graph are kept, and why.

Here belongs what may be cut. How channels flow through a model is in `graph.py`; where the
constants go of those that are cut, in `fold.py`.
"""

import numpy as np

from lats_optax.compaction.graph import (
    Arrays,
    Elementwise,
    Function,
    Graph,
    Layer,
    Linear,
    Mask,
    Node,
    Norm,
    Pinned,
    Vector,
)
from lats_optax.compaction.groups import dependency_groups

# A constant stands for others if it is not much smaller than the largest of them: it is rounded.
_STRONG = 1 / 16


class Plan:
    """Which channels of a graph are kept, and why.

    Attributes:
      values: the constant value of each node's channels; NaN for a channel that varies.
      live: which of them vary and are read, on some way to the output.
      groups: of each node's channels, the number of the group that it shares with other nodes': a
        group is kept or cut as a whole.
      reasons: of the groups that are kept whether or not anything in them is live, why.
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
        self.groups, self._count = dependency_groups(graph)
        self.reasons: dict[int, str] = {}
        self._kept = np.zeros(self._count, bool)
        for node in graph.nodes.values():
            if isinstance(node, Pinned):
                for name in (node.name, *node.sources):
                    self._keep(self.groups[name], _why(node, name))
        for name, live in self.live.items():
            self._kept[self.groups[name][live]] = True
        while self._keep_constants():
            pass

    @property
    def keep(self) -> dict[str, Mask]:
        """Which channels of each node are kept."""
        return {name: self._kept[groups] for name, groups in self.groups.items()}

    def round_up(self, multiple: int) -> None:
        """Keeps more channels, so that those of each layer are a multiple, or all."""
        settled = False
        while not settled:
            settled = True
            for name, node in self.graph.nodes.items():
                cut = np.flatnonzero(~self._kept[self.groups[name]])
                missing = min(-(node.channels - len(cut)) % multiple, len(cut))
                if isinstance(node, Layer) and missing:
                    groups = self.groups[name][cut[:missing]]
                    self._keep(groups, f"for a multiple of {multiple}")
                    settled = False

    def broken(self) -> dict[str, str]:
        """Functions that do something else with fewer channels, and what to say of them."""
        keep, found = self.keep, {}
        for name, node in self.graph.nodes.items():
            if isinstance(node, Function) and node.channelwise is not None:
                inputs = keep[node.sources[0]]
                if not node.channelwise(inputs, keep[name]):
                    found[name] = f"it is made for {len(inputs)} channels"
        return found

    def lost(self, node: Node) -> Vector:
        """The constants of its source that it reads no more, 0 for every other channel."""
        (source,) = node.sources
        values, cut = self.values[source], ~self._kept[self.groups[source]]
        return np.where(cut & ~np.isnan(values), values, 0.0)

    def folding_bias(self, node: Node) -> tuple[str, int] | None:
        """An array to which a change of this node's constants can go, and with which sign."""
        if isinstance(node, Layer) and node.bias:
            return f"params/{node.name}/bias", 1
        reader = self.graph.only_reader(node.name)
        if isinstance(reader, Norm):
            return f"batch_stats/{reader.name}/mean", -1
        if isinstance(reader, Elementwise) and reader.adds:
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
            own = self._kept[self.groups[node.name]]
            lost = np.where(node.reads(own, self.arrays, len(lost)), lost, 0.0)
            taken = not node.padded and self.folding_bias(node) is not None
        elif isinstance(node, Function) and node.reindexable:
            taken = self.folding_bias(node) is not None
        else:
            taken = True
        if taken or not lost.any():
            return np.zeros(len(lost))
        found = np.minimum(np.abs(np.nan_to_num(values)) / np.abs(lost).max(), 1)
        return np.where(found < _STRONG, 0.0, found)

    def representative(self, node: Node) -> int | None:
        """The channel of its source that stands for those that are lost; None if none has to."""
        strength = self.strength(node) * self._kept[self.groups[node.sources[0]]]
        return int(strength.argmax()) if strength.any() else None

    def _live(self) -> dict[str, Mask]:
        live: dict[str, Mask] = {}
        for name, node in reversed(self.graph.nodes.items()):
            read = np.zeros(node.channels, bool)
            for reader in self.graph.readers[name]:
                read |= reader.reads(live[reader.name], self.arrays, node.channels)
            live[name] = np.isnan(self.values[name]) & read
        return live

    def _keep(self, groups: np.ndarray, reason: str) -> None:
        for group in np.unique(groups[~self._kept[groups]]).tolist():
            self.reasons[group] = reason
        self._kept[groups] = True

    def _keep_constants(self) -> bool:
        """Keeps what readers need that cannot take up constants; False if nothing is missing."""
        needy: dict[str, Vector] = {}
        for name, node in self.graph.nodes.items():
            if isinstance(node, Linear | Function):
                strength = self.strength(node)
                if isinstance(node, Function) and strength.any():
                    # It has no arrays by which one channel could stand for another.
                    lost = self.lost(node) != 0
                    self._keep(self.groups[node.sources[0]][lost], f"{name} brings it on")
                    return True
                if strength.any() and self.representative(node) is None:
                    needy[name] = strength
        found = bool(needy)
        while needy:
            # The group that serves most readers of its residual stream best.
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
        return self.groups[self.graph.nodes[name].sources[0]]


def _why(node: Pinned, name: str) -> str:
    return node.reason if node.name in (name, "output") else f"{node.name} reads it"
