"""The work directory of a run: what is in it, and that no run overwrites another."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lats_optax.files.atomic import sweep
from lats_optax.files.storage import URL
from lats_optax.training import directories
from lats_optax.training.config import TrainConfig
from lats_optax.training.lock import LOCK, locked
from lats_optax.training.parallel import Engine

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
INITIAL = "initial.safetensors"
MODEL = "model.safetensors"
AVERAGED = "model_averaged.safetensors"
REPORT, WEIGHTS = "report.png", "weights.png"
EVENTS = "events.out.tfevents."
"""What the names of TensorBoard's files begin with."""
_FILES = (METRICS, INITIAL, MODEL, AVERAGED, REPORT, WEIGHTS)


def check(config: TrainConfig) -> None:
    """Checks that the run may write where it wants to.

    Raises:
      FileExistsError: `config.workdir` has something in it, and the config neither resumes nor
        overwrites.
      NotADirectoryError: it is a file.
    """
    workdir = config.workdir
    if workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"workdir is {str(workdir)!r}, a file; allowed: a directory.")
    if config.resume or config.overwrite or not workdir.exists():
        return
    # What a run has left that ended before it wrote anything.
    if any(path.name != LOCK for path in workdir.iterdir()):
        raise FileExistsError(
            f"workdir {workdir} is not empty: --resume goes on with the run in it, --overwrite "
            "throws it away, --workdir names another place."
        )


@contextlib.contextmanager
def prepared(config: TrainConfig, parallel: Engine) -> Iterator[Callable[[], None]]:
    """The directory, made, for one run alone until the block ends; all processes of it enter.

    What a killed run has left unfinished is removed; with `overwrite`, so is what a run wrote
    there, and nothing else.

    Yields:
      What raises a `WorkdirInUseError` where another run has taken the directory all the same, as
      in a store one may: for the process that writes there.

    Raises:
      FileExistsError, NotADirectoryError: as `check`.
      WorkdirInUseError: another run has it.
      OSError: it cannot be written to.
    """
    guards: list[Callable[[], None]] = []
    with contextlib.ExitStack() as stack:

        def prepare() -> None:
            workdir = config.workdir
            check(config)
            workdir.mkdir(parents=True, exist_ok=True)
            guards.append(stack.enter_context(locked(workdir)))
            check(config)  # Another run may have been here in between.
            if config.overwrite:
                _remove_run(workdir)
            directories.sweep(workdir / CHECKPOINTS)
            for name in _FILES:
                sweep(workdir / name)

        parallel.barrier("all have looked into the work directory")
        parallel.on_primary(prepare)
        yield guards[0] if guards else lambda: None


def checkpoint_path(workdir: Path | URL, step: int) -> Path | URL:
    """Where the checkpoint of a step is."""
    return workdir / CHECKPOINTS / str(step)


def _remove_run(workdir: Path | URL) -> None:
    """Removes what a run wrote in its work directory."""
    checkpoints = workdir / CHECKPOINTS
    if checkpoints.exists():
        directories.remove(checkpoints, CHECKPOINTS)
    events = [path.name for path in workdir.iterdir() if path.name.startswith(EVENTS)]
    for name in (*_FILES, *events):
        (workdir / name).unlink(missing_ok=True)
