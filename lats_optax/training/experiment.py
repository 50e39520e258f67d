"""A run that is ready to begin: everything that a config names, found, checked and put together.

Nothing is trained or written here. The parts are functions of their own, so that a step can be had
without a data set, and a data set without a model.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import lats_optax
from lats_optax import data, masks, models
from lats_optax.training import config as configs
from lats_optax.training import workdir
from lats_optax.training.checkpoint import Checkpoints
from lats_optax.training.config import TrainConfig
from lats_optax.training.export import SavedModel, variables_of
from lats_optax.training.initial import load_initial
from lats_optax.training.optimizer import Optimizer, make_optimizer
from lats_optax.training.parallel import AXIS, DataParallel, join_processes
from lats_optax.training.step import (
    Batch,
    Metrics,
    Reduce,
    TrainState,
    create_state,
    eval_step,
    statistics_step,
    train_step,
)

TrainStep = Callable[[TrainState, Batch, Reduce[Any]], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch, Reduce[Any]], Metrics]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that is ready to begin: everything that a config names, found and checked.

    Attributes:
      config: what is run.
      parallel: the devices.
      dataset: what is trained on.
      model: what is trained.
      optimizer: what trains it.
      steps_per_epoch: whole batches in the training images.
      train_step: `(state, sharded batch) -> (state, metrics)`, which uses up the state.
      frozen_step: the same on a fixed support, after a search; None in a run without one.
      eval_step: `(state, sharded batch) -> sums`.
      statistics_step: the same, of the batch statistics of the state's weights.
      initial: what the run begins from; None: from weights that its seed gives.
    """

    config: TrainConfig
    parallel: DataParallel
    dataset: data.Dataset
    model: nn.Module
    optimizer: Optimizer
    steps_per_epoch: int
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    frozen_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]] | None
    eval_step: Callable[[TrainState, Batch], Metrics]
    statistics_step: Callable[[TrainState, Batch], Metrics]
    initial: SavedModel | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.total_epochs * self.steps_per_epoch

    @property
    def pruned(self) -> Callable[[Any], Any] | None:
        """The mask of what is pruned; None in a dense run."""
        return self.optimizer.mask if self.config.prune.enabled else None

    def train_batches(self) -> data.Batches:
        """The training images of this process, from the first epoch on."""
        return self.dataset.train_batches(
            self.parallel.host_batch_size(self.config.data.batch_size),
            seed=self.config.seed,
            shard_index=self.parallel.process_index,
            shard_count=self.parallel.process_count,
        )

    def step_after(self, step: int) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        """What takes the next step when `step` of them are done."""
        search_steps = self.optimizer.search_steps
        if search_steps is None or step < search_steps:
            return self.train_step
        assert self.frozen_step is not None
        return self.frozen_step


