"""One run at a time in a work directory: by the system's lock, or by a lease in an object store.

A disk's file system has locks, which end with the process that holds them. A store has none: there
the object `.lock` says who writes in the directory and when that was last seen. Its run writes it
again every half minute, and whoever finds it older than three minutes takes it for that of a dead
run. A run that was silent for so long, and finds another's, ends before it writes anything more.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lats_optax.files.storage import URL

LOCK = ".lock"

# Seconds between two signs of life, after which a run is taken for dead, and in which another one
# that takes its place at the same moment is seen.
_BEAT, _STALE, _SETTLED = 30.0, 180.0, 2.0


class WorkdirInUseError(RuntimeError):
    """Another run is writing in the work directory."""


@contextlib.contextmanager
def locked(workdir: Path | URL) -> Iterator[Callable[[], None]]:
    """Keeps others out of a directory until the block ends.

    Yields:
      What raises a `WorkdirInUseError` where another run has the directory all the same.

    Raises:
      WorkdirInUseError: another run has it.
      OSError: it cannot be written to.
    """
    if isinstance(workdir, URL):
        lease = Lease(workdir)
        lease.take()
        try:
            yield lease.check
        finally:
            lease.give_back()
        return
    with _flock(workdir):
        yield lambda: None


class Lease:
    """The right to write in a directory of an object store, for as long as it is renewed."""

    def __init__(self, workdir: URL):
        self._workdir, self._path = workdir, workdir / LOCK
        self._token, self._ended = secrets.token_hex(8), threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        """Takes it, and renews it from then on.

        Raises:
          WorkdirInUseError: another run has it.
        """
        if not self._path.create(self._content()):
            found = self._found()
            age = time.time() - found["time"]
            if age < _STALE:
                raise WorkdirInUseError(
                    f"workdir {self._workdir} is in use by {found['holder']}: wait for its end, or "
                    f"name another --workdir. It was seen {age:.0f} s ago; if it is dead, the "
                    f"place is free {_STALE:.0f} s after that, or when {self._path} is removed"
                )
            self._path.write_bytes(self._content())
            time.sleep(_SETTLED)
        self.check()
        self._thread.start()

    def check(self) -> None:
        """Raises a WorkdirInUseError if another run has taken it."""
        found = self._found()
        if found["token"] != self._token:
            raise WorkdirInUseError(
                f"workdir {self._workdir} was taken over by {found['holder']}, as this run gave no "
                f"sign of life for {_STALE:.0f} s or {self._path} was removed; it ends here"
            )

    def give_back(self) -> None:
        """Ends it. What fails here passes with time."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join(_BEAT)
        with contextlib.suppress(OSError, WorkdirInUseError):
            self.check()
            self._path.unlink()

    def _renew(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                self.check()
                self._path.write_bytes(self._content())
            except WorkdirInUseError:
                return  # the main thread finds out before it writes
            except OSError:
                continue  # a store that cannot be reached now may be at the next beat

    def _content(self) -> bytes:
        return json.dumps(
            {"holder": _own_name(), "token": self._token, "time": time.time()}
        ).encode()

    def _found(self) -> dict[str, Any]:
        """What the object says; what is none of ours, or gone, is of nobody and of long ago."""
        try:
            content = json.loads(self._path.read_bytes())
            return {
                "holder": str(content["holder"]),
                "token": str(content["token"]),
                "time": float(content["time"]),
            }
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return {"holder": "another run", "token": "", "time": 0.0}


@contextlib.contextmanager
def _flock(workdir: Path) -> Iterator[None]:
    """Keeps others out. The system ends it with the process, however that ends."""
    descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            raise WorkdirInUseError(
                f"workdir {workdir} is in use by {holder}: wait for its end, or name another "
                "--workdir"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            message = f"workdir {workdir}: its file system has no locks; start no second run there"
            warnings.warn(message, UserWarning, stacklevel=2)
        with contextlib.suppress(OSError):  # a full disk: what fails next can say where
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{_own_name()}\n".encode())
        yield
        os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _own_name() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
