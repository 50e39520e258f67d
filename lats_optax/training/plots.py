"""The plots that a finished run leaves in its work directory."""

from pathlib import Path

from lats_optax.analysis.runs import FinishedRun
from lats_optax.files.storage import URL
from lats_optax.plots.runs import draw_runs
from lats_optax.plots.weights import draw_weights
from lats_optax.training import workdir
from lats_optax.training.result import RunResult


def write_plots(result: RunResult) -> list[Path | URL]:
    """Draws a run: its curves, and where it was pruned its weights.

    Args:
      result: of `loop.fit`.

    Returns:
      The files; none in a process that keeps silent.
    """
    if not result.is_primary:
        return []
    directory = result.config.workdir
    curves = directory / workdir.REPORT
    draw_runs(curves, [as_run(directory.name, result)])
    if not result.weights:
        return [curves]
    weights = directory / workdir.WEIGHTS
    draw_weights(weights, result.metrics, result.weights)
    return [curves, weights]


def as_run(name: str, result: RunResult) -> FinishedRun:
    """What a report tells of a run, under a name."""
    return FinishedRun(name, result.test_accuracy, result.seconds, result.sparsity, result.metrics)
