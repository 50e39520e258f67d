"""Copies of one array on several devices: their checksums, and which of them differ.

Here belongs what is known of one process's devices, and of numbers that all processes have sent.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


class ReplicaError(RuntimeError):
    """Devices that should hold the same numbers do not: one of them, or its memory, is faulty."""


def fingerprints(leaves: Sequence[jax.Array], devices: Sequence[jax.Device]) -> np.ndarray:
    """What each device holds of each array.

    Args:
      leaves: on these devices, whole or in parts.
      devices: of this process.

    Returns:
      uint32 [devices, leaves, 2]: which part of the array it is, and the sum of its bits as words.
    """
    held = [{shard.device: shard for shard in leaf.addressable_shards} for leaf in leaves]
    sums = [_sums([shards[device].data for shards in held]) for device in devices]
    parts = [
        [zlib.crc32(str(shards[device].index).encode()) for shards in held] for device in devices
    ]
    return np.stack([np.array(parts, np.uint32), np.array(jax.device_get(sums))], axis=-1)


def differing(
    found: np.ndarray, names: Sequence[str], devices: Sequence[int] | np.ndarray
) -> dict[str, str]:
    """Name of an array -> the devices whose copy is not that of most.

    >>> found = np.array([[[7, 1]], [[7, 1]], [[7, 2]], [[8, 3]]], np.uint32)
    >>> differing(found, ["kernel"], [0, 1, 2, 3])
    {'kernel': '2'}
    """
    odd: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        parts, sums = found[:, index, 0], found[:, index, 1]
        for part in np.unique(parts):
            values, counts = np.unique(sums[parts == part], return_counts=True)
            usual = values[np.argmax(counts)]
            odd.setdefault(name, []).extend(
                int(device) for device in np.asarray(devices)[(parts == part) & (sums != usual)]
            )
    return {name: ", ".join(map(str, found)) for name, found in odd.items() if found}


@jax.jit
def _sums(leaves: list[jax.Array]) -> jax.Array:
    return jnp.stack([_sum(leaf) for leaf in leaves])


def _sum(leaf: jax.Array) -> jax.Array:
    """The sum of an array's bits as words, modulo 2³²: any flipped bit changes it."""
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    return jnp.sum(jax.lax.bitcast_convert_type(leaf, width).astype(jnp.uint32), dtype=jnp.uint32)
