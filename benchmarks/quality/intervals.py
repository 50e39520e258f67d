"""Means over seeds with Student-t intervals, and paired differences between two methods."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean over seeds.

    Attributes:
      mean: of the values.
      std: their standard deviation, with n − 1; not a number for one value.
      half_width: t · std / √n, of the 95 % interval; not a number for one value.
      seeds: n, how many there are.
    """

    mean: float
    std: float
    half_width: float
    seeds: int

    @property
    def contains_zero(self) -> bool:
        """Whether the values could have a mean of 0; never of one value."""
        return abs(self.mean) <= self.half_width


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean, sample standard deviation and Student-t interval.

    Args:
      values: independent ones; at least one.
      confidence: how often the interval contains the mean of all that could have been drawn.

    Example:
      >>> found = interval([1.0, 2.0, 3.0])
      >>> found.mean, found.std, round(found.half_width, 3)
      (2.0, 1.0, 2.484)
    """
    from scipy.stats import t

    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    std = float(np.std(values, ddof=1))
    quantile = float(t.ppf((1 + confidence) / 2, count - 1))
    return Interval(mean, std, quantile * std / math.sqrt(count), count)


def paired(ours: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """The interval of ``ours − other`` over the seeds that both have; None: there are none.

    Both train from a seed's weights on its batches, so what a seed is worth cancels.

    Args:
      ours: the values by seed.
      other: those of another method.

    Example:
      >>> paired({0: 1.0, 1: 3.0, 2: 9.0}, {0: 0.5, 1: 2.0}).mean
      0.75
    """
    seeds = sorted(ours.keys() & other.keys())
    return interval([ours[seed] - other[seed] for seed in seeds]) if seeds else None


def verdict(difference: Interval, higher_is_better: bool) -> str:
    """What a paired difference to the best other method says, in words.

    >>> verdict(Interval(0.5, 0.1, 0.2, 5), higher_is_better=True)
    'best'
    >>> verdict(Interval(0.1, 0.1, 0.2, 5), higher_is_better=True)
    'within the interval of the best'
    >>> verdict(Interval(0.5, 0.1, 0.2, 5), higher_is_better=False)
    'behind the best'
    """
    if difference.seeds < 2:
        return "one seed in common, no interval"
    if difference.contains_zero:
        return "within the interval of the best"
    return "best" if (difference.mean > 0) == higher_is_better else "behind the best"
