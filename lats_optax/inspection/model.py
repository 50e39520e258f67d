"""What is left of a sparse model, layer by layer: a table and a picture.

Pure functions of a model's parameters and of the multiply-adds that were counted for them.
"""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import lats_optax
from lats_optax.analysis.operations import OperationsReport
from lats_optax.inspection.schedule import check_picture
from lats_optax.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BINS = 201
_DENSE, _LEFT, _INPUTS = "#BBBBBB", style.line_style(1)["color"], style.line_style(2)["color"]


@dataclass(frozen=True)
class Layer:
    """One array of parameters.

    Attributes:
      path: such as ``stem/kernel``.
      shape: of the array.
      zeros: how many of its entries are zero.
      prunable: whether :func:`lats_optax.prunable` selects it.
      outputs, inputs: channels, as Flax has them: the last axis and the one before; 0 for arrays of
        fewer than two dimensions or no entries.
      zero_outputs, zero_inputs: those of which every weight is zero.
      magnitudes: the 5, 50 and 95 % quantiles of the absolute values of the weights that are
        finite and not zero; None where there are none.
      dense: multiply-adds, zeros included; None where they were not counted.
      effective: those with a weight that is not zero.
    """

    path: str
    shape: tuple[int, ...]
    zeros: int
    prunable: bool
    outputs: int
    inputs: int
    zero_outputs: int
    zero_inputs: int
    magnitudes: tuple[float, float, float] | None
    dense: int | None
    effective: int | None

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class ModelReport:
    """A model; ``str()`` is the table.

    Attributes:
      layers: one entry for each array of parameters, in the order of the tree.
      operations: the multiply-adds of one call; None where they were not counted.
      histogram: how many prunable weights that are finite and not zero lie between the edges.
      edges: one more than there are counts, in the units of the weights.
      not_finite: paths of the arrays that hold an infinity or a NaN.
    """

    layers: tuple[Layer, ...]
    operations: OperationsReport | None
    histogram: np.ndarray
    edges: np.ndarray
    not_finite: tuple[str, ...]

    @property
    def shown(self) -> tuple[Layer, ...]:
        """The layers that have a line: prunable ones and those that multiply, or else all."""
        return tuple(la for la in self.layers if la.prunable or la.dense) or self.layers

    def __str__(self) -> str:
        """The table: layers one by one, the totals, and what deserves a look."""
        head = ("layer", "shape", "weights", "non-zero", "sparsity", "multiply-adds", "effective")
        body = [_row(layer.path, layer.shape, [layer]) for layer in self.shown]
        foot = [
            _row("prunable weights", (), [layer for layer in self.layers if layer.prunable]),
            _row("all parameters", (), self.layers),
        ]
        if self.operations is not None and (other := self.operations.other):
            total, effective = self.operations.dense, self.operations.effective or 0
            foot.append(("no parameter", "", "", "", "", f"{other:,}", f"{other:,}"))
            foot.append(("multiply-adds", "", "", "", "", f"{total:,}", f"{effective:,}"))
        columns = len(head) if self.operations is not None else 5
        names, *cells = zip(*(row[:columns] for row in [head, *body, *foot]))
        width = max(map(len, names))
        aligned = [[f"{cell:>{max(map(len, column))}}" for cell in column] for column in cells]
        lines = ["  ".join([f"{name:<{width}}", *row]) for name, *row in zip(names, *aligned)]
        rule = "-" * len(lines[0])
        lines[1:1], lines[-len(foot) : -len(foot)] = [rule], [rule]
        return "\n".join([*(line.rstrip() for line in lines), *self._remarks()])

    def _remarks(self) -> list[str]:
        layers = [layer for layer in self.layers if layer.prunable]
        remarks = []
        for kind in ("outputs", "inputs"):
            zero = sum(getattr(layer, f"zero_{kind}") for layer in layers)
            total = sum(getattr(layer, kind) for layer in layers)
            remarks.append(f"{zero:,} of {total:,} {kind[:-1]} channels")
        remarks = [f"wholly zero: {', '.join(remarks)}"] if layers else ["nothing is prunable"]
        if empty := [layer.path for layer in layers if layer.size == layer.zeros and layer.size]:
            remarks.append(f"nothing is left of: {', '.join(empty)}")
        if self.not_finite:
            remarks.append(f"not finite: {', '.join(self.not_finite)}")
        if self.operations is not None and self.operations.uncounted:
            remarks.append(f"not counted: {', '.join(self.operations.uncounted)}")
        return remarks


