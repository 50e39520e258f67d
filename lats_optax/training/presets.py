"""Runs that have a name: what each does, the command, what it takes and what it gives."""

from pathlib import Path
from typing import NamedTuple

from lats_optax.training.config import PruneConfig, TrainConfig


class Preset(NamedTuple):
    """A run with a name.

    Attributes:
      description: the command; what it takes and gives, measured on two cores of a CPU.
      config: the run.
    """

    description: str
    config: TrainConfig


PRESETS: dict[str, Preset] = {
    "digits": Preset(
        "lats-train digits: a small residual network on 8×8 digits, dense; 15 s, test accuracy "
        "100 %. Sparse: lats-train digits --prune.target-sparsity 0.95.",
        TrainConfig(workdir=Path("runs/digits")),
    ),
    "digits-lats": Preset(
        "lats-train digits-lats: the same with 95 % of the weights zero; 15 seconds, test accuracy "
        "99.7 %.",
        TrainConfig(workdir=Path("runs/digits-lats"), prune=PruneConfig(target_sparsity=0.95)),
    ),
}
