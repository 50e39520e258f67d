"""What the results say of each task: values by method, sparsity and seed, ready to show.

Here belongs what the table and the plot both need.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from benchmarks.quality.intervals import Interval, interval, paired
from benchmarks.quality.methods import METHODS
from benchmarks.quality.results import DENSE, Result, Results, reported
from benchmarks.quality.search import hits
from benchmarks.quality.tasks import higher_is_better


class Cell(NamedTuple):
    """The runs of a method at a sparsity.

    Attributes:
      values: the metric by seed.
      sparsity: the mean of what was reached.
      comparable: whether all runs are as sparse as asked for, and none diverged.
    """

    values: dict[int, float]
    sparsity: float
    comparable: bool

    @property
    def interval(self) -> Interval:
        """Mean and interval over the seeds."""
        return interval(list(self.values.values()))


class Scores(NamedTuple):
    """One task.

    Attributes:
      task: its name.
      metric: ``"accuracy"`` or ``"bits"``.
      dense: the runs without pruning; None: there are none.
      targets: the sparsities, in ascending order.
      methods: names, `in_order`.
      cells: by method and target, where there are runs.
    """

    task: str
    metric: str
    dense: Cell | None
    targets: list[float]
    methods: list[str]
    cells: dict[tuple[str, float], Cell]

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value is the better one."""
        return higher_is_better(self.metric)

    def best(self, target: float, but: str = "") -> str | None:
        """The method of the best mean among the comparable ones, another than ``but``."""
        means = {
            method: self.cells[method, target].interval.mean
            for method in self.methods
            if method != but and self.comparable(method, target)
        }
        choose = max if self.higher_is_better else min
        return choose(means, key=means.__getitem__) if means else None

    def comparable(self, method: str, target: float) -> bool:
        """Whether there are runs, and all of them count."""
        return (method, target) in self.cells and self.cells[method, target].comparable

    def difference(self, method: str, other: str, target: float) -> Interval | None:
        """The paired difference ``method − other``; None: they have no seed in common."""
        values = (self.cells[name, target].values for name in (method, other))
        return paired(*values)

    def on_top(self, target: float) -> list[str]:
        """The best method, and those whose paired difference to it may be 0."""
        best = self.best(target)
        found = []
        for method in self.methods:
            if best is None or not self.comparable(method, target):
                continue
            difference = self.difference(method, best, target)
            if method == best or (difference is not None and difference.contains_zero):
                found.append(method)
        return found


def scores(results: Results) -> list[Scores]:
    """The tasks in the order of the file."""
    by_task: dict[str, list[Result]] = {}
    for result in reported(results):
        by_task.setdefault(result.key.task, []).append(result)
    return [_scores(task, own) for task, own in by_task.items()]


def in_order(methods: Iterable[str]) -> list[str]:
    """As they are registered, our default first, then others by name.

    >>> in_order(["str", "one-shot", "hard", "lats_optax", "str"])
    ['lats_optax', 'one-shot', 'str', 'hard']
    """
    places = {method.name: place for place, method in enumerate(METHODS)}
    return sorted(set(methods), key=lambda name: (places.get(name, len(places)), name))


def _scores(task: str, results: Iterable[Result]) -> Scores:
    metric = ""
    groups: dict[tuple[str, float], dict[int, Result]] = {}
    for result in results:
        metric, key = result.metric, result.key
        runs = groups.setdefault((key.method, key.target), {})
        if result.counts:
            runs[key.seed] = result
    cells = {key: _cell(key[0], runs) for key, runs in groups.items() if runs}
    dense = cells.get((DENSE, 0.0))
    methods = in_order(method for method, _ in groups if method != DENSE)
    targets = sorted({target for method, target in groups if method != DENSE})
    return Scores(task, metric, dense, targets, methods, cells)


def _cell(method: str, runs: Mapping[int, Result]) -> Cell:
    values = {seed: runs[seed].value for seed in sorted(runs)}
    near = all(hits(run.key.target, run.sparsity) for run in runs.values())
    comparable = all(map(math.isfinite, values.values())) and (near or method == DENSE)
    return Cell(values, sum(run.sparsity for run in runs.values()) / len(runs), comparable)
