"""The demonstration: one network trained dense and sparse on real digits, and what came of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from lats_optax.analysis.runs import comparison_table
from lats_optax.files.atomic import replacing
from lats_optax.files.storage import URL, as_path
from lats_optax.plots.runs import draw_runs
from lats_optax.plots.weights import draw_weights
from lats_optax.training import experiment, loop, plots
from lats_optax.training.config import PruneConfig, TrainConfig
from lats_optax.training.experiment import Experiment
from lats_optax.training.presets import PRESETS
from lats_optax.training.result import RunResult

PLOT, WEIGHTS, SUMMARY = "report.png", "weights.png", "summary.json"


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Train a dense and a sparse network on the digits of scikit-learn, and compare them."""

    target_sparsity: float = 0.95
    """Fraction of the sparse network's prunable weights that is zero at the end."""
    epochs: int = PRESETS["digits"].config.epochs
    """Passes over the training images, for each of the two."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the images."""
    data_dir: str | None = None
    """Where prepared data sets are kept; None: the TFDS default."""
    workdir: Path | URL = Path("runs/demo")
    """Where the two runs, the plots and the summary are written."""
    overwrite: bool = False
    """Throw away the demonstration that is in workdir."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "workdir", as_path(self.workdir, "workdir"))
        self.runs()  # the runs' own checks find wrong fields

    def runs(self) -> dict[str, TrainConfig]:
        """The two runs, `dense` and `sparse`: the preset `digits` without and with a target."""
        base = PRESETS["digits"].config
        base = dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, data_dir=self.data_dir),
            epochs=self.epochs,
            seed=self.seed,
            overwrite=self.overwrite,
            # Often enough for a smooth curve of so short a run.
            eval_every=1,
            log_every=10,
            checkpoint_every=self.epochs,
        )
        prune = PruneConfig(target_sparsity=self.target_sparsity)
        return {
            "dense": dataclasses.replace(base, workdir=self.workdir / "dense"),
            "sparse": dataclasses.replace(base, workdir=self.workdir / "sparse", prune=prune),
        }


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demonstration has come to.

    Attributes:
      table: the comparison, as plain text.
      plot: path of the PNG that compares the two.
      weights: path of the PNG of the sparse run's weights.
      summary: path of the JSON file: for `dense` and `sparse` the test accuracy, the sparsity of
        the prunable weights, how many are not zero, and the seconds it took.
      runs: the finished runs by name.
    """

    table: str
    plot: Path | URL
    weights: Path | URL
    summary: Path | URL
    runs: dict[str, RunResult]


def build_runs(config: DemoConfig) -> dict[str, Experiment]:
    """Finds and checks everything that the demonstration needs; writes nothing in its directory.

    Args:
      config: what to train and where to write.

    Returns:
      The two runs, ready to begin, by name.

    Raises:
      FileExistsError: there is something in the work directory, and `overwrite` is False.
      ValueError: the runs do not fit the devices.
    """
    if not config.overwrite and config.workdir.exists() and any(config.workdir.iterdir()):
        raise FileExistsError(
            f"workdir {config.workdir} is not empty: --overwrite throws away the demonstration in "
            "it, --workdir names another place."
        )
    return {name: experiment.build_experiment(run) for name, run in config.runs().items()}


def fit(config: DemoConfig, experiments: dict[str, Experiment]) -> DemoResult:
    """Trains both networks and writes the plots and the summary.

    Args:
      config: where to write.
      experiments: what `build_runs` has made of it.

    Returns:
      The table, the paths and the two finished runs.

    Raises:
      NonFiniteError: training diverged.
      KeyboardInterrupt: as `loop.fit`.
    """
    summary, plot, weights = (config.workdir / name for name in (SUMMARY, PLOT, WEIGHTS))
    # If this one is interrupted, nothing of an older demonstration stands beside its runs.
    for file in (summary, plot, weights):
        file.unlink(missing_ok=True)
    results = {name: loop.fit(ready) for name, ready in experiments.items()}
    runs = [plots.as_run(name, result) for name, result in results.items()]
    draw_runs(plot, runs)
    draw_weights(weights, results["sparse"].metrics, results["sparse"].weights)
    _write_json(
        summary,
        {
            run.name: {
                "test_accuracy": run.test_accuracy,
                "sparsity": run.sparsity.sparsity,
                "nonzero_weights": run.sparsity.nonzeros,
                "seconds": round(run.seconds, 2),
            }
            for run in runs
        },
    )
    return DemoResult(comparison_table(runs), plot, weights, summary, results)


def _write_json(path: Path | URL, content: dict[str, Any]) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
