"""The work directory of a run: what is in it, and that no run overwrites another."""

import contextlib
import errno
import fcntl
import os
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path

from lats_optax.atomic import remove, sweep, unfinished_name
from lats_optax.training.config import TrainConfig
from lats_optax.training.parallel import Engine

CHECKPOINTS = "checkpoints"
UNFINISHED_CHECKPOINT = "step"
"""What a checkpoint is called in the name that it has before it is complete."""
METRICS = "metrics.jsonl"
INITIAL = "initial.safetensors"
MODEL = "model.safetensors"
AVERAGED = "model_averaged.safetensors"
REPORT, WEIGHTS = "report.png", "weights.png"
LOCK = ".lock"
EVENTS = "events.out.tfevents."
"""What the names of TensorBoard's files begin with."""
_FILES = (METRICS, INITIAL, MODEL, AVERAGED, REPORT, WEIGHTS)


class WorkdirInUseError(RuntimeError):
    """Another run is writing in the work directory."""


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
def prepared(config: TrainConfig, parallel: Engine) -> Iterator[None]:
    """The directory, made, for one run alone until the block ends; all processes of it enter.

    What a killed run has left unfinished is removed; with `overwrite`, so is what a run wrote
    there, and nothing else.

    Raises:
      FileExistsError, NotADirectoryError: as `check`.
      WorkdirInUseError: another run has it.
      OSError: it cannot be written to.
    """
    with contextlib.ExitStack() as stack:

        def prepare() -> None:
            workdir = config.workdir
            check(config)
            workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(workdir))
            check(config)  # Another run may have been here in between.
            if config.overwrite:
                _remove_run(workdir)
            sweep(workdir / CHECKPOINTS)
            sweep(workdir / CHECKPOINTS / UNFINISHED_CHECKPOINT)
            for name in _FILES:
                sweep(workdir / name)

        parallel.barrier("all have looked into the work directory")
        parallel.on_primary(prepare)
        yield


def checkpoint_path(workdir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return workdir / CHECKPOINTS / str(step)


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    """Keeps others out. The system ends it with the process, however that ends."""
    descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise WorkdirInUseError(
                f"workdir {workdir} is in use by {holder}: wait for its end, or name another "
                "--workdir"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            message = f"workdir {workdir}: its file system has no locks; start no second run there"
            warnings.warn(message, UserWarning, stacklevel=2)
        with contextlib.suppress(OSError):  # a full disk: what fails next can say where
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _remove_run(workdir: Path) -> None:
    """Removes what a run wrote in its work directory."""
    checkpoints = workdir / CHECKPOINTS
    if checkpoints.exists():
        # Renamed first: what is left of it if this is killed must not look like checkpoints.
        unfinished = unfinished_name(checkpoints)
        os.rename(checkpoints, unfinished)
        remove(unfinished)
    for file in [*(workdir / name for name in _FILES), *workdir.glob(f"{EVENTS}*")]:
        file.unlink(missing_ok=True)
