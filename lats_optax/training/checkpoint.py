"""Checkpoints that can be trusted: the one file that names Orbax.

A checkpoint is a directory, `checkpoints/STEP`: in `arrays`, written by Orbax, the training state
and the support that the log compares the next one with; in `MANIFEST`, written last, the config,
where the data iterator is, and what there has to be: size and SHA-256 of each file, dtype, shape
and CRC-32 of each array. Process 0 writes it, as a directory that appears whole (`directories`).
It is never changed again, so any difference from the manifest is damage; every process checks all
of it before it goes on from it, and that sparse weights are those of their latent ones. From a
damaged checkpoint all processes go back to the one before, with a warning. The damaged one is kept
as `checkpoints/STEP.damaged`, and the run may write its step again. Where none is whole, the run
ends, and nothing is changed.

In an object store too, Orbax writes to and reads from a disk: TensorStore has drivers for gs:// and
s3:// alone, which ask for settings of their own, and what is verified before it is used has to be
at hand as a whole in any case.
"""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from lats_optax.analysis.weight_summary import Support
from lats_optax.files.storage import URL, as_path, fetched
from lats_optax.training import config_json, directories, manifest, step
from lats_optax.training.config import TrainConfig
from lats_optax.training.manifest import DamagedError
from lats_optax.training.optimizer import pruned_mask
from lats_optax.training.parallel import Engine
from lats_optax.training.recovery import CheckpointError, newest_whole, set_aside, steps, warn
from lats_optax.training.step import TrainState
from lats_optax.training.workdir import CHECKPOINTS, checkpoint_path

# Orbax logs every file that it writes, and every error that it raises, with pages of traceback:
# itself, and by asyncio for writes that an error of another one has left behind.
for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(
        lambda record: "orbax" not in record.pathname + record.getMessage()
    )

_ARRAYS = "arrays"


class Checkpoint(NamedTuple):
    """What training goes on from: `state` and `support` in host memory, the rest as JSON types."""

    state: TrainState
    data_state: dict[str, Any]
    support: Support


class Checkpoints:
    """The last checkpoints of a run; an older one is removed once a newer one is complete.

    Each method is for all processes of a run at once.

    Args:
      workdir: directory of the run, on a disk or in a store.
      parallel: the processes.
      keep: how many there are at most once a save is done; None: all.
    """

    def __init__(self, workdir: Path | URL, parallel: Engine, keep: int | None = None):
        self._workdir, self._parallel, self._keep = workdir, parallel, keep

    @property
    def latest_step(self) -> int | None:
        """Step of the last complete checkpoint."""
        return max(steps(self._workdir), default=None)

    def save(
        self,
        state: TrainState,
        data_state: dict[str, Any],
        config: dict[str, Any],
        support: Support,
    ) -> None:
        """Writes a checkpoint of `state.step`, and returns when it is complete and on the disk.

        Args:
          state: equal in every process.
          data_state: what the data iterator's `get_state` gives.
          config: what `config_json.to_json` gives.
          support: that of the last evaluation, which need not be that of the state; empty in a
            dense run.

        Raises:
          CheckpointError: it cannot be written. Those before it are as they were.
        """

        def write() -> None:
            # As host arrays: they are the same for any number of devices that reads them. And not
            # in the background: that could read buffers that the next step, to which they are
            # donated, is already writing.
            tree = jax.device_get({"state": state, "support": support})
            self._write(tree, {"config": config, "data_state": data_state})
            self._remove_old()

        self._parallel.on_primary(write)

    def config(self) -> dict[str, Any] | None:
        """The config in the last checkpoint; None where there is no checkpoint.

        Raises:
          CheckpointError: there are some, and none has a whole manifest.
        """

        def read(path: Path | URL) -> dict[str, Any]:
            with fetched(path, [manifest.MANIFEST]) as directory:
                config: dict[str, Any] = _read_manifest(directory)["config"]
            return config

        return newest_whole(self._workdir, read, self._parallel)[0]

    def restore(
        self,
        like: Callable[[int], TrainState],
        support: Support,
        check: Callable[[TrainState], None],
    ) -> Checkpoint | None:
        """The last checkpoint that is whole, the same in every process; None where there is none.

        Args:
          like: gives a state of the tree, shapes and dtypes that it has at a step.
          support: a support of its shapes.
          check: raises a ValueError for a state that is none of this run.

        Warns:
          DamagedCheckpointWarning: a later one is damaged, and was renamed.

        Raises:
          CheckpointError: there are some, and none is whole.
        """

        def read(path: Path | URL) -> Checkpoint:
            shapes = {"state": like(int(path.name)), "support": support}
            wanted = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
            tree, content = _read(path, wanted)
            state = tree["state"]
            if int(state.step) != int(path.name):
                raise DamagedError(f"array state/step is {int(state.step)}")
            check(state)
            return Checkpoint(state, content["data_state"], tree["support"])

        found, damaged = newest_whole(self._workdir, read, self._parallel)
        self._parallel.on_primary(lambda: set_aside(damaged))
        return found

    def _write(self, tree: dict[str, Any], content: dict[str, Any]) -> None:
        number = int(tree["state"].step)
        path = checkpoint_path(self._workdir, number)
        try:
            with directories.writing(path) as unfinished:
                with _orbax() as orbax:
                    orbax.save((unfinished / _ARRAYS).absolute(), args=ocp.args.StandardSave(tree))
                content = {"step": number, **content, "arrays": manifest.checksums(tree)}
                manifest.write(unfinished, content)
        except Exception as error:  # Orbax and TensorStore raise all kinds
            raise CheckpointError(
                f"checkpoint {path} cannot be written: {_reason(error)}. Those before it are "
                "whole, and --resume goes on from the last of them"
            ) from error

    def _remove_old(self) -> None:
        old = [] if self._keep is None else sorted(steps(self._workdir))[: -self._keep]
        for number in old:
            directories.remove(checkpoint_path(self._workdir, number))


