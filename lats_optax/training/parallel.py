"""Training on many devices: the one file that names a pmap, a mesh or a collective.

Two engines with one interface, `Engine`:

- `PmapEngine`: `jax.pmap`. The state is the same on every device and has no device axis; a batch
  has one: (local devices, examples a device, ...). A step sees a device's own part of the batch.
- `JitEngine`: `jax.jit` over a mesh of two axes. Both divide the batch; the second divides every
  large array of the state too (FSDP); a step gathers only the weights. A step sees the
  whole batch, and the compiler finds out who has what.
"""

import abc
import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lats_optax import masks
from lats_optax.training.config import ParallelConfig
from lats_optax.training.lifeline import Lifeline, meet
from lats_optax.training.replicas import ReplicaError, differing, fingerprints
from lats_optax.training.step import Batch, split_in_order

Item = TypeVar("Item")

_REPLICA = "replica"
"""Name of the axis that the replicas of `jax.pmap` are on."""

_BATCH, _FSDP = "batch", "fsdp"
"""Names of the mesh's axes."""

# Smaller arrays are on every device: to divide them saves nothing.
_DIVIDED_FROM = 1024

# An initial state is computed once: XLA's optimizations of so many random draws take longer than
# they save.
_QUICK = {"xla_backend_optimization_level": 0}


def join_processes(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = 300,
) -> Lifeline | None:
    """Joins the other processes of a TPU pod or a cluster.

    Args:
      coordinator: HOST:PORT of process 0; None: all three as the environment describes them.
      num_processes: how many processes there are.
      process_id: which of them this is.
      timeout: seconds to wait for the others, and for one that no longer answers.

    Returns:
      With a coordinator, connections by which a lost process is noticed at once; None: JAX alone
      waits for processes, and aborts after the timeout.

    Raises:
      ValueError: there is no coordinator, and the environment describes none.
      TimeoutError: with a coordinator, not all processes came.
    """
    if jax.distributed.is_initialized():
        return None
    lifeline = None
    if coordinator is not None:
        assert num_processes is not None
        assert process_id is not None
        lifeline = meet(coordinator, num_processes, process_id, timeout)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (ValueError, RuntimeError) as error:
        if coordinator is not None:
            raise ValueError(f"coordinator is {coordinator!r}; JAX says: {error}") from error
        raise ValueError(
            "distributed is True; allowed without a coordinator: only where the environment "
            "describes a TPU pod or a cluster (SLURM, Open MPI, Kubernetes). "
            f"JAX says: {error}"
        ) from error
    return lifeline


