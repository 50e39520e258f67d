"""The tables of the quality benchmark in Markdown, from a file of results alone.

python -m benchmarks.quality.table benchmarks/results/quality.jsonl
"""

import argparse
import math
import signal
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from benchmarks.quality.intervals import Interval, verdict
from benchmarks.quality.results import OURS, Result, Results, read, reported, tuned
from benchmarks.quality.scores import Cell, Scores, scores
from benchmarks.quality.search import CLOSE, FEWER_OR_MORE, hits, is_close

NOTE = (
    "Mean ± half-width of the 95 % Student-t interval over the seeds; in brackets the number of "
    f"seeds. Runs are compared that end within {100 * CLOSE:g} % (absolute) of the named sparsity, "
    f"and within {100 * FEWER_OR_MORE:g} % of the weights that it leaves. Bold: the best mean, and "
    "all whose paired difference to it has an interval that contains 0, which one seed that fails "
    "makes wide. The best is chosen by the runs that it is judged by, which favors it a little."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        "benchmarks.quality.table", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", type=Path, help="a file that benchmarks.quality wrote")
    options = parser.parse_args(arguments)
    if not options.results.exists():
        parser.error(f"there is no file {options.results}")
    try:
        results, _ = read(options.results)
    except ValueError as error:
        parser.error(str(error))
    print(report(results))
    return 0


def report(results: Results) -> str:
    """All tables as one text."""
    tasks = scores(results)
    if not tasks:
        return "No run of the test split is finished."
    lines = [NOTE, "", *_where(reported(results))]
    for task in tasks:
        lines += ["", f"### {task.task}", "", *task_table(task), ""]
        lines += [*_rates(task, results), "", *(f"- {line}" for line in verdicts(task))]
    searched = whole_runs(results)
    if searched:
        lines += ["", "### Whole runs needed", "", *searched]
    return "\n".join(lines)


def task_table(task: Scores) -> Iterator[str]:
    """The rows of one task: methods, by sparsity."""
    unit = "test accuracy in %" if task.metric == "accuracy" else "bits per character"
    if task.dense is not None:
        yield f"{unit.capitalize()}; dense {_value(task, task.dense.interval)}."
        yield ""
    else:
        yield f"{unit.capitalize()}."
        yield ""
    yield _row(["method", *(f"{100 * target:g} %" for target in task.targets)])
    yield _row(["---", *("---:" for _ in task.targets)])
    top = {target: task.on_top(target) for target in task.targets}
    for method in task.methods:
        cells = [_text(task, method, target, method in top[target]) for target in task.targets]
        yield _row([method, *cells])


def verdicts(task: Scores) -> Iterator[str]:
    """What the default is against the best other method, a line a sparsity."""
    for target in task.targets:
        where = f"{task.task} at {100 * target:g} %"
        other = task.best(target, but=OURS)
        if not task.comparable(OURS, target):
            yield f"{where}: no comparable run of {OURS}"
            continue
        if other is None:
            yield f"{where}: nothing to compare {OURS} with"
            continue
        ours = _number(task, task.cells[OURS, target].interval.mean)
        theirs = _number(task, task.cells[other, target].interval.mean)
        difference = task.difference(OURS, other, target)
        said = f"{where}: {OURS} {ours}, best other {other} {theirs}; "
        if difference is None:
            yield said + "no seed in common"
            continue
        paired = _number(task, difference.mean, signed=True)
        if difference.seeds > 1:
            paired += f" ± {_number(task, difference.half_width)}"
        seeds = "1 seed" if difference.seeds == 1 else f"{difference.seeds} seeds"
        what = verdict(difference, task.higher_is_better)
        yield f"{said}paired difference {paired} over {seeds}: **{what}**"


def whole_runs(results: Results) -> list[str]:
    """Of methods that search: whole runs until one is close to the sparsity that was asked for."""
    runs: dict[tuple[str, str, float], dict[int, list[bool]]] = {}
    for result in reported(results):
        key = result.key
        if key.knob is not None:
            group = runs.setdefault((key.task, key.method, key.target), {})
            group.setdefault(key.seed, []).append(is_close(key.target, result.sparsity))
    if not runs:
        return []
    columns = ["task", "method", "sparsity", "first seed", "other seeds, mean", "not hit"]
    lines = [
        "Runs from start to end that a method without a target needs until its sparsity is within "
        f"{100 * CLOSE:g} % (absolute) of the named one; more may follow, until one compares. "
        "The first seed searches the whole range, the others begin at its result. A method with a "
        "target needs one.",
        "",
        _row(columns),
        _row(["---", "---", "---:", "---:", "---:", "---:"]),
    ]
    for (task, method, target), seeds in sorted(runs.items()):
        close = [seeds[seed] for seed in sorted(seeds)]
        first, *others = (own.index(True) + 1 if any(own) else len(own) for own in close)
        missed = sum(not any(own) for own in close)
        mean = f"{statistics.mean(others):.1f}" if others else "–"
        missed_of = f"{missed} of {len(seeds)}" if missed else "–"
        lines.append(_row([task, method, f"{100 * target:g} %", str(first), mean, missed_of]))
    return lines


def _where(runs: Iterable[Result]) -> Iterator[str]:
    machines: dict[tuple[str, str], int] = {}
    for run in runs:
        machines[run.machine, run.jax] = machines.get((run.machine, run.jax), 0) + 1
    for (machine, jax), count in sorted(machines.items(), key=lambda pair: -pair[1]):
        yield f"{count} runs on {machine}; jax {jax}."


def _rates(task: Scores, results: Results) -> Iterator[str]:
    chosen: dict[str, dict[float, float]] = {}
    rest: dict[str, float] = {}
    for key in sorted(result.key for result in reported(results)):
        if key.task != task.task:
            continue
        if tuned(key) in results.rates:
            chosen.setdefault(key.method, {})[key.target] = key.learning_rate
        else:
            rest[key.method] = key.learning_rate
    if chosen:
        said = "; ".join(f"{method} {_by_target(rates)}" for method, rates in chosen.items())
        yield f"Learning rates tuned on validation data: {said}."
    if rest:
        which = f" of {', '.join(rest)}" if chosen else ""
        rates = ", ".join(f"{rate:g}" for rate in sorted(set(rest.values())))
        yield f"Learning rate{which}, not tuned: {rates}."


def _by_target(rates: Mapping[float, float]) -> str:
    """Learning rates by sparsity, in ascending order: ``0.1 to 90 %, 0.2 to 99 %``."""
    groups = [list(group) for _, group in groupby(rates.items(), key=itemgetter(1))]
    if len(groups) == 1:
        return f"{groups[0][0][1]:g}"
    return ", ".join(f"{group[-1][1]:g} to {100 * group[-1][0]:g} %" for group in groups)


def _text(task: Scores, method: str, target: float, bold: bool) -> str:
    cell = task.cells.get((method, target))
    if cell is None:
        return "–"
    text = _value(task, cell.interval)
    text = f"**{text}**" if bold else text
    return text + _at(cell, target) + f" ({cell.interval.seeds})"


def _at(cell: Cell, target: float) -> str:
    return "" if hits(target, cell.sparsity) else f" at {100 * cell.sparsity:.1f} %"


def _value(task: Scores, found: Interval) -> str:
    if not math.isfinite(found.mean):
        return "diverged"
    mean = _number(task, found.mean)
    return mean if found.seeds < 2 else f"{mean} ± {_number(task, found.half_width)}"


def _number(task: Scores, value: float, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.2f}" if task.metric == "accuracy" else f"{value:{sign}.3f}"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a traceback
    sys.exit(main())
