"""What a user may name for a schedule: a method, a Python object, a file, a run.

Nothing that is typed is evaluated. An expression of one's own is a function in a Python file, named
MODULE:ATTRIBUTE and imported; a table of one's own is a column of a file.
"""

import dataclasses
import importlib
import math
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax

import lats_optax
from lats_optax.analysis.curves import Curve, curve, recorded_curve
from lats_optax.control.schedules import ScalarOrSchedule, tabulate
from lats_optax.files.storage import URL, as_path
from lats_optax.inspection.columns import read_column
from lats_optax.training import optimizer
from lats_optax.training.config import PruneConfig, TrainConfig
from lats_optax.training.logging import scan_metrics
from lats_optax.training.workdir import METRICS

# Thresholds that others let rise in other ways, over x = t/T, as fractions of the final one.
_SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "linear": lambda x: x,
    "sine": lambda x: (1 - np.cos(np.pi * x)) / 2,
    # Zhu and Gupta, "To prune, or not to prune" (2017): how gradual magnitude pruning moves.
    "cubic": lambda x: 1 - (1 - x) ** 3,
}
_TRAINED = ("lats", "s-lats", "epoch-lats", "pgh", "constant")
_KNOWN = (
    "lats, lats:PROFILE, s-lats, epoch-lats, pgh:BETA, constant, linear, sine, cubic, "
    "MODULE:ATTRIBUTE, or a file of type .csv, .npy or .jsonl"
)


@dataclasses.dataclass(frozen=True)
class ScheduleRun:
    """What thresholds are made for.

    Attributes:
      config: names the epochs.
      steps_per_epoch: optimizer steps of each.
      learning_rate: ``count -> eta``.
      final: the last threshold, for schedules that take one.
    """

    config: TrainConfig
    steps_per_epoch: int
    learning_rate: optax.Schedule
    final: float

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch


def labeled(source: str) -> tuple[str, str]:
    """What a curve is called and what it is of, from LABEL=SCHEDULE or SCHEDULE.

    >>> labeled("mine=pgh:0.1"), labeled("lats")
    (('mine', 'pgh:0.1'), ('lats', 'lats'))
    """
    # A path may have an equals sign of its own.
    label, _, named = ("", "", source) if Path(source).exists() else source.rpartition("=")
    return label or named, named


def workdir_of(source: str) -> Path | URL | None:
    """The work directory of the run whose record a user names; None for all else."""
    named = labeled(source)[1]
    file, _ = (None, None) if named.startswith("lats:") else _file(named)
    return file.parent if file is not None and file.suffix == ".jsonl" else None


def find_curve(label: str, source: str, run: ScheduleRun) -> Curve:
    """The curve of what a user names: a method, MODULE:ATTRIBUTE or a file.

    Args:
      label: what the curve is called.
      source: what the user has typed.
      run: what it is for; a run that has recorded its threshold comes with its own learning rate.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not known, cannot be imported or read, or fails.
    """
    file, column = (None, None) if source.startswith("lats:") else _file(source)
    if file is None:
        threshold = _threshold(source, run)
        return curve(label, threshold, run.learning_rate, run.steps)
    if file.suffix == ".jsonl":
        return _recorded(label, file)
    rows, thresholds = read_column(file, column)
    steps = np.arange(len(thresholds)) if rows is None else rows
    whole = np.all(steps == np.round(steps))
    if not (whole and np.all(steps >= 0) and np.all(steps <= run.steps)):
        raise ValueError(
            f"{file} is of the steps {steps.min():g} to {steps.max():g}; allowed are whole numbers "
            f"from 0 to {run.steps}, epochs times steps_per_epoch"
        )
    sums = np.append(0.0, np.cumsum(tabulate("learning_rate", run.learning_rate, run.steps)))
    return recorded_curve(label, steps, thresholds, sums[steps.astype(int)])


def find_function(what: str, reference: str) -> Callable[[Any], Any]:
    """The function of one number that MODULE:ATTRIBUTE names; its failures are ValueErrors.

    Args:
      what: it is for, in messages.
      reference: what the user has typed.

    Raises:
      ValueError: it is no reference, cannot be imported, or is no function.

    Example:
      >>> find_function("learning_rate", "math:sqrt")(4)
      2.0
    """
    return _guarded(reference, _imported(what, reference))


def number(text: str) -> float | None:
    """The number that a text is; None for other texts."""
    try:
        return float(text)
    except ValueError:
        return None


# --- thresholds ---------------------------------------------------------------------------------