def prefetch(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items; up to `depth` of them are requested before they are needed.

    Over batches that `Engine.shard` sends off, these are on the devices when the step
    before them is over.

    >>> asked = []
    >>> items = prefetch((asked.append(n) or n for n in range(5)), depth=2)
    >>> next(items), asked
    (0, [0, 1, 2])
    >>> list(items)
    [1, 2, 3, 4]
    """
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


class PrimaryError(RuntimeError):
    """What every process waited for has failed in process 0."""


class Engine(abc.ABC):
    """Runs step functions on all devices at once.

    Args:
      devices: what to run on, the same in every process; None: all devices of all processes.
      lifeline: the connections between the processes, of `join_processes`.

    >>> engine = PmapEngine(jax.devices()[:1])
    >>> engine.host_batch_size(32)
    32
    """

    axis_name: str | None
    """The axis that a model's batch normalization averages over; None: it sees the whole batch."""

    def __init__(
        self, devices: Sequence[jax.Device] | None = None, lifeline: Lifeline | None = None
    ):
        self._lifeline = lifeline
        self.devices = list(jax.devices() if devices is None else devices)
        self.process_index = jax.process_index()
        self.local_devices = [d for d in self.devices if d.process_index == self.process_index]
        self.process_count = jax.process_count()

    @abc.abstractmethod
    def place(self, tree: Any) -> Any:
        """A state on the devices, as the step functions give it back.

        A state that comes in as it goes out is what keeps the second step from compiling again.

        Args:
          tree: arrays, equal in every process.
        """

    @abc.abstractmethod
    def create(self, make: Callable[..., Any], *args: Any) -> Any:
        """What a pure function gives, compiled, on the devices as `place` has it."""

    @abc.abstractmethod
    def shard(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch of this process on its devices, as the step functions take it.

        Returns at once: the arrays are on their way while the devices do other work.
        """

    @abc.abstractmethod
    def abstract(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """What a step is lowered with where there are no arrays, nor the devices themselves.

        Args:
          state: shapes.
          batch: shapes of the whole batch, over all processes.

        Returns:
          Shapes as `place` and `shard` would have arrays of them.
        """

    def split(self, batch: Batch, count: int) -> Batch:
        """What a step sees of a batch, in parts in which every device has a share: see `step`."""
        return split_in_order(batch, count)

    def whole(self, params: Any) -> Any:
        """Within a step, the parameters as a forward pass takes them: see `step`."""
        return params

    @abc.abstractmethod
    def compile_update(self, step: Callable[..., tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
        """`(state, sharded batch) -> (state, metrics)` from `step(state, batch, mean)`.

        The state that is passed in is donated: its memory is used for the one that comes out.
        """

    @abc.abstractmethod
    def compile_sums(self, step: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        """`(state, sharded batch) -> sums` from `step(state, batch, total)`."""

    @abc.abstractmethod
    def to_host(self, tree: Any) -> Any:
        """The whole arrays in the memory of this process; all processes have to ask for them."""

    @property
    def is_primary(self) -> bool:
        """Whether this is the process that writes logs."""
        return self.process_index == 0

    def host_batch_size(self, batch_size: int, grad_accum_steps: int = 1) -> int:
        """The part that this process has of a batch of `batch_size` examples.

        Args:
          batch_size: examples over all devices of all processes.
          grad_accum_steps: equal parts that each device divides its own into.

        Raises:
          ValueError: the batch does not divide over the devices and the parts.
        """
        count = len(self.devices)
        if batch_size % (count * grad_accum_steps):
            devices = "device" if count == 1 else "devices"
            parts = f" with grad_accum_steps {grad_accum_steps}" if grad_accum_steps > 1 else ""
            raise ValueError(
                f"data.batch_size is {batch_size}; allowed on {count} {devices}{parts}: a multiple "
                f"of {count * grad_accum_steps}."
            )
        return batch_size // len(self.devices) * len(self.local_devices)

    def sums(
        self,
        step: Callable[[Any, Any], Any],
        state: Any,
        batches: Iterable[dict[str, np.ndarray]],
    ) -> list[Any]:
        """What a step of `compile_sums` gives for each batch of this process, on the host.

        Fetched in turn, two behind: batches that all wait for the devices would fill their memory.
        """
        taken = (step(state, self.shard(batch)) for batch in batches)
        return [jax.device_get(found) for found in prefetch(taken)]

    def total(self, count: int) -> int:
        """The sum of every process's count; all of them have to ask for it."""
        if self.process_count == 1:
            return count
        return int(np.sum(multihost_utils.process_allgather(np.asarray(count))))

    def watching(self, resume: str) -> contextlib.AbstractContextManager[Any]:
        """While it is entered, a process that is lost ends this one, with a line.

        Args:
          resume: what the line says of going on, behind which process it was.
        """
        return contextlib.nullcontext() if self._lifeline is None else self._lifeline.watch(resume)

    def barrier(self, name: str) -> None:
        """Waits until every process is here."""
        if self.process_count > 1:
            multihost_utils.sync_global_devices(name)

    def from_primary(self, value: int) -> int:
        """The value that the primary process has; all of them have to ask for it."""
        if self.process_count == 1:
            return value
        return int(multihost_utils.broadcast_one_to_all(np.asarray(value)))

    def on_primary(self, act: Callable[[], None]) -> None:
        """Does something in the primary process, for which the others wait.

        Raises:
          PrimaryError: it failed there; in the primary process, what it failed with.
        """
        failure: Exception | None = None
        if self.is_primary:
            try:
                act()
            except Exception as error:
                failure = error
        # Without this, the others would wait for a process that has ended.
        if self.total(int(failure is not None)):
            raise failure or PrimaryError("process 0 has failed; its last line says why")

    def check_replicas(self, tree: Any, step: int) -> None:
        """Compares the copies of every array on all devices; all processes have to.

        Args:
          tree: on the devices.
          step: named in the error.

        Raises:
          ReplicaError: copies differ; names the arrays and the devices.
        """
        found = fingerprints(jax.tree.leaves(tree), self.local_devices)
        devices = np.array([device.id for device in self.local_devices])
        if self.process_count > 1:
            found, devices = multihost_utils.process_allgather((found, devices), tiled=True)
        odd = differing(found, jax.tree.leaves(masks.paths(tree)), devices)
        if odd:
            named = [f"{name} on device {which}" for name, which in odd.items()]
            raise ReplicaError(
                f"after step {step} copies of one array differ between devices: "
                f"{masks.some(named)}. --resume goes on from the last checkpoint; leave "
                "the faulty device out"
            )

    def preempted(self, step: int) -> bool:
        """Whether every process stops after this step, as one of them was sent SIGTERM.

        All of them have to ask, at every step. JAX agrees on a step that none of them has passed.
        """
        return self.process_count > 1 and multihost_utils.reached_preemption_sync_point(step)


class PmapEngine(Engine):
    """`jax.pmap`: every device has the whole state, and a part of the batch."""

    axis_name = _REPLICA

    def place(self, tree: Any) -> Any:
        """The tree on each of this process's devices."""
        return jax.device_put(tree, self._placed())

    def create(self, make: Callable[..., Any], *args: Any) -> Any:
        """Computed on the default device, then placed."""
        return self.place(jax.jit(make, compiler_options=_QUICK)(*args))

    def shard(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """With a leading axis of devices."""
        rows = {
            name: array.reshape(len(self.local_devices), -1, *array.shape[1:])
            for name, array in batch.items()
        }
        return jax.device_put(rows, self._placed(_REPLICA))

    def abstract(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """The batch with an axis of all devices."""
        count = len(self.devices)

        def divided(leaf: Any) -> jax.ShapeDtypeStruct:
            rows, *rest = leaf.shape
            shape = (count, rows // count, *rest)
            return jax.ShapeDtypeStruct(shape, leaf.dtype)  # type: ignore[no-untyped-call]

        return state, jax.tree.map(divided, batch)

    def compile_update(self, step: Callable[..., tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
        """The mean is over the replicas."""

        def replica(state: Any, batch: Any) -> Any:
            return step(state, batch, lambda tree: jax.lax.pmean(tree, _REPLICA))  # type: ignore[no-untyped-call]

        return self._pmap(replica, donate_argnums=(0,))

    def compile_sums(self, step: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        """The sum is over the replicas."""

        def replica(state: Any, batch: Any) -> Any:
            return step(state, batch, lambda tree: jax.lax.psum(tree, _REPLICA))  # type: ignore[no-untyped-call]

        return self._pmap(replica)

    def to_host(self, tree: Any) -> Any:
        """From any one device."""
        return jax.device_get(tree)

    @functools.cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return jax.sharding.Mesh(np.array(self.local_devices), (_REPLICA,))

    def _placed(self, *axes: str) -> jax.sharding.NamedSharding:
        """How an array lies on this process's devices whose first axis is spread over `axes`."""
        return _named(self._mesh, *axes)

    def _pmap(self, function: Callable[..., Any], donate_argnums: tuple[int, ...] = ()) -> Any:
        return jax.pmap(
            function,
            axis_name=_REPLICA,
            in_axes=(None, 0),
            out_axes=None,
            devices=self.devices,
            donate_argnums=donate_argnums,
        )


class JitEngine(Engine):
    """`jax.jit` over a mesh: the batch is divided over all devices, the state over some.

    Args:
      devices: as for `Engine`.
      lifeline: as for `Engine`.
      fsdp: over how many devices each large array of the state is divided, along the longest axis
        that is a multiple of it; 1: every device has all of it.

    Raises:
      ValueError: ``fsdp`` does not divide the number of devices.
    """

    axis_name = None

    def __init__(
        self,
        devices: Sequence[jax.Device] | None = None,
        lifeline: Lifeline | None = None,
        fsdp: int = 1,
    ):
        super().__init__(devices, lifeline)
        count = len(self.devices)
        if count % fsdp:
            raise ValueError(
                f"parallel.fsdp is {fsdp}; allowed on {count} devices: what divides {count}."
            )
        grid = np.array(self.devices).reshape(-1, fsdp)
        self._mesh, self._fsdp = jax.sharding.Mesh(grid, (_BATCH, _FSDP)), fsdp

    def place(self, tree: Any) -> Any:
        """Each array divided as `JitEngine` says."""
        return jax.tree.map(self._put, tree)

    def create(self, make: Callable[..., Any], *args: Any) -> Any:
        """Each device computes its own part: nowhere is there a whole state."""
        layout = jax.tree.map(self._layout, jax.eval_shape(make, *args))
        return jax.jit(make, compiler_options=_QUICK, out_shardings=layout)(*args)

    def shard(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The arrays of all processes as one, divided over all devices."""
        return {
            name: jax.make_array_from_process_local_data(self._rows, array)  # type: ignore[no-untyped-call]
            for name, array in batch.items()
        }

    def abstract(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """With where the parts of each array are."""

        def laid(leaf: Any, layout: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)  # type: ignore[no-untyped-call]

        divided = jax.tree.map(lambda leaf: laid(leaf, self._layout(leaf)), state)
        return divided, jax.tree.map(lambda leaf: laid(leaf, self._rows), batch)

    def split(self, batch: Batch, count: int) -> Batch:
        """Parts of every device's own examples, so that no example moves."""
        rows = _named(self._mesh, None, (_BATCH, _FSDP))

        def cut(x: jax.Array) -> jax.Array:
            by_device = x.reshape(len(self.devices), count, -1, *x.shape[1:])
            parts = jnp.swapaxes(by_device, 0, 1).reshape(count, -1, *x.shape[1:])
            return jax.lax.with_sharding_constraint(parts, rows)  # type: ignore[no-untyped-call]

        return {name: cut(x) for name, x in batch.items()}

    def whole(self, params: Any) -> Any:
        """Every parameter on every device.

        Left alone, the compiler divides activations as it finds the kernels divided: it then moves
        these, which are far larger, and keeps whole ones.
        """
        return jax.lax.with_sharding_constraint(params, _named(self._mesh))  # type: ignore[no-untyped-call]

    def compile_update(self, step: Callable[..., tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
        """The step sees the whole batch: its mean is that over all devices."""

        def update(state: Any, batch: Any) -> Any:
            state, metrics = step(state, batch, lambda tree: tree)
            layout = jax.tree.map(self._layout, state)
            state = jax.lax.with_sharding_constraint(state, layout)  # type: ignore[no-untyped-call]
            return state, metrics

        return jax.jit(update, donate_argnums=(0,))

    def compile_sums(self, step: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        """The step sees the whole batch: its sum is that over all devices."""
        everywhere = _named(self._mesh)
        return jax.jit(
            lambda state, batch: step(self.whole(state), batch, lambda tree: tree),
            out_shardings=everywhere,
        )

    def to_host(self, tree: Any) -> Any:
        """Array by array, so that no device has more than one of them whole."""
        if self.process_count == 1:
            return jax.device_get(tree)
        return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)

    @property
    def _rows(self) -> jax.sharding.NamedSharding:
        """Where the examples of a batch are."""
        return _named(self._mesh, (_BATCH, _FSDP))

    def _layout(self, leaf: Any) -> jax.sharding.NamedSharding:
        """Where the parts of an array are."""
        fitting = [axis for axis, size in enumerate(leaf.shape) if size % self._fsdp == 0]
        if self._fsdp == 1 or leaf.size < _DIVIDED_FROM or not fitting:
            return _named(self._mesh)
        longest = max(fitting, key=lambda axis: leaf.shape[axis])
        return _named(self._mesh, *(None,) * longest, _FSDP)

    def _put(self, leaf: Any) -> jax.Array:
        layout = self._layout(leaf)
        if self.process_count == 1:
            return jax.device_put(leaf, layout)
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=layout)(leaf)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, layout, host.__getitem__)


def _named(mesh: jax.sharding.Mesh, *axes: Any) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # type: ignore[no-untyped-call]


def make_engine(
    config: ParallelConfig,
    devices: Sequence[jax.Device] | None = None,
    lifeline: Lifeline | None = None,
) -> Engine:
    """The engine that a config names; its arguments are those of `Engine`."""
    if config.engine == "jit":
        return JitEngine(devices, lifeline, config.fsdp)
    return PmapEngine(devices, lifeline)
