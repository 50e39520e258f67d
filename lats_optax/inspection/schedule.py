"""What threshold schedules mean: the implied L1 coefficient of each, as a table and a picture.

Pure functions of schedules and of recorded thresholds, whoever they are from. The coefficient is
that of plain SGD; momentum m makes it act as μ·(1 − m).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lats_optax.checks.numbers import check_steps, check_threshold
from lats_optax.control.schedules import ScalarOrSchedule, evaluate, learning_rates
from lats_optax.files.storage import as_path, has_room
from lats_optax.plots import style
from lats_optax.thresholds import l1_from_threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.legend import Legend

# Two curves nearer than this, as a fraction of the range, are one line to the eye.
_SAME = 0.004
# More points than a panel has pixels are thinned before they are drawn.
_POINTS = 2000


@dataclass(frozen=True, eq=False)
class Curve:
    """A threshold over a run, and the L1 coefficient that it implies.

    Attributes:
      name: what it is called.
      steps: the numbers of optimizer steps at which the threshold is known, rising, shape (n + 1,).
      threshold: d after as many steps, shape (n + 1,), in the units of the weights.
      learning_rate_sums: of all steps before these, shape (n + 1,).
      l1: mean μ over each of the n intervals, shape (n,); NaN where the learning rate is zero.
      own_rate: whether the learning rate was recorded with the threshold.
    """

    name: str
    steps: np.ndarray
    threshold: np.ndarray
    learning_rate_sums: np.ndarray
    l1: np.ndarray
    own_rate: bool = False

    @property
    def learning_rate(self) -> np.ndarray:
        """Mean η over each of the n intervals, shape (n,)."""
        return np.diff(self.learning_rate_sums) / np.diff(self.steps)

    @property
    def final(self) -> float:
        """The last threshold."""
        return float(self.threshold[-1])

    @property
    def defined(self) -> np.ndarray:
        """The coefficients where the learning rate is not zero; there may be none."""
        return self.l1[np.isfinite(self.l1)]

    @property
    def mean(self) -> float:
        """``(d_T - d_0) / sum(eta)``: the coefficient that LATS between the same ends has."""
        budget = float(self.learning_rate_sums[-1] - self.learning_rate_sums[0])
        return float(self.threshold[-1] - self.threshold[0]) / budget if budget else np.nan

    @property
    def deviation(self) -> float:
        """``(max mu - min mu) / |mean|``; 0 for a threshold that stands still, NaN without mu."""
        if not self.defined.size:
            return np.nan
        spread = float(np.ptp(self.defined))
        return spread / abs(self.mean) if self.mean else np.inf if spread else 0.0


def curve(
    name: str, threshold: ScalarOrSchedule, learning_rate: ScalarOrSchedule, steps: int
) -> Curve:
    """The threshold and the implied L1 coefficient, step by step.

    ``mu_t = (d_{t+1} - d_t) / eta_t``

    Args:
      name: what it is called.
      threshold: d, a number or any schedule ``count -> d``.
      learning_rate: eta, a number or any schedule ``count -> eta``.
      steps: number of optimizer steps, >= 1.

    Returns:
      The curve, in float64.

    Raises:
      ValueError: ``steps`` < 1; a threshold or a learning rate that is negative or not finite.

    Example:
      >>> from lats_optax import lats_threshold
      >>> rate = lambda count: 0.1 - 0.0001 * count
      >>> lats = curve("lats", lats_threshold(rate, 1000, final=0.05), rate, 1000)
      >>> round(float(lats.l1[0]), 6), lats.deviation < 1e-12
      (0.000999, True)
    """
    steps = check_steps(steps)
    rates = learning_rates(learning_rate, steps)
    if not callable(threshold):
        check_threshold(name, threshold)
    counts = np.arange(steps + 1)
    thresholds = evaluate("threshold", threshold, counts)
    _check_thresholds(name, counts, thresholds)
    # Where neither moves, the zero that `l1_from_threshold` gives says nothing of a penalty.
    l1 = np.where(rates > 0, l1_from_threshold(threshold, learning_rate)(counts[:-1]), np.nan)
    # A difference of equal thresholds may miss zero by what rounding makes of them.
    rounding = 4 * np.finfo(float).eps * thresholds.max()
    l1 = np.where((l1 < 0) & (-l1 * rates <= rounding), 0.0, l1)
    return Curve(name, counts, thresholds, np.append(0.0, np.cumsum(rates)), l1)


def recorded_curve(
    name: str,
    steps: np.ndarray,
    threshold: np.ndarray,
    learning_rate_sums: np.ndarray,
    *,
    own_rate: bool = False,
) -> Curve:
    """The same of a threshold that is known at some steps alone, as a run's log has it.

    ``mu = (d(t') - d(t)) / sum_{t <= s < t'} eta_s`` between the records t and t'.

    Args:
      name: what it is called.
      steps: numbers of optimizer steps, rising, shape (n + 1,), n >= 1.
      threshold: d after as many, shape (n + 1,).
      learning_rate_sums: the sums of the learning rates of as many, shape (n + 1,).
      own_rate: whether these were recorded with the threshold; the picture then shows them.

    Returns:
      The curve.

    Raises:
      ValueError: fewer than two records; steps that do not rise; a threshold that is negative or
        not finite.

    Example:
      >>> found = recorded_curve("run", np.array([0, 10]), np.array([0, 0.2]), np.array([0, 4.0]))
      >>> found.l1, found.learning_rate
      (array([0.05]), array([0.4]))
    """
    if len(steps) < 2:
        raise ValueError(f"{name}: {len(steps)} recorded thresholds; allowed are 2 or more")
    lengths, budgets = np.diff(steps), np.diff(learning_rate_sums)
    if not np.all(lengths > 0):
        raise ValueError(f"{name}: its steps do not rise after {steps[np.argmin(lengths > 0)]:g}")
    _check_thresholds(name, steps, threshold)
    l1 = np.full(len(budgets), np.nan)
    np.divide(np.diff(threshold), budgets, out=l1, where=budgets > 0)
    return Curve(name, steps, threshold, learning_rate_sums, l1, own_rate)


def summary_table(curves: Sequence[Curve]) -> str:
    """The ends of each threshold, and how its implied L1 coefficient μ moves.

    Args:
      curves: one or more.

    Returns:
      Lines of plain text, without a newline at the end.

    Raises:
      ValueError: there are no curves.

    Example:
      >>> rate = lambda count: 0.1
      >>> print(summary_table([curve("linear", lambda t: 0.01 * t, rate, 10),
      ...                      curve("square", lambda t: 0.001 * t**2, rate, 10)]))
      schedule    final d   first mu    last mu  lowest mu highest mu  deviation
      --------------------------------------------------------------------------
      linear          0.1        0.1        0.1        0.1        0.1      ...
      square          0.1       0.01       0.19       0.01       0.19        1.8
      deviation: of the highest mu from the lowest, relative to mu of LATS between the same ends
    """
    _check_some(curves)
    names = max(len("schedule"), *(len(curve.name) for curve in curves))
    # Letters that every terminal has: what is printed must not fail at the end of the work.
    head = ("final d", "first mu", "last mu", "lowest mu", "highest mu", "deviation")
    lines = [f"{'schedule':<{names}}" + "".join(f"{title:>11}" for title in head)]
    lines.append("-" * len(lines[0]))
    for curve in curves:
        l1 = curve.defined if curve.defined.size else np.array([np.nan])
        values = (curve.final, l1[0], l1[-1], l1.min(), l1.max())
        cells = [f"{value:>11.4g}" for value in values] + [f"{curve.deviation:>11.2g}"]
        lines.append(f"{curve.name:<{names}}" + "".join(cells))
    lines.append(
        "deviation: of the highest mu from the lowest, relative to mu of LATS between the same ends"
    )
    lines += [note for curve in curves for note in _undefined(curve)]
    return "\n".join(lines)


def write_picture(
    path: str | os.PathLike[str],
    thresholds: Mapping[str, ScalarOrSchedule | Curve],
    learning_rate: ScalarOrSchedule,
    steps: int,
    *,
    steps_per_epoch: int | None = None,
) -> None:
    """Draws threshold schedules side by side, as a PNG of 2100 × 1350 pixels.

    Over the steps: the learning rate η, the thresholds d and their implied L1 coefficients
    ``mu_t = (d_{t+1} - d_t) / eta_t``; and d over the sum of η so far, of which μ is the slope:
    LATS is a straight line there, whatever the learning rate.

    Args:
      path: file to write or replace; it appears only when it is complete.
      thresholds: by name, a number, any schedule ``count -> d``, or a curve.
      learning_rate: a number or any schedule ``count -> eta``.
      steps: number of optimizer steps, >= 1.
      steps_per_epoch: if given, time is in epochs of so many steps.

    Raises:
      FileNotFoundError: there is no directory to write to.
      ValueError: the path does not end in .png; there are no thresholds; as :func:`curve`.

    Example:
      >>> import optax, os, tempfile, lats_optax
      >>> rate = optax.cosine_decay_schedule(0.1, 1000)
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = os.path.join(directory, "schedules.png")
      ...     write_picture(path, {"lats": lats_optax.lats_threshold(rate, 1000, final=0.02),
      ...                          "cubic": lambda t: 0.02 * (1 - (1 - t / 1000) ** 3)}, rate, 1000)
      ...     os.path.getsize(path) > 10_000
      True
    """
    check_picture(path)
    curves = [
        threshold if isinstance(threshold, Curve) else curve(name, threshold, learning_rate, steps)
        for name, threshold in thresholds.items()
    ]
    _check_some(curves)
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


def check_picture(path: str | os.PathLike[str]) -> None:
    """Checks that a picture can be written there, before anything is computed for it.

    Raises:
      FileNotFoundError: there is no directory to write to.
      ValueError: it is not the name of a PNG.
    """
    path = as_path(path, "out")
    if path.suffix != ".png":
        raise ValueError(f"the picture is to be {str(path)!r}; allowed: a name that ends in .png")
    if not has_room(path):
        raise FileNotFoundError(f"there is no directory {path.parent} to write to")


def _check_some(curves: Sequence[Curve]) -> None:
    if not curves:
        raise ValueError("there are no thresholds; there must be at least one")


def _check_thresholds(name: str, steps: np.ndarray, thresholds: np.ndarray) -> None:
    wrong = ~(np.isfinite(thresholds) & (thresholds >= 0))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: the threshold is {thresholds[at]:g} after {steps[at]:g} steps; allowed are "
            "finite numbers >= 0"
        )


def _undefined(curve: Curve) -> list[str]:
    """What there is to say of the steps without a learning rate."""
    still = ~np.isfinite(curve.l1)
    if not still.any():
        return []
    count = int(np.diff(curve.steps)[still].sum())
    rises = np.any(np.diff(curve.threshold)[still])
    return [
        f"{curve.name}: mu is undefined at {count} of {curve.steps[-1] - curve.steps[0]:g} steps, "
        "where the learning rate is zero"
        + (" and the threshold moves all the same" if rises else "")
    ]


# --- panels -------------------------------------------------------------------------------------


def _label(curve: Curve) -> str:
    name = style.shortened(curve.name)
    if not curve.defined.size:
        return f"{name}: μ undefined"
    low, high = curve.defined.min(), curve.defined.max()
    # What differs in the third digit alone is one value to a reader of a picture.
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
