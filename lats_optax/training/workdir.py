"""The work directory of a run: what is in it, and that no run overwrites another."""

import shutil
from pathlib import Path

from lats_optax.training.config import TrainConfig

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
INITIAL = "initial.safetensors"
MODEL = "model.safetensors"
AVERAGED = "model_averaged.safetensors"
REPORT, WEIGHTS = "report.png", "weights.png"
_EVENTS = "events.out.tfevents.*"


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
    if any(workdir.iterdir()):
        raise FileExistsError(
            f"workdir {workdir} is not empty: --resume goes on with the run in it, --overwrite "
            "throws it away, --workdir names another place."
        )


def prepare(config: TrainConfig) -> None:
    """Makes the directory; with `overwrite`, removes what a run wrote there and nothing else.

    Raises:
      FileExistsError, NotADirectoryError: as `check`.
    """
    check(config)
    config.workdir.mkdir(parents=True, exist_ok=True)
    if config.overwrite:
        shutil.rmtree(config.workdir / CHECKPOINTS, ignore_errors=True)
        written = (METRICS, INITIAL, MODEL, AVERAGED, REPORT, WEIGHTS)
        files = [config.workdir / name for name in written]
        for file in [*files, *config.workdir.glob(_EVENTS)]:
            file.unlink(missing_ok=True)


def checkpoint_path(workdir: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return workdir / CHECKPOINTS / str(step)
