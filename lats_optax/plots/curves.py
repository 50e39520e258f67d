"""The plot of threshold schedules, side by side, and of the L1 coefficients that they imply."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lats_optax.analysis import curves as analysis
from lats_optax.analysis.curves import Curve, check_some
from lats_optax.checks.numbers import check_steps
from lats_optax.control.schedules import ScalarOrSchedule, learning_rates
from lats_optax.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

# Two curves nearer than this, as a fraction of the range, are one line to the eye.
_SAME = 0.004
# More points than a panel has pixels are thinned before they are drawn.
_POINTS = 2000


def draw_thresholds(
    path: str | os.PathLike[str],
    thresholds: Mapping[str, ScalarOrSchedule | Curve],
    learning_rate: ScalarOrSchedule,
    steps: int,
    *,
    steps_per_epoch: int | None = None,
) -> None:
    """Draws threshold schedules side by side, as a PNG of 2100 × 1350 pixels.

    Over the steps: the learning rate η, the thresholds d and their implied L1 coefficients
    ``mu_t = (d_{t+1} - d_t) / eta_t``; and d over the sum of η so far, with slope μ:
    LATS is a straight line there under any learning rate.

    Args:
      path: file to write or replace; it appears only when it is complete.
      thresholds: by name, a number, any schedule ``count -> d``, or a curve.
      learning_rate: a number or any schedule ``count -> eta``.
      steps: number of optimizer steps, >= 1.
      steps_per_epoch: if given, time is in epochs of so many steps.

    Raises:
      FileNotFoundError: there is no directory to write to.
      ValueError: the path does not end in .png; there are no thresholds; as
        :func:`lats_optax.analysis.curves.curve`.

    Example:
      >>> import optax, os, tempfile, lats_optax
      >>> rate = optax.cosine_decay_schedule(0.1, 1000)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "schedules.png")
      ...     draw_thresholds(path, {"lats": lats_optax.lats_threshold(rate, 1000, final=0.02),
      ...                          "cubic": lambda t: 0.02 * (1 - (1 - t / 1000) ** 3)}, rate, 1000)
      ...     os.path.getsize(path) > 10_000
      True
    """
    style.check_path(path)
    curves = [
        threshold
        if isinstance(threshold, Curve)
        else analysis.curve(name, threshold, learning_rate, steps)
        for name, threshold in thresholds.items()
    ]
    check_some(curves)
    rates = learning_rates(learning_rate, check_steps(steps))
    unit = check_steps(steps_per_epoch or 1, "steps_per_epoch")
    of_others = [] if all(curve.own_rate for curve in curves) else [len(rates)]
    end = max([*of_others, *(curve.steps[-1] for curve in curves)])
    with style.figure(path, (14, 9)) as figure:
        panels = figure.subplot_mosaic([["rate", "l1"], ["threshold", "slope"]])
        _draw_rates(panels["rate"], rates, curves, unit)
        _draw_thresholds(panels["threshold"], curves, unit)
        _draw_l1(panels["l1"], curves, unit)
        _draw_slopes(panels["slope"], curves)
        for over_time in ("rate", "threshold", "l1"):
            time = "optimizer step" if steps_per_epoch is None else "epoch"
            panels[over_time].set_xlabel(time)
            panels[over_time].set_xlim(0, end / unit)
        legend = figure.legend(
            panels["threshold"].get_lines(),
            [" "] * len(curves),
            loc="outside upper center",
            ncols=min(len(curves), 3),
            frameon=False,
            handlelength=3.5,
        )
        _name(legend, [_label(curve) for curve in curves])


def _label(curve: Curve) -> str:
    name = style.shortened(curve.name)
    if not curve.defined.size:
        return f"{name}: μ undefined"
    low, high = curve.defined.min(), curve.defined.max()
    # What differs in the third digit alone is one value to a reader of a plot.
    if high - low <= 0.005 * max(abs(low), abs(high)):
        return f"{name}: μ = {np.median(curve.defined):.3g}"
    return f"{name}: μ = {low:.3g} … {high:.3g}"


def _name(legend: "Legend", labels: Sequence[str]) -> None:
    """Names that are the user's: matplotlib would leave out some, and set others as formulas."""
    for text, label in zip(legend.get_texts(), labels):
        text.set(text=label, parse_math=False)


def _draw_rates(axes: "Axes", rates: np.ndarray, curves: Sequence[Curve], unit: int) -> None:
    own = [(index, curve) for index, curve in enumerate(curves) if curve.own_rate]
    labels = []
    if len(own) < len(curves):
        _steps(axes, np.arange(len(rates) + 1) / unit, rates, color="0.35")
        labels.append("all others")
    for index, curve in own:
        _steps(axes, curve.steps / unit, curve.learning_rate, **style.line_style(index))
        labels.append(f"{style.shortened(curve.name)}, as recorded")
    if own:
        legend = axes.legend(axes.get_lines(), [" "] * len(labels), frameon=False)
        _name(legend, labels)
    axes.set(title="Learning rate", ylabel="learning rate η")
    axes.set_ylim(bottom=0)


