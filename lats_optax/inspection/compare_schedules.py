"""What `lats-inspect schedule` is asked for, and what comes of it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import optax
import tyro

from lats_optax.analysis.curves import Curve, summary_table
from lats_optax.checks.numbers import check_threshold
from lats_optax.control.schedules import learning_rates
from lats_optax.files.storage import URL
from lats_optax.inspection import sources
from lats_optax.inspection.sources import ScheduleRun
from lats_optax.plots import style
from lats_optax.plots.curves import draw_thresholds
from lats_optax.training import optimizer
from lats_optax.training.config import OptimizerConfig, TrainConfig
from lats_optax.training.presets import PRESETS

# Training images of the presets' data sets, which need not be on this machine.
_TRAINING_IMAGES = {
    "imagenet2012": 1_281_167,
    "fashion_mnist": 60_000,
    "cifar10": 50_000,
    "digits": 1_437,
}


@dataclasses.dataclass(frozen=True)
class ScheduleRequest:
    """Compare threshold schedules: the L1 coefficient that each implies, as a table and a plot.

    Each schedule is a name: lats; s-lats; epoch-lats; pgh:BETA; constant; linear; sine; cubic. Or
    lats:PROFILE, an L1 coefficient of one's own over x = t/T, where PROFILE is a number BETA for
    BETA**x, MODULE:FUNCTION or a FILE. Or a threshold: MODULE:ATTRIBUTE, any optax schedule; a
    column of numbers, FILE.csv:COLUMN or FILE.npy:COLUMN; what a run has recorded, its work
    directory or metrics.jsonl. LABEL=SCHEDULE gives it another name.
    """

    schedules: tyro.conf.Positional[tuple[str, ...]] = ()
    """Schedules to compare, one or more; none: the preset's own, or lats."""
    preset: str | None = None
    """Preset of lats-train whose learning rate, epochs and schedule are taken where not given."""
    final: float | None = None
    """Threshold at the end, which scales the L1 coefficient; None: the preset's, or 1."""
    epochs: int | None = None
    """Epochs of the run; None: the preset's, or 100."""
    steps_per_epoch: int | None = None
    """Optimizer steps of an epoch; None: the preset's, or 100."""
    learning_rate: str | None = None
    """Learning rate at its peak, or MODULE:ATTRIBUTE, any optax schedule; None: the preset's, or
    0.1."""
    shape: Literal["cosine", "constant", "milestones"] = "cosine"
    """How the learning rate goes on from its peak: to zero, not at all, or down at milestones."""
    lr_update: Literal["step", "epoch"] | None = None
    """When the cosine changes: at every `step`, or once an `epoch`; None: the preset's, or step."""
    warmup_epochs: int | None = None
    """Epochs over which the learning rate rises linearly to its peak; None: the preset's, or 0."""
    milestones: tuple[int, ...] = ()
    """With shape milestones: the epochs after which the learning rate is multiplied by factor."""
    factor: float = 0.1
    """With shape milestones: what it is multiplied by."""
    out: Path | URL | None = None
    """The plot to write; one that is there is replaced. None: schedule.png in the work directory
    of the first run among them, or else here."""

    def __post_init__(self) -> None:
        if self.out is not None:
            style.check_path(self.out)
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset is {self.preset!r}; allowed: {', '.join(PRESETS)}.")
        if self.final is not None:
            check_threshold("final", self.final)
        for field in ("epochs", "steps_per_epoch"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}; allowed: 1 or more.")
        if bool(self.milestones) != (self.shape == "milestones"):
            raise ValueError(
                f"shape is {self.shape!r} and milestones is {self.milestones}; allowed: shape "
                "milestones with one or more, another shape with none."
            )
        if any(epoch < 1 for epoch in self.milestones):
            raise ValueError(f"milestones is {self.milestones}; allowed: epochs from 1.")
        if not 0 < self.factor <= 1:
            raise ValueError(f"factor is {self.factor}; allowed: 0 < factor <= 1.")
        if self.shape != "cosine" and self.lr_update is not None:
            raise ValueError(
                f"lr_update is {self.lr_update!r}; allowed: none with shape {self.shape}."
            )
        if self.has_own_rate:
            for field, otherwise in (
                ("shape", "cosine"),
                ("lr_update", None),
                ("warmup_epochs", None),
            ):
                if (value := getattr(self, field)) != otherwise:
                    raise ValueError(
                        f"{field} is {value!r} and learning_rate is {self.learning_rate!r}; "
                        "allowed: the one, or a learning_rate that is a number."
                    )

    @property
    def has_own_rate(self) -> bool:
        """Whether the learning rate is a schedule of the user's."""
        return self.learning_rate is not None and sources.number(self.learning_rate) is None


@dataclasses.dataclass(frozen=True)
class ScheduleComparison:
    """Schedules that were asked for, found and evaluated.

    Attributes:
      curves: by name.
      learning_rate: ``count -> eta``, of all that have not recorded their own.
      steps: of the run.
      steps_per_epoch: None where the curves are of runs that may count their epochs differently.
      described: the learning rate and the run, in words.
    """

    curves: Mapping[str, Curve]
    learning_rate: optax.Schedule
    steps: int
    steps_per_epoch: int | None
    described: str


