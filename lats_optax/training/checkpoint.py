"""Checkpoints: the one file that names Orbax.

A checkpoint holds the training state, where the data iterator is, the config, and the support that
the log compares the next one with. Orbax marks one as complete when all of it is written; others,
of a run that was killed, are never read.
"""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from lats_optax.training import config as configs
from lats_optax.training import step
from lats_optax.training.optimizer import pruned_mask
from lats_optax.training.statistics import Support
from lats_optax.training.step import TrainState
from lats_optax.training.workdir import CHECKPOINTS

# Orbax tells every file that it writes; a run says where its checkpoints are.
logging.getLogger("absl").setLevel(logging.WARNING)


class Checkpoint(NamedTuple):
    """What training goes on from: `state` and `support` in host memory, the rest as JSON types."""

    state: TrainState
    data_state: dict[str, Any]
    support: Support


class Checkpoints:
    """The last checkpoints of a run; an older one is removed once a newer one is complete.

    Args:
      workdir: directory of the run.
      keep: how many there are at most once a save is done; None: all.
    """

    def __init__(self, workdir: Path, keep: int | None = None):
        # Saving in the background could read buffers that the next step, to which they are
        # donated, is already writing.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager((workdir / CHECKPOINTS).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the last complete checkpoint."""
        return self._manager.latest_step()

    def save(
        self,
        state: TrainState,
        data_state: dict[str, Any],
        config: dict[str, Any],
        support: Support,
    ) -> None:
        """Writes a checkpoint of `state.step`, and returns when it is complete.

        Args:
          state: equal in every process.
          data_state: what the data iterator's `get_state` gives.
          config: what `config.to_json` gives.
          support: that of the last evaluation, which need not be that of the state; empty in a
            dense run.
        """
        # As host arrays: they are the same for any number of devices that reads them.
        host, support = jax.device_get((state, support))
        items = {
            "state": ocp.args.StandardSave(host),
            "run": ocp.args.JsonSave({"config": config, "data_state": data_state}),
        }
        if support:  # Orbax refuses to write nothing
            items["support"] = ocp.args.StandardSave(support)
        self._manager.save(int(host.step), args=ocp.args.Composite(**items))

    def config(self) -> dict[str, Any] | None:
        """The config in the last checkpoint; None where there is no checkpoint."""
        if self.latest_step is None:
            return None
        items = ocp.args.Composite(run=ocp.args.JsonRestore())
        config: dict[str, Any] = self._manager.restore(self.latest_step, args=items).run["config"]
        return config

    def restore(self, like: TrainState, support: Support) -> Checkpoint:
        """The last checkpoint, of which there is one.

        Args:
          like: a state of its tree, shapes and dtypes.
          support: a support of its shapes.
        """
        like, support = jax.device_get((like, support))
        items = {"state": ocp.args.StandardRestore(like), "run": ocp.args.JsonRestore()}
        if support:
            items["support"] = ocp.args.StandardRestore(support)
        restored = self._manager.restore(self.latest_step, args=ocp.args.Composite(**items))
        return Checkpoint(restored.state, restored.run["data_state"], restored.get("support", []))


def load_state(workdir: Path | str) -> TrainState:
    """The state in a run's last checkpoint, without the run: for evaluation, not for going on.

    ``lats_optax.finalize(state.params, state.opt_state)`` are its sparse weights, checked against
    the latent ones.

    Args:
      workdir: directory of the run.

    Returns:
      The state, that of the optimizer in dicts and lists.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    return _load(workdir)[0]


def load_variables(workdir: Path | str, averaged: bool = False) -> dict[str, Any]:
    """The weights in a run's last checkpoint, as `model.apply` takes them.

    Args:
      workdir: directory of the run.
      averaged: whether to load the averaged weights. Those of a sparse run are zero where its
        weights are.

    Returns:
      `params` and `batch_stats`.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: averaged weights are asked for, and the run has kept none.
    """
    state, config = _load(workdir)
    if averaged:
        if not state.average:
            raise ValueError(
                f"averaged is True; allowed for {workdir}: False, because that run has no "
                "average_decay."
            )
        prune = configs.prune_from_json(config)
        mask = pruned_mask(prune) if prune.enabled else None
        state = step.averaged(state, mask)
    return {"params": state.params, "batch_stats": state.batch_stats or {}}


def _load(workdir: Path | str) -> tuple[TrainState, dict[str, Any]]:
    """The state and the config in a run's last checkpoint."""
    directory = Path(workdir) / CHECKPOINTS
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no checkpoint in {directory}.")
    with Checkpoints(Path(workdir)) as checkpoints:
        if checkpoints.latest_step is None:
            raise FileNotFoundError(f"there is no checkpoint in {directory}.")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(), run=ocp.args.JsonRestore())
        restored = checkpoints._manager.restore(checkpoints.latest_step, args=items)
    state = TrainState(**restored.state)
    if state.average:
        state = state._replace(average=step.Average(**state.average))
    return state, restored.run["config"]
