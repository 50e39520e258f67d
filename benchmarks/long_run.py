"""A long run in one process: whether memory stays flat, steps as fast, and the target exact.

    python -m benchmarks.long_run --steps 50000

It trains a small network on the digits to a named sparsity by the trainer's own loop, with an
evaluation and a checkpoint after each quarter, and prints one line a figure: the memory that the
process has allocated in the middle of each quarter, the time of a step in the first and in the last
thousand, and the zeros beside those wanted.

A machine's speed changes within minutes by more than the few percent that are asked for. So the
last thousand steps are not compared with those of ten minutes before, but with the first of a
second run, in a process of its own: the two are stopped and continued in turn, by SIGSTOP and
SIGCONT, and have the machine in alternating fractions of a second. The very first thousand compile,
and are left out.

Memory is what malloc has given and not got back (glibc alone counts it), Python's objects included:
the runs have PYTHONMALLOC=malloc. The resident set would not do: it has also what was freed, until
the system takes it back.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from lats_optax.training import experiment, loop
from lats_optax.training.config import TrainConfig
from lats_optax.training.presets import PRESETS

_THOUSAND, _RECORD = 1000, 100
_MIB = 2**20
_SLICE = 0.25
"""Seconds that one of two runs has the machine for."""


def config_of(steps: int, directory: Path) -> TrainConfig:
    """The run: about so many steps, with a record of every hundred."""
    preset = PRESETS["digits-lats"].config
    config = dataclasses.replace(
        preset,
        model=dataclasses.replace(preset.model, width=0.25),
        workdir=directory / "run",
        log_every=_RECORD,
    )
    epochs = steps // experiment.build_experiment(config).steps_per_epoch
    quarter = -(-epochs // 4)
    return dataclasses.replace(config, epochs=epochs, eval_every=quarter, checkpoint_every=quarter)


def train(steps: int, directory: Path) -> None:
    """One run; leaves what it was found to be in `figures.json`, unless SIGTERM ends it."""
    memory = Memory()
    try:
        result = loop.fit(experiment.build_experiment(config_of(steps, directory)))
    except KeyboardInterrupt:
        return
    finally:
        memory.close()
    target = result.config.prune.target_sparsity
    assert target is not None
    figures = {
        "seconds": result.seconds,
        "memory": [memory.around(part) for part in (1 / 8, 3 / 8, 5 / 8, 7 / 8)],
        "zeros": int(result.sparsity.zeros),
        "size": int(result.sparsity.size),
        "wanted": round(target * result.sparsity.size),
    }
    (directory / "figures.json").write_text(json.dumps(figures))


class Memory(threading.Thread):
    """Samples the allocated memory of this process, in bytes, until it is closed."""

    def __init__(self, seconds: float = 0.5) -> None:
        """Starts to sample."""
        super().__init__(daemon=True)
        self._samples: list[tuple[float, int]] = []
        self._seconds, self._end = seconds, threading.Event()
        self.start()

    def run(self) -> None:
        """Samples."""
        while not self._end.wait(self._seconds):
            self._samples.append((time.perf_counter(), allocated()))

    def close(self) -> None:
        """Ends the thread."""
        self._end.set()
        self.join()

    def around(self, part: float) -> float:
        """The median over a tenth of the time, around a part of it."""
        begin, end = self._samples[0][0], self._samples[-1][0]
        middle = begin + part * (end - begin)
        return statistics.median(
            size for at, size in self._samples if abs(at - middle) <= 0.05 * (end - begin)
        )


class _Mallinfo2(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def allocated() -> int:
    """Bytes that malloc has given and not got back: of its arenas, and mapped one by one."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


