"""Configs as JSON: as checkpoints hold them, and whether a run can go on with another one."""

import dataclasses
import json
from typing import Any

from lats_optax.training.config import TrainConfig
from lats_optax.training.prune_config import PruneConfig

# Where a run is, how it is watched and who does the work: a resumed run may differ in these alone.
# In skip_corrupt too: a run that a corrupt record has stopped would be lost. And in
# bn_recalibration_batches, which training does not depend on: a run that is over can be evaluated
# again.
_FREE = {
    "workdir",
    "resume",
    "overwrite",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "bn_recalibration_batches",
    "distributed",
    "coordinator",
    "num_processes",
    "process_id",
    "process_timeout",
    "data.data_dir",
    "data.skip_corrupt",
    "data.workers",
    "parallel.engine",
    "parallel.fsdp",
}


def to_json(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON types, nested as the classes are.

    >>> to_json(TrainConfig())["data"]["name"]
    'digits'
    """
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return plain


def prune_from_json(config: dict[str, Any]) -> PruneConfig:
    """What was pruned, in a config that `to_json` made.

    >>> prune_from_json(to_json(TrainConfig(prune=PruneConfig(0.9, exclude=("stem",))))).exclude
    ('stem',)
    """

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return PruneConfig(**{name: frozen(value) for name, value in config["prune"].items()})


def check_resumable(saved: dict[str, Any], config: TrainConfig) -> None:
    """Checks that a run that was begun with `saved` (of `to_json`) can go on with `config`.

    Raises:
      ValueError: a field that decides what the run computes differs; names all of them.
    """
    # A field that is newer than the checkpoint had its default.
    before, now = _flat(to_json(TrainConfig())) | _flat(saved), _flat(to_json(config))
    changed = [
        f"{field} is {now.get(field)!r} and was {before.get(field)!r}"
        for field in sorted(before.keys() | now.keys())
        if field not in _FREE and before.get(field) != now.get(field)
    ]
    if changed:
        raise ValueError(
            f"cannot resume {config.workdir}: {'; '.join(changed)}. Allowed: the values it was "
            "begun with, or another workdir."
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat
