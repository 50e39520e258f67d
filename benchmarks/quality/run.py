"""Runs methods against tasks and writes a line of JSON a run; a finished run is not run again.

    python -m benchmarks.quality --quick --jobs 2
    python -m benchmarks.quality --tasks lenet --methods lats_optax dense --seeds 3
    python -m benchmarks.quality --tune --jobs 2

`--tune` trains on less, scores on validation data, and writes the best learning rate of each task
and method, at the sparsities that the task names, to the same file. A range whose best rate is at
an end is widened, by a factor of two and at most twice. From then on runs of the test split use the
rate that was chosen at their sparsity, or else at the next lower one. Methods that cannot name a
sparsity are searched: their runs that miss it are in the file too.
"""

import argparse
import math
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.quality import plan, workers
from benchmarks.quality.fashion_mnist import DIRECTORY
from benchmarks.quality.results import Key, Rate, Result, Results, Writer, read, tuned
from benchmarks.quality.tasks import Task

OUT = Path("benchmarks/results/quality.jsonl")

QUICK_SEEDS, SEEDS = 3, 5

# Runs that a search is expected to take, with the first seed and with another.
_SEARCH_RUNS, _CORRECTION_RUNS = 6, 2


def main(arguments: Sequence[str] | None = None, load: workers.Load = workers.load) -> int:
    """Runs what is not finished; the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    registry = load(options.data)
    _check(parser, options, registry)
    tasks = [registry.tasks[name] for name in options.tasks]
    methods = [registry.methods[name] for name in options.methods]
    for file in {file for task in tasks for file in task.files if not file.exists()}:
        parser.error(f"--data: there is no {file} (Debian has it in dataset-fashion-mnist)")
    try:
        writer = Writer(options.out)
    except ValueError as error:
        parser.error(f"--out: {error}")
    try:
        if options.rates is not None:
            take_rates(options.rates, writer)
        if options.tune:
            cells = plan.tuning_cells(tasks, methods)
        else:
            sparsities = {task.name: _sparsities(options, task) for task in tasks}
            seeds = range(options.seeds)
            cells = plan.report_cells(tasks, methods, sparsities, seeds, writer.results)
        with workers.pool(options.jobs, load, options.data) as pool:
            finish = tune if options.tune else work
            failed = finish(cells, writer, pool, options.jobs)
    except KeyboardInterrupt:
        print(
            f"\nstopped; finished runs are in {options.out}; the same command goes on", flush=True
        )
        return 130
    finally:
        writer.close()
    return 1 if failed else 0


def work(cells: Sequence[plan.Cell], writer: Writer, pool: workers.Pool, jobs: int) -> int:
    """Runs all that the cells need; how many of them could not be finished."""
    finished = writer.results.runs
    pending = [cell for cell in cells if plan.next_run(cell, finished) != plan.Status.DONE]
    running: dict[Key, plan.Cell] = {}
    total, failed = len(pending), 0
    print(f"{len(cells) - total} of {len(cells)} are finished", flush=True)
    while pending or running:
        while pool.free() and (found := _first_ready(pending, finished)):
            cell, key = found
            pending.remove(cell)
            running[key] = cell
            pool.submit(key)
        if not running:
            print(f"{len(pending)} not run: the search of their first seed failed", flush=True)
            return failed + len(pending)
        end = pool.wait()
        cell = running.pop(end.key)
        if end.outcome is None:
            failed += 1
            print(f"failed: {_named(end.key)}: {end.error}", flush=True)
            continue
        result = _result(cell, end)
        writer.add(result)
        if plan.next_run(cell, finished) != plan.Status.DONE:
            pending.insert(0, cell)
        left = _seconds_left([*pending, *running.values()], writer.results) / jobs
        done = total - len(pending) - len(running)
        print(f"[{done}/{total}] {_line(result)}; {_duration(left)} left", flush=True)
    return failed


def tune(cells: Sequence[plan.Cell], writer: Writer, pool: workers.Pool, jobs: int) -> int:
    """Runs all rates and writes the best of each task, method and sparsity.

    Where the best is at an end of the range, the range is widened first.

    Returns:
      How many cells could not be finished.
    """
    failed = work(cells, writer, pool, jobs)
    cells = list(cells)
    while wider := plan.wider_cells(cells, writer.results.runs):
        cells += wider
        failed += work(wider, writer, pool, jobs)
    for own in plan.choices(cells):
        task, method, target = own[0].task.name, own[0].method.name, own[0].target
        where = task + _of(method, target)
        rate = plan.best_rate(own, writer.results.runs)
        if rate is None:
            print(f"{where}: no learning rate was chosen", flush=True)
            continue
        versions = own[0].task.version, own[0].method.version
        _write_rate(Rate(task, method, target, rate, *versions), writer)
        rates = {cell.learning_rate for cell in own}
        edge = " (at the end of its range)" if rate in (min(rates), max(rates)) else ""
        print(f"{where}: learning rate {rate:g}{edge}", flush=True)
    return failed


def take_rates(path: Path, writer: Writer) -> None:
    """Writes the tuned rates of another file."""
    for (task, method, *versions), rates in read(path)[0].rates.items():
        for target, rate in rates.items():
            _write_rate(Rate(task, method, target, rate, *versions), writer)


def _write_rate(rate: Rate, writer: Writer) -> None:
    """Writes a tuned rate, where the file has another or none."""
    if writer.results.rates.get(tuned(rate), {}).get(rate.target) != rate.learning_rate:
        writer.add(rate)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", help="default: all")
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--sparsities", nargs="+", type=float, help="default: those of the task")
    parser.add_argument("--seeds", type=int, help=f"how many; default: {SEEDS}")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results")
    parser.add_argument("--data", type=Path, default=DIRECTORY, help="of Fashion-MNIST's idx files")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each if > 1")
    parser.add_argument("--quick", action="store_true", help="a few of each, unless named")
    parser.add_argument("--tune", action="store_true", help="choose learning rates, report nothing")
    parser.add_argument("--rates", type=Path, help="a file of results to take tuned rates from")
    return parser


def _check(
    parser: argparse.ArgumentParser, options: argparse.Namespace, registry: workers.Registry
) -> None:
    quick = options.quick
    if options.rates is not None and not options.rates.exists():
        parser.error(f"--rates: there is no file {options.rates}")
    if options.seeds is None:
        options.seeds = QUICK_SEEDS if quick else SEEDS
    options.tasks = options.tasks or [
        task.name for task in registry.tasks.values() if task.quick_sparsities or not quick
    ]
    options.methods = options.methods or [
        method.name for method in registry.methods.values() if method.quick or not quick
    ]
    for kind, names, known in (
        ("task", options.tasks, registry.tasks),
        ("method", options.methods, registry.methods),
    ):
        for name in names:
            if name not in known:
                allowed = ", ".join(map(repr, known))
                parser.error(f"--{kind}s: {kind} {name!r} is not known; known are {allowed}")
    for sparsity in options.sparsities or []:
        if not 0 < sparsity < 1:
            parser.error(f"--sparsities: {sparsity} is not allowed; numbers between 0 and 1 are")
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; allowed: 1 or more")
    if options.seeds > plan.TUNING_SEED:
        parser.error(f"--seeds is {options.seeds}; allowed: {plan.TUNING_SEED} or fewer")


def _sparsities(options: argparse.Namespace, task: Task) -> Sequence[float]:
    quick = options.quick and task.quick_sparsities
    return options.sparsities or quick or task.sparsities


def _first_ready(
    pending: Sequence[plan.Cell], finished: dict[Key, Result]
) -> tuple[plan.Cell, Key] | None:
    for cell in pending:
        key = plan.next_run(cell, finished)
        if isinstance(key, Key):
            return cell, key
    return None


def _result(cell: plan.Cell, end: workers.Finished) -> Result:
    assert end.outcome is not None
    value, zeros, size = end.outcome
    return Result(
        end.key,
        metric=cell.task.metric,
        value=value,
        zeros=zeros,
        size=size,
        sparsity=end.outcome.sparsity,
        seconds=round(end.seconds, 1),
        jax=jax.__version__,
        machine=machine(),
    )


def machine() -> str:
    """The processor and the number of cores, or the accelerator."""
    kind = jax.devices()[0].device_kind
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if kind != "cpu":
        name = kind
    elif cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores"


def _seconds_left(cells: Sequence[plan.Cell], results: Results) -> float:
    measured: dict[str, list[float]] = {}
    for key, result in results.runs.items():
        measured.setdefault(key.task, []).append(result.seconds)
    left = 0.0
    for cell in cells:
        own = measured.get(cell.task.name)
        runs = 1
        if cell.method.search is not None:
            expected = _CORRECTION_RUNS if cell.first else _SEARCH_RUNS
            runs = max(expected - len(plan.tried(cell, results.runs)), 1)
        left += runs * (statistics.median(own) if own else cell.task.seconds)
    return left


def _named(key: Key) -> str:
    knob = "" if key.knob is None else f", knob {key.knob:.4g}"
    rate = f", rate {key.learning_rate:g}" if key.split == "validation" else ""
    return f"{key.task}{_of(key.method, key.target)}, seed {key.seed}{rate}{knob}"


def _of(method: str, target: float) -> str:
    return f", {method}" if target == 0 else f", {method} at {100 * target:g} %"


def _line(result: Result) -> str:
    value = f"{result.value:.2%}" if result.metric == "accuracy" else f"{result.value:.3f} bits"
    missed = "" if result.counts else " (search)"
    zeros = f"{result.sparsity:.2%} zeros{missed}"
    return f"{_named(result.key)}: {value}, {zeros}, {result.seconds:.0f} s"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"about {math.ceil(seconds)} s"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h"
