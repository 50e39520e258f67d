"""The plot of what is left of a sparse model, layer by layer."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lats_optax.analysis.macs import MacsReport
from lats_optax.analysis.model import Layer, ModelReport, in_short
from lats_optax.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DENSE, _LEFT, _INPUTS = "#BBBBBB", style.line_style(1)["color"], style.line_style(2)["color"]


def draw_model(path: str | os.PathLike[str], report: ModelReport, title: str = "") -> None:
    """Draws what is left of a model as a PNG, 2400 pixels wide and as high as its layers need.

    Layer by layer: the sparsity; the MACs, dense and effective, or where these are not
    known the weights; the channels without a nonzero weight; and the magnitudes of the weights that
    are not zero. Below, the histogram of these, of all prunable layers.

    Args:
      path: file to write or replace; it appears only when it is complete.
      report: of :func:`lats_optax.analysis.model.inspect_model`.
      title: a line above.

    Raises:
      FileNotFoundError: there is no directory to write to.
      ValueError: the path does not end in .png.
    """
    style.check_path(path)
    layers = report.shown
    room = float(np.clip(0.2 * len(layers), 3, 90))
    with style.figure(path, (16, room + 4.5)) as figure:
        # Names are the user's, and no formulas.
        figure.suptitle(style.shortened(title, 120), parse_math=False)
        panels = figure.subplot_mosaic(
            [["sparsity", "size", "channels", "magnitudes"], ["histogram"] * 4],
            height_ratios=[room, 2.8],
        )
        _draw_sparsity(panels["sparsity"], layers)
        _draw_size(panels["size"], layers, report.macs)
        _draw_channels(panels["channels"], layers)
        _draw_magnitudes(panels["magnitudes"], layers)
        names = [style.shortened(layer.path.removesuffix("/kernel")) for layer in layers]
        points = float(np.clip(60 * room / max(len(layers), 1), 4, 10))
        for name, axes in panels.items():
            if name != "histogram":
                labels = names if name == "sparsity" else [""] * len(names)
                rows = np.arange(len(layers))
                axes.set_yticks(rows, labels, fontsize=points, parse_math=False)
                axes.set_ylim(len(layers) - 0.4, -0.6)
                axes.grid(visible=False, axis="y")
        _draw_histogram(panels["histogram"], report)


def _draw_sparsity(axes: "Axes", layers: Sequence[Layer]) -> None:
    values = [100 * la.zeros / la.size if la.size else 0.0 for la in layers]
    bars = axes.barh(np.arange(len(layers)), values, 0.75, color=_LEFT)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axes.set(title="Zeros", xlabel="sparsity (%)", xlim=(0, 118), xticks=range(0, 101, 25))


def _draw_size(axes: "Axes", layers: Sequence[Layer], macs: MacsReport | None) -> None:
    title, what, kept = "MACs", "MACs", "effective"
    pairs = [(la.dense or 0, la.effective or 0) for la in layers]
    if macs is None:
        title, what, kept = "Weights", "weights", "not zero"
        pairs = [(la.size, la.size - la.zeros) for la in layers]
    largest = max((dense for dense, _ in pairs), default=0)
    shown, prefix = in_short(largest)
    scale = shown / largest if largest else 1.0
    rows = np.arange(len(layers))
    axes.barh(rows, [scale * dense for dense, _ in pairs], 0.75, color=_DENSE, label="dense")
    axes.barh(rows, [scale * left for _, left in pairs], 0.75, color=_LEFT, label=kept)
    axes.set(title=title, xlabel=f"{what} ({prefix})" if prefix else what)
    _legend(axes)


def _draw_channels(axes: "Axes", layers: Sequence[Layer]) -> None:
    rows = np.arange(len(layers))
    for offset, kind, color in ((-0.2, "outputs", _LEFT), (0.2, "inputs", _INPUTS)):
        share = [
            100 * getattr(la, f"zero_{kind}") / total if (total := getattr(la, kind)) else 0.0
            for la in layers
        ]
        axes.barh(rows + offset, share, 0.38, color=color, label=kind[:-1])
    axes.set(title="Zero channels", xlabel="channels (%)", xlim=(0, 100))
    _legend(axes)


def _draw_magnitudes(axes: "Axes", layers: Sequence[Layer]) -> None:
    from matplotlib.ticker import NullFormatter

    rows = [row for row, la in enumerate(layers) if la.magnitudes]
    found = np.array([la.magnitudes for la in layers if la.magnitudes]).reshape(-1, 3)
    axes.set(title="Weights that are not zero", xlabel="|w|: 5 %, median and 95 %")
    if not len(found):
        style.annotate(axes, "there are none")
        return
    if found[:, 2].max() > 20 * found[:, 0].min():
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.hlines(rows, found[:, 0], found[:, 2], color=_LEFT, linewidth=2)
    axes.plot(found[:, 1], rows, "o", color=_LEFT, markersize=4)


def _legend(axes: "Axes") -> None:
    """Beside the title: bars may be anywhere in the panel."""
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),
        borderaxespad=0,
        ncols=2,
        fontsize=9,
        frameon=False,
        handlelength=1,
        columnspacing=1,
    )


def _draw_histogram(axes: "Axes", report: ModelReport) -> None:
    axes.set(title="All prunable weights that are not zero", xlabel="weight", ylabel="count")
    if not report.histogram.any():
        style.annotate(axes, "there are none")
        return
    axes.stairs(report.histogram, report.edges, fill=True, color=_LEFT)
    axes.set_yscale("log")
    axes.set_xlim(report.edges[0], report.edges[-1])
