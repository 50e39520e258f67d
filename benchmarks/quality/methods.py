"""Which methods are compared: the registry, and what belongs to an entry of it."""

from typing import Any, NamedTuple

import optax

import lats_optax
from benchmarks.quality.peers import acdc, family, one_shot, rigl, sparse_evolution, str_
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
      quick: whether a quick run has it.
      version: raised when results are no longer comparable to those of before.
    """

    name: str
    paper: str
    make: Any
    search: Search | None = None
    prunes: bool = True
    quick: bool = True
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


def str_searched(
    optimizer: optax.GradientTransformation, setting: Setting, knob: float
) -> optax.GradientTransformation:
    """STR, whose sparsity follows from its weight decay."""
    return str_.make(optimizer, setting, decay=knob)


METHODS = (
    Method(DENSE, "", dense, prunes=False),
    Method(OURS, "this library's default", default, version=4),
    Method("one-shot", "magnitude at half the run, then fine-tuning", one_shot.make),
    Method("gradual-magnitude", "Zhu and Gupta, 2017", family.gradual_magnitude),
    Method("dpf", "Lin et al., ICLR 2020", family.ste_magnitude, quick=False),
    Method("st3", "Vanderschueren and De Vleeschouwer, WACV 2023", family.st3),
    Method("feather", "Glentis Georgoulakis et al., BMVC 2023", family.feather),
    Method("rigl", "Evci et al., ICML 2020", rigl.make, quick=False),
    Method("set", "Mocanu et al., 2018", sparse_evolution.make, quick=False),
    Method("acdc", "Peste et al., NeurIPS 2021", acdc.make, quick=False),
    Method("lats-searched", "Chen et al., ICLR 2023", family.lats, Search(1e-3, 3.0), quick=False),
    Method("str", "Kusupati et al., ICML 2020", str_searched, Search(1e-5, 1e-1), quick=False),
)


def all_methods() -> dict[str, Method]:
    """The methods by name."""
    return {method.name: method for method in METHODS}