def plot_path(request: ScheduleRequest) -> Path | URL:
    """Where the plot goes."""
    places = (sources.workdir_of(source) for source in request.schedules)
    beside = next((place for place in places if place is not None), Path())
    return request.out or beside / "schedule.png"


def compare_schedules(request: ScheduleRequest) -> ScheduleComparison:
    """Finds and evaluates what was asked for; writes nothing.

    Args:
      request: the schedules, the run and its learning rate.

    Returns:
      The curves and what they have in common.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a schedule is not known, cannot be imported or read, or fails.

    Example:
      >>> request = ScheduleRequest(("lats", "linear"), epochs=2, steps_per_epoch=50, final=0.1)
      >>> comparison = compare_schedules(request)
      >>> {name: f"{curve.deviation:.1f}" for name, curve in comparison.curves.items()}
      {'lats': '0.0', 'linear': '2046.4'}
    """
    run = _run(request)
    learning_rates(run.learning_rate, run.steps)
    curves: dict[str, Curve] = {}
    for source in request.schedules or (_own_schedule(request, run.config),):
        label, named = sources.labeled(source)
        if label in curves:
            raise ValueError(f"schedule {label!r} is there twice; LABEL={named} tells them apart")
        curves[label] = sources.find_curve(label, named, run)
    recorded = any(curve.own_rate for curve in curves.values())
    return ScheduleComparison(
        curves,
        run.learning_rate,
        run.steps,
        None if recorded else run.steps_per_epoch,
        _describe(request, run),
    )


def write_report(comparison: ScheduleComparison, out: Path | URL) -> str:
    """Writes the plot.

    Args:
      comparison: of :func:`compare_schedules`.
      out: where to.

    Returns:
      The table, and where the plot is, as lines of plain text.
    """
    draw_thresholds(
        out,
        comparison.curves,
        comparison.learning_rate,
        comparison.steps,
        steps_per_epoch=comparison.steps_per_epoch,
    )
    curves = list(comparison.curves.values())
    lines = [summary_table(curves), ""]
    if not all(curve.own_rate for curve in curves):
        lines.append(f"learning rate  {comparison.described}")
    return "\n".join([*lines, f"plot           {out}"])


# --- the run ------------------------------------------------------------------------------------


def _run(request: ScheduleRequest) -> ScheduleRun:
    """The run that the schedules are for: the preset's, or a plain one, as far as not given."""
    config = TrainConfig(epochs=100, optimizer=OptimizerConfig(learning_rate=0.1))
    steps_per_epoch = 100
    if request.preset is not None:
        config = PRESETS[request.preset].config
        steps_per_epoch = _TRAINING_IMAGES[config.data.name] // config.data.batch_size
    peak = None if request.learning_rate is None else sources.number(request.learning_rate)
    sgd = dataclasses.replace(
        config.optimizer,
        learning_rate=_given(peak, config.optimizer.learning_rate),
        warmup_epochs=_given(request.warmup_epochs, config.optimizer.warmup_epochs),
        lr_update=_given(request.lr_update, config.optimizer.lr_update),
    )
    epochs = _given(request.epochs, config.epochs)
    config = dataclasses.replace(config, epochs=epochs, optimizer=sgd)
    steps_per_epoch = _given(request.steps_per_epoch, steps_per_epoch)
    return ScheduleRun(
        config,
        steps_per_epoch,
        _learning_rate(request, config, steps_per_epoch),
        _given(request.final, _given(config.prune.final_threshold, 1.0)),
    )


def _given(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _learning_rate(
    request: ScheduleRequest, config: TrainConfig, steps_per_epoch: int
) -> optax.Schedule:
    if request.has_own_rate:
        assert request.learning_rate is not None
        return sources.find_function("learning_rate", request.learning_rate)
    if request.shape == "cosine":
        return optimizer.cosine(config, steps_per_epoch)
    peak, warmup = config.optimizer.learning_rate, config.optimizer.warmup_epochs * steps_per_epoch

    def schedule(count: Any) -> Any:
        passed = sum(count >= epoch * steps_per_epoch for epoch in request.milestones)
        rising = jnp.minimum((jnp.asarray(count) + 1) / max(warmup, 1), 1.0)
        return peak * rising * request.factor**passed

    return schedule


def _own_schedule(request: ScheduleRequest, config: TrainConfig) -> str:
    """The default schedule: the preset's, or `lats`."""
    prune = config.prune
    if request.preset is None:
        return "lats"
    if not prune.has_threshold:
        raise ValueError(f"preset {request.preset!r} is dense; name the schedules to compare.")
    return f"pgh:{prune.beta}" if prune.schedule == "pgh" else prune.schedule


def _describe(request: ScheduleRequest, run: ScheduleRun) -> str:
    sgd = run.config.optimizer
    length = f"{run.config.epochs} epochs of {run.steps_per_epoch:,} steps"
    if request.has_own_rate:
        return f"{request.learning_rate}; {length}"
    shape = {
        "cosine": f"a cosine from {sgd.learning_rate:g} to 0, moved at every {sgd.lr_update}",
        "constant": f"{sgd.learning_rate:g}",
        "milestones": f"{sgd.learning_rate:g}, times {request.factor:g} after each of the epochs "
        f"{', '.join(map(str, request.milestones))}",
    }[request.shape]
    warmup = f"{sgd.warmup_epochs} epochs of warm-up, then " if sgd.warmup_epochs else ""
    return f"{warmup}{shape}; {length}"
