"""Data parallelism with `jax.pmap`: the one file that names devices, a pmap or a collective.

Training state is the same on every device and has no device axis: `in_axes=None`, `out_axes=None`.
A batch has one: (local devices, examples a device, ...).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Item = TypeVar("Item")

AXIS = "replica"
"""Name of the axis that replicas are on; a model's batch normalization averages over it."""


def join_processes(
    coordinator: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
) -> None:
    """Joins the other processes of a TPU pod or a cluster.

    Args:
      coordinator: HOST:PORT of process 0; None: all three as the environment describes them.
      process_count: how many processes there are.
      process_index: which of them this is.

    Raises:
      ValueError: there is no coordinator, and the environment describes none.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize(coordinator, process_count, process_index)
    except (ValueError, RuntimeError) as error:
        if coordinator is not None:
            raise ValueError(f"coordinator is {coordinator!r}; JAX says: {error}") from error
        raise ValueError(
            "distributed is True; allowed without a coordinator: only where the environment "
            "describes a TPU pod or a cluster (SLURM, Open MPI, Kubernetes). "
            f"JAX says: {error}"
        ) from error


def ahead(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, of which up to `depth` have been asked for before they are needed.

    Over batches that `DataParallel.shard` sends off, these are on the devices when the step
    before them is over.

    >>> asked = []
    >>> items = ahead((asked.append(n) or n for n in range(5)), depth=2)
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


class DataParallel:
    """Runs step functions on all devices at once, each on its part of the batch.

    Args:
      devices: what to run on, the same in every process; None: all devices of all processes.

    >>> parallel = DataParallel(jax.devices()[:1])
    >>> parallel.host_batch_size(32)
    32
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None):
        self.devices = list(jax.devices() if devices is None else devices)
        self.process_index = jax.process_index()
        self.local_devices = [d for d in self.devices if d.process_index == self.process_index]
        self.process_count = jax.process_count()

    @property
    def is_primary(self) -> bool:
        """Whether this is the process that writes logs."""
        return self.process_index == 0

    def host_batch_size(self, batch_size: int, accumulate: int = 1) -> int:
        """The part that this process has of a batch of `batch_size` examples.

        Args:
          batch_size: examples over all devices of all processes.
          accumulate: equal parts that each device divides its own into.

        Raises:
          ValueError: the batch does not divide over the devices and the parts.
        """
        count = len(self.devices)
        if batch_size % (count * accumulate):
            devices = "device" if count == 1 else "devices"
            parts = f" with optimizer.accumulate {accumulate}" if accumulate > 1 else ""
            raise ValueError(
                f"data.batch_size is {batch_size}; allowed on {count} {devices}{parts}: a multiple "
                f"of {count * accumulate}."
            )
        return batch_size // len(self.devices) * len(self.local_devices)

    def replicate(self, tree: Any) -> Any:
        """The tree on each of this process's devices, as the step functions give it back.

        A state that comes in as it goes out is what keeps the second step from compiling again.
        """
        return jax.device_put(tree, self._placed())

    def shard(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The batch of this process on its devices, with a leading axis of them.

        Returns at once: the arrays are on their way while the devices do other work.
        """
        rows = {
            name: array.reshape(len(self.local_devices), -1, *array.shape[1:])
            for name, array in batch.items()
        }
        return jax.device_put(rows, self._placed(AXIS))

    def train_step(self, step: Callable[..., tuple[Any, Any]]) -> Callable[[Any, Any], Any]:
        """`(state, sharded batch) -> (state, metrics)` from `step(state, batch, mean)`.

        The state that is passed in is donated: its memory is used for the one that comes out.
        """

        def replica(state: Any, batch: Any) -> Any:
            return step(state, batch, lambda tree: jax.lax.pmean(tree, AXIS))  # type: ignore[no-untyped-call]

        return self._pmap(replica, donate_argnums=(0,))

    def eval_step(self, step: Callable[..., Any]) -> Callable[[Any, Any], Any]:
        """`(state, sharded batch) -> sums` from `step(state, batch, total)`."""

        def replica(state: Any, batch: Any) -> Any:
            return step(state, batch, lambda tree: jax.lax.psum(tree, AXIS))  # type: ignore[no-untyped-call]

        return self._pmap(replica)

    def sums(
        self,
        step: Callable[[Any, Any], Any],
        state: Any,
        batches: Iterable[dict[str, np.ndarray]],
    ) -> list[Any]:
        """What a step of `eval_step` gives for each batch of this process, on the host.

        Fetched in turn, two behind: batches that all wait for the devices would fill their memory.
        """
        taken = (step(state, self.shard(batch)) for batch in batches)
        return [jax.device_get(found) for found in ahead(taken)]

    def total(self, count: int) -> int:
        """The sum of every process's count; all of them have to ask for it."""
        if self.process_count == 1:
            return count
        return int(np.sum(multihost_utils.process_allgather(np.asarray(count))))

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

    def preempted(self, step: int) -> bool:
        """Whether every process stops after this step, as one of them was sent SIGTERM.

        All of them have to ask, at every step. JAX agrees on a step that none of them has passed.
        """
        return self.process_count > 1 and multihost_utils.reached_preemption_sync_point(step)

    @cached_property
    def _mesh(self) -> jax.sharding.Mesh:
        return jax.sharding.Mesh(np.array(self.local_devices), (AXIS,))

    def _placed(self, *axes: str) -> jax.sharding.NamedSharding:
        """How an array lies on this process's devices whose first axis is spread over `axes`."""
        return jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec(*axes))  # type: ignore[no-untyped-call]

    def _pmap(self, function: Callable[..., Any], donate_argnums: tuple[int, ...] = ()) -> Any:
        return jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=self.devices,
            donate_argnums=donate_argnums,
        )
