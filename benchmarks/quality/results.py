"""The file of results, a line of JSON a run: its fields, reading it, adding to it."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quality.search import hits

DENSE = "dense"
"""The name of the method that prunes nothing."""

OURS = "lats_optax"
"""The name of this library's default, which the others are compared with."""


class Key(NamedTuple):
    """What tells one run from all others. A knob is that of a method that searches."""

    task: str
    method: str
    target: float
    seed: int
    learning_rate: float
    split: str
    knob: float | None
    task_version: int
    method_version: int


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
      key: what tells it from all other runs.
      metric: of the task: ``"accuracy"`` or ``"bits"``.
      value: of the metric; not a number where training diverged.
      zeros: among the prunable weights after the last step.
      size: number of prunable weights.
      sparsity: zeros / size.
      seconds: that the run took, compilation included.
      jax: version of JAX.
      machine: its processor and number of cores.
    """

    key: Key
    metric: str
    value: float
    zeros: int
    size: int
    sparsity: float
    seconds: float
    jax: str
    machine: str

    @property
    def counts(self) -> bool:
        """Whether it is compared: a search's run that missed the target is not."""
        return self.key.knob is None or hits(self.key.target, self.sparsity)


@dataclasses.dataclass(frozen=True)
class Rate:
    """The base learning rate that tuning chose for a method on a task, at one sparsity."""

    task: str
    method: str
    target: float
    learning_rate: float
    task_version: int
    method_version: int
    role: str = "rate"


class Tuned(NamedTuple):
    """What learning rates are tuned for: a method on a task, and the versions of both."""

    task: str
    method: str
    task_version: int
    method_version: int


class Results(NamedTuple):
    """All that a file holds. A later line takes the place of an earlier one of the same key.

    Attributes:
      runs: finished runs.
      rates: tuned learning rates, each by the sparsity that it was tuned at.
    """

    runs: dict[Key, Result]
    rates: dict[Tuned, dict[float, float]]

    def add(self, line: Result | Rate) -> None:
        """Takes a line in."""
        if isinstance(line, Rate):
            self.rates.setdefault(tuned(line), {})[line.target] = line.learning_rate
        else:
            self.runs[line.key] = line

    def rate(self, which: Tuned, target: float) -> float | None:
        """The learning rate tuned at the largest sparsity up to the target, or at the smallest."""
        rates = self.rates.get(which)
        if not rates:
            return None
        return rates[max((own for own in rates if own <= target), default=min(rates))]


def read(path: Path) -> tuple[Results, int]:
    """What a file holds, and the bytes of it that are whole lines; nothing where there is none.

    Raises:
      ValueError: a line that is whole is not one of a result.
    """
    found = Results({}, {})
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            found.add(_parsed(json.loads(line)))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is not a result: {error}") from error
    return found, whole


class Writer:
    """Adds lines to a file of results, each on the disk before the next run begins."""

    def __init__(self, path: Path) -> None:
        """Reads what is there. A last line that was not written to its end is dropped."""
        self.results, whole = read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")
        if path.stat().st_size > whole:
            print(f"{path}: the last line was half written; dropped", flush=True)
            self._file.truncate(whole)

    def add(self, line: Result | Rate) -> None:
        """Writes one line."""
        self.results.add(line)
        fields = _flat(line) if isinstance(line, Result) else dataclasses.asdict(line)
        self._file.write(json.dumps(fields).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def reported(results: Results) -> list[Result]:
    """The test runs that count: of the newest versions, at the tuned rate where there is one."""
    newest = newest_versions(results.runs)
    return [
        result
        for key, result in results.runs.items()
        if key.split == "test"
        and _versions(key) == newest[key.task, key.method]
        and results.rate(tuned(key), key.target) in (None, key.learning_rate)
    ]


def newest_versions(keys: Iterable[Key]) -> dict[tuple[str, str], tuple[int, int]]:
    """For each task and method, the newest version of the task and of the method on it."""
    keys = list(keys)
    tasks: dict[str, int] = {}
    for key in keys:
        tasks[key.task] = max(tasks.get(key.task, 0), key.task_version)
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for key in keys:
        # A method without a run of the newest task has none that compares: no result has this pair.
        newest = found.get((key.task, key.method), (tasks[key.task], 0))
        if key.task_version == tasks[key.task]:
            newest = max(newest, _versions(key))
        found[key.task, key.method] = newest
    return found


def tuned(line: Key | Rate) -> Tuned:
    """What the learning rate of a run, or a chosen one, belongs to."""
    return Tuned(line.task, line.method, line.task_version, line.method_version)


def _versions(key: Key) -> tuple[int, int]:
    return key.task_version, key.method_version


def _parsed(fields: dict[str, Any]) -> Result | Rate:
    if fields.get("role") == "rate":
        return Rate(**fields)
    if fields["value"] is None:
        fields["value"] = math.nan
    key = Key(**{name: fields.pop(name) for name in Key._fields})
    return Result(key, **fields)


def _flat(result: Result) -> dict[str, Any]:
    """The fields of a line: those of the key, then the others."""
    fields = dataclasses.asdict(result)
    del fields["key"]
    if not math.isfinite(result.value):
        fields["value"] = None  # JSON has no NaN
    return result.key._asdict() | fields
