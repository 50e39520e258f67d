"""The pictures that a finished run leaves in its work directory."""

from pathlib import Path

from lats_optax.files.storage import URL
from lats_optax.training import report, weights_report, workdir
from lats_optax.training.result import RunResult


def write(result: RunResult) -> list[Path | URL]:
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
    report.write_picture(curves, [as_run(directory.name, result)])
    if not result.weights:
        return [curves]
    weights = directory / workdir.WEIGHTS
    weights_report.write_picture(weights, result.metrics, result.weights)
    return [curves, weights]


def as_run(name: str, result: RunResult) -> report.Run:
    """What a report tells of a run, under a name."""
    return report.Run(name, result.test_accuracy, result.seconds, result.sparsity, result.metrics)
