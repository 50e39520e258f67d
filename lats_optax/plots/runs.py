"""The plot of finished runs, side by side: what was imposed on them, and what came of it."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lats_optax.analysis.runs import FinishedRun, check_some, implied_l1, prunable_layers, records
from lats_optax.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_runs(path: str | os.PathLike[str], runs: Sequence[FinishedRun]) -> None:
    """Draws the runs as a PNG of 2100 × 1200 pixels: what was imposed, and what came of it.

    Over time: the threshold, the L1 coefficient that it means (see :func:`implied_l1`), the
    sparsity and the test accuracy; at the end: the sparsity of each layer.

    Args:
      path: file to write or replace; it appears only when it is complete.
      runs: one or more, dense ones included.

    Raises:
      ValueError: there are no runs.
    """
    check_some(runs)
    with style.figure(path, (14, 8)) as figure:
        panels = figure.subplot_mosaic(
            [["threshold", "l1", "layers"], ["sparsity", "accuracy", "layers"]],
            width_ratios=[1, 1, 1.15],
        )
        _draw_threshold(panels["threshold"], runs)
        _draw_l1(panels["l1"], runs)
        _draw_sparsity(panels["sparsity"], runs)
        _draw_accuracy(panels["accuracy"], runs)
        epochs = max((r["epoch"] for run in runs for r in run.metrics), default=None)
        for over_time in set(panels) - {"layers"}:
            panels[over_time].set_xlabel("epoch")
            panels[over_time].set_xlim(0, epochs)
        _draw_layers(panels["layers"], runs)
        lines = panels["accuracy"].get_lines()
        labels = [
            f"{run.name}: test accuracy {run.test_accuracy:.2%}, {run.sparsity.sparsity:.2%} zeros"
            for run in runs
        ]
        figure.legend(lines, labels, loc="outside upper center", ncols=2, frameon=False)


def _draw_threshold(axes: "Axes", runs: Sequence[FinishedRun]) -> None:
    _draw_metric(axes, runs, "train", "threshold")
    axes.set(title="Threshold", ylabel="threshold d")
    axes.set_ylim(bottom=0)


def _draw_l1(axes: "Axes", runs: Sequence[FinishedRun]) -> None:
    values: list[float] = []
    for index, run in enumerate(runs):
        epochs, l1 = implied_l1(run.metrics)
        if len(l1):
            axes.stairs(l1, epochs, baseline=None, linewidth=2, **style.line_style(index))
            values.extend(l1[np.isfinite(l1)])
    axes.set(title="Implied L1 coefficient", ylabel="μ = Δd / Ση between records")
    if not values:
        style.annotate(axes, "not recorded by any run")
    elif min(values) > 0 and max(values) > 10 * min(values):
        # Some schedules diverge at the end, which would press all else flat.
        axes.set_yscale("log")
    else:
        axes.set_ylim(min(0, 1.1 * min(values)), max(0, 1.1 * max(values)) or None)


def _draw_sparsity(axes: "Axes", runs: Sequence[FinishedRun]) -> None:
    _draw_metric(axes, runs, "train", "sparsity", scale=100)
    axes.set(title="Zeros among prunable weights", ylabel="sparsity (%)")
    axes.set_ylim(0, 100)


def _draw_accuracy(axes: "Axes", runs: Sequence[FinishedRun]) -> None:
    _draw_metric(axes, runs, "test", "accuracy", scale=100)
    axes.set(title="Test accuracy", ylabel="accuracy (%)")
    found = [r for run in runs for r in records(run.metrics, "test", "accuracy")]
    if found:
        values = [100 * r["accuracy"] for r in found]
        margin = max(0.05 * (max(values) - min(values)), 0.5)
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _draw_layers(axes: "Axes", runs: Sequence[FinishedRun]) -> None:
    shown = [index for index, run in enumerate(runs) if run.sparsity.zeros] or range(len(runs))
    layers = prunable_layers(runs)
    names = [path.removesuffix("/kernel") for path in layers]
    rows = np.arange(len(names) + 1)
    # Points of height that a layer has, of the 500 that the panel is high.
    room = 500 / len(rows)
    for place, index in enumerate(shown):
        found = [cells[index] for cells in layers.values()]
        values = [100 * layer.sparsity if layer else np.nan for layer in found]
        values.append(100 * runs[index].sparsity.sparsity)
        height = 0.8 / len(shown)
        offset = (place + 0.5) * height - 0.4
        bars = axes.barh(
            rows + offset, values, 0.9 * height, color=style.line_style(index)["color"]
        )
        if room * height > 7:
            axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=min(9, 0.8 * room * height))
    axes.set_yticks(rows, [*names, "all layers"], fontsize=float(np.clip(0.7 * room, 4, 10)))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 115)
    axes.set_xticks(range(0, 101, 20))
    axes.grid(visible=False, axis="y")
    axes.set(title="Zeros in each layer at the end", xlabel="sparsity (%)")


def _draw_metric(
    axes: "Axes", runs: Sequence[FinishedRun], split: str, name: str, scale: float = 1
) -> None:
    """A line for each run; an empty one, for the legend, where a run has not recorded it."""
    recorded = False
    for index, run in enumerate(runs):
        found = records(run.metrics, split, name)
        recorded = recorded or bool(found)
        epochs, values = [r["epoch"] for r in found], [scale * r[name] for r in found]
        # A line through one record is not to be seen.
        marker = "o" if len(found) == 1 else None
        axes.plot(epochs, values, marker=marker, **style.line_style(index))
    if not recorded:
        style.annotate(axes, "not recorded by any run")
