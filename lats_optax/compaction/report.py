"""What `compact` has cut, and what it could not, as a table."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lats_optax.compaction.graph import Arrays, DepthwiseConv, Function, Layer, Linear, Pinned
from lats_optax.compaction.plan import Plan


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
      pinned: the other layers that have to keep all channels that they read and write -> why.
      parameters_before: entries of all parameters.
      parameters_after: those that are left.
    """

    layers: tuple[LayerReport, ...]
    pinned: Mapping[str, str]
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
            f"{name} keeps all that it reads and writes: {why}" for name, why in self.pinned.items()
        ]
        return "\n".join(line.rstrip() for line in lines)


def report_of(plan: Plan, arrays: Arrays, small: Arrays) -> CompactReport:
    keep, writers, ends = plan.keep, _writers(plan), _ends(plan)
    layers, pinned = [], {}
    for name, node in plan.graph.nodes.items():
        if isinstance(node, Layer):
            idle = plan.groups[name][keep[name] & ~plan.live[name]].tolist()
            sizes = [
                sum(tree[path].size for path in _paths(node) if path in tree)
                for tree in (arrays, small)
            ]
            stays = _stays(plan, idle, writers, ends)
            row = LayerReport(name, node.channels, int(keep[name].sum()), sizes[0], sizes[1], stays)
            layers.append(row)
        elif isinstance(node, Pinned) and name not in ("input", "output"):
            pinned[name] = node.reason
    counts = [
        sum(array.size for path, array in tree.items() if path.startswith("params/"))
        for tree in (arrays, small)
    ]
    return CompactReport(tuple(layers), pinned, counts[0], counts[1])


def _paths(layer: Layer) -> list[str]:
    return [f"params/{layer.name}/{leaf}" for leaf in ("kernel", "bias")]


def _stays(
    plan: Plan, idle: list[int], writers: Mapping[int, list[str]], ends: Mapping[int, str]
) -> dict[str, int]:
    """Why some groups are kept: reason -> how many of them."""
    found = Counter[str]()
    others = Counter[str]()
    written = 0
    for group in idle:
        if group in plan.reasons:
            found[plan.reasons[group]] += 1
        elif group in writers:
            written += 1
            others.update(writers[group])
        else:
            where = "at the borders " * isinstance(plan.graph.nodes[ends[group]], DepthwiseConv)
            found[f"constant, but not {where}behind {ends[group]}"] += 1
    if written:
        most = [name for name, _ in others.most_common(2)]
        more = f", {len(others) - 2} more" if len(others) > 2 else ""
        found[f"written by {', '.join(most)}{more}"] = written
    return dict(found)


def _writers(plan: Plan) -> dict[int, list[str]]:
    """Of each group, what writes something to it that varies and is read."""
    found: dict[int, list[str]] = {}
    for name, node in plan.graph.nodes.items():
        if isinstance(node, Linear) or (isinstance(node, Function) and node.reindexable):
            for group in plan.groups[name][plan.live[name]].tolist():
                found.setdefault(group, []).append(name)
    return found


def _ends(plan: Plan) -> dict[int, str]:
    """Of each group, the first node in which it varies."""
    found: dict[int, str] = {}
    for name, live in plan.live.items():
        found |= dict.fromkeys(plan.groups[name][live].tolist(), name)  # live goes backwards
    return found


def _arrow(before: int, after: int, width: int) -> str:
    return f"{f'{before:,} → {after:,}' if before != after else f'{before:,}':>{width}}"
