"""A run that is ready to begin: everything that a config names, found, checked and put together.

Nothing is trained or written here. What needs neither a data set nor a file is in `parts`.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import lats_optax
from lats_optax import data, masks
from lats_optax.training import config_json, limits, workdir
from lats_optax.training.assembly import bind_state, bind_step, make_model
from lats_optax.training.checkpoint import Checkpoints
from lats_optax.training.config import TrainConfig
from lats_optax.training.export import SavedModel, variables_of
from lats_optax.training.initial import load_initial
from lats_optax.training.optimizer import Optimizer, Phase, make_optimizer
from lats_optax.training.parallel import Engine, join_processes, make_engine
from lats_optax.training.step import Batch, Metrics, TrainState, eval_step, statistics_step

Update = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Sums = Callable[[TrainState, Batch], Any]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that is ready to begin: everything that a config names, found and checked.

    Attributes:
      config: what is run.
      parallel: the devices.
      dataset: what is trained on.
      model: what is trained.
      optimizer: what trains it, in one or two phases.
      steps_per_epoch: whole batches in the training images.
      initial: what the run begins from; None: from weights that its seed gives.
    """

    config: TrainConfig
    parallel: Engine
    dataset: data.Dataset
    model: nn.Module
    optimizer: Optimizer
    steps_per_epoch: int
    initial: SavedModel | None = None

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.optimizer.phases[-1].end

    @property
    def pruned(self) -> Callable[[Any], Any] | None:
        """The mask of what is pruned; None in a dense run."""
        return self.optimizer.mask if self.config.prune.enabled else None

    @functools.cached_property
    def updates(self) -> tuple[Update, ...]:
        """Of each phase `(state, sharded batch) -> (state, metrics)`, which uses up the state."""
        parallel = self.parallel
        bind = partial(
            bind_step, self.config, self.model, split=parallel.split, whole=parallel.whole
        )
        return tuple(parallel.compile_update(bind(phase)) for phase in self.optimizer.phases)

    @functools.cached_property
    def eval_sums(self) -> Sums:
        """`(state, sharded batch) -> sums` of `step.eval_step`."""
        return self.parallel.compile_sums(partial(eval_step, apply=self.model.apply))

    @functools.cached_property
    def statistics_sums(self) -> Sums:
        """`(state, sharded batch) -> sums` of `step.statistics_step`."""
        return self.parallel.compile_sums(partial(statistics_step, apply=self.model.apply))

    def train_batches(self) -> data.Batches:
        """The training images of this process, from the first epoch on."""
        return self.dataset.train_batches(
            self.parallel.host_batch_size(self.config.data.batch_size),
            seed=self.config.seed,
            shard_index=self.parallel.process_index,
            shard_count=self.parallel.process_count,
        )

    def initial_state(self) -> TrainState:
        """The state before the first step, on the run's devices."""
        phase, image_shape = self.optimizer.phases[0], self.dataset.image_shape
        make = bind_state(self.config, self.model, phase, image_shape)
        variables = None if self.initial is None else self.initial.variables
        state: TrainState = self.parallel.create(make, variables)
        return state

    def begin(self, phase: Phase, state: TrainState) -> TrainState:
        """The state that a second phase begins with, not yet on the run's devices.

        Early pruning goes on from where the search is. Pruning at initialization goes back to the
        initial state, of whose weights those remain that the search has left alive.

        Args:
          phase: the second one.
          state: after the last step of the first.
        """
        if not phase.from_scratch:
            opt_state = lats_optax.freeze(state.opt_state, phase.transform, state.params)
            return state._replace(opt_state=opt_state)
        first = self.initial_state()
        support = lats_optax.support(state.params, self.optimizer.mask)
        params = lats_optax.apply_support(first.params, support)
        average = first.average
        if average:
            average = average._replace(params=jax.tree.map(jnp.copy, params))
        return TrainState(
            step=state.step,
            params=params,
            batch_stats=first.batch_stats,
            # From the found weights, not from the masked ones: initial weights may be zero.
            opt_state=phase.transform.init(state.params),
            average=average,
        )

    def state_like(self, initial: TrainState, step: int) -> TrainState:
        """A state of the tree, shapes and dtypes that the run has when some steps are done.

        Args:
          initial: of `initial_state`.
          step: 0 or more; at the last of a search, the support is not yet fixed.
        """
        for phase in self.optimizer.phases[1:]:
            if step > phase.start:
                initial = self.begin(phase, initial)
        return initial

    def check_state(self, state: TrainState) -> None:
        """Checks that sparse weights are those of the state: ``w = P_d(theta)``.

        After a search and in fine-tuning, where no latent weights are left: that what the support
        leaves out is zero. A dense run has nothing to check.

        Raises:
          ValueError: they are not; the message names the layers.
        """
        if optax.tree.get(state.opt_state, "latent") is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the run is not over yet
                operator = self.optimizer.operator
                lats_optax.finalize(state.params, state.opt_state, operator=operator)
        elif self.config.prune.enabled:
            kept = optax.tree.get(state.opt_state, "support")
            names = masks.paths(state.params)
            masked = lats_optax.apply_support(state.params, kept)
            same = jax.tree.leaves(jax.tree.map(jnp.array_equal, state.params, masked))
            if wrong := [name for name, ok in zip(jax.tree.leaves(names), same) if not ok]:
                raise ValueError(f"params: {', '.join(wrong)} are not zero where the support is")


