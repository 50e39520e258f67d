"""Runs of the trainer: what ends badly is said, and what has no effect is refused."""

import contextlib
import io
import re
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lats_optax import cli
from lats_optax.training import loop, pictures
from tests import tiny
from tests.misuse import Case, gives
from tests.test_checkpoint import at_step

TINY = ["digits", "--data.batch-size", "8", "--epochs", "3", "--optimizer.learning-rate", "0.05"]
SPARSE = [*TINY, "--prune.target-sparsity", "0.75"]


class Done(NamedTuple):
    """What a command has come to, and which files it has left."""

    code: int
    out: str
    err: str
    files: set[str]


@contextlib.contextmanager
def _tiny_runs():
    """A directory for runs, in which the tiny data set and model are all there is."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        tiny.install(patch)
        # Drawing takes longer than training.
        patch.setattr(pictures, "write", lambda result: [])
        yield Path(name), patch


def _command(*commands: list[str], spoil: Callable[[Any], None] = lambda patch: None) -> Done:
    """The last of some `lats-train` commands, in the one work directory `run`."""
    with _tiny_runs() as (runs, patch):
        spoil(patch)
        for arguments in commands:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = cli.train([*arguments, "--workdir", str(runs / "run")])
        files = {file.name for file in (runs / "run").glob("*")}
        return Done(code, out.getvalue(), err.getvalue(), files)


def _lag(patch: pytest.MonkeyPatch) -> None:
    """Batch statistics that lag: an evaluation with them is wrong wherever it can be."""

    def lagging(experiment, state, original=loop.evaluate):
        right = original(experiment, state)
        fresh = experiment.config.recalibration_batches
        return right if fresh else right | {"accuracy": 0.1}

    patch.setattr(loop, "evaluate", lagging)


def _interrupt(at: Callable[[pytest.MonkeyPatch, Callable[[], None]], None]):
    return lambda patch: at(patch, lambda: signal.raise_signal(signal.SIGINT))


def _in_last_step(patch, act):
    at_step(patch, 18, act)


def _while_writing(patch, act, twice=False):
    def write(*arguments, original=loop._write_models):
        for _ in range(1 + twice):
            act()
        return original(*arguments)

    patch.setattr(loop, "_write_models", write)


def _while_writing_twice(patch, act):
    _while_writing(patch, act, twice=True)


def _stopped_at_the_end(done: Done) -> bool:
    return (
        done.code == 130
        and "error: interrupted after the last step; the run is over" in done.err
        and "--resume" in done.err
        and "model.safetensors" in done.files
    )


CASES = [
    Case(
        "a dense run whose batch statistics lag ends far below its training accuracy",
        lambda: _command([*TINY, "--recalibrate", "0"], spoil=_lag),
        gives(
            lambda done: (
                done.code == 0
                and done.err.splitlines()[-1].startswith("lats-train: warning: the test accuracy, ")
                and "--resume --recalibrate 50" in done.err
            )
        ),
    ),
    Case(
        "the same, resumed as the warning says, without training again",
        lambda: _command(
            [*TINY, "--recalibrate", "0"], [*TINY, "--resume", "--recalibrate", "50"], spoil=_lag
        ),
        gives(lambda done: (done.code, done.err) == (0, "")),
    ),
    Case(
        "a run that meets its target says so",
        lambda: _command(SPARSE),
        gives(
            lambda done: re.fullmatch(
                r"target        sparsity 75.00% met: (\d+) weights are zero, and \1 were to be",
                done.out.splitlines()[-1],
            )
        ),
    ),
    Case(
        "Ctrl-C in the last step",
        lambda: _command(TINY, spoil=_interrupt(_in_last_step)),
        gives(_stopped_at_the_end),
    ),
    Case(
        "Ctrl-C while the model is written",
        lambda: _command(TINY, spoil=_interrupt(_while_writing)),
        gives(_stopped_at_the_end),
    ),
    Case(
        "Ctrl-C twice",
        lambda: _command(TINY, spoil=_interrupt(_while_writing_twice)),
        gives(
            lambda done: (
                done.code == 130
                and "error: interrupted at once; --resume goes on from the last" in done.err
            )
        ),
    ),
]
