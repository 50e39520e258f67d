"""Which checkpoint of a run is taken: the newest that is whole, the same in all processes.

Here belongs what is done where one is damaged. What damage is, others say: here it is a ValueError.
"""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lats_optax.files.storage import URL
from lats_optax.training import directories
from lats_optax.training.parallel import Engine
from lats_optax.training.workdir import CHECKPOINTS, checkpoint_path

Value = TypeVar("Value")
Damage = tuple[Path | URL, str]
"""A checkpoint, and what is wrong with it."""


class CheckpointError(RuntimeError):
    """No checkpoint is whole, or one cannot be written."""


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint is damaged, and the one before it is taken."""


def steps(workdir: Path | URL) -> list[int]:
    """Steps that have a checkpoint, whole or damaged."""
    names = directories.names(workdir / CHECKPOINTS)
    return [int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name)]


def newest_whole(
    workdir: Path | URL, read: Callable[[Path | URL], Value], parallel: Engine | None = None
) -> tuple[Value | None, list[Damage]]:
    """The content of the newest checkpoint that can be read.

    Args:
      workdir: directory of the run.
      read: raises a ValueError, such as a DamagedError, where it cannot.
      parallel: processes that all have to be able to read it; None: this one alone.

    Returns:
      What was read, None where there is no checkpoint; and the newer checkpoints, each with what is
      wrong.

    Raises:
      CheckpointError: there are checkpoints, and none can be read.
    """
    damaged: list[Damage] = []
    before: float = float("inf")
    while True:
        # No step is -1. Where several processes share the directory, one of them names it.
        newest = max((number for number in steps(workdir) if number < before), default=-1)
        before = newest if parallel is None else parallel.from_primary(newest)
        if before < 0:
            break
        path, value, problem = checkpoint_path(workdir, int(before)), None, ""
        try:
            value = read(path)
        except ValueError as error:
            problem = str(error) or type(error).__name__
        failures = int(bool(problem))
        if not (failures if parallel is None else parallel.total(failures)):
            return value, damaged
        damaged.append((path, problem or "another process cannot read it"))
    if not damaged:
        return None, []
    problems = [f"{path.name}: {problem}" for path, problem in damaged[:3]]
    if (more := len(damaged) - 3) > 0:
        problems.append(f"and {more} more")
    raise CheckpointError(
        f"no checkpoint in {workdir / CHECKPOINTS} is whole ({'; '.join(problems)}). Put a copy of "
        "one of them in its place, or begin the run again with --overwrite"
    )


def set_aside(damaged: list[Damage]) -> None:
    """Makes room for what the run will write at the steps of damaged checkpoints."""
    for path, problem in damaged:
        kept = directories.set_aside(path)
        warn(path, problem, f"the run goes on from the one before it; this one is now {kept}")


def warn(path: Path | URL, problem: str, consequence: str) -> None:
    """Names a damaged checkpoint, and what is done about it."""
    message = f"checkpoint {path} is damaged ({problem}): {consequence}"
    warnings.warn(message, DamagedCheckpointWarning, stacklevel=4)
