"""Files that appear whole or not at all, whatever interrupts their writing."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside ``path`` to write to; what stands there at the end becomes ``path``.

    It is brought to the disk and then renamed. If the block raises, or the process is killed, a
    file that stood at ``path`` before stays whole.

    Args:
      path: of the file to write or replace, in a directory that exists.

    Yields:
      The path to write the new file to.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = Path(directory, "notes.txt")
      ...     with replacing(path) as unfinished:
      ...         _ = unfinished.write_text("all of it")
      ...     path.read_text(), os.listdir(directory)
      ('all of it', ['notes.txt'])
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # where the new name can be brought to the disk too
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
