"""Figures of the performance benchmarks as JSON lines: each with its repeats, machine and versions.

Here belong writing and reading; what moved between two files, `compare` tells. A program that
measures takes `--json FILE`, which is `add_argument` here, and calls `write`: one line a figure.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "torch")


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
      benchmark: the program, as `python -m benchmarks.NAME` has it.
      name: what was measured.
      unit: of the values; ratios are to another program of the same round.
      lower_is_better: whether less of it is an improvement.
      values: one for each round.
      settings: of the program; figures of other settings are not compared.
      machine: what it was measured on.
      versions: of Python and the packages.
      date: when, UTC.
    """

    benchmark: str
    name: str
    unit: str
    lower_is_better: bool
    values: tuple[float, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What has to be the same in figures that are compared."""
        return self.benchmark, self.name, self.unit, json.dumps(self.settings, sort_keys=True)


def add_argument(parser: argparse.ArgumentParser) -> None:
    """The option `--json`."""
    parser.add_argument("--json", type=Path, help="file that the figures are appended to, as lines")


def write(
    path: Path | None,
    benchmark: str,
    values: Mapping[str, Sequence[float]],
    *,
    unit: str,
    lower_is_better: bool,
    settings: Mapping[str, Any],
    machine: str | None = None,
) -> None:
    """Appends a line for each figure.

    Args:
      path: of the file, of which the directory is there; None: nothing is written.
      benchmark, unit, lower_is_better, settings: as in `Figure`, of all the figures.
      values: of each figure, by name, one for each round.
      machine: default: the processor and how many cores it has.
    """
    if path is None:
        return
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    common = {
        "settings": dict(settings),
        "machine": machine or f"{_processor()}, {os.cpu_count()} cores",
        "versions": _versions(),
        "date": date,
    }
    with path.open("a", encoding="utf-8") as file:
        for name, measured in values.items():
            figure = Figure(benchmark, name, unit, lower_is_better, tuple(measured), **common)
            print(json.dumps(asdict(figure)), file=file)


def read(path: str | os.PathLike[str]) -> dict[tuple[str, str, str, str], Figure]:
    """The figures of a file by key; of several with one key, the last.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is no figure; the message names it.
    """
    found: dict[tuple[str, str, str, str], Figure] = {}
    for number, line in enumerate(Path(path).read_text("utf-8").splitlines(), 1):
        try:
            parsed = json.loads(line)
            figure = Figure(**{**parsed, "values": tuple(map(float, parsed["values"]))})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is not a figure: {error}") from error
        found[figure.key] = figure
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
