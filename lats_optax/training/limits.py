"""What a run would take of a machine, checked before anything is allocated.

Here belong the limits that a config alone cannot know: they depend on the data set, on the shapes
of the model and on the memory that is there.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax

from lats_optax.control.schedules import MOST_TABULATED
from lats_optax.training.config import RECALIBRATION_BATCHES, TrainConfig

# Parameters, gradients, momentum and updates, all in float32.
_COPIES = 4


def check_steps(config: TrainConfig, steps_per_epoch: int) -> None:
    """Checks that the learning rates of a run fit in a table.

    Raises:
      ValueError: the run has more steps than that.
    """
    total = config.total_epochs * steps_per_epoch
    if total > MOST_TABULATED:
        before = config.total_epochs - config.epochs
        raise ValueError(
            f"epochs is {config.epochs}{f' after {before} of a search' if before else ''}, which "
            f"makes {total:,} steps; allowed: at most {MOST_TABULATED:,} steps, or "
            f"{MOST_TABULATED // steps_per_epoch:,} epochs of {steps_per_epoch:,} steps."
        )


def check_recalibration(config: TrainConfig, steps_per_epoch: int) -> None:
    """Checks that batch statistics are not estimated on far more batches than there are.

    Raises:
      ValueError: ``config.bn_recalibration_batches`` is larger than both an epoch and the default.
    """
    batches, most = config.bn_recalibration_batches, max(steps_per_epoch, RECALIBRATION_BATCHES)
    if batches is not None and batches > most:
        raise ValueError(
            f"bn_recalibration_batches is {batches}; allowed: None, or at most {most}, which an "
            f"epoch of {steps_per_epoch} batches is enough for."
        )


def check_memory(variables: Mapping[str, Any], device: jax.Device, shared_by: int = 1) -> None:
    """Checks that the parameters of a model can be trained in the memory of a device.

    Args:
      variables: the shapes of the model's.
      device: any of those that the run is on.
      shared_by: devices that each array is divided over.

    Raises:
      ValueError: parameters, gradients, momentum and updates alone take more.
    """
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))
    need = _COPIES * size / shared_by
    have = memory_of(device)
    if have is not None and need > have:
        raise ValueError(
            f"the model has {size / 1e9:,.1f} GB of parameters, and training takes {_COPIES} times "
            f"that{f' on {shared_by} devices' if shared_by > 1 else ''}; allowed: at most "
            f"{have / 1e9:,.1f} GB, what {device} has. model.width, the number of classes, "
            "data.image_size and parallel.fsdp decide."
        )


def memory_of(device: jax.Device) -> int | None:
    """Bytes of memory of a device, of the host's for a CPU; None: it does not say."""
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit: int | None = (device.memory_stats() or {}).get("bytes_limit")
    return limit
