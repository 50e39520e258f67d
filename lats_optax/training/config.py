"""The configs of a training run: frozen dataclasses, checked at construction.

The command line is made from these classes: the line under a field is its `--help` text. Pruning is
in `prune_config.py`, the checks of fields in `config_checks.py`.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from lats_optax.checks.options import check
from lats_optax.files.storage import URL, as_path
from lats_optax.training.config_checks import MOST_COUNTED, check_float32
from lats_optax.training.prune_config import PruneConfig

__all__ = [
    "RECALIBRATION_BATCHES",
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PruneConfig",
    "TrainConfig",
]

RECALIBRATION_BATCHES = 50
"""Batches for estimating batch statistics, unless a config gives a number; more than needed."""

_MOST_WORKERS = 1024


def _located(field: str, path: Path | URL) -> Path | URL:
    """The path with ``~`` expanded, or the URL that it is."""
    check("\0" not in str(path), field, str(path), "a path without null characters")
    return as_path(path, field)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set and how it is read."""

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
        check(self.batch_size >= 1, "data.batch_size", self.batch_size, "1 or more")
        size = self.image_size
        check(size is None or size >= 1, "data.image_size", size, "None, or 1 or more")
        few = 0 <= self.workers <= _MOST_WORKERS
        check(few, "data.workers", self.workers, f"0 to {_MOST_WORKERS}")
        for field in ("synthetic_examples", "synthetic_classes"):
            value = getattr(self, field)
            counted = 1 <= value <= MOST_COUNTED
            check(counted, f"data.{field}", value, f"1 to {MOST_COUNTED}")
            used = self.name == "synthetic" or value == getattr(type(self), field)
            check(used, f"data.{field}", value, "the default, but for the data set synthetic")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model and its options."""

    name: str = "digits-cnn"
    """Model of the zoo."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that the layers compute in; parameters are float32 in both cases."""
    width: float | None = None
    """Multiplier of all channel counts; as the other options, None: the model's default."""
    classifier_bias: bool | None = None
    """Whether the classifier adds a bias."""
    time_steps: int | None = None
    """Steps for which a spiking network is shown an image."""
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
    """The optimizer and its learning rate: linear warm-up, then a cosine."""

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
    lr_update: Literal["step", "epoch"] = "step"
    """When the learning rate changes: at every `step`, or once an `epoch`."""

    def __post_init__(self) -> None:
        check_float32("optimizer.learning_rate", self.learning_rate, positive=True)
        check(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "0 <= momentum < 1")
        check(0 < self.beta2 < 1, "optimizer.beta2", self.beta2, "0 < beta2 < 1")
        used = self.name == "adamw" or self.beta2 == type(self).beta2
        check(used, "optimizer.beta2", self.beta2, "the default, but for adamw")
        check_float32("optimizer.weight_decay", self.weight_decay)
        if self.clip_norm is not None:
            check_float32("optimizer.clip_norm", self.clip_norm, positive=True)
        nesterov = not self.nesterov or self.momentum > 0
        check(nesterov, "optimizer.nesterov", self.nesterov, "False without momentum")
        penalized = self.decay_norm or self.weight_decay > 0
        check(penalized, "optimizer.decay_norm", self.decay_norm, "True without weight_decay")
        least = self.minimum_learning_rate
        below = 0 <= least < self.learning_rate
        allowed = f"0 or more, and below learning_rate, {self.learning_rate:g}"
        check(below, "optimizer.minimum_learning_rate", least, allowed)
        check(self.warmup_epochs >= 0, "optimizer.warmup_epochs", self.warmup_epochs, "0 or more")


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """How the devices share the work."""

    engine: Literal["pmap", "jit"] = "pmap"
    """`pmap`: every device has the whole state; `jit`: the compiler divides it, see fsdp."""
    fsdp: int = 1
    """With engine jit, devices that share each large array of the state, latent weights among them:
    a model may then be larger than one device. It divides the number of devices."""

    def __post_init__(self) -> None:
        check(self.fsdp >= 1, "parallel.fsdp", self.fsdp, "1 or more")
        used = self.engine == "jit" or self.fsdp == 1
        check(used, "parallel.fsdp", self.fsdp, "1, but for engine jit")


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
    prune: PruneConfig = PruneConfig()  # noqa: RUF009  # it is frozen
    parallel: ParallelConfig = ParallelConfig()
    init_from: Path | URL | None = None
    """Model file of another run to begin from; options of `model` that are None are its own."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradients that are not finite: `stop` the run, or `skip` what is learned from these
    images. A target sparsity is met all the same."""
    grad_accum_steps: int = 1
    """Parts of each device's images that go through the model one after another, to save memory."""
    label_smoothing: float = 0.0
    """Mass that the training loss's target spreads evenly over all classes."""
    ema_decay: float | None = None
    """Decay of an average of the weights over the steps (EMA), evaluated as well; None: none."""
    bn_recalibration_batches: int | None = None
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
    num_processes: int | None = None
    """With a coordinator, how many processes there are."""
    process_id: int | None = None
    """With a coordinator, which of them this is, from 0."""
    process_timeout: int = 300
    """Seconds to wait for the other processes to join, and for one that no longer answers."""

    def __post_init__(self) -> None:
        for field in ("workdir", "init_from"):
            path = getattr(self, field)
            object.__setattr__(self, field, None if path is None else _located(field, path))
        parts = self.grad_accum_steps
        check(parts >= 1, "grad_accum_steps", parts, "1 or more")
        check(
            0 <= self.label_smoothing < 1,
            "label_smoothing",
            self.label_smoothing,
            "0 <= label_smoothing < 1",
        )
        decay = self.ema_decay
        # An average of decay 0 is the weights.
        allowed = "None, or 0 < ema_decay < 1"
        check(decay is None or 0 < decay < 1, "ema_decay", decay, allowed)
        batches = self.bn_recalibration_batches
        check(
            batches is None or batches >= 0,
            "bn_recalibration_batches",
            batches,
            "None, or 0 or more",
        )
        check(self.epochs >= 1, "epochs", self.epochs, "1 or more")
        for field in ("log_every", "eval_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, field)
            check(1 <= value <= MOST_COUNTED, field, value, f"1 to {MOST_COUNTED}")
        check(0 <= self.seed < 2**32, "seed", self.seed, "0 <= seed < 2**32")
        warmup = self.optimizer.warmup_epochs
        check(
            warmup < self.epochs,
            "optimizer.warmup_epochs",
            warmup,
            f"less than epochs, {self.epochs}",
        )
        check(
            self.prune.mode != "fine-tuning" or self.init_from is not None,
            "prune.mode",
            self.prune.mode,
            "fine-tuning with init_from, the model file whose zeros stay",
        )
        search = self.prune.search_epochs
        check(
            self.prune.mode != "early" or search is None or search < self.epochs,
            "prune.search_epochs",
            search,
            f"with mode early, less than epochs, {self.epochs}",
        )
        first, epochs = self.prune.first_epoch, self.prune.search_epochs or self.epochs
        allowed = f"less than the epochs of the threshold, {epochs}"
        check(first == 0 or first < epochs, "prune.first_epoch", first, allowed)
        penalized = self.prune.weight_decay_on == "latent" or self.optimizer.weight_decay > 0
        check(
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
        if self.bn_recalibration_batches is None:
            return RECALIBRATION_BATCHES if self.prune.enabled else 0
        return self.bn_recalibration_batches

    @property
    def total_epochs(self) -> int:
        """Passes over the training images, those of a search at initialization included."""
        before = self.prune.mode == "at-initialization"
        return self.epochs + ((self.prune.search_epochs or 0) if before else 0)

    def _check_processes(self) -> None:
        seconds = self.process_timeout
        check(1 <= seconds <= MOST_COUNTED, "process_timeout", seconds, f"1 to {MOST_COUNTED}")
        check(
            self.distributed or seconds == type(self).process_timeout,
            "process_timeout",
            seconds,
            "the default without distributed",
        )
        address, count, index = self.coordinator, self.num_processes, self.process_id
        if address is None:
            for field in ("num_processes", "process_id"):
                check(getattr(self, field) is None, field, getattr(self, field), "with coordinator")
            return
        check(self.distributed, "coordinator", address, "with distributed")
        host, _, port = address.rpartition(":")
        place = bool(host) and port.isdecimal() and 1 <= int(port) <= 65535
        check(place, "coordinator", address, "HOST:PORT, with a port from 1 to 65535")
        check(
            count is not None and count >= 1, "num_processes", count, "with coordinator, 1 or more"
        )
        assert count is not None
        within = index is not None and 0 <= index < count
        check(within, "process_id", index, f"with coordinator, 0 to {count - 1}")