def _draw_thresholds(axes: "Axes", curves: Sequence[Curve], unit: int) -> None:
    widths = _widths(curves)
    for index, curve in enumerate(curves):
        shown = _thinned(curve.threshold)
        x, y = curve.steps[shown] / unit, curve.threshold[shown]
        axes.plot(x, y, **style.line_style(index) | {"linewidth": widths[index]})
    axes.set(title="Threshold", ylabel="threshold d (units of the weights)")
    axes.set_ylim(bottom=0)


def _draw_l1(axes: "Axes", curves: Sequence[Curve], unit: int) -> None:
    axes.set(title="Implied L1 coefficient", ylabel="μ = Δd / η")
    found = np.concatenate([curve.defined for curve in curves])
    if not found.size:
        style.annotate(axes, "undefined: the learning rate is zero")
        return
    sizes = np.abs(found[found != 0])
    spread = bool(sizes.size) and sizes.max() > 10 * sizes.min()
    logarithmic = spread and found.min() >= 0
    if logarithmic:
        axes.set_yscale("log")
        axes.set_ylim(*_decades(curves))
        if found.min() == 0:
            note = "μ = 0 is not drawn on this scale"
            axes.set_title(note, loc="right", fontsize=9, fontweight="normal")
    elif spread and sizes.max() > 20 * np.median(sizes):
        _scale_by_decades(axes, np.median(sizes), sizes.max())
    else:
        axes.set_ylim(min(0, 1.1 * found.min()), max(0, 1.1 * found.max()) or None)
    widths = _widths(curves)
    for index, curve in enumerate(curves):
        values = np.where(curve.l1 > 0, curve.l1, np.nan) if logarithmic else curve.l1
        width = {"linewidth": widths[index]}
        _steps(axes, curve.steps / unit, values, **style.line_style(index) | width)


def _decades(curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits of a logarithmic axis: what goes to zero or diverges leaves room for the rest."""
    positive = [found[found > 0] for found in (curve.defined for curve in curves)]
    usual = [float(np.median(found)) for found in positive if found.size]
    low = max(min(found.min() for found in positive if found.size), min(usual) / 100)
    high = min(max(found.max() for found in positive if found.size), max(usual) * 10_000)
    return low / 1.5, high * 1.5


def _scale_by_decades(axes: "Axes", usual: float, largest: float) -> None:
    """A scale for both signs: linear up to what is usual, logarithmic beyond."""
    from matplotlib.ticker import NullLocator

    first, last = int(np.floor(np.log10(usual))), int(np.ceil(np.log10(largest)))
    axes.set_yscale("symlog", linthresh=10.0**first)
    # matplotlib's own ticks lie on one another around zero.
    shown = 10.0 ** np.arange(last, first, -max(1, round((last - first) / 4)))
    axes.set_yticks([*-shown, 0.0, *shown])
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_slopes(axes: "Axes", curves: Sequence[Curve]) -> None:
    widths = _widths(curves)
    for index, curve in enumerate(curves):
        sums = curve.learning_rate_sums
        shown = _thinned(curve.threshold)
        look = style.line_style(index) | {"linewidth": widths[index]}
        axes.plot(sums[shown] / sums[-1], curve.threshold[shown], **look)
    axes.set(title="Threshold over learning rate spent: the slope is μ · Ση")
    axes.set(xlabel="learning rate spent, as a fraction of its sum Ση", xlim=(0, 1))
    axes.set(ylabel="threshold d (units of the weights)")
    axes.set_ylim(bottom=0)


def _steps(axes: "Axes", edges: np.ndarray, values: np.ndarray, **look: Any) -> None:
    """Values that each hold over an interval; wider gaps stay gaps."""
    shown = _thinned(values)
    x, y = np.append(edges[:-1][shown], edges[-1]), np.append(values[shown], values[-1])
    axes.plot(x, y, drawstyle="steps-post", **look)


def _thinned(values: np.ndarray) -> np.ndarray:
    """Indices to draw: the ends, and of each of many short stretches the lowest and the highest."""
    if len(values) <= 2 * _POINTS:
        return np.arange(len(values))
    parts = np.array_split(np.arange(len(values)), _POINTS)
    low = np.where(np.isfinite(values), values, np.inf)
    high = np.where(np.isfinite(values), values, -np.inf)
    kept = [0, len(values) - 1]
    for part in parts:
        kept += [part[0], part[0] + low[part].argmin(), part[0] + high[part].argmax()]
    return np.unique(kept)


def _widths(curves: Sequence[Curve]) -> list[float]:
    """Line widths with which curves that coincide show under one another, the widest lowest."""
    places = np.linspace(0, max(curve.steps[-1] for curve in curves), 201)
    outside = {"left": np.nan, "right": np.nan}
    sampled = [np.interp(places, curve.steps, curve.threshold, **outside) for curve in curves]
    tolerance = _SAME * max(float(curve.threshold.max()) for curve in curves)

    def coincide(one: np.ndarray, other: np.ndarray) -> bool:
        both = np.isfinite(one) & np.isfinite(other)
        return bool(both.any() and np.all(np.abs(one - other)[both] <= tolerance))

    above = [
        sum(coincide(one, other) for other in sampled[index + 1 :])
        for index, one in enumerate(sampled)
    ]
    return [2.0 + 2.5 * count for count in above]
