"""What a training run is told: frozen dataclasses, checked when they are made.

The command line is made from these classes: the line under a field is its `--help` text.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lats_optax.files.storage import URL, as_path

RECALIBRATION_BATCHES = 50
"""On which batch statistics are estimated where a config does not say; more than are needed."""

_MOST_COUNTED = 2**31 - 1
_MOST_WORKERS = 1024
_FLOAT32 = np.finfo(np.float32)


def _check(allowed_if: bool, field: str, value: object, allowed: str) -> None:
    if not allowed_if:
        raise ValueError(f"{field} is {value!r}; allowed: {allowed}.")


def _check_float32(field: str, value: float, *, positive: bool = False) -> None:
    """Refuses what would be negative, infinite or lost in the type that runs compute in."""
    least, most = float(_FLOAT32.tiny), float(_FLOAT32.max)
    zero = "" if positive else "0, or "
    allowed = f"{zero}{least:.2g} to {most:.2g}, the numbers of float32"
    _check((value == 0 and not positive) or least <= value <= most, field, value, allowed)


def _located(field: str, path: Path | URL) -> Path | URL:
    """The path with ``~`` expanded, or the URL that it is."""
    _check("\0" not in str(path), field, str(path), "a path without null characters")
    return as_path(path, field)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    name: str = "digits"
    """Data set: `digits`; `synthetic`, noise; or one of TFDS, as NAME, NAME/CONFIG:VERSION, …"""
    data_dir: str | None = None
    """Where prepared data sets are kept, on this machine or on gs://; None: the TFDS default."""
    batch_size: int = 64
    """Images a step, over all devices of all processes together."""
    image_size: int | None = None
    """Height and width of the images; None: 224, or what small images have."""
    eval_split: str | None = None
    """Split to evaluate on; None: `validation` where there is one, or else `test`."""
    skip_corrupt: bool = False
    """Leave corrupt records out and count them; otherwise they are an error."""
    workers: int = 0
    """Processes, on each host, that read, decode and augment; 0: threads of the one that trains."""
    synthetic_examples: int = 1_281_167
    """Training images of `synthetic`."""
    synthetic_classes: int = 1000
    """Classes of `synthetic`."""

    def __post_init__(self) -> None:
        _check(self.batch_size >= 1, "data.batch_size", self.batch_size, "1 or more")
        size = self.image_size
        _check(size is None or size >= 1, "data.image_size", size, "None, or 1 or more")
        few = 0 <= self.workers <= _MOST_WORKERS
        _check(few, "data.workers", self.workers, f"0 to {_MOST_WORKERS}")
        for field in ("synthetic_examples", "synthetic_classes"):
            value = getattr(self, field)
            counted = 1 <= value <= _MOST_COUNTED
            _check(counted, f"data.{field}", value, f"1 to {_MOST_COUNTED}")
            used = self.name == "synthetic" or value == getattr(type(self), field)
            _check(used, f"data.{field}", value, "the default, but for the data set synthetic")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is trained."""

    name: str = "digits-cnn"
    """Model of the zoo."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the layers compute in; parameters are float32 in both cases."""
    width: float | None = None
    """Multiplier of all channel counts; as the other options, None: the model's default."""
    classifier_bias: bool | None = None
    """Whether the classifier adds a bias."""
    steps: int | None = None
    """How often a spiking network is shown an image."""
    connection: str | None = None
    """How a spiking block joins its shortcut: `ADD`, `AND` or `IAND`."""
    neuron: str | None = None
    """Spiking neuron: `if`, integrate-and-fire; `lif`, leaky; `plif`, leaky at a trained rate."""
    stem: str | None = None
    """First layers of a spiking network: `imagenet`, or `cifar` for images of 32×32."""
    depth: int | None = None
    """Blocks of a vision transformer."""
    patch_size: int | None = None
    """Height and width of a vision transformer's patches, in pixels."""

    @property
    def options(self) -> dict[str, Any]:
        """The options that are given, by name."""
        given = dataclasses.asdict(self)
        return {k: v for k, v in given.items() if k not in ("name", "dtype") and v is not None}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What moves the weights: linear warm-up, then a cosine."""

    name: Literal["sgd", "adamw"] = "sgd"
    """`sgd`, or `adamw`, whose learning rates are a hundred times smaller."""
    learning_rate: float = 0.3
    """Learning rate at its peak."""
    momentum: float = 0.9
    """Momentum of SGD, 0 for none; beta_1 of AdamW."""
    beta2: float = 0.999
    """beta_2 of AdamW."""
    weight_decay: float = 0.0
    """Coefficient of the L2 penalty on the parameters; AdamW decays them by it, times its rate."""
    clip_norm: float | None = None
    """Largest global norm of the gradients, which are scaled down to it; None: any. Where channels
    die before a batch normalization, their gradients alone exceed it."""
    decay_norm: bool = True
    """Whether the penalty is also on batch normalization and biases: all but `prunable` ones."""
    nesterov: bool = False
    """Nesterov's momentum."""
    minimum_learning_rate: float = 0.0
    """Where the cosine ends. The schedule `lats`, which sums the rates of the run, is still exact;
    the closed forms `s-lats`, `epoch-lats` and `pgh` are of a cosine that ends at 0."""
    warmup_epochs: int = 0
    """Epochs over which the learning rate rises linearly to its peak."""
    decay: Literal["step", "epoch"] = "step"
    """Whether the learning rate moves at every step or once an epoch."""
    accumulate: int = 1
    """Parts of each device's images that go through the model one after another, to save memory."""

    def __post_init__(self) -> None:
        _check_float32("optimizer.learning_rate", self.learning_rate, positive=True)
        _check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "0 <= momentum < 1")
        _check(0 < self.beta2 < 1, "optimizer.beta2", self.beta2, "0 < beta2 < 1")
        used = self.name == "adamw" or self.beta2 == type(self).beta2
        _check(used, "optimizer.beta2", self.beta2, "the default, but for adamw")
        _check_float32("optimizer.weight_decay", self.weight_decay)
        if self.clip_norm is not None:
            _check_float32("optimizer.clip_norm", self.clip_norm, positive=True)
        nesterov = not self.nesterov or self.momentum > 0
        _check(nesterov, "optimizer.nesterov", self.nesterov, "False without momentum")
        penalized = self.decay_norm or self.weight_decay > 0
        _check(penalized, "optimizer.decay_norm", self.decay_norm, "True without weight_decay")
        least = self.minimum_learning_rate
        below = 0 <= least < self.learning_rate
        allowed = f"0 or more, and below learning_rate, {self.learning_rate:g}"
        _check(below, "optimizer.minimum_learning_rate", least, allowed)
        _check(self.warmup_epochs >= 0, "optimizer.warmup_epochs", self.warmup_epochs, "0 or more")
        _check(self.accumulate >= 1, "optimizer.accumulate", self.accumulate, "1 or more")