class Run:
    """A run in a process of its own, which may be stopped and continued."""

    def __init__(self, steps: int, directory: Path) -> None:
        """Starts it."""
        directory.mkdir()
        self._metrics, self._read = directory / "run" / "metrics.jsonl", 0
        self._records: list[dict[str, Any]] = []
        context = multiprocessing.get_context("spawn")
        self.process: BaseProcess = context.Process(target=train, args=(steps, directory))
        with mock.patch.dict(os.environ, PYTHONMALLOC="malloc"):
            self.process.start()

    def send(self, number: int) -> None:
        """Sends it a signal; nothing if it is over."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def records(self) -> list[dict[str, Any]]:
        """The records of training that it has written so far."""
        if self._metrics.exists():
            with self._metrics.open("rb") as file:
                file.seek(self._read)
                # What is written at this moment has no end of line yet.
                new = file.read().rpartition(b"\n")[0]
            self._read += len(new) + bool(new)
            found = map(json.loads, new.splitlines())
            self._records += [record for record in found if record["split"] == "train"]
        return self._records

    def wait_for(self, step: int) -> None:
        """Returns soon after a step, or when the process has ended."""
        while self.process.is_alive():
            if (records := self.records()) and records[-1]["step"] >= step:
                return
            time.sleep(0.02)

    def close(self) -> None:
        """Ends it after its step, if it goes on."""
        for number in (signal.SIGTERM, signal.SIGCONT):
            self.send(number)
        self.process.join()


def in_turn(long: Run, fresh: Run) -> None:
    """Lets two stopped runs go on in alternating slices of time, until one has ended."""
    while long.process.is_alive() and fresh.process.is_alive():
        for run in (long, fresh):
            run.send(signal.SIGCONT)
            run.process.join(_SLICE)
            run.send(signal.SIGSTOP)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, and prints the figures; 1 where a process failed."""
    parser = argparse.ArgumentParser(
        "benchmarks.long_run", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=50_000, help="at least 4,000")
    options = parser.parse_args(arguments)
    if options.steps < 4 * _THOUSAND:
        parser.error(f"--steps is {options.steps}; allowed: {4 * _THOUSAND} or more")
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        parser.error("this program needs glibc 2.33 or newer, whose malloc counts what it gives")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        trained = config_of(options.steps, directory)
        total = trained.epochs * experiment.build_experiment(trained).steps_per_epoch
        before_last = (total - _THOUSAND) // _RECORD * _RECORD
        with contextlib.closing(Run(options.steps, directory / "long")) as long:
            long.wait_for(before_last)
            long.send(signal.SIGSTOP)
            with contextlib.closing(Run(options.steps, directory / "fresh")) as fresh:
                fresh.wait_for(_THOUSAND)
                fresh.send(signal.SIGSTOP)
                in_turn(long, fresh)
                long.send(signal.SIGCONT)
                long.process.join()
        if long.process.exitcode or fresh.process.exitcode:
            print("a run failed; what it wrote is above", file=sys.stderr)
            return 1
        figures = json.loads((directory / "long" / "figures.json").read_text())
        first = milliseconds(fresh.records(), _THOUSAND, trained.data.batch_size)
        last = milliseconds(long.records(), before_last, trained.data.batch_size)
    print(report(figures, total, first, last))
    return 0


def milliseconds(records: Sequence[dict[str, Any]], after: int, batch_size: int) -> list[float]:
    """The time of a step, by the records after one step, each of a hundred."""
    rates = [record["images_per_second"] for record in records if record["step"] > after]
    # The first has a pause in it. Of the time of the others the process had half.
    return [1000 * batch_size / rate / 2 for rate in rates[1:]]


def report(
    figures: dict[str, Any], steps: int, first: Sequence[float], last: Sequence[float]
) -> str:
    """The figures of a run, one a line."""
    memory = figures["memory"]
    same = min(len(first), len(last))
    means = [statistics.mean(each[:same]) for each in (first, last)]
    change = means[1] / means[0] - 1
    return "\n".join(
        [
            f"{steps:,} steps in {figures['seconds']:.0f} s",
            f"memory: {', '.join(f'{each / _MIB:.1f}' for each in memory)} MiB in the four "
            f"quarters, {memory[3] / memory[1] - 1:+.2%} from the second to the last",
            f"step: {means[0]:.2f} ms in the first thousand, {means[1]:.2f} ms in the last, "
            f"{change:+.1%} (two processes in turn, {same} hundreds of steps of each)",
            f"zeros: {figures['zeros']:,} of {figures['size']:,}, {figures['wanted']:,} wanted",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