def load_state(workdir: Path | URL | str) -> TrainState:
    """The state in a run's last checkpoint, without the run: for evaluation, not for going on.

    ``lats_optax.finalize(state.params, state.opt_state)`` are its sparse weights, checked against
    the latent ones.

    Args:
      workdir: directory of the run.

    Returns:
      The state, that of the optimizer in dicts and lists.

    Warns:
      DamagedCheckpointWarning: the last one is damaged, and the one before it is taken.

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointError: there are some, and none is whole.
    """
    return _load(workdir)[0]


def load_variables(workdir: Path | URL | str, averaged: bool = False) -> dict[str, Any]:
    """The weights in a run's last checkpoint, as `model.apply` takes them.

    Args:
      workdir: directory of the run.
      averaged: whether to load the averaged weights. Those of a sparse run are zero where its
        weights are.

    Returns:
      `params` and `batch_stats`.

    Warns:
      DamagedCheckpointWarning: the last one is damaged, and the one before it is taken.

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointError: there are some, and none is whole.
      ValueError: averaged weights are asked for, and the run has kept none.
    """
    state, config = _load(workdir)
    if averaged:
        if not state.average:
            raise ValueError(
                f"averaged is True; allowed for {workdir}: False, because that run has no "
                "ema_decay."
            )
        prune = config_json.prune_from_json(config)
        mask = pruned_mask(prune) if prune.enabled else None
        state = step.averaged(state, mask)
    return {"params": state.params, "batch_stats": state.batch_stats or {}}


def _load(workdir: Path | URL | str) -> tuple[TrainState, dict[str, Any]]:
    """The state and the config in a run's last whole checkpoint."""
    workdir = as_path(workdir, "workdir")
    found, damaged = newest_whole(workdir, _read)
    if found is None:
        raise FileNotFoundError(f"there is no checkpoint in {workdir / CHECKPOINTS}.")
    for path, problem in damaged:
        warn(path, problem, "the one before it is taken")
    tree, content = found
    state = TrainState(**tree["state"])
    if state.average:
        state = state._replace(average=step.Average(**state.average))
    return state, content["config"]


def _read(path: Path | URL, like: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `_read_directory`, of a copy on this machine where the checkpoint is in a store."""
    with fetched(path) as directory:
        return _read_directory(directory, like)


def _read_directory(path: Path, like: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the manifest of a checkpoint, all of it checked.

    Args:
      path: of the checkpoint.
      like: the tree of its arrays; None: in dicts and lists.

    Raises:
      DamagedError: it is not what was written, or its arrays are not those of `like`.
    """
    content = _read_manifest(path)
    manifest.check_files(path, content["files"])
    if like is not None:
        _check_alike(content["arrays"], manifest.checksums(like))
    try:
        with _orbax() as orbax:
            restore = ocp.args.StandardRestore(like)
            tree: dict[str, Any] = orbax.restore((path / _ARRAYS).absolute(), args=restore)
    except Exception as error:  # Orbax and TensorStore raise all kinds
        raise DamagedError(f"{_ARRAYS} cannot be read: {_reason(error)}") from error
    manifest.check_arrays(content["arrays"], tree)
    return tree, content


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, with all that a run takes from it.

    Raises:
      DamagedError: it is not what was written, or a value in it is missing or not allowed.
    """
    content = manifest.read(path)

    def require(name: str, value: Any, holds: bool, allowed: str) -> None:
        if not holds:
            raise DamagedError(f"{name} in {manifest.MANIFEST} is {value!r}; allowed: {allowed}")

    for name in ("files", "arrays", "config", "data_state"):
        require(name, content.get(name), isinstance(content.get(name), dict), "an object")
    number = content.get("step")
    require("step", number, number == int(path.name), path.name)
    config, position = content["config"], content["data_state"]
    for name, default in config_json.to_json(TrainConfig()).items():
        if isinstance(default, dict):
            section = config.get(name)
            require(f"config.{name}", section, isinstance(section, dict), "an object")
    # A step takes one batch.
    index, skipped = position.get("next_index"), position.get("skipped")
    require("data_state.next_index", index, index == number, f"the step, {number}")
    counts = isinstance(skipped, int) and skipped >= 0
    require("data_state.skipped", skipped, counts, "0 or more")
    return content


def _check_alike(written: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Checks that a program's arrays are called, shaped and typed as those of a checkpoint."""
    for name in sorted(written.keys() | wanted.keys()):
        # Without their values' checksums.
        was, wants = (
            names[name].split()[0] if name in names else "missing" for names in (written, wanted)
        )
        if was != wants:
            raise DamagedError(f"array {name} is {was}, and {wants} in the run")


@contextlib.contextmanager
def _orbax() -> Iterator[ocp.Checkpointer]:
    """Orbax in this process alone, which waits for no other."""
    index = jax.process_index()
    options = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    before = sys.unraisablehook

    def hook(raised: Any) -> None:
        if str(raised.exc_value) != "Event loop is closed":
            before(raised)

    sys.unraisablehook = hook
    with ocp.Checkpointer(handler, multiprocessing_options=options) as orbax:
        yield orbax
    # Not after an error: other threads of TensorStore then go on writing, and one that is done
    # finds nobody to tell, which Python would print.
    sys.unraisablehook = before


def _reason(error: BaseException) -> str:
    """What is behind an error, in a few words: Orbax's and TensorStore's are pages."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        if found := re.search(r"os_error_code='(\d+)'", str(cause)):
            return os.strerror(int(found[1]))
        cause = cause.__cause__ or cause.__context__
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}"
