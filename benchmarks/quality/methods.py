"""Which methods are compared: the registry, and what belongs to an entry of it."""

from typing import Any, NamedTuple

import optax

import lats_optax
from benchmarks.quality.peers.base import Setting
from benchmarks.quality.results import DENSE, OURS
from benchmarks.quality.search import Search


class Method(NamedTuple):
    """One way to prune.

    Attributes:
      name: for the command line and the tables.
      paper: where it was published.
      make: a `peers.base.Make`; with ``search`` it is called with a third argument, ``knob``.
      search: how the knob that gives a sparsity is found, where the method has no target.
      prunes: False of a method that leaves the model dense: it has no target sparsity.
      version: raised when results are no longer comparable to those of before.
    """

    name: str
    paper: str
    make: Any
    search: Search | None = None
    prunes: bool = True
    version: int = 1


def dense(
    optimizer: optax.GradientTransformation, setting: Setting
) -> optax.GradientTransformation:
    """The base optimizer as it is."""
    del setting
    return optimizer


def default(
    optimizer: optax.GradientTransformation, setting: Setting
) -> optax.GradientTransformation:
    """What the README recommends."""
    threshold = lats_optax.target_sparsity(setting.target, setting.learning_rate, setting.steps)
    return optax.chain(optimizer, lats_optax.soft_threshold(threshold, mask=setting.mask))


METHODS = (
    Method(DENSE, "", dense, prunes=False),
    Method(OURS, "this library's default", default),
)

QUICK = (DENSE, OURS)
"""The methods of a quick run."""


def all_methods() -> dict[str, Method]:
    """The methods by name."""
    return {method.name: method for method in METHODS}
