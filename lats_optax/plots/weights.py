"""One run's weights in a plot: how many died and revived over time, and what is left.

Pure functions of what a run has recorded and of the statistics of its last weights.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lats_optax.analysis.weight_summary import Histogram, WeightSummary
from lats_optax.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import SubFigure

SHOWN = 8
"""How many layers' histograms there is room for."""

_LINE, _MARK = (style.line_style(index)["color"] for index in (1, 2))


def draw_weights(
    path: str | os.PathLike[str],
    metrics: Sequence[Mapping[str, Any]],
    layers: Mapping[str, WeightSummary],
) -> None:
    """Draws the weights of a run as a PNG of 2100 × 1650 pixels.

    Above, from one evaluation to the next: how many weights were pruned and how many revived, of
    all layers, and of each as a fraction of its weights. Below: the histograms of the latent
    weights and of those that are not zero, at the end, with the threshold.

    Args:
      path: file to write or replace; it appears only when it is complete.
      metrics: the records of the run; those with ``split`` "weights" are used.
      layers: by path, the statistics of its weights at the end, one or more.

    Raises:
      ValueError: there are no layers.
    """
    if not layers:
        raise ValueError("layers is empty; it must hold at least one layer")
    # A damaged file of metrics may have a record of other layers.
    records = [
        record
        for record in metrics
        if record["split"] == "weights" and layers.keys() <= record["layers"].keys()
    ]
    with style.figure(path, (14, 11)) as figure:
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[2, 3])[:, 0]
        _draw_changes(above, records, layers)
        _draw_end(below, layers)


def _draw_changes(
    figure: "SubFigure",
    records: Sequence[Mapping[str, Any]],
    layers: Mapping[str, WeightSummary],
) -> None:
    totals, pruned, revived = figure.subplots(1, 3)
    totals.set(title="Pruned and revived between evaluations", ylabel="weights")
    pruned.set_title("Pruned, by layer")
    revived.set_title("Revived, by layer")
    if not records:
        for axes in (totals, pruned, revived):
            style.annotate(axes, "not recorded")
        return
    _draw_totals(totals, records)
    _draw_by_layer(pruned, records, "pruned", layers)
    mesh = _draw_by_layer(revived, records, "revived", layers)
    revived.set_yticklabels([])
    bar = figure.colorbar(mesh, ax=[pruned, revived], extend="min", pad=0.02)
    bar.set_label("% of the layer's weights; white: none")
    for axes in (totals, pruned, revived):
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True)
        axes.set_xlim(0, records[-1]["epoch"])


def _draw_totals(axes: "Axes", records: Sequence[Mapping[str, Any]]) -> None:
    for index, name in enumerate(("pruned", "revived"), start=1):
        numbers = [record[name] for record in records]
        look = {**style.line_style(index), "linestyle": "-"}
        axes.stairs(numbers, _edges(records), baseline=None, linewidth=2, label=name, **look)
    # Logarithmic, so that the end is seen beside the beginning, but for a place for none.
    axes.set_yscale("symlog", linthresh=1)
    axes.minorticks_off()
    # Room for a decade at least: on a frozen support there is nothing but zeros.
    axes.set_ylim(0, max(10.0, axes.get_ylim()[1]))
    axes.legend(frameon=False)


def _draw_by_layer(
    axes: "Axes",
    records: Sequence[Mapping[str, Any]],
    name: str,
    layers: Mapping[str, WeightSummary],
) -> "QuadMesh":
    """A row for each layer, a column for each evaluation; what a color bar is made of."""
    from matplotlib.colors import LogNorm

    axes.grid(visible=False)
    rows = np.arange(len(layers))
    axes.set_yticks(rows, map(_short, layers), fontsize=float(np.clip(220 / len(rows), 3, 10)))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    share = [
        [100 * record["layers"][path][name] / max(layer.size, 1) for record in records]
        for path, layer in layers.items()
    ]
    if not np.any(share):
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
    # One scale for both panels and for any run, from a few in ten thousand to all.
    return axes.pcolormesh(
        _edges(records),
        np.arange(len(rows) + 1) - 0.5,
        np.ma.masked_equal(share, 0),
        norm=LogNorm(0.01, 100, clip=True),
        cmap="cividis_r",
        rasterized=True,
    )


def _edges(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Where the intervals between evaluations begin and end, in epochs; the first begins at 0."""
    return [0.0, *(record["epoch"] for record in records)]


def _draw_end(figure: "SubFigure", layers: Mapping[str, WeightSummary]) -> None:
    shown = _spread_out(list(layers), SHOWN)
    panels = np.ravel(figure.subplots(2, SHOWN // 2))
    for axes, path in zip(panels, shown):
        _draw_layer(axes, path, layers[path])
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    some = "" if len(shown) == len(layers) else f" of {len(shown)} of the {len(layers)} layers"
    figure.suptitle(f"The weights{some} at the end", x=0.01, ha="left", fontweight="bold")
    figure.supylabel("weights in an interval", fontsize=11)
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper right", ncols=3, frameon=False)


def _draw_layer(axes: "Axes", path: str, layer: WeightSummary) -> None:
    zeros = layer.zeros / max(layer.size, 1)
    axes.set_title(f"{_short(path)}, {zeros:.1%} zeros", fontsize=10, fontweight="normal")
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    if layer.latent is not None:
        _draw_histogram(axes, layer.latent, color="#AAAAAA", fill=True, label="latent weights")
    _draw_histogram(axes, layer.weights, color=_LINE, linewidth=1.5, label="weights, without zeros")
    if layer.threshold is not None:
        for place, label in ((-layer.threshold, None), (layer.threshold, "threshold ±d")):
            axes.axvline(place, color=_MARK, linestyle="--", linewidth=1.2, label=label)


def _draw_histogram(axes: "Axes", histogram: Histogram, **look: Any) -> None:
    # A bin of one weight is to be seen, on a scale that has no zero.
    axes.stairs(histogram.counts, histogram.edges, baseline=0.5, **look)


def _short(path: str) -> str:
    return path.removesuffix("/kernel")


def _spread_out(items: Sequence[str], most: int) -> list[str]:
    """At most so many of them, evenly from the first to the last.

    >>> _spread_out("abcdefg", 3)
    ['a', 'd', 'g']
    """
    places = np.linspace(0, len(items) - 1, min(most, len(items)))
    return [items[place] for place in np.round(places).astype(int)]
