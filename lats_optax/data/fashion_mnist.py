"""The four files of Fashion-MNIST: what they are called, how they are read, what is checked.

`lats-prepare fashion_mnist` checks them here before TFDS makes its data set from them. A program
that needs the plain arrays calls `read_idx`.

The files are in the idx format of MNIST, compressed by gzip: a magic number, the lengths of the
axes as big-endian 32-bit integers, then one byte for each value.
"""

import gzip
import io
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
"""Array → name of the file that holds it."""

NUM_EXAMPLES = {"train": 60_000, "test": 10_000}
"""Examples of each split."""

DEBIAN = "Debian's package dataset-fashion-mnist has the files in /usr/share/datasets/fashion-mnist"

_IMAGE_SHAPE = (28, 28)
_NUM_CLASSES = 10
# A magic number is two zero bytes, the type of the values (8: uint8) and the number of axes.
_UINT8 = 0x0800
# No file of the data set declares more, so none can make a reader allocate more.
_MOST_EXAMPLES = 60_000
_CHUNK = 1 << 20


def read_idx(directory: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads Fashion-MNIST from its four idx files.

    What a file declares is checked before memory is allocated for it. A smaller set in the same
    format is read as well.

    Args:
      directory: holds the files of ``FILES``.

    Returns:
      ``"train_images"`` and ``"test_images"``, uint8 (n, 28, 28); ``"train_labels"`` and
      ``"test_labels"``, int32 (n,), from 0 to 9.

    Raises:
      FileNotFoundError: a file is missing; the message names it.
      OSError: a file cannot be read.
      ValueError: a file is damaged or is another one; the message names it.

    Example:
      >>> import tempfile
      >>> images = struct.pack(">4i", 2051, 2, 28, 28) + bytes(2 * 28 * 28)
      >>> labels = struct.pack(">2i", 2049, 2) + bytes([9, 0])
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     for name, file in FILES.items():
      ...         content = gzip.compress(images if name.endswith("images") else labels)
      ...         _ = Path(directory, file).write_bytes(content)
      ...     arrays = read_idx(directory)
      >>> arrays["train_images"].shape, arrays["test_labels"]
      ((2, 28, 28), array([9, 0], dtype=int32))
    """
    arrays: dict[str, np.ndarray] = {}
    for split in NUM_EXAMPLES:
        paths = {kind: Path(directory, FILES[f"{split}_{kind}"]) for kind in ("images", "labels")}
        images, labels = _read(paths["images"], _IMAGE_SHAPE), _read(paths["labels"], ())
        if len(images) != len(labels):
            raise ValueError(
                f"{paths['labels']} has {len(labels):,} labels for the {len(images):,} images of "
                f"{paths['images'].name}"
            )
        if len(labels) and labels.max() >= _NUM_CLASSES:
            raise ValueError(
                f"{paths['labels']} has a label {labels.max()}; allowed: 0 to {_NUM_CLASSES - 1}"
            )
        arrays |= {f"{split}_images": images, f"{split}_labels": labels.astype(np.int32)}
    return arrays


def check(directory: str | os.PathLike[str]) -> None:
    """Checks that the four files are there and whole, with all examples of the data set.

    Args:
      directory: as for ``read_idx``.

    Raises:
      OSError: as ``read_idx``.
      ValueError: as ``read_idx``; a file has another number of examples.
    """
    arrays = read_idx(directory)
    for split, expected in NUM_EXAMPLES.items():
        found = len(arrays[f"{split}_images"])
        if found != expected:
            raise ValueError(
                f"{Path(directory, FILES[f'{split}_images'])} has {found:,} images; Fashion-MNIST "
                f"has {expected:,} there"
            )


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The uint8 array in a compressed idx file, whose examples are of a given shape."""
    try:
        with gzip.open(path) as file:
            length = _declared_length(path, file, shape)
            size = length * math.prod(shape)
            # One byte more shows what is too many. It is at the end, too, that gzip's own
            # checksum is compared.
            content = _read_at_most(file, size + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent} has no {path.name}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error
    if len(content) != size:
        has = "more" if len(content) > size else f"{len(content):,}"
        raise ValueError(f"{path} declares {size:,} bytes of values and has {has}")
    return np.frombuffer(content, np.uint8).reshape(length, *shape)


def _declared_length(path: Path, file: io.BufferedIOBase, shape: tuple[int, ...]) -> int:
    """The number of examples in the header of an idx file."""
    axes = 1 + len(shape)
    header = file.read(4 * (1 + axes))
    magic = _UINT8 + axes
    if len(header) < 4 * (1 + axes) or struct.unpack_from(">I", header)[0] != magic:
        raise ValueError(
            f"{path} is not an idx file of {axes} {'axes' if axes > 1 else 'axis'}: it begins with "
            f"{header[:4]!r}, and {struct.pack('>I', magic)!r} is allowed"
        )
    length, *declared = struct.unpack(f">{axes}I", header[4:])
    if tuple(declared) != shape:
        raise ValueError(
            f"{path} declares images of {'×'.join(map(str, declared))} pixels; allowed: "
            f"{'×'.join(map(str, shape))}"
        )
    if length > _MOST_EXAMPLES:
        raise ValueError(
            f"{path} declares {length:,} examples; allowed: at most {_MOST_EXAMPLES:,}"
        )
    return int(length)


def _read_at_most(file: io.BufferedIOBase, limit: int) -> bytearray:
    """What is left of a file, or its first bytes; memory grows with what is there."""
    content = bytearray()
    while chunk := file.read(min(_CHUNK, limit - len(content))):
        content += chunk
    return content