def _threshold(source: str, run: ScheduleRun) -> ScalarOrSchedule:
    name, _, argument = source.partition(":")
    if name == "lats" and argument:
        profile = _profile(source, argument)
        return lats_optax.lats_threshold(run.learning_rate, run.steps, run.final, l1=profile)
    if name == "pgh" or source in _TRAINED:
        beta = None
        if name == "pgh" and (beta := number(argument)) is None:
            raise ValueError(f"schedule {source!r} needs a number above 0, as in pgh:0.01")
        prune = PruneConfig(final_threshold=run.final, schedule=name, beta=beta)  # type: ignore[arg-type]
        config = dataclasses.replace(run.config, prune=prune)
        return optimizer.schedule_to(config, run.learning_rate, run.steps_per_epoch, run.final)
    if source in _SHAPES:
        x = np.arange(run.steps + 1) / run.steps
        return lats_optax.ThresholdSchedule(run.final * _SHAPES[source](x))
    if not _REFERENCE.fullmatch(source) or name in (*_TRAINED, *_SHAPES):
        raise ValueError(f"schedule {source!r} is not known; known are {_KNOWN}")
    found = _imported("schedule", source)
    # Its own increments are finer than differences of its values.
    return found if isinstance(found, lats_optax.ThresholdSchedule) else _guarded(source, found)


def _profile(source: str, argument: str) -> Callable[[Any], Any]:
    """An L1 coefficient over x = t/T, of a base, a file or a function."""
    beta = number(argument)
    if beta is not None:
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"schedule {source!r}: beta is {beta:g}; allowed: a number above 0.")
        return lambda x: beta**x
    file, column = _file(argument)
    if file is not None:
        steps, values = read_column(file, column)
        places = np.arange(len(values)) if steps is None else steps
        if len(values) < 2 or places[0] < 0 or np.any(np.diff(places) <= 0):
            raise ValueError(
                f"{file}: its {len(values)} rows must be 2 or more, of steps that rise from 0"
            )
        return lambda x: np.interp(x, places / places[-1], values)
    profile = _imported("profile", argument)

    def each(x: np.ndarray) -> np.ndarray:
        try:
            return np.broadcast_to(np.asarray(profile(x), float), x.shape)
        except Exception:
            # A function of Python's own `if` and `math` takes one number at a time.
            one = _guarded(argument, profile)
            return np.array([float(one(float(value))) for value in x])

    return each


def _recorded(label: str, path: Path | URL) -> Curve:
    """The threshold of a run of lats-train, under the learning rate that it had."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    metrics, lost = scan_metrics(path)
    if lost and not metrics:
        raise ValueError(
            f"{path} is not a metrics file of lats-train: no line has split, step and epoch"
        )
    if lost:
        warnings.warn(f"{path}: {len(lost)} lines are no records", UserWarning, stacklevel=2)
    records = [r for r in metrics if r["split"] == "train" and "threshold" in r]
    try:
        steps, thresholds, sums = (
            np.array([r[name] for r in records], np.float64)
            for name in ("step", "threshold", "learning_rate_sum")
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a metrics file of lats-train: {error!r}") from error
    if not records:
        raise ValueError(f"{path} records no threshold: was the run dense?")
    return recorded_curve(label, steps, thresholds, sums, own_rate=True)


# --- what the user names ------------------------------------------------------------------------

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_FILE = re.compile(r"(.+\.(?:csv|npy|jsonl))(?::(.+))?")


def _file(source: str) -> tuple[Path | URL | None, str | None]:
    """The file and its column that a source names; none where it names something else."""
    if found := _FILE.fullmatch(source):
        return as_path(found[1], "schedule"), found[2]
    place = as_path(source, "schedule")
    if place.is_dir() and source not in (*_TRAINED, *_SHAPES):
        return place / METRICS, None
    return None, None


def _imported(what: str, reference: str) -> Callable[[Any], Any]:
    """The function or schedule that MODULE:ATTRIBUTE names."""
    if not _REFERENCE.fullmatch(reference):
        raise ValueError(f"{what} is {reference!r}; allowed: a number, or MODULE:ATTRIBUTE.")
    module, _, attribute = reference.partition(":")
    # As `python -m` has it, a file in the current directory can be named.
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ValueError(
            f"{what} {reference!r}: cannot import {module}: {_brief(error)}"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{what} {reference!r}: {module} has no attribute {attribute}")
        found = getattr(found, name)
    if not callable(found):
        raise ValueError(
            f"{what} {reference!r} is of type {type(found).__name__}; allowed: a function of one "
            "number"
        )
    return found


def _guarded(reference: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The user's function; its errors become a ValueError that names it."""

    def call(count: Any) -> Any:
        try:
            value = function(count)
            if np.shape(value) != ():
                raise ValueError(f"it returns an array of shape {np.shape(value)}, not a number")
            return value
        except Exception as error:
            raise ValueError(f"{reference} fails at {count}: {_brief(error)}") from error

    return call


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
