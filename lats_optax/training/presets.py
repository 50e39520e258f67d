"""Runs that have a name: what each does, the command, what it takes and what it gives."""

from pathlib import Path
from typing import NamedTuple

from lats_optax.training.config import PruneConfig, TrainConfig


class Preset(NamedTuple):
    """A run with a name."""

    description: str
    config: TrainConfig


PRESETS: dict[str, Preset] = {
    "digits": Preset(
        "A small ResNet on 8×8 digits, dense unless a --prune field is given.",
        TrainConfig(workdir=Path("runs/digits")),
    ),
    "digits-lats": Preset(
        "The same, with 95 % of the weights zero at the end.",
        TrainConfig(workdir=Path("runs/digits-lats"), prune=PruneConfig(target_sparsity=0.95)),
    ),
}
