"""What is left to run: a cell is what a table needs one run for, and may take several to find.

All of it follows from the finished lines, so a plan that was interrupted goes on where it was.
"""

import enum
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from benchmarks.quality.methods import Method
from benchmarks.quality.results import Key, Result, Results, Tuned
from benchmarks.quality.search import Tried, closest, hits, propose
from benchmarks.quality.tasks import Task

TUNING_SEED = 1000
"""The first of the seeds that learning rates are tuned with; they are never reported."""

# Steps beyond a range of learning rates, and their factor. A method that fails at every rate would
# go on for ever.
_WIDER, _STEP = 2, 2.0


class Cell(NamedTuple):
    """One task, method, target, seed, learning rate and split.

    Attributes:
      first: the cell of the first seed, whose knob a search starts from; None: this is it.
    """

    task: Task
    method: Method
    target: float
    seed: int
    learning_rate: float
    split: str
    first: "Cell | None" = None

    def key(self, knob: float | None = None) -> Key:
        """The key of a run of it."""
        return Key(
            self.task.name,
            self.method.name,
            self.target,
            self.seed,
            self.learning_rate,
            self.split,
            knob,
            self.task.version,
            self.method.version,
        )


class Status(enum.Enum):
    """A cell that has nothing to run: it is done, or waits for the first seed's search."""

    DONE = "done"
    WAITING = "waiting"


def next_run(cell: Cell, finished: Mapping[Key, Result]) -> Key | Status:
    """The next run that a cell needs."""
    search = cell.method.search
    if search is None:
        return Status.DONE if cell.key() in finished else cell.key()
    start = None
    if cell.first is not None:
        if next_run(cell.first, finished) != Status.DONE:
            return Status.WAITING
        start = closest(tried(cell.first, finished), cell.target).knob
    done: list[Tried] = []
    while len(done) < search.most:
        key = cell.key(propose(search, cell.target, done, start))
        if key not in finished:
            return key
        done.append(Tried(key.knob or 0.0, finished[key].sparsity))
        if hits(cell.target, done[-1].sparsity):
            break
    return Status.DONE


def tried(cell: Cell, finished: Mapping[Key, Result]) -> list[Tried]:
    """The finished runs of a cell of a method that searches."""
    return [
        Tried(key.knob, result.sparsity)
        for key, result in finished.items()
        if key.knob is not None and key == cell.key(key.knob)
    ]


def targets(method: Method, sparsities: Sequence[float]) -> Sequence[float]:
    """What a method is run at: one that does not prune, once, at 0."""
    return sparsities if method.prunes else (0.0,)


def report_cells(
    tasks: Sequence[Task],
    methods: Sequence[Method],
    sparsities: Mapping[str, Sequence[float]],
    seeds: Sequence[int],
    results: Results,
) -> list[Cell]:
    """The cells of the test split, seeds outermost: wherever one stops, methods are balanced.

    Args:
      tasks: what is trained.
      methods: how it is pruned.
      sparsities: targets by the name of the task.
      seeds: of the runs.
      results: the finished ones, with the learning rates that were tuned.
    """

    def rate(task: Task, method: Method, target: float) -> float:
        which = Tuned(task.name, method.name, task.version, method.version)
        return results.rate(which, target) or task.default_rate

    return _linked(
        Cell(task, method, target, seed, rate(task, method, target), "test")
        for seed in seeds
        for task in tasks
        for method in methods
        for target in targets(method, sparsities[task.name])
    )


def tuning_cells(tasks: Sequence[Task], methods: Sequence[Method]) -> list[Cell]:
    """The cells of the validation split: all rates of a task, at the sparsities to tune at."""
    return _linked(
        Cell(task, method, target, seed, rate, "validation")
        for task in tasks
        for seed in range(TUNING_SEED, TUNING_SEED + task.tuning_seeds)
        for method in methods
        for target in targets(method, task.tuned_at)
        for rate in task.learning_rates
    )


def choices(cells: Iterable[Cell]) -> list[list[Cell]]:
    """The cells by what one learning rate is chosen for: task, method and target."""

    def of_choice(cell: Cell) -> tuple[str, str, float]:
        return cell.task.name, cell.method.name, cell.target

    return [list(own) for _, own in groupby(sorted(cells, key=of_choice), key=of_choice)]


def wider_cells(cells: Iterable[Cell], finished: Mapping[Key, Result]) -> list[Cell]:
    """The cells of one more learning rate, wherever the best is at an end of those that were tried.

    Args:
      cells: those of the rates that were tried.
      finished: the runs that are.

    Returns:
      The cells; none where the best is inside, or the range was widened twice.
    """
    return [cell for own in choices(cells) for cell in _one_rate_more(own, finished)]


def _one_rate_more(cells: Sequence[Cell], finished: Mapping[Key, Result]) -> list[Cell]:
    best = best_rate(cells, finished)
    rates = {cell.learning_rate for cell in cells}
    if best is None or len(rates) == len(cells[0].task.learning_rates) + _WIDER:
        return []
    if best == max(rates):
        further = best * _STEP
    elif best == min(rates):
        further = best / _STEP
    else:
        return []
    return _linked(
        cell._replace(learning_rate=further) for cell in cells if cell.learning_rate == best
    )


def _linked(cells: Iterable[Cell]) -> list[Cell]:
    """The cells, each with the first of those that differ from it by their seed alone."""
    firsts: dict[Key, Cell] = {}
    linked: list[Cell] = []
    for cell in cells:
        group = cell.key()._replace(seed=0)
        linked.append(cell._replace(first=firsts.get(group)))
        firsts.setdefault(group, linked[-1])
    return linked


def best_rate(cells: Sequence[Cell], finished: Mapping[Key, Result]) -> float | None:
    """The learning rate of the best mean over the seeds.

    A rate with a seed that diverged, or whose search did not hit the target, is out.

    Args:
      cells: those of one task, method and target.
      finished: the runs that are.

    Returns:
      The rate; None where all are out, or where a run is missing.
    """
    if any(next_run(cell, finished) != Status.DONE for cell in cells):
        return None
    values: dict[float, list[float]] = {}
    for cell in cells:
        counted = [
            result.value
            for key, result in finished.items()
            if result.counts and key == cell.key(key.knob)
        ]
        values.setdefault(cell.learning_rate, []).append(counted[0] if counted else float("nan"))
    sign = 1 if cells[0].task.higher_is_better else -1
    means = {rate: sign * sum(own) / len(own) for rate, own in values.items()}
    finite = [rate for rate in means if means[rate] == means[rate]]
    return max(finite, key=means.__getitem__, default=None)