def inspect_model(params: Any, operations: OperationsReport | None = None) -> ModelReport:
    """Measure what is left of each layer.

    Args:
      params: a pytree of arrays.
      operations: what :func:`lats_optax.count_operations` says of the same parameters.

    Returns:
      The report; ``str()`` of it is a table.

    Raises:
      ValueError: there are no arrays; the operations are of other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[0.5, 0.0, -2.0], [0.0, 0.0, 0.0]]), "bias": jnp.ones(3)}
      >>> call = lambda params, x: x @ params["kernel"] + params["bias"]
      >>> print(inspect_model(params, lats_optax.count_operations(call, params, jnp.ones((1, 2)))))
      layer             shape  weights  non-zero  sparsity  multiply-adds  effective
      ------------------------------------------------------------------------------
      kernel              2×3        6         2    66.67%              6          2
      ------------------------------------------------------------------------------
      prunable weights               6         2    66.67%              6          2
      all parameters                 9         5    44.44%              6          2
      wholly zero: 1 of 3 output channels, 1 of 2 input channels
    """
    with warnings.catch_warnings():
        # Of parameters of which none is prunable the table says so.
        warnings.simplefilter("ignore")
        measured = lats_optax.sparsity(params).layers
    if not measured:
        raise ValueError("there are no arrays in it")
    counted: Sequence[Any] = [None] * len(measured)
    if operations is not None:
        counted = operations.parameters
        if [c.path for c in counted] != [m.path for m in measured]:
            raise ValueError("operations: they are of other parameters than params")
    layers, weights, not_finite = [], [], []
    for found, count, leaf in zip(measured, counted, jax.tree.leaves(params)):
        array = np.asarray(leaf)
        values = _values(array)
        if not np.all(np.isfinite(array)):
            not_finite.append(found.path)
        if found.prunable:
            weights.append(values)
        quantiles = np.quantile(np.abs(values), (0.05, 0.5, 0.95)) if values.size else None
        layers.append(
            Layer(
                found.path,
                found.shape,
                found.zeros,
                found.prunable,
                *_channels(array),
                None if quantiles is None else tuple(map(float, quantiles)),  # type: ignore[arg-type]
                None if count is None else count.dense,
                None if count is None else count.effective,
            )
        )
    every = np.concatenate([np.zeros(0, np.float32), *weights])
    limit = float(np.abs(every).max()) if every.size else 1.0
    histogram, edges = np.histogram(every, _BINS, (-limit, limit))
    return ModelReport(tuple(layers), operations, histogram, edges, tuple(not_finite))


def write_picture(path: str | os.PathLike[str], report: ModelReport, title: str = "") -> None:
    """Draws what is left of a model as a PNG, 2400 pixels wide and as high as its layers need.

    Layer by layer: the sparsity; the multiply-adds, dense and effective, or where these are not
    known the weights; the channels of which nothing is left; and the magnitudes of the weights that
    are not zero. Below, the histogram of these, of all prunable layers.

    Args:
      path: file to write or replace; it appears only when it is complete.
      report: of :func:`inspect_model`.
      title: a line above.

    Raises:
      FileNotFoundError: there is no directory to write to.
      ValueError: the path does not end in .png.
    """
    check_picture(path)
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
        _draw_size(panels["size"], layers, report.operations)
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


def in_short(number: float) -> tuple[float, str]:
    """A number between 1 and 1000, and the prefix of its unit.

    >>> in_short(4_089_184_256), in_short(640)
    ((4.089184256, 'G'), (640.0, ''))
    """
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return number / scale, prefix
    return float(number), ""


def _row(name: str, shape: tuple[int, ...], layers: Sequence[Layer]) -> tuple[str, ...]:
    size, zeros = sum(layer.size for layer in layers), sum(layer.zeros for layer in layers)
    dense, effective = (sum(getattr(la, f) or 0 for la in layers) for f in ("dense", "effective"))
    share = f"{zeros / size if size else 0:.2%}"
    numbers = (f"{size:,}", f"{size - zeros:,}", share, f"{dense:,}", f"{effective:,}")
    return (name, "×".join(map(str, shape)), *numbers)


def _values(array: np.ndarray) -> np.ndarray:
    """The weights of an array that are real, finite and not zero."""
    if array.dtype.kind in "cb":
        return np.zeros(0, np.float32)
    flat = array.reshape(-1).astype(np.float32)
    return flat[np.isfinite(flat) & (flat != 0)]


def _channels(array: np.ndarray) -> tuple[int, int, int, int]:
    """Output and input channels, and how many of each are wholly zero."""
    if array.ndim < 2 or not array.size:
        return 0, 0, 0, 0
    used = array != 0
    outputs = used.any(axis=tuple(range(array.ndim - 1)))
    inputs = used.any(axis=(*range(array.ndim - 2), array.ndim - 1))
    return outputs.size, inputs.size, int((~outputs).sum()), int((~inputs).sum())


# --- panels -------------------------------------------------------------------------------------


def _draw_sparsity(axes: "Axes", layers: Sequence[Layer]) -> None:
    values = [100 * la.zeros / la.size if la.size else 0.0 for la in layers]
    bars = axes.barh(np.arange(len(layers)), values, 0.75, color=_LEFT)
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axes.set(title="Zeros", xlabel="sparsity (%)", xlim=(0, 118), xticks=range(0, 101, 25))


def _draw_size(axes: "Axes", layers: Sequence[Layer], operations: OperationsReport | None) -> None:
    title, what, kept = "Multiply-adds", "multiply-adds", "effective"
    pairs = [(la.dense or 0, la.effective or 0) for la in layers]
    if operations is None:
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
    for offset, kind, colour in ((-0.2, "outputs", _LEFT), (0.2, "inputs", _INPUTS)):
        share = [
            100 * getattr(la, f"zero_{kind}") / total if (total := getattr(la, kind)) else 0.0
            for la in layers
        ]
        axes.barh(rows + offset, share, 0.38, color=colour, label=kind[:-1])
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
