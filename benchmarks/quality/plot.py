"""The plot of the quality benchmark: metric over density, a panel a task, a line a method.

python -m benchmarks.quality.plot benchmarks/results/quality.jsonl quality.png
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quality.results import DENSE, OURS, read
from benchmarks.quality.scores import Scores, in_order, scores
from lats_optax.plots.style import figure, line_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL = (5.0, 3.9)  # inches
# As many as have no factor in common with the six colors: a pair comes again after 66 methods.
_MARKERS = "sD^vPX*<>ph"
# How far below our default a panel goes, in its distances from the dense model: what is further
# down would leave no room for the differences above.
_DEPTH = 1.0
# What is left above the best mean, as a part of the rest.
_MARGIN = 0.15
# Points of one density stand side by side, so that their intervals can be read: as a factor.
_SIDE_BY_SIDE = 1.012


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws the plot."""
    parser = argparse.ArgumentParser(
        "benchmarks.quality.plot", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", type=Path, help="a file that benchmarks.quality wrote")
    parser.add_argument("plot", type=Path, help="the PNG to write")
    options = parser.parse_args(arguments)
    if not options.results.exists():
        parser.error(f"there is no file {options.results}")
    try:
        tasks = scores(read(options.results)[0])
    except ValueError as error:
        parser.error(str(error))
    if not tasks:
        parser.error(f"{options.results} has no run of the test split")
    draw(tasks, options.plot)
    return 0


def draw(tasks: Sequence[Scores], path: Path) -> None:
    """Writes the plot.

    Args:
      tasks: a panel each, two in a row.
      path: of the PNG.
    """
    columns = min(len(tasks), 2)
    rows = math.ceil(len(tasks) / columns)
    methods = in_order([OURS, *(method for task in tasks for method in task.methods)])
    lines = 1 + math.ceil((len(methods) + 1) / (2 * columns))
    size = (_PANEL[0] * columns, _PANEL[1] * rows + 0.25 * lines)
    with figure(path, size) as whole:
        handles: dict[str, Any] = {}
        panels = whole.subplots(rows, columns, squeeze=False).ravel()
        for axes, task in zip(panels, tasks):
            _panel(axes, task, methods, handles)
        for axes in panels[len(tasks) :]:
            axes.remove()
        order = [name for name in (DENSE, *methods) if name in handles]
        whole.legend(
            [handles[name] for name in order],
            order,
            loc="outside lower center",
            ncols=min(2 * columns, len(order)),
            frameon=False,
        )


def _panel(axes: "Axes", task: Scores, methods: Sequence[str], handles: dict[str, Any]) -> None:
    scale = 100 if task.metric == "accuracy" else 1
    low, high = _limits(task, scale)
    if task.dense is not None:
        dense = task.dense.interval
        line = axes.axhline(scale * dense.mean, color="0.45", linestyle=(0, (4, 3)), linewidth=1.5)
        handles.setdefault(DENSE, line)
    present = [name for name in methods if name in task.methods]
    for index, method in enumerate(present):
        found = [
            (target, task.cells[method, target].interval)
            for target in task.targets
            if task.comparable(method, target)
        ]
        if not found:
            continue
        side = _SIDE_BY_SIDE ** (0 if method == OURS else index - len(present) / 2)
        x = [100 * (1 - target) * side for target, _ in found]
        y = [scale * own.mean for _, own in found]
        widths = [scale * (0 if own.seeds < 2 else own.half_width) for _, own in found]
        style = _style(methods.index(method))
        if method == OURS:
            below, above = ([m + sign * w for m, w in zip(y, widths)] for sign in (-1, 1))
            axes.fill_between(x, below, above, color=style["color"], alpha=0.15, linewidth=0)
            (line,) = axes.plot(x, y, **style, linewidth=3, markersize=7, zorder=5)
        else:
            # An interval without its mean would be a line from nowhere.
            widths = [w if low <= m <= high else math.nan for m, w in zip(y, widths)]
            bars = axes.errorbar(x, y, widths, **style, markersize=5, linewidth=1.4, elinewidth=1)
            line = bars.lines[0]
        handles.setdefault(method, line)
    unit = "test accuracy, %" if task.metric == "accuracy" else "bits per character"
    better = "" if task.higher_is_better else ", lower is better"
    axes.set_title(f"{task.task}: {unit}{better}")
    axes.set_xscale("log")
    axes.set_xlabel("weights that are not zero, %")
    ticks = [100 * (1 - target) for target in task.targets]
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    if math.isfinite(low):
        axes.set_ylim(low, high)


def _style(index: int) -> dict[str, Any]:
    """Color, line and marker: black for the first, our default, and for no other."""
    if index == 0:
        return {**line_style(0), "marker": "o"}
    turn, place = divmod(index - 1, 6)
    return {**line_style(1 + place + 7 * turn), "marker": _MARKERS[(index - 1) % len(_MARKERS)]}


def _limits(task: Scores, scale: float) -> tuple[float, float]:
    """The values that a panel shows, without what is far worse than our default.

    Intervals beyond the best mean are cut off too. Infinite where there is nothing to compare with.
    """
    means = {
        key: scale * cell.interval.mean for key, cell in task.cells.items() if task.comparable(*key)
    }
    ours = [mean for (method, _), mean in means.items() if method == OURS]
    if task.dense is None or not ours:
        return -math.inf, math.inf
    dense = scale * task.dense.interval.mean
    sign = 1 if task.higher_is_better else -1
    best = sign * max(sign * mean for mean in [dense, *means.values()])
    last = sign * min(sign * mean for mean in ours)
    far = last - sign * _DEPTH * abs(last - dense)
    if best == far:
        return -math.inf, math.inf
    low, high = sorted([far, best + _MARGIN * (best - far)])
    return low, high


if __name__ == "__main__":
    sys.exit(main())
