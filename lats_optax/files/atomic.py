"""Files and directories that appear whole or not at all, whatever interrupts their writing."""

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from lats_optax.files.storage import URL, as_path, temporary

# After so many seconds without a write, what a killed process left is taken for that.
_STALE = 3600


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside ``path`` to write to; what stands there at the end becomes ``path``.

    In an object store the name is one of this machine, and the object is made of it at the end.
    There an object appears whole by itself. Elsewhere:

    It is brought to the disk and then renamed. If the block raises, or the process is killed, a
    file that stood at ``path`` before stays whole. Any number of threads and processes may write
    to one path; the last to end wins. What a killed process leaves, ``.NAME.….unfinished``, is
    removed by the next write to the same path that begins an hour later or more.

    Args:
      path: of the file to write or replace, in a directory that exists; or a URL.

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
    path = as_path(path)
    if isinstance(path, URL):
        with temporary() as directory:
            yield directory / path.name
            path.parent.upload(directory, [path.name])
        return
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        allowed = "names that the file system can encode"
        raise ValueError(f"path: {str(path)!a} is not allowed; allowed are {allowed}") from error
    sweep(path, _STALE)
    unfinished = unfinished_name(path)
    # With O_EXCL a link that stands there is an error. tempfile's would be for the owner alone.
    os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield unfinished
        with unfinished.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        set_filename(error, path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)
    sync_directory(path.parent)


def unfinished_name(path: Path) -> Path:
    """A name beside a path, which nobody can guess and which `sweep` knows.

    >>> unfinished_name(Path("runs/notes.txt")).match("runs/.notes.txt.*.unfinished")
    True
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.unfinished")


def set_filename(error: OSError, path: str | os.PathLike[str]) -> None:
    """Lets an error say which file it is about; one of writing to an open file does not.

    >>> error = OSError(28, "No space left on device")
    >>> set_filename(error, "notes.txt")
    >>> print(error)
    [Errno 28] No space left on device: 'notes.txt'
    """
    if error.errno is not None and error.filename is None:
        error.filename = os.fspath(path)


def sync_directory(directory: Path) -> None:
    """Brings the names in a directory to the disk, where the system can do so."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(path: Path | URL, age: float = 0) -> None:
    """Removes what killed processes have left of a path: unfinished files and directories.

    Args:
      path: that was to be written.
      age: seconds that must have passed since the last write. 0 where nobody else writes to it.
    """
    if isinstance(path, URL):
        return  # a store leaves nothing unfinished
    left = re.compile(re.escape(f".{path.name}.") + r"[0-9a-f]{16}\.unfinished")
    try:
        names = os.listdir(path.parent)
    except OSError:  # who may write to a directory may not be allowed to list it
        return
    for name in filter(left.fullmatch, names):
        with contextlib.suppress(OSError):  # not ours to remove, or already removed
            found = path.with_name(name)
            if not age or time.time() - found.lstat().st_mtime > age:
                remove(found)


def remove(path: Path) -> None:
    """Removes a file, or a directory with what is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
