"""What threshold schedules mean: the implied L1 coefficient of each, and a table of several.

Pure functions of schedules and of recorded thresholds, whoever they are from. The coefficient is
that of plain SGD; momentum m makes it act as μ·(1 − m).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lats_optax.checks.numbers import check_steps, check_threshold
from lats_optax.control.schedules import ScalarOrSchedule, evaluate, learning_rates
from lats_optax.thresholds import l1_from_threshold


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
      own_rate: whether these were recorded with the threshold; the plot then shows them.

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
    lengths = np.diff(steps)
    if not np.all(lengths > 0):
        raise ValueError(f"{name}: its steps do not rise after {steps[np.argmin(lengths > 0)]:g}")
    _check_thresholds(name, steps, threshold)
    l1 = mean_l1(threshold, learning_rate_sums)
    return Curve(name, steps, threshold, learning_rate_sums, l1, own_rate)


def mean_l1(thresholds: np.ndarray, learning_rate_sums: np.ndarray) -> np.ndarray:
    """The L1 coefficient that recorded thresholds imply, as a mean over each interval.

    ``mu = (d(t') - d(t)) / sum_{t <= s < t'} eta_s`` between the records t and t'.

    Args:
      thresholds: d at each record, shape (n + 1,).
      learning_rate_sums: the sums of the learning rates of the steps before it, shape (n + 1,).

    Returns:
      mu, float64 (n,); NaN where the learning rate was zero.

    >>> mean_l1(np.array([0, 0.2, 0.2]), np.array([0, 4.0, 4.0]))
    array([0.05,  nan])
    """
    rates = np.diff(learning_rate_sums)
    unknown = np.full(len(rates), np.nan)
    return np.divide(np.diff(thresholds), rates, out=unknown, where=rates > 0)


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
    check_some(curves)
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


def check_some(curves: Sequence[Curve]) -> None:
    """Checks that there is a curve.

    Raises:
      ValueError: there is none.
    """
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
