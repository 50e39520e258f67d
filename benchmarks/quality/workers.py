"""Where runs are executed: in this process, or in worker processes with one thread each.

Here belongs nothing about what is run: a worker is given the key of a run and sends its outcome.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from unittest import mock

from benchmarks.quality.methods import Method, all_methods
from benchmarks.quality.results import Key
from benchmarks.quality.tasks import Task, all_tasks
from benchmarks.quality.training import Outcome

# XLA takes the number of its threads from NPROC, and those of Eigen from its flags.
ONE_THREAD = {
    "NPROC": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "OMP_NUM_THREADS": "1",
}


class Registry(NamedTuple):
    """The tasks and methods by name."""

    tasks: dict[str, Task]
    methods: dict[str, Method]


Load = Callable[[Path], Registry]


def load(directory: Path) -> Registry:
    """All tasks and methods; the directory is that of Fashion-MNIST."""
    return Registry(all_tasks(directory), all_methods())


class Finished(NamedTuple):
    """A run that ended: with an outcome, or with the line that says what went wrong."""

    key: Key
    outcome: Outcome | None
    seconds: float
    error: str = ""


class Pool(Protocol):
    """What executes runs."""

    def free(self) -> bool:
        """Whether it takes another run."""

    def submit(self, key: Key) -> None:
        """Gives it a run."""

    def wait(self) -> Finished:
        """Waits for the next run to end."""


def execute(registry: Registry, key: Key) -> Finished:
    """Runs one run; what a method raises is an error of that run alone."""
    task, method = registry.tasks[key.task], registry.methods[key.method]
    make = method.make if key.knob is None else partial(method.make, knob=key.knob)
    start = time.perf_counter()
    try:
        outcome = task.run(make, key.target, key.seed, key.learning_rate, key.split)
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        return Finished(key, None, time.perf_counter() - start, f"{type(error).__name__}: {line}")
    return Finished(key, outcome, time.perf_counter() - start)


class InProcess:
    """One run at a time, with all threads that XLA takes."""

    def __init__(self, registry: Registry) -> None:
        """Keeps the registry."""
        self._registry = registry
        self._waiting: list[Key] = []

    def free(self) -> bool:
        """Whether it takes another run."""
        return not self._waiting

    def submit(self, key: Key) -> None:
        """Gives it a run, which `wait` executes."""
        self._waiting.append(key)

    def wait(self) -> Finished:
        """Executes the run."""
        return execute(self._registry, self._waiting.pop())


class Workers:
    """Processes with one thread each."""

    def __init__(self, count: int, load: Load, directory: Path) -> None:
        """Starts them."""
        self._arguments = (load, directory)
        self._idle = [self._start() for _ in range(count)]
        self._busy: dict[Connection, tuple[Any, Key]] = {}

    def free(self) -> bool:
        """Whether one is idle."""
        return bool(self._idle)

    def submit(self, key: Key) -> None:
        """Gives one a run."""
        process, connection = self._idle.pop()
        connection.send(key)
        self._busy[connection] = (process, key)

    def wait(self) -> Finished:
        """Waits for the next run to end. A worker that died is replaced."""
        connection = wait(list(self._busy))[0]
        assert isinstance(connection, Connection)
        process, key = self._busy.pop(connection)
        try:
            finished = connection.recv()
        except EOFError:
            process.join()
            message = f"the worker process ended with exit code {process.exitcode}"
            finished = Finished(key, None, 0.0, message)
            process, connection = self._start()
        self._idle.append((process, connection))
        return finished

    def stop(self) -> None:
        """Ends all processes; what they were running is lost."""
        for process, connection in [*self._idle, *((p, c) for c, (p, _) in self._busy.items())]:
            connection.close()
            process.terminate()
            process.join()

    def _start(self) -> tuple[Any, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        # A spawned process imports JAX before its first line runs: it inherits its environment.
        with mock.patch.dict(os.environ, ONE_THREAD):
            process.start()
        theirs.close()
        return process, ours


@contextlib.contextmanager
def pool(jobs: int, load: Load, directory: Path) -> Iterator[Pool]:
    """What executes runs, ``jobs`` at once."""
    if jobs == 1:
        yield InProcess(load(directory))
        return
    workers = Workers(jobs, load, directory)
    try:
        yield workers
    finally:
        workers.stop()


def _serve(connection: Connection, load: Load, directory: Path) -> None:
    # Ctrl-C reaches the whole process group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    registry = load(directory)
    with contextlib.suppress(EOFError):
        while True:
            connection.send(execute(registry, connection.recv()))
