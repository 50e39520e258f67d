"""Finished runs side by side: the table that the demo prints and the picture that it leaves.

Pure functions of what a run has recorded.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lats_optax.analysis.sparsity import LayerSparsity, SparsityReport
from lats_optax.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      name: what it is called in the table and the legend.
      test_accuracy: fraction of the test images classified correctly at the end.
      seconds: how long it took.
      sparsity: the zeros of its final weights.
      metrics: its records, in the order of steps. Those with ``split`` "train" have ``step``,
        ``epoch``, ``learning_rate_sum`` (of all steps up to it) and, where weights are pruned,
        ``threshold`` and ``sparsity`` (after it); those with ``split`` "test" have ``epoch`` and
        ``accuracy``.
    """

    name: str
    test_accuracy: float
    seconds: float
    sparsity: SparsityReport
    metrics: Sequence[Mapping[str, Any]]


def comparison_table(runs: Sequence[Run]) -> str:
    """Sparsity layer by layer, the totals, accuracy and time: a row each, a column for each run.

    Args:
      runs: one or more; a layer that only some of them have is left blank in the others.

    Returns:
      Lines of plain text, without a newline at the end.

    Raises:
      ValueError: there are no runs.

    Example:
      >>> from lats_optax.analysis.sparsity import LayerSparsity
      >>> layers = (LayerSparsity("fc/kernel", (64, 10), 640, 608, prunable=True),
      ...           LayerSparsity("fc/bias", (10,), 10, 0, prunable=False))
      >>> print(comparison_table([Run("lats", 0.9875, 12.3, SparsityReport(layers), [])]))
                          weights       lats
      --------------------------------------
      fc/kernel               640     95.00%
      --------------------------------------
      prunable weights        640     95.00%
      all parameters          650     93.54%
      non-zero weights        640         32
      test accuracy                   98.75%
      seconds                           12.3
    """
    _check(runs)
    reports = [run.sparsity for run in runs]
    layers = _prunable_layers(runs)
    body = [
        (
            path,
            _common(la.size for la in found if la),
            *(f"{la.sparsity:.2%}" if la else "" for la in found),
        )
        for path, found in layers.items()
    ]
    prunable, total = _common(r.size for r in reports), _common(r.total_size for r in reports)
    foot = [
        ("prunable weights", prunable, *(f"{r.sparsity:.2%}" for r in reports)),
        ("all parameters", total, *(f"{r.total_sparsity:.2%}" for r in reports)),
        ("non-zero weights", prunable, *(f"{r.nonzeros:,}" for r in reports)),
        ("test accuracy", "", *(f"{run.test_accuracy:.2%}" for run in runs)),
        ("seconds", "", *(f"{run.seconds:.1f}" for run in runs)),
    ]
    head = ("", "weights", *(run.name for run in runs))
    names, *columns = zip(head, *body, *foot)
    widths = [max(9, *map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        right = (f"{cell:>{width}}" for cell, width in zip(cells[1:], widths))
        return "  ".join([f"{cells[0]:<{max(map(len, names))}}", *right])

    rule = "-" * len(line(head))
    return "\n".join([line(head), rule, *map(line, body), rule, *map(line, foot)])


def implied_l1(metrics: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The L1 coefficient that a recorded threshold means, as a mean over each interval of the log.

    ``μ = (d(t′) − d(t)) / Σ_{t ≤ s < t′} η_s`` between the records of steps t and t′.

    Args:
      metrics: the records of a run; those of the train split with a threshold are used.

    Returns:
      Edges of the intervals in epochs, (n,), and μ, (n − 1,), NaN where the learning rate was zero;
      both empty for a run that has no threshold, or fewer than two records of it.
    """
    records = _records(metrics, "train", "threshold", "learning_rate_sum")
    if len(records) < 2:
        return np.zeros(0), np.zeros(0)
    rise = np.diff([r["threshold"] for r in records])
    rates = np.diff([r["learning_rate_sum"] for r in records])
    l1 = np.divide(rise, rates, out=np.full(rates.shape, np.nan), where=rates > 0)
    return np.array([r["epoch"] for r in records]), l1


def write_picture(path: str | os.PathLike[str], runs: Sequence[Run]) -> None:
    """Draws the runs as a PNG of 2100 × 1200 pixels: what was imposed, and what came of it.

    Over time: the threshold, the L1 coefficient that it means (see :func:`implied_l1`), the
    sparsity and the test accuracy; at the end: the sparsity of each layer.

    Args:
      path: file to write or replace; it appears only when it is complete.
      runs: one or more, dense ones included.

    Raises:
      ValueError: there are no runs.
    """
    _check(runs)
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


def _draw_threshold(axes: "Axes", runs: Sequence[Run]) -> None:
    _draw_metric(axes, runs, "train", "threshold")
    axes.set(title="Threshold", ylabel="threshold d")
    axes.set_ylim(bottom=0)


def _draw_l1(axes: "Axes", runs: Sequence[Run]) -> None:
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


def _draw_sparsity(axes: "Axes", runs: Sequence[Run]) -> None:
    _draw_metric(axes, runs, "train", "sparsity", scale=100)
    axes.set(title="Zeros among prunable weights", ylabel="sparsity (%)")
    axes.set_ylim(0, 100)


def _draw_accuracy(axes: "Axes", runs: Sequence[Run]) -> None:
    _draw_metric(axes, runs, "test", "accuracy", scale=100)
    axes.set(title="Test accuracy", ylabel="accuracy (%)")
    records = [r for run in runs for r in _records(run.metrics, "test", "accuracy")]
    if records:
        values = [100 * r["accuracy"] for r in records]
        margin = max(0.05 * (max(values) - min(values)), 0.5)
        axes.set_ylim(min(values) - margin, max(values) + margin)


def _draw_layers(axes: "Axes", runs: Sequence[Run]) -> None:
    shown = [index for index, run in enumerate(runs) if run.sparsity.zeros] or range(len(runs))
    layers = _prunable_layers(runs)
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
    axes: "Axes", runs: Sequence[Run], split: str, name: str, scale: float = 1
) -> None:
    """A line for each run; an empty one, for the legend, where a run has not recorded it."""
    recorded = False
    for index, run in enumerate(runs):
        records = _records(run.metrics, split, name)
        recorded = recorded or bool(records)
        epochs, values = [r["epoch"] for r in records], [scale * r[name] for r in records]
        # A line through one record is not to be seen.
        marker = "o" if len(records) == 1 else None
        axes.plot(epochs, values, marker=marker, **style.line_style(index))
    if not recorded:
        style.annotate(axes, "not recorded by any run")


def _records(
    metrics: Sequence[Mapping[str, Any]], split: str, *names: str
) -> list[Mapping[str, Any]]:
    """The records of a split that have all of these."""
    return [r for r in metrics if r["split"] == split and all(name in r for name in names)]


def _prunable_layers(runs: Sequence[Run]) -> dict[str, list[LayerSparsity | None]]:
    """By path, the layer in each run, for all that any run counts as prunable."""
    found = [{la.path: la for la in run.sparsity.layers if la.prunable} for run in runs]
    paths = dict.fromkeys(path for layers in found for path in layers)
    return {path: [layers.get(path) for layers in found] for path in paths}


def _common(sizes: Iterable[int]) -> str:
    distinct = set(sizes)
    return f"{distinct.pop():,}" if len(distinct) == 1 else "varies"


def _check(runs: Sequence[Run]) -> None:
    if not runs:
        raise ValueError("runs is empty; it must hold at least one run")