@dataclasses.dataclass(frozen=True)
class PruneConfig:
    """Soft threshold pruning; the run is dense while both of the first two fields are None."""

    target_sparsity: float | None = None
    """Fraction of the pruned weights that is zero at the end; the threshold follows from it."""
    final_threshold: float | None = None
    """Threshold at the end of training, instead of a sparsity."""
    schedule: Literal["lats", "s-lats", "epoch-lats", "pgh", "constant"] = "lats"
    """How the threshold rises to its end; `lats` is exact for the run's learning rate."""
    operator: Literal["annealed", "power", "soft", "hard"] | None = None
    """What the threshold does to the weights above it: `soft` shrinks all by as much, `hard` none,
    `power` is between them, `annealed` goes from soft to there, rescaled, during the run.
    None: soft with a final_threshold; with a target_sparsity annealed, and hard for
    output-channels, which a batch normalization behind them makes as large again as they were."""
    first_epoch: int = 0
    """Epochs before the threshold begins to rise: until then it is 0."""
    reach: float | None = None
    """Part of the steps, from first_epoch on, after which target_sparsity is reached, and held;
    None: a half, and all of them with operator soft, which is the published method."""
    beta: float | None = None
    """Base of the pgh schedule: the L1 penalty is proportional to beta**x, x from 0 to 1."""
    update_every: int | None = None
    """Steps between two selections of target_sparsity's quantile; None: the library's default."""
    include: tuple[str, ...] = ()
    """Regular expressions on parameter paths: what is pruned; none: all of 2 dimensions or more."""
    exclude: tuple[str, ...] = ()
    """Regular expressions on parameter paths: what stays dense."""
    weight_decay_on: Literal["latent", "weights"] = "latent"
    """Weights that weight decay acts on: the latent ones, as in the paper's code, or the pruned."""
    mode: Literal["during-training", "early", "at-initialization", "fine-tuning"] = (
        "during-training"
    )
    """When: to the end; early, then frozen; in a search before; fine-tuning: `initial`'s zeros."""
    search_epochs: int | None = None
    """Epochs of the search: the first of the run if early, before its own if at-initialization."""
    distribution: Literal["global", "uniform", "er", "erk"] = "global"
    """Layers share target_sparsity freely, equally, or by Erdős–Rényi or Erdős–Rényi-kernel."""
    layer_sparsity: tuple[tuple[str, float], ...] = ()
    """With distribution uniform, EXPRESSION SPARSITY ...: layers with a target of their own."""
    structure: Literal[
        "none", "output-channels", "input-channels", "filters", "blocks", "n-of-m"
    ] = "none"
    """What is zeroed as a whole, or in a pattern. Left out, unless `include` is given: with
    output-channels the classifier, with input-channels layers that have one, with filters all but
    convolutions, with n-of-m layers whose inputs M does not divide."""
    block: tuple[int, int] | None = None
    """With structure blocks, INPUTS OUTPUTS in a block of a layer's matrix, at each position."""
    pattern: tuple[int, int] | None = None
    """With structure n-of-m, N M: of M weights along the inputs N are left."""

    @property
    def enabled(self) -> bool:
        """Whether the run's weights have zeros that are meant to be there."""
        return self.has_threshold or self.mode == "fine-tuning"

    @property
    def chosen_operator(self) -> str:
        """`operator`, or what is best where it is None."""
        if self.operator is not None:
            return self.operator
        if self.target_sparsity is None:
            return "soft"
        if self.structure == "n-of-m":  # what survives is not shrunk under any of them
            return "soft"
        # A shrunken channel has the same outputs behind a batch normalization, and gradients as
        # much larger as it is smaller.
        return "hard" if self.structure == "output-channels" else "annealed"

    @property
    def horizon(self) -> float:
        """The part of the steps after which `target_sparsity` is reached."""
        if self.reach is not None:
            return self.reach
        return 1.0 if self.chosen_operator == "soft" and self.structure != "n-of-m" else 0.5

    @property
    def has_threshold(self) -> bool:
        """Whether weights are pruned in the run."""
        return self.target_sparsity is not None or self.final_threshold is not None

    def __post_init__(self) -> None:
        target, final, beta, every = (
            self.target_sparsity,
            self.final_threshold,
            self.beta,
            self.update_every,
        )
        if target is not None and final is not None:
            raise ValueError(
                f"prune.target_sparsity is {target!r} and prune.final_threshold is {final!r}; "
                "allowed: one of the two, with the other None."
            )
        if target is not None:
            _check(0 <= target < 1, "prune.target_sparsity", target, "0 <= target_sparsity < 1")
            rises = self.schedule != "constant"
            with_target = "with a target_sparsity, all but 'constant'"
            _check(rises, "prune.schedule", self.schedule, with_target)
        if final is not None:
            _check_float32("prune.final_threshold", final)
        if self.has_threshold and self.schedule == "pgh":
            _check(beta is not None, "prune.beta", beta, "with schedule pgh, a number above 0")
            assert beta is not None
            _check_float32("prune.beta", beta, positive=True)
        else:
            _check(beta is None, "prune.beta", beta, "None, but for schedule pgh of a sparse run")
        if target is None:
            _check(every is None, "prune.update_every", every, "None without a target_sparsity")
        else:
            _check(every is None or every >= 1, "prune.update_every", every, "None, or 1 or more")
        if not self.enabled:
            dense = "none without prune.target_sparsity, prune.final_threshold or mode fine-tuning"
            _check(not self.include, "prune.include", self.include, dense)
            _check(not self.exclude, "prune.exclude", self.exclude, dense)
        if not self.has_threshold:
            _check(self.operator is None, "prune.operator", self.operator, "None in a dense run")
            for field in ("schedule", "weight_decay_on", "first_epoch"):
                value, default = getattr(self, field), getattr(type(self), field)
                without = f"{default!r} without prune.target_sparsity or prune.final_threshold"
                _check(value == default, f"prune.{field}", value, without)
        _check(self.first_epoch >= 0, "prune.first_epoch", self.first_epoch, "0 or more")
        anneals = self.operator != "annealed" or target is not None
        _check(anneals, "prune.operator", self.operator, "another one without target_sparsity")
        reach = self.reach
        if target is None:
            _check(reach is None, "prune.reach", reach, "None without a target_sparsity")
        else:
            _check(reach is None or 0 < reach <= 1, "prune.reach", reach, "0 < reach <= 1")
        self._check_search()
        self._check_layers()
        self._check_structure()

    def _check_search(self) -> None:
        mode, epochs = self.mode, self.search_epochs
        if mode in ("during-training", "fine-tuning"):
            allowed = "None, but for the modes early and at-initialization"
            _check(epochs is None, "prune.search_epochs", epochs, allowed)
            for field in ("target_sparsity", "final_threshold"):
                none = getattr(self, field) is None or mode != "fine-tuning"
                _check(none, f"prune.{field}", getattr(self, field), f"None with mode {mode}")
            return
        allowed = (
            "during-training, or fine-tuning, without prune.target_sparsity or "
            "prune.final_threshold"
        )
        _check(self.has_threshold, "prune.mode", mode, allowed)
        enough = epochs is not None and epochs >= 1
        _check(enough, "prune.search_epochs", epochs, f"with mode {mode}, 1 or more")

    def _check_layers(self) -> None:
        if self.target_sparsity is None:
            allowed = "global without prune.target_sparsity"
            _check(self.distribution == "global", "prune.distribution", self.distribution, allowed)
        layers = self.layer_sparsity
        if self.distribution != "uniform":
            _check(not layers, "prune.layer_sparsity", layers, "none without distribution uniform")
        for expression, value in layers:
            named = f"prune.layer_sparsity {expression!r}"
            _check(0 <= value < 1, named, value, "0 <= sparsity < 1")

    def _check_structure(self) -> None:
        structure, block = self.structure, self.block
        if not self.has_threshold:
            allowed = "none without prune.target_sparsity or prune.final_threshold"
            _check(structure == "none", "prune.structure", structure, allowed)
        if structure == "blocks":
            sides = block is not None and len(block) == 2 and min(block) >= 1
            _check(sides, "prune.block", block, "with structure blocks, two numbers of 1 or more")
        else:
            _check(block is None, "prune.block", block, "None, but for structure blocks")
        pattern = self.pattern
        if structure != "n-of-m":
            _check(pattern is None, "prune.pattern", pattern, "None, but for structure n-of-m")
            return
        known = pattern is not None and len(pattern) == 2 and 1 <= pattern[0] < pattern[1]
        _check(known, "prune.pattern", pattern, "with structure n-of-m, N M with 1 <= N < M")
        assert pattern is not None
        most = 1 - pattern[0] / pattern[1]
        within = self.target_sparsity is None or self.target_sparsity <= most
        allowed = f"up to {most:g} with pattern {pattern[0]} {pattern[1]}"
        _check(within, "prune.target_sparsity", self.target_sparsity, allowed)
        single = self.operator != "annealed"
        _check(single, "prune.operator", self.operator, "another one with structure n-of-m")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices share the work."""

    engine: Literal["pmap", "jit"] = "pmap"
    """`pmap`: every device has the whole state; `jit`: the compiler divides it, see fsdp."""
    fsdp: int = 1
    """With engine jit, devices that share each large array of the state, latent weights among them:
    a model may then be larger than one device. It divides the number of devices."""

    def __post_init__(self) -> None:
        _check(self.fsdp >= 1, "parallel.fsdp", self.fsdp, "1 or more")
        used = self.engine == "jit" or self.fsdp == 1
        _check(used, "parallel.fsdp", self.fsdp, "1, but for engine jit")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run.

    >>> config = TrainConfig(prune=PruneConfig(target_sparsity=0.95), epochs=2)
    >>> config.prune.enabled, config.model.dtype
    (True, 'float32')
    >>> PruneConfig(target_sparsity=95)
    Traceback (most recent call last):
    ...
    ValueError: prune.target_sparsity is 95; allowed: 0 <= target_sparsity < 1.
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    prune: PruneConfig = PruneConfig()
    parallel: ParallelConfig = ParallelConfig()
    initial: Path | URL | None = None
    """Model file of another run to begin from; options of `model` that are None are its own."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradients that are not finite: `stop` the run, or `skip` what is learnt from these
    images. A target sparsity is met all the same."""
    label_smoothing: float = 0.0
    """Mass that the training loss's target spreads evenly over all classes."""
    average_decay: float | None = None
    """Decay of an average of the weights over the steps (EMA), evaluated as well; None: none."""
    recalibrate: int | None = None
    """Batches to estimate batch statistics on before evaluations; None: 50 in a sparse run."""
    epochs: int = 20
    """Passes over the training images, those of a search at initialization not counted."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the images."""
    workdir: Path | URL = Path("runs/digits")
    """Where metrics, checkpoints and the trained model are written: a path, or a URL as gs://…"""
    resume: bool = False
    """Go on from the last checkpoint in workdir; begin where there is none."""
    overwrite: bool = False
    """Throw away the run that is in workdir."""
    log_every: int = 50
    """Steps between two records of the training metrics."""
    eval_every: int = 5
    """Epochs between two evaluations on the test images; there is one after the last epoch."""
    checkpoint_every: int = 5
    """Epochs between two checkpoints; there is one after the last epoch."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints are kept."""
    distributed: bool = False
    """Join the other processes of a TPU pod or cluster; the command is run in each of them."""
    coordinator: str | None = None
    """With distributed, HOST:PORT of process 0; None: as the pod or cluster describes itself."""
    process_count: int | None = None
    """With a coordinator, how many processes there are."""
    process_index: int | None = None
    """With a coordinator, which of them this is, from 0."""
    process_timeout: int = 300
    """Seconds to wait for the other processes to join, and for one that no longer answers."""

    def __post_init__(self) -> None:
        for field in ("workdir", "initial"):
            path = getattr(self, field)
            object.__setattr__(self, field, None if path is None else _located(field, path))
        _check(
            0 <= self.label_smoothing < 1,
            "label_smoothing",
            self.label_smoothing,
            "0 <= label_smoothing < 1",
        )
        decay = self.average_decay
        # An average of decay 0 is the weights.
        allowed = "None, or 0 < average_decay < 1"
        _check(decay is None or 0 < decay < 1, "average_decay", decay, allowed)
        batches = self.recalibrate
        _check(batches is None or batches >= 0, "recalibrate", batches, "None, or 0 or more")
        _check(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        for field in ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, field)
            _check(1 <= value <= _MOST_COUNTED, field, value, f"1 to {_MOST_COUNTED}")
        _check(0 <= self.seed < 2**32, "seed", self.seed, "0 <= seed < 2**32")
        warmup = self.optimizer.warmup_epochs
        _check(
            warmup < self.epochs,
            "optimizer.warmup_epochs",
            warmup,
            f"less than epochs, {self.epochs}",
        )
        _check(
            self.prune.mode != "fine-tuning" or self.initial is not None,
            "prune.mode",
            self.prune.mode,
            "fine-tuning with initial, the model file whose zeros stay",
        )
        search = self.prune.search_epochs
        _check(
            self.prune.mode != "early" or search is None or search < self.epochs,
            "prune.search_epochs",
            search,
            f"with mode early, less than epochs, {self.epochs}",
        )
        first, epochs = self.prune.first_epoch, self.prune.search_epochs or self.epochs
        allowed = f"less than the epochs of the threshold, {epochs}"
        _check(first == 0 or first < epochs, "prune.first_epoch", first, allowed)
        penalized = self.prune.weight_decay_on == "latent" or self.optimizer.weight_decay > 0
        _check(
            penalized,
            "prune.weight_decay_on",
            self.prune.weight_decay_on,
            "'latent' without optimizer.weight_decay",
        )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite are both True; allowed: one of the two.")
        self._check_processes()

    @property
    def recalibration_batches(self) -> int:
        """Batches that batch statistics are estimated on before an evaluation."""
        if self.recalibrate is None:
            return RECALIBRATION_BATCHES if self.prune.enabled else 0
        return self.recalibrate

    @property
    def total_epochs(self) -> int:
        """Passes over the training images, those of a search at initialization included."""
        before = self.prune.mode == "at-initialization"
        return self.epochs + ((self.prune.search_epochs or 0) if before else 0)

    def _check_processes(self) -> None:
        seconds = self.process_timeout
        _check(1 <= seconds <= _MOST_COUNTED, "process_timeout", seconds, f"1 to {_MOST_COUNTED}")
        _check(
            self.distributed or seconds == type(self).process_timeout,
            "process_timeout",
            seconds,
            "the default without distributed",
        )
        address, count, index = self.coordinator, self.process_count, self.process_index
        if address is None:
            for field in ("process_count", "process_index"):
                _check(
                    getattr(self, field) is None, field, getattr(self, field), "with coordinator"
                )
            return
        _check(self.distributed, "coordinator", address, "with distributed")
        host, _, port = address.rpartition(":")
        place = bool(host) and port.isdecimal() and 1 <= int(port) <= 65535
        _check(place, "coordinator", address, "HOST:PORT, with a port from 1 to 65535")
        _check(
            count is not None and count >= 1, "process_count", count, "with coordinator, 1 or more"
        )
        assert count is not None
        within = index is not None and 0 <= index < count
        _check(within, "process_index", index, f"with coordinator, 0 to {count - 1}")


# Where a run is, how it is watched and who does the work: a resumed run may differ in these alone.
# In skip_corrupt too: a run that a corrupt record has stopped would be lost. And in recalibrate,
# which training does not depend on: a run that is over can be evaluated again.
_FREE = {
    "workdir",
    "resume",
    "overwrite",
    "log_every",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "recalibrate",
    "distributed",
    "coordinator",
    "process_count",
    "process_index",
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
