"""Finding the knob, such as a final threshold, that gives a named sparsity: whole runs are counted.

Here belongs the choice of the next value from those that were tried; nothing here runs anything.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

CLOSE = 0.005
"""How far from its target a close sparsity may be, absolute."""

FEWER_OR_MORE = 0.1
"""Part of the weights that a target leaves: how many more or fewer a comparison allows."""

# A run may end with no weight left, whose density has no logarithm.
_LEAST_DENSITY = 1e-6
# Of the distance between two values of which one gives too few zeros and one too many: how close
# the next value may be to either.
_MARGIN = 0.1
# Steps while all runs are on one side of the target, as parts of the range's width; the last is
# repeated. From the middle the fourth ends where the range does.
_FROM_MIDDLE = (1 / 4, 1 / 8, 1 / 16, 1 / 16, 1 / 8, 1 / 4)
_FROM_START = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)


class Search(NamedTuple):
    """Where a method's knob is looked for, on a logarithmic scale.

    Attributes:
      low: the smallest value of the range that is looked at first, above 0.
      high: its largest value.
      most: runs after which the search gives up.
      increasing: whether a larger value gives more zeros.
    """

    low: float
    high: float
    most: int = 12
    increasing: bool = True


class Tried(NamedTuple):
    """A value of the knob and the sparsity that a whole run with it ended at."""

    knob: float
    sparsity: float


def is_close(target: float, sparsity: float) -> bool:
    """Whether a sparsity is near its target, however many weights that is."""
    return abs(sparsity - target) <= CLOSE


def hits(target: float, sparsity: float) -> bool:
    """Whether a sparsity compares with the target: it is close, and leaves about as many weights.

    At 99 % one that is merely close may leave half as many weights again.

    >>> hits(0.9, 0.896), hits(0.9, 0.91), hits(0.99, 0.9905), hits(0.99, 0.986)
    (True, False, True, False)
    """
    about_as_many = abs(sparsity - target) <= FEWER_OR_MORE * (1 - target)
    return is_close(target, sparsity) and about_as_many


def closest(tried: Sequence[Tried], target: float) -> Tried:
    """The one whose sparsity is closest to the target."""
    return min(tried, key=lambda one: abs(one.sparsity - target))


def propose(
    search: Search, target: float, tried: Sequence[Tried], start: float | None = None
) -> float:
    """The value to try next.

    The middle of the range, or ``start``, is the first. While all runs are on one side of the
    target, steps towards the other become shorter until the end of the range is near, and then
    longer, past it. From a start they become longer at once. Between a run of either side the
    logarithm of the density is interpolated, not closer than a tenth to an end.

    Args:
      search: the range.
      target: the sparsity to hit.
      tried: the runs so far, of one seed.
      start: a value that hit the target with another seed.

    Returns:
      A value of the knob.

    Example:
      >>> search = Search(0.01, 100.0)
      >>> propose(search, 0.9, [])
      1.0
      >>> propose(search, 0.9, [Tried(1.0, 0.5)])
      10.0
    """
    sign = 1.0 if search.increasing else -1.0

    def place(knob: float) -> float:
        return sign * math.log(knob)

    def knob(place: float) -> float:
        # Rounding keeps 1.0 what was exp(log(0.01) / 2 + log(100) / 2).
        return float(f"{math.exp(sign * place):.12g}")

    if not tried:
        return start if start is not None else knob((place(search.low) + place(search.high)) / 2)
    below = [(place(one.knob), one.sparsity) for one in tried if one.sparsity < target]
    above = [(place(one.knob), one.sparsity) for one in tried if one.sparsity >= target]
    if below and above:
        low, high = max(below), min(above)
        ends = [math.log(max(1 - s, _LEAST_DENSITY)) for s in (low[1], high[1])]
        part = (math.log(1 - target) - ends[0]) / (ends[1] - ends[0])
        part = min(max(part, _MARGIN), 1 - _MARGIN)
        return knob(low[0] + part * (high[0] - low[0]))
    steps = _FROM_MIDDLE if start is None else _FROM_START
    step = steps[min(len(tried), len(steps)) - 1] * math.log(search.high / search.low)
    return knob(max(below)[0] + step if below else min(above)[0] - step)