def build_experiment(
    config: TrainConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    dataset: data.Dataset | None = None,
    model: nn.Module | None = None,
) -> Experiment:
    """Finds and checks everything that a config names; writes nothing in the work directory.

    Args:
      config: the run.
      devices: what to run on; None: all there are.
      dataset: what to train on, in the place of the one that the config names.
      model: what to train, in the place of the one that the config names: called as those of
        `models.create`. Its batch statistics are averaged over the engine's `axis_name`.

    Raises:
      ValueError, OSError: what is wrong with the config, or not there.
      CheckpointError: the run resumes, and no checkpoint has a whole manifest.
    """
    workdir.check(config)
    lifeline = None
    if config.distributed:
        lifeline = join_processes(
            config.coordinator,
            config.num_processes,
            config.process_id,
            config.process_timeout,
        )
    parallel = make_engine(config.parallel, devices, lifeline)
    parallel.host_batch_size(config.data.batch_size, config.grad_accum_steps)
    dataset = load_data(config) if dataset is None else dataset
    steps_per_epoch = dataset.num_train // config.data.batch_size
    if steps_per_epoch < 1:
        raise ValueError(
            f"data.batch_size is {config.data.batch_size}; allowed: at most {dataset.num_train}, "
            f"the training images of {dataset.name}."
        )
    limits.check_steps(config, steps_per_epoch)
    limits.check_recalibration(config, steps_per_epoch)
    model = make_model(config, dataset.num_classes, parallel.axis_name) if model is None else model
    shapes = variables_of(model, dataset.image_shape)
    limits.check_memory(shapes, parallel.local_devices[0], config.parallel.fsdp)
    optimizer = make_optimizer(config, steps_per_epoch)
    _check_effects(config, optimizer, shapes)
    resumes = _check_resumable(config, parallel)
    initial = None
    if config.init_from is not None:
        # A run that goes on needs nothing but its work directory.
        path = config.workdir / workdir.INITIAL if resumes else config.init_from
        initial = load_initial(path, config, model, dataset.image_shape, optimizer.mask)
        model, shapes = initial.model, initial.variables
    # Expressions that match no parameter are found when the mask meets the parameters.
    jax.eval_shape(optimizer.phases[0].transform.init, shapes["params"])
    return Experiment(config, parallel, dataset, model, optimizer, steps_per_epoch, initial)


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
            f"prune.granularity {prune.granularity!r}, which leaves nothing to prune; allowed: a "
            f"choice with at least one of the parameters {', '.join(names)}."
        )
    if config.bn_recalibration_batches and not variables.get("batch_stats"):
        raise ValueError(
            f"bn_recalibration_batches is {config.bn_recalibration_batches}; allowed: None or 0, "
            f"as the model {config.model.name!r} has no batch statistics."
        )


def _check_resumable(config: TrainConfig, parallel: Engine) -> bool:
    """Whether there is a checkpoint to go on from, after a look at whether it is of this run."""
    if not config.resume:
        return False
    saved = Checkpoints(config.workdir, parallel).config()
    if saved is not None:
        config_json.check_resumable(saved, config)
    return saved is not None


def load_data(config: TrainConfig) -> data.Dataset:
    """The data set that a config names, its images of the type that the model computes in."""
    settings = dataclasses.asdict(config.data)
    del settings["batch_size"]
    return data.load(**settings, dtype=config.model.dtype)
