"""Data parallelism with `jax.pmap`: the one file that names devices, a pmap or a collective.

Training state is the same on every device and has no device axis: `in_axes=None`, `out_axes=None`.
A batch has one: (local devices, examples a device, ...).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

AXIS = "replica"
"""Name of the axis that replicas are on; a model's batch normalization averages over it."""


def join_processes() -> None:
    """Joins the other processes of a TPU pod or a cluster, as their environment describes it.

    Raises:
      ValueError: the environment describes none.
    """
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            "distributed is True; allowed: only where the environment describes a TPU pod or a "
            f"cluster (SLURM, Open MPI, Kubernetes). JAX says: {error}"
        ) from error


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
        mesh = jax.sharding.Mesh(np.array(self.local_devices), (AXIS,))
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())  # type: ignore[no-untyped-call]
        return jax.device_put(tree, replicated)

    def shard(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch of this process with a leading axis of local devices."""
        return {
            name: array.reshape(len(self.local_devices), -1, *array.shape[1:])
            for name, array in batch.items()
        }

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

    def barrier(self, name: str) -> None:
        """Waits until every process is here."""
        if self.process_count > 1:
            multihost_utils.sync_global_devices(name)

    def _pmap(self, function: Callable[..., Any], donate_argnums: tuple[int, ...] = ()) -> Any:
        return jax.pmap(
            function,
            axis_name=AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=self.devices,
            donate_argnums=donate_argnums,
        )
