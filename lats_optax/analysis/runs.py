"""Finished runs as plain values: what each has recorded, and the table of several side by side."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lats_optax.analysis.curves import mean_l1
from lats_optax.analysis.sparsity import LayerSparsity, SparsityReport
from lats_optax.analysis.tables import table


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
      name: what it is called in the table and the legend.
      test_accuracy: fraction of the test images classified correctly at the end.
      seconds: how long it took.
      sparsity: the zeros of its final weights.
      metrics: its records, in the order of steps. Those with ``split`` "train" have ``step``,
        ``epoch``, ``learning_rate_sum`` (of all steps up to it) and, where weights are pruned,
        ``threshold`` and ``sparsity`` (after it); those with ``split`` "test" have ``epoch`` and
        ``accuracy``.
    """

    name: str
    test_accuracy: float
    seconds: float
    sparsity: SparsityReport
    metrics: Sequence[Mapping[str, Any]]


def comparison_table(runs: Sequence[FinishedRun]) -> str:
    """Sparsity layer by layer, the totals, accuracy and time: a row each, a column for each run.

    Args:
      runs: one or more; a layer that only some of them have is left blank in the others.

    Returns:
      Lines of plain text, without a newline at the end.

    Raises:
      ValueError: there are no runs.

    Example:
      >>> from lats_optax.analysis.sparsity import LayerSparsity
      >>> layers = (LayerSparsity("fc/kernel", (64, 10), 640, 608, prunable=True),
      ...           LayerSparsity("fc/bias", (10,), 10, 0, prunable=False))
      >>> print(comparison_table([FinishedRun("lats", 0.9875, 12.3, SparsityReport(layers), [])]))
                          weights       lats
      --------------------------------------
      fc/kernel               640     95.00%
      --------------------------------------
      prunable weights        640     95.00%
      all parameters          650     93.54%
      non-zero weights        640         32
      test accuracy                   98.75%
      seconds                           12.3
    """
    check_some(runs)
    reports = [run.sparsity for run in runs]
    layers = prunable_layers(runs)
    body = [
        (
            path,
            _common(la.size for la in found if la),
            *(f"{la.sparsity:.2%}" if la else "" for la in found),
        )
        for path, found in layers.items()
    ]
    prunable, total = _common(r.size for r in reports), _common(r.total_size for r in reports)
    foot = [
        ("prunable weights", prunable, *(f"{r.sparsity:.2%}" for r in reports)),
        ("all parameters", total, *(f"{r.total_sparsity:.2%}" for r in reports)),
        ("non-zero weights", prunable, *(f"{r.nonzeros:,}" for r in reports)),
        ("test accuracy", "", *(f"{run.test_accuracy:.2%}" for run in runs)),
        ("seconds", "", *(f"{run.seconds:.1f}" for run in runs)),
    ]
    head = ("", "weights", *(run.name for run in runs))
    return "\n".join(table(head, body, foot, least=(0, *[9] * (len(head) - 1))))


def implied_l1(metrics: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """The L1 coefficient that a recorded threshold means, as a mean over each interval of the log.

    ``μ = (d(t′) − d(t)) / Σ_{t ≤ s < t′} η_s`` between the records of steps t and t′.

    Args:
      metrics: the records of a run; those of the train split with a threshold are used.

    Returns:
      Edges of the intervals in epochs, (n,), and μ, (n − 1,), NaN where the learning rate was zero;
      both empty for a run that has no threshold, or fewer than two records of it.
    """
    found = records(metrics, "train", "threshold", "learning_rate_sum")
    if len(found) < 2:
        return np.zeros(0), np.zeros(0)
    columns = ("epoch", "threshold", "learning_rate_sum")
    epochs, thresholds, sums = (np.array([r[name] for r in found]) for name in columns)
    return epochs, mean_l1(thresholds, sums)


def records(
    metrics: Sequence[Mapping[str, Any]], split: str, *names: str
) -> list[Mapping[str, Any]]:
    """The records of a split that have all of these."""
    return [r for r in metrics if r["split"] == split and all(name in r for name in names)]


def prunable_layers(runs: Sequence[FinishedRun]) -> dict[str, list[LayerSparsity | None]]:
    """By path, the layer in each run, for all that any run counts as prunable."""
    found = [{la.path: la for la in run.sparsity.layers if la.prunable} for run in runs]
    paths = dict.fromkeys(path for layers in found for path in layers)
    return {path: [layers.get(path) for layers in found] for path in paths}


def _common(sizes: Iterable[int]) -> str:
    distinct = set(sizes)
    return f"{distinct.pop():,}" if len(distinct) == 1 else "varies"


def check_some(runs: Sequence[FinishedRun]) -> None:
    """Checks that there is a run.

    Raises:
      ValueError: there is none.
    """
    if not runs:
        raise ValueError("runs is empty; it must hold at least one run")
