"""Where files are: a path of this machine, or a URL of an object store, which `fsspec` reads.

Here belongs what differs between the two below a single file or a tree of them. `as_path` tells
them apart; what comes of it has the methods of `pathlib.Path` that the package uses, so that most
code need not ask which it has. Whole files go in and out: `fetched` gives one that any library can
open, and `atomic.replacing` puts one there.

Why fsspec, and not `etils.epath`: etils hands gs://, s3:// and az:// to it and knows no other
scheme, and none that can be tested without a network. An object appears whole or not at all, but
cannot be appended to or renamed, and there are no directories but in names. fsspec is imported
where it is used.
"""

import contextlib
import errno
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

# `Path` makes one slash of two.
_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)


class StoreError(OSError):
    """An object store cannot be reached, or refuses what it is asked for."""


class Stat(NamedTuple):
    """What `URL.stat` tells of an object: its size in bytes."""

    st_size: int


class URL(PurePosixPath):
    """The name of an object in a store, or of all objects below it.

    Every method that asks the store raises a `FileNotFoundError` where there is no such object, and
    a `StoreError` for all other failures.

    >>> URL("memory://bucket/run") / "notes.txt"
    URL('memory://bucket/run/notes.txt')
    """

    def __str__(self) -> str:
        """With the two slashes that `PurePosixPath` makes one of."""
        return super().__str__().replace(":/", "://", 1)

    def exists(self) -> bool:
        """Whether there is an object of that name, or one below it."""
        with self._asking() as store:
            return bool(store.exists(str(self)))

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        with self._asking() as store:
            return bool(store.isdir(str(self)))

    def is_file(self) -> bool:
        """Whether there is an object of that name."""
        with self._asking() as store:
            return bool(store.isfile(str(self)))

    def stat(self) -> Stat:
        """The size of the object."""
        with self._asking() as store:
            return Stat(int(store.size(str(self))))

    def iterdir(self) -> Iterator["URL"]:
        """The names right below it."""
        with self._asking() as store:
            found = [name.rstrip("/") for name in store.ls(str(self), detail=False)]
            own = store._strip_protocol(str(self)).rstrip("/")
        # Where a directory was made by hand, an object stands for it.
        return (self / PurePosixPath(name).name for name in found if name != own)

    def names(self) -> list[str]:
        """The names of all objects below it, relative to it, in their order."""
        with self._asking() as store:
            root = store._strip_protocol(str(self)).rstrip("/") + "/"
            found = [name for name in store.find(str(self)) if name.startswith(root)]
        return sorted(name.removeprefix(root) for name in found if name != root)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a store has no directories."""

    def read_bytes(self) -> bytes:
        """The content of the object."""
        with self._asking() as store:
            return bytes(store.cat_file(str(self)))

    def write_bytes(self, data: bytes) -> None:
        """Makes the object, or replaces it, as a whole."""
        with self._asking() as store:
            store.pipe_file(str(self), data)

    def create(self, data: bytes) -> bool:
        """Makes the object; False: there is one already. A store that can, makes sure of that."""
        with self._asking() as store:
            try:
                store.pipe_file(str(self), data, mode="create")
            except FileExistsError:
                return False
        return True

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object. Not every store says that there was none."""
        with contextlib.ExitStack() as stack:
            if missing_ok:
                stack.enter_context(contextlib.suppress(FileNotFoundError))
            with self._asking() as store:
                store.rm_file(str(self))

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects below it."""
        with self._asking() as store:
            if paths := [str(self / name) for name in names]:
                store.rm(paths)

    def copy(self, names: Sequence[str], target: "URL") -> None:
        """Copies objects below it to the same names below another one, within the store."""
        with self._asking() as store:
            store.copy([str(self / name) for name in names], [str(target / name) for name in names])

    def upload(self, directory: Path, names: Sequence[str]) -> None:
        """Puts files of a directory there, under their names below it."""
        with self._asking() as store:
            store.put([str(directory / n) for n in names], [str(self / n) for n in names])

    def download(self, directory: Path, names: Sequence[str]) -> None:
        """Gets objects into a directory, under their names below it."""
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        with self._asking() as store:
            store.get([str(self / n) for n in names], [str(directory / n) for n in names])

    @contextlib.contextmanager
    def _asking(self) -> Iterator[Any]:
        """The store; what its libraries raise becomes one of two errors, which name the object."""
        try:
            yield _store(str(self).partition(":")[0])
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "No such object", str(self)) from error
        except PermissionError as error:
            raise StoreError(
                errno.EACCES, _reason("Permission denied", error), str(self)
            ) from error
        except Exception as error:
            raise StoreError(errno.EIO, _reason(type(error).__name__, error), str(self)) from error


def as_path(path: str | os.PathLike[str], what: str = "path") -> Path | URL:
    """A path of this machine with ``~`` expanded, or a URL whose store can be used here.

    Args:
      path: as a user names it.
      what: it is, in errors.

    Raises:
      ValueError: there is no such store, or a package is missing for it; or no such home directory.

    >>> as_path("runs/digits"), as_path(Path("memory://bucket/run"))
    (PosixPath('runs/digits'), URL('memory://bucket/run'))
    """
    text = os.fspath(path)
    found = _URL.fullmatch(text)
    if found is None:
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise ValueError(
                f"{what} is {text!r}; allowed: a path of this machine. {error}"
            ) from error
    scheme, name = found.groups()
    if scheme == "file":
        return Path("/", name)
    if not name:
        raise ValueError(f"{what} is {text!r}; allowed: {scheme}://BUCKET/NAME")
    _check_store(scheme, f"{scheme}://{name}", what)
    return URL(text)


@contextlib.contextmanager
def fetched(path: Path | URL, names: Sequence[str] | None = None) -> Iterator[Path]:
    """A file, or a directory, on this machine: itself, or a copy for as long as the block lasts.

    Args:
      path: of either.
      names: of a directory in a store, the objects below it that are needed; None: all.

    Yields:
      A path of the same name.

    Raises:
      FileNotFoundError: there is nothing of that name in the store.
      StoreError: it cannot be read.
    """
    if not isinstance(path, URL):
        yield path
        return
    with temporary() as directory:
        if names is None and path.is_file():
            path.parent.download(directory, [path.name])
        else:
            path.download(directory / path.name, path.names() if names is None else names)
        yield directory / path.name


@contextlib.contextmanager
def growing(place: Path | URL) -> Iterator[tuple[Path, Callable[[], None]]]:
    """For files that are appended to, which a store cannot do: a directory of this machine.

    Args:
      place: the directory where they shall be.

    Yields:
      The directory to write them in, and what copies them to a store, each as a whole, where it has
      grown. On a disk, the place itself, and nothing to do.
    """
    if not isinstance(place, URL):
        yield place, lambda: None
        return
    url, copied = place, dict[str, int]()
    with temporary() as directory:

        def copy() -> None:
            sizes = {file.name: file.stat().st_size for file in directory.iterdir()}
            url.upload(directory, [n for n, size in sizes.items() if copied.get(n) != size])
            copied.update(sizes)

        yield directory, copy


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A directory of this machine for copies, removed at the end; `TMPDIR` says where."""
    with tempfile.TemporaryDirectory(prefix="lats-optax.", ignore_cleanup_errors=True) as name:
        yield Path(name)


def has_room(path: Path | URL) -> bool:
    """Whether a file can be made at a path: its directory is there, which a store does not need."""
    return isinstance(path, URL) or path.parent.is_dir()


@functools.cache
def _store(scheme: str) -> Any:
    import fsspec

    # What others have written since is to be seen.
    return fsspec.filesystem(scheme, use_listings_cache=False)


def _check_store(scheme: str, url: str, what: str) -> None:
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        causes = [error, error.__cause__, error.__context__]
        missing = [cause.name for cause in causes if isinstance(cause, ImportError) and cause.name]
        package = missing[0] if missing else str(error)
        needs = f"{scheme}:// needs {package}, which is not installed: pip install {package}"
        raise ValueError(f"{what} is {url!r}; {needs}") from error
    except ValueError as error:
        allowed = "gs://, s3:// and what else fsspec knows, or a path of this machine"
        raise ValueError(f"{what} is {url!r}; allowed: {allowed}") from error


def _reason(kind: str, error: Exception) -> str:
    """An error of a store's library in a line."""
    words = " ".join(str(error).split())[:300]
    return f"{kind}: {words}" if words else kind
