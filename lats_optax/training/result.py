"""What a run that is over has come to: its model files, its verdict, and all of it as one value."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import optax

import lats_optax
from lats_optax import models
from lats_optax.analysis.weight_summary import WeightSummary
from lats_optax.files.storage import URL
from lats_optax.training import verdict, workdir
from lats_optax.training.config import TrainConfig
from lats_optax.training.experiment import Experiment
from lats_optax.training.export import ModelFile, save_model
from lats_optax.training.logging import Record
from lats_optax.training.step import TrainState, averaged


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run has come to.

    Attributes:
      config: what was run.
      test_accuracy: fraction of the test images that are classified correctly, at the end.
      test_accuracy_averaged: that of the averaged weights; None where there are none.
      seconds: how long it took, compilation included; after a resume, since the resume.
      state: the last training state, on the run's devices.
      sparsity: the zeros of the weights that are pruned; in a dense run, that would be.
      checkpoint: the directory of the last checkpoint.
      metrics: all records of metrics.jsonl, those from before a resume included.
      is_primary: whether this is the process that speaks for the run.
      weights: by path, the layers that are pruned, at the end; empty in a dense run.
      model: the file of the weights, exactly as sparse as the state; None where `is_primary` is
        False.
      model_averaged: that of the averaged weights; None where there are none.
      target_line: whether the target sparsity was met; None in a run without one.
      problems: problems of the run, a sentence each; `lats-train` prints them as warnings.
    """

    config: TrainConfig
    test_accuracy: float
    seconds: float
    state: TrainState
    sparsity: lats_optax.SparsityReport
    checkpoint: Path | URL
    metrics: list[Record]
    is_primary: bool = True
    test_accuracy_averaged: float | None = None
    weights: dict[str, WeightSummary] = dataclasses.field(default_factory=dict)
    model: ModelFile | None = None
    model_averaged: ModelFile | None = None
    target_line: str | None = None
    problems: list[str] = dataclasses.field(default_factory=list)


def write_models(
    experiment: Experiment, state: TrainState, test: dict[str, dict[str, float]]
) -> dict[str, ModelFile]:
    """The model files of a run that is over, by the name of what an `Evaluation` says of them.

    Args:
      experiment: the run.
      state: its last, in host memory.
      test: as for `result_of`.
    """
    config, optimizer = experiment.config, experiment.optimizer
    states = {"test": state}
    if optax.tree.get(state.opt_state, "threshold") is not None:
        # Adding an update rounds: without it the weights may be an ulp from those of the method.
        exact = lats_optax.finalize(state.params, state.opt_state, operator=optimizer.operator)
        states["test"] = state._replace(params=exact)
    if "test_average" in test:
        states["test_average"] = averaged(state, experiment.pruned)
    files = {}
    for split, of in states.items():
        path = config.workdir / (workdir.MODEL if split == "test" else workdir.AVERAGED)
        variables = {"params": of.params, "batch_stats": of.batch_stats}
        told = {
            "data": config.data.name,
            "step": str(int(of.step)),
            "test_accuracy": f"{test[split]['accuracy']:.4f}",
        }
        if models.in_zoo(experiment.model):
            save_model(path, experiment.model, variables, experiment.dataset.image_shape, told)
        else:  # which no description could build again
            lats_optax.save_sparse(path, variables, told)
        files[split] = ModelFile.written(path, variables)
    return files


def result_of(
    experiment: Experiment,
    state: TrainState,
    test: Mapping[str, Mapping[str, float]],
    weights: dict[str, WeightSummary],
    files: Mapping[str, ModelFile],
    metrics: list[Record],
    seconds: float,
) -> RunResult:
    """A run that is over, as one value.

    Args:
      experiment: the run.
      state: its last.
      test: what was measured of it, by split: `test`, and `test_average` if averages are kept.
      weights: of its layers, by path.
      files: of `write_models`.
      metrics: all its records.
      seconds: that it took.
    """
    config, optimizer = experiment.config, experiment.optimizer
    sparsity = lats_optax.sparsity(state.params, optimizer.mask, groups=optimizer.groups)
    wanted = verdict.wanted_zeros(config, state.params, optimizer)
    trained = [record["accuracy"] for record in metrics if record["split"] == "train"]
    accuracies = {"train": trained[-1] if trained else None, "test": test["test"]["accuracy"]}
    return RunResult(
        config=config,
        test_accuracy=test["test"]["accuracy"],
        test_accuracy_averaged=test.get("test_average", {}).get("accuracy"),
        seconds=seconds,
        state=state,
        sparsity=sparsity,
        target_line=verdict.target_line(config, sparsity.zeros, wanted),
        problems=verdict.problems(
            config,
            optimizer,
            sparsity,
            accuracies,
            wanted,
            normalized=bool(jax.tree.leaves(state.batch_stats)),
        ),
        checkpoint=workdir.checkpoint_path(config.workdir, experiment.total_steps),
        metrics=metrics,
        is_primary=experiment.parallel.is_primary,
        weights=weights,
        model=files.get("test"),
        model_averaged=files.get("test_average"),
    )
