"""The manifest of a checkpoint: its files by size and digest, its arrays by checksum.

Here belongs what is known of bytes alone: which of them there have to be, and what differs from
that. A manifest is two lines, the SHA-256 of the second and JSON.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lats_optax.files.atomic import sync_directory

MANIFEST = "MANIFEST"


class DamagedError(ValueError):
    """A checkpoint is not what was written; the message says which file or array is wrong."""


def write(directory: Path, content: Mapping[str, Any]) -> None:
    """Writes the manifest of a directory, after all else in it has been brought to the disk.

    Args:
      directory: of the checkpoint, with all of its other files.
      content: what the manifest holds beside `files`, of JSON types.
    """
    files = {}
    for path in _files(directory):
        with path.open("rb") as file:
            files[path.relative_to(directory).as_posix()] = [
                path.stat().st_size,
                hashlib.file_digest(file, "sha256").hexdigest(),
            ]
            os.fsync(file.fileno())
    with (directory / MANIFEST).open("xb") as file:
        file.write(_signed(json.dumps({**content, "files": files}).encode()))
        file.flush()
        os.fsync(file.fileno())
    for below, _, _ in os.walk(directory):
        sync_directory(Path(below))


def read(directory: Path) -> dict[str, Any]:
    """What the manifest of a directory holds.

    Raises:
      DamagedError: it is missing, or not what was written.
    """
    try:
        data = (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise _unreadable(MANIFEST, error) from error
    line = data.partition(b"\n")[2].removesuffix(b"\n")
    if data != _signed(line):
        raise DamagedError(f"{MANIFEST} is not what was written: its SHA-256 differs")
    content: dict[str, Any] = json.loads(line)
    return content


def check_files(directory: Path, files: Mapping[str, Any]) -> None:
    """Checks every file that a manifest lists, to the bit.

    Args:
      directory: of the checkpoint.
      files: those that `read` gives.

    Raises:
      DamagedError: one is missing, cannot be read, or is not what was written.
    """
    for name, (size, digest) in files.items():
        path = directory / name
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise DamagedError(f"{name} has {found:,} bytes and was written with {size:,}")
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise DamagedError(f"{name} is not what was written: its SHA-256 differs")
        except OSError as error:
            raise _unreadable(name, error) from error


def checksums(tree: Any) -> dict[str, str]:
    """Path of an array -> its dtype, shape and CRC-32.

    Args:
      tree: of NumPy arrays. Named tuples and dicts of one content have the same paths.

    >>> checksums({"a": [np.zeros(2, np.float32)]})
    {'a/0': 'float32[2] 6522df69'}
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _checksum(np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def check_arrays(written: Mapping[str, str], tree: Any) -> None:
    """Checks arrays against the checksums of those that were written.

    Raises:
      DamagedError: one is missing, is another, or has not been written.
    """
    found = checksums(tree)
    for name in sorted(written.keys() | found.keys()):
        was, has = written.get(name), found.get(name)
        if was != has:
            raise DamagedError(
                f"array {name} is {has or 'missing'} and was {was or 'not written'} (CRC-32)"
            )


def _files(directory: Path) -> Iterator[Path]:
    """All files below a directory."""
    return (path for path in sorted(directory.rglob("*")) if not path.is_dir())


def _unreadable(name: str, error: OSError) -> DamagedError:
    if isinstance(error, FileNotFoundError):
        return DamagedError(f"{name} is missing")
    return DamagedError(f"{name} cannot be read: {error.strerror}")


def _signed(line: bytes) -> bytes:
    """A line behind its digest: what a manifest is, to the bit."""
    return hashlib.sha256(line).hexdigest().encode() + b"\n" + line + b"\n"


def _checksum(array: np.ndarray) -> str:
    # As bytes: not every dtype of JAX has a buffer.
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    shape = ",".join(map(str, array.shape))
    return f"{array.dtype.name}[{shape}] {zlib.crc32(data.data):08x}"
