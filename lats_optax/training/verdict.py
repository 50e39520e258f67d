"""The verdict on a finished run: whether it met its target, and what looks wrong.

Pure functions of what the run has come to. They write nothing: the command prints what they say.
"""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from lats_optax import masks
from lats_optax.analysis.sparsity import SparsityReport
from lats_optax.control.targets import named_zeros
from lats_optax.training.config import TrainConfig
from lats_optax.training.optimizer import Optimizer, target_of

_FAR_BELOW = 0.5
"""A test accuracy below this part of the training accuracy is said to be wrong."""


def target_line(config: TrainConfig, zeros: int, wanted: int | None) -> str | None:
    """Whether the target was met, in a line; None in a run without one.

    >>> from lats_optax.training.config import PruneConfig
    >>> target_line(TrainConfig(prune=PruneConfig(0.9)), zeros=90, wanted=90)
    'target        sparsity 90.00% met: 90 weights are zero, and 90 were to be'
    """
    if wanted is None:
        return None
    met = "met" if zeros >= wanted else "NOT met"
    return (
        f"target        sparsity {config.prune.target_sparsity:.2%} {met}: {zeros:,} weights are "
        f"zero, and {wanted:,} were to be"
    )


def wanted_zeros(config: TrainConfig, params: Any, optimizer: Optimizer) -> int | None:
    """How many of the pruned weights are to be zero in the end; None without a target."""
    if config.prune.target_sparsity is None or optimizer.operator is None:
        return None
    mask = masks.resolve(optimizer.mask, params)
    pruned = jax.tree.map(lambda on, leaf: leaf if on else optax.MaskedNode(), mask, params)
    return named_zeros(target_of(config.prune), pruned, optimizer.operator)


def problems(
    config: TrainConfig,
    optimizer: Optimizer,
    sparsity: SparsityReport,
    accuracies: Mapping[str, float | None],
    wanted: int | None,
    *,
    normalized: bool,
) -> list[str]:
    """What looks wrong in a run that is over, a sentence each, with what to do.

    Args:
      config: the run.
      optimizer: of `make_optimizer`.
      sparsity: of its last weights.
      accuracies: `train`, of the last steps, and `test`; None where it is not known.
      wanted: of `wanted_zeros`.
      normalized: whether the model has batch statistics.
    """
    found = []
    train, test = accuracies["train"], accuracies["test"]
    if train is not None and test is not None and test < _FAR_BELOW * train:
        found.append(
            f"the test accuracy, {test:.2%}, is far below that of the last training steps, "
            f"{train:.2%}: {_reason(config, normalized)}"
        )
    found += _of_zeros(config, optimizer, sparsity, wanted)
    return found


def _reason(config: TrainConfig, normalized: bool) -> str:
    if normalized and not config.recalibration_batches:
        return (
            "the running batch statistics lag behind the weights; "
            "--resume --bn-recalibration-batches 50 estimates them on the weights as they "
            "are, without training again"
        )
    return (
        "the weights fit the training images alone; more weight decay, fewer epochs or a lower "
        "learning rate may help"
    )


def _of_zeros(
    config: TrainConfig, optimizer: Optimizer, sparsity: SparsityReport, wanted: int | None
) -> list[str]:
    prune, found = config.prune, list[str]()
    if not prune.enabled:
        return found
    if wanted is not None and sparsity.zeros < wanted:
        found.append(_missed(config, optimizer, sparsity, wanted))
    if prune.final_threshold and not sparsity.zeros:
        found.append(
            f"no weight is zero: prune.final_threshold is {prune.final_threshold:g}, and all "
            "weights are larger; raise it, or name a prune.target_sparsity"
        )
    # The table of the sparsity names single layers that are wholly zero.
    if not sparsity.nonzeros:
        found.append("no pruned weight is left; lower the threshold, or name a target_sparsity")
    return found


def _missed(
    config: TrainConfig, optimizer: Optimizer, sparsity: SparsityReport, wanted: int
) -> str:
    what = "weight" if optimizer.groups is None else "group of weights"
    return (
        f"the target sparsity {config.prune.target_sparsity:.2%} was not met: {sparsity.zeros:,} "
        f"of {sparsity.size:,} weights are zero, and {wanted:,} were to be. One {what} always "
        "stays, of each layer that has a target of its own; a lower target, or more layers to "
        "prune, can be met"
    )