def build(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """Finds and checks everything that a config names; writes nothing in the work directory.

    Raises:
      ValueError, OSError: what is wrong with the config, or not there.
      CheckpointError: the run resumes, and no checkpoint has a whole manifest.
    """
    workdir.check(config)
    if config.distributed:
        join_processes(config.coordinator, config.process_count, config.process_index)
    parallel = DataParallel(devices)
    parallel.host_batch_size(config.data.batch_size, config.optimizer.accumulate)
    dataset = load_data(config)
    steps_per_epoch = dataset.num_train // config.data.batch_size
    if steps_per_epoch < 1:
        raise ValueError(
            f"data.batch_size is {config.data.batch_size}; allowed: at most {dataset.num_train}, "
            f"the training images of {dataset.name}."
        )
    model = make_model(config, dataset.num_classes)
    optimizer = make_optimizer(config, steps_per_epoch)
    _check_effects(config, optimizer, variables_of(model, dataset.image_shape))
    resumes = _check_resumable(config, parallel)
    initial = None
    if config.initial is not None:
        # A run that goes on needs nothing but its work directory.
        path = config.workdir / workdir.INITIAL if resumes else config.initial
        initial = load_initial(path, config, model, dataset.image_shape, optimizer.mask)
        model = initial.model
    frozen_step = None
    if optimizer.frozen is not None:
        frozen_step = parallel.train_step(make_train_step(config, model, optimizer, frozen=True))
    experiment = Experiment(
        config=config,
        parallel=parallel,
        dataset=dataset,
        model=model,
        optimizer=optimizer,
        steps_per_epoch=steps_per_epoch,
        train_step=parallel.train_step(make_train_step(config, model, optimizer)),
        frozen_step=frozen_step,
        eval_step=parallel.eval_step(make_eval_step(model)),
        statistics_step=parallel.eval_step(partial(statistics_step, apply=model.apply)),
        initial=initial,
    )
    # Expressions that match no parameter are found when the mask meets the parameters.
    jax.eval_shape(partial(make_state, config, model, optimizer, dataset.image_shape))
    return experiment


def _check_effects(config: TrainConfig, optimizer: Optimizer, variables: Mapping[str, Any]) -> None:
    """Refuses a mask that leaves nothing to prune, and statistics of a model that has none.

    Args:
      config: the run.
      optimizer: its own.
      variables: the shapes of the model's.
    """
    params = variables["params"]
    if config.prune.enabled and not any(jax.tree.leaves(optimizer.mask(params))):
        prune, names = config.prune, jax.tree.leaves(masks.paths(params))
        raise ValueError(
            f"prune.include is {prune.include!r}, prune.exclude {prune.exclude!r} and "
            f"prune.structure {prune.structure!r}, which leaves nothing to prune; allowed: a "
            f"choice with at least one of the parameters {', '.join(names)}."
        )
    if config.recalibrate and not variables.get("batch_stats"):
        raise ValueError(
            f"recalibrate is {config.recalibrate}; allowed: None or 0, as the model "
            f"{config.model.name!r} has no batch statistics."
        )


def _check_resumable(config: TrainConfig, parallel: DataParallel) -> bool:
    """Whether there is a checkpoint to go on from, after a look at whether it is of this run."""
    if not config.resume:
        return False
    saved = Checkpoints(config.workdir, parallel).config()
    if saved is not None:
        configs.check_resumable(saved, config)
    return saved is not None


def make_model(config: TrainConfig, num_classes: int) -> nn.Module:
    """The model that a config names; its batch statistics are averaged over the replicas.

    Raises:
      ValueError: there is no such model, it has no such option, or a value is not allowed.
    """
    options = config.model.options
    if "neuron" in options:
        options["neuron"] = models.Neuron(options["neuron"])
    return models.create(
        config.model.name,
        num_classes=num_classes,
        dtype=jnp.dtype(config.model.dtype),
        axis_name=AXIS,
        **options,
    )


def make_train_step(
    config: TrainConfig, model: nn.Module, optimizer: Optimizer, *, frozen: bool = False
) -> TrainStep:
    """The training step of a config, a pure function that no data set or device is needed for.

    Args:
      config: the run.
      model: of `make_model`.
      optimizer: of `make_optimizer`.
      frozen: whether it is the one on a fixed support, after a search.

    Returns:
      `(state, batch of a replica, mean over replicas) -> (state, metrics)`, for
      `DataParallel.train_step`: see `step.train_step`.
    """
    begins_anew = frozen and config.prune.mode == "at-initialization"
    return partial(
        train_step,
        apply=model.apply,
        transform=optimizer.frozen if frozen else optimizer.transform,
        label_smoothing=config.label_smoothing,
        accumulate=config.optimizer.accumulate,
        average_decay=config.average_decay,
        average_since=(optimizer.search_steps or 0) if begins_anew else 0,
    )


def make_eval_step(model: nn.Module) -> EvalStep:
    """The evaluation step of a model: `(state, batch of a replica, sum over replicas) -> sums`."""
    return partial(eval_step, apply=model.apply)


def make_state(
    config: TrainConfig,
    model: nn.Module,
    optimizer: Optimizer,
    image_shape: tuple[int, ...],
    variables: Mapping[str, Any] | None = None,
) -> TrainState:
    """The state before the first step, a pure function: see `step.create_state`.

    Args:
      config: the run.
      model: of `make_model`.
      optimizer: of `make_optimizer`.
      image_shape: (height, width, channels).
      variables: to begin with; None: those that the config's seed gives.
    """
    average = config.average_decay is not None
    return create_state(model, optimizer.transform, image_shape, config.seed, average, variables)


def load_data(config: TrainConfig) -> data.Dataset:
    """The data set that a config names, its images of the type that the model computes in."""
    settings = dataclasses.asdict(config.data)
    del settings["batch_size"]
    return data.load(**settings, dtype=config.model.dtype)


def new_state(
    config: TrainConfig,
    model: nn.Module,
    optimizer: Optimizer,
    image_shape: tuple[int, ...],
    variables: Mapping[str, Any] | None = None,
) -> TrainState:
    """`make_state`, compiled and computed on the default device."""
    # It runs once: XLA's optimizations of so many random draws take longer than they save.
    options = {"xla_backend_optimization_level": 0}
    make = partial(make_state, config, model, optimizer, image_shape)
    return jax.jit(make, compiler_options=options)(variables)


def initial_state(experiment: Experiment) -> TrainState:
    """The state before the first step, not yet on the run's devices."""
    return new_state(
        experiment.config,
        experiment.model,
        experiment.optimizer,
        experiment.dataset.image_shape,
        None if experiment.initial is None else experiment.initial.variables,
    )


def fix_support(experiment: Experiment, state: TrainState) -> TrainState:
    """The state with which training goes on when the search is over.

    Early pruning goes on from where the search is. Pruning at initialization goes back to the
    initial state, of whose weights those remain that the search has left alive.

    Args:
      experiment: a run with a search.
      state: after the last step of the search.

    Returns:
      The state for `experiment.frozen_step`, not yet on the run's devices.
    """
    config, optimizer = experiment.config, experiment.optimizer
    assert optimizer.frozen is not None
    if config.prune.mode == "early":
        opt_state = lats_optax.freeze(state.opt_state, optimizer.frozen, state.params)
        return state._replace(opt_state=opt_state)
    first = initial_state(experiment)
    # From the found weights, not from the restricted ones: initial weights may be zero.
    opt_state = optimizer.frozen.init(state.params)
    params = lats_optax.restrict(first.params, lats_optax.support(state.params, optimizer.mask))
    average = first.average._replace(params=jax.tree.map(jnp.copy, params)) if first.average else ()
    return first._replace(step=state.step, params=params, opt_state=opt_state, average=average)


def state_like(experiment: Experiment, initial: TrainState, step: int) -> TrainState:
    """A state of the tree, shapes and dtypes that a run has when `step` steps are done.

    Args:
      experiment: the run.
      initial: of `initial_state`.
      step: 0 or more; at the last of a search, the support is not yet fixed.
    """
    search_steps = experiment.optimizer.search_steps
    searched = search_steps is not None and step > search_steps
    return fix_support(experiment, initial) if searched else initial


def check_state(experiment: Experiment, state: TrainState) -> None:
    """Checks that sparse weights are those of the state: ``w = P_d(theta)``.

    After a search and in fine-tuning, where no latent weights are left: that what the support
    leaves out is zero. A dense run has nothing to check.

    Raises:
      ValueError: they are not; the message names the layers.
    """
    config, optimizer = experiment.config, experiment.optimizer
    search_steps = optimizer.search_steps
    if config.prune.has_threshold and (search_steps is None or int(state.step) <= search_steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the run is not over yet
            lats_optax.finalize(state.params, state.opt_state, operator=optimizer.operator)
    elif config.prune.enabled:
        kept = optax.tree.get(state.opt_state, "support")
        names = masks.paths(state.params)
        restricted = lats_optax.restrict(state.params, kept)
        same = jax.tree.map(jnp.array_equal, state.params, restricted)
        if wrong := [n for n, ok in zip(jax.tree.leaves(names), jax.tree.leaves(same)) if not ok]:
            raise ValueError(f"params: {', '.join(wrong)} are not zero where the support is")
