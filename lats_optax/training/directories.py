"""Directories that appear whole or not at all, and go so: those of checkpoints.

On a disk one is written under another name and renamed. An object store has no rename: there the
object `MARKER`, written last and removed first, says that a directory is whole, and what is without
it was never finished.

A directory is written and read on this machine, and copied: every library works on every store, and
what is verified is what was written. That takes room for one checkpoint in a temporary directory.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lats_optax.files.atomic import remove as remove_at_once
from lats_optax.files.atomic import sweep as sweep_path
from lats_optax.files.atomic import sync_directory, unfinished_name
from lats_optax.files.storage import URL, temporary
from lats_optax.training.manifest import MANIFEST as MARKER

_UNFINISHED = "step"
"""What a directory is called in the name that it has before it is complete."""


def names(parent: Path | URL) -> list[str]:
    """The names in a directory; of those in a store, which are directories, that are whole."""
    if isinstance(parent, URL):
        return [*_whole(parent.names())]
    try:
        return os.listdir(parent)
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def writing(path: Path | URL) -> Iterator[Path]:
    """A new directory of this machine, whose content stands at a path when the block ends.

    Args:
      path: where nothing whole is.

    Yields:
      The directory, in which `MARKER` has to be at the end, and all of it on the disk.
    """
    if isinstance(path, URL):
        with temporary() as unfinished:
            yield unfinished
            found = [file for file in unfinished.rglob("*") if not file.is_dir()]
            relative = sorted(file.relative_to(unfinished).as_posix() for file in found)
            path.remove(path.names())  # what a killed run has left
            path.upload(unfinished, [name for name in relative if name != MARKER])
            path.upload(unfinished, [MARKER])
        return
    unfinished = unfinished_name(path.with_name(_UNFINISHED))
    try:
        path.parent.mkdir(exist_ok=True)
        unfinished.mkdir()
        yield unfinished
        os.rename(unfinished, path)
        sync_directory(path.parent)
    finally:
        _remove_for_good(unfinished)


def remove(path: Path | URL, called: str = _UNFINISHED) -> None:
    """Removes a directory, and those in it; one that is half removed does not look damaged.

    Args:
      path: of the directory.
      called: what it is called in the name that it has on a disk while it is being removed.
    """
    if isinstance(path, URL):
        _remove_objects(path)
        return
    unfinished = unfinished_name(path.with_name(called))
    os.rename(path, unfinished)
    remove_at_once(unfinished)


def set_aside(path: Path | URL) -> Path | URL:
    """Renames a damaged directory, and returns its new name, ``NAME.damaged``."""
    taken = {found.name for found in path.parent.iterdir()}
    name, count = f"{path.name}.damaged", 1
    while name in taken:
        count += 1
        name = f"{path.name}.damaged-{count}"
    if isinstance(path, URL):
        path.copy(path.names(), path.with_name(name))
        _remove_objects(path)
    else:
        os.rename(path, path.with_name(name))
    return path.with_name(name)


def sweep(parent: Path | URL) -> None:
    """Removes what a killed run has left of directories that it was writing or removing."""
    if isinstance(parent, URL):
        found = parent.names()
        whole = _whole(found)
        parent.remove(
            name for name in found if re.match("[0-9]+/", name) and name.split("/")[0] not in whole
        )
        return
    sweep_path(parent)
    sweep_path(parent / _UNFINISHED)


def _whole(names: list[str]) -> set[str]:
    """Of the objects' names below a parent, the directories that have their marker."""
    parts = [name.split("/") for name in names]
    return {part[0] for part in parts if part[1:] == [MARKER]}


def _remove_objects(path: URL) -> None:
    found = path.names()
    marks = [name for name in found if PurePosixPath(name).name == MARKER]
    path.remove(marks)
    path.remove(name for name in found if name not in marks)


def _remove_for_good(path: Path) -> None:
    """Removes a directory that threads of TensorStore may still be writing to, for seconds."""
    for _ in range(100):
        if not path.exists():
            return
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)
