"""What moved beyond noise between two files of figures.

    python -m benchmarks.optimizer_step --json before.jsonl     # later the same with after.jsonl
    python -m benchmarks.compare before.jsonl after.jsonl

Of each figure the medians over the rounds are compared. The standard error of a median is taken
from the spread of its own rounds: 1.2533 * 1.4826 * MAD / sqrt(rounds), where MAD is the median
absolute deviation. A figure has moved where the difference is more than four standard errors of the
difference, and more than 1 % of the figure: rounds of one run are more alike than runs are. The
exit code is 1 where a figure became worse, else 0.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.records import Figure, read

ERRORS = 4.0
LEAST = 0.01
FEWEST = 3


class Change(NamedTuple):
    """A figure in two files.

    Attributes:
      figure: the later one.
      before: the median in the first file.
      after: the median in the second one.
      noise: the part of `before` within which a difference says nothing; None: too few rounds.
    """

    figure: Figure
    before: float
    after: float
    noise: float | None

    @property
    def ratio(self) -> float:
        """After over before."""
        return self.after / self.before if self.before else math.inf

    @property
    def verdict(self) -> str:
        """`same`, `better`, `worse`, or that there is too little to tell."""
        if self.noise is None:
            return "too few rounds"
        if abs(self.after - self.before) <= self.noise * abs(self.before):
            return "same"
        return "better" if (self.after < self.before) == self.figure.lower_is_better else "worse"


def standard_error(values: Sequence[float]) -> float:
    """Of the median of a normal distribution, from the median absolute deviation.

    >>> round(standard_error([1.0, 2.0, 3.0, 4.0, 5.0]), 3)
    0.831
    """
    middle = statistics.median(values)
    deviation = statistics.median(abs(value - middle) for value in values)
    return math.sqrt(math.pi / 2) * 1.4826 * deviation / math.sqrt(len(values))


def compare(first: Figure, second: Figure) -> Change:
    """How a figure differs between two runs."""
    before, after = statistics.median(first.values), statistics.median(second.values)
    noise = None
    if min(len(first.values), len(second.values)) >= FEWEST:
        error = math.hypot(standard_error(first.values), standard_error(second.values))
        noise = max(ERRORS * error / abs(before) if before else math.inf, LEAST)
    return Change(second, before, after, noise)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", help="file of figures")
    parser.add_argument("after", help="file of figures")
    options = parser.parse_args(arguments)
    try:
        first, second = read(options.before), read(options.after)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    both = [key for key in second if key in first]
    if not both:
        parser.error("the two files have no figure of one name and the same settings in common")
    for what in ("machine", "versions"):
        for key in both:
            old, new = getattr(first[key], what), getattr(second[key], what)
            if old != new:
                print(f"{what} differ: {old} before, {new} after")
                break
    changes = [compare(first[key], second[key]) for key in both]
    names = [f"{benchmark}: {name}, {unit}" for benchmark, name, unit, _ in both]
    width = max(map(len, names))
    print(f"{'figure':<{width}} {'before':>10} {'after':>10} {'ratio':>6} {'noise':>6}  verdict")
    for name, change in zip(names, changes):
        noise = "" if change.noise is None else f"{change.noise:6.1%}"
        print(
            f"{name:<{width}} {change.before:10.4g} {change.after:10.4g} {change.ratio:6.3f} "
            f"{noise:>6}  {change.verdict}"
        )
    if missing := len(first.keys() ^ second.keys()):
        print(f"figures in one of the files alone: {missing}")
    return int(any(change.verdict == "worse" for change in changes))


if __name__ == "__main__":
    sys.exit(main())
