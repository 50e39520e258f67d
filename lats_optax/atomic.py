"""Files that appear whole or not at all, whatever interrupts their writing."""

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

# After so many seconds without a write, what a killed process left is taken for that.
_STALE = 3600


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside ``path`` to write to; what stands there at the end becomes ``path``.

    It is brought to the disk and then renamed. If the block raises, or the process is killed, a
    file that stood at ``path`` before stays whole. Any number of threads and processes may write
    to one path; the last to end wins. What a killed process leaves, ``.NAME.….unfinished``, is
    removed by the next write to the same path that begins an hour later or more.

    Args:
      path: of the file to write or replace, in a directory that exists.

    Yields:
      The path to write the new file to: an empty file, new and of a name that nobody can guess.

    Raises:
      ValueError: the file system has no such name.

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
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        allowed = "names that the file system can encode"
        raise ValueError(f"path: {str(path)!a} is not allowed; allowed are {allowed}") from error
    _remove_stale(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")
    # With O_EXCL a link that stands there is an error. tempfile's would be for the owner alone.
    os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
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


def _remove_stale(path: Path) -> None:
    left = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.unfinished")
    try:
        names = os.listdir(path.parent)
    except OSError:  # who may write to a directory may not be allowed to list it
        return
    for name in filter(left.fullmatch, names):
        with contextlib.suppress(OSError):  # not ours to remove, or already removed
            file = path.with_name(name)
            if time.time() - file.lstat().st_mtime > _STALE:
                file.unlink()
