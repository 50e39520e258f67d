"""Connections that hold the processes of one run together, next to those of JAX.

JAX waits minutes for a process that is missing or dead, and then aborts with pages of a C++ trace.
Here belongs what ends such a run in a time that its config names, with one line:

1. `meet`: before JAX is told of the others, each connects to process 0, which counts them.
2. `Lifeline`: the connections stay open. The kernel closes those of a process that is gone, and
   process 0 tells the others which one it was.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType

LOST = 1
"""Exit code of a process that has lost another one."""

_GO, _BYE, _FAILED, _GONE = "go", "bye", "failed", "gone"
# Seconds between two attempts to connect, and in which the news of a lost process is here.
_PAUSE, _GRACE = 0.2, 2.0
# Seconds that a process gets to end by itself when another one has failed.
_PATIENCE = 10.0


def meet(coordinator: str, count: int, index: int, timeout: float) -> "Lifeline":
    """Waits until all processes of a run are there.

    Args:
      coordinator: HOST:PORT of process 0, at which JAX listens afterwards.
      count: how many processes there are.
      index: which of them this is; all others connect to 0.
      timeout: seconds to wait, and after which a host that no longer answers is taken for lost.

    Returns:
      Their connections.

    Raises:
      ValueError: the address is none of this host (process 0) or cannot be resolved, or two
        processes are of one index or of different counts.
      TimeoutError: some did not come; names them.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + timeout
    if index == 0:
        connections = _gather(coordinator, int(port), count, deadline)
    else:
        connections = {0: _join(coordinator, host, int(port), count, index, deadline)}
    for connection in connections.values():
        _keep_alive(connection, timeout)
    return Lifeline(connections)


def end_process(message: str) -> None:
    """Prints a line and ends the process at once: its main thread may wait for a lost one."""
    print(f"lats-train: error: {message}", file=sys.stderr, flush=True)
    os._exit(LOST)


class Lifeline:
    """The connections of a process: one to each other process for process 0, else one to it.

    Entered, a thread watches them. A process that ends without leaving the context is lost.
    """

    def __init__(self, connections: Mapping[int, socket.socket]):
        """Takes connections that `meet` has made."""
        self._connections = dict(connections)
        self._lost = threading.Event()
        self._left = threading.Event()
        self._end: Callable[[str], None] = end_process
        self._resume = ""

    def watch(self, resume: str, end: Callable[[str], None] = end_process) -> "Lifeline":
        """Itself, with what to say of resuming, and with what ends the process."""
        self._resume, self._end = resume, end
        return self

    def __enter__(self) -> "Lifeline":
        """Starts the thread."""
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Says goodbye, or that this process has failed."""
        if isinstance(error, Exception):
            # A collective that fails because a process is gone may be ahead of the news that it is.
            self._lost.wait(_GRACE)
        self._left.set()
        self._thread.join(_GRACE)
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                _send(connection, _BYE if error is None else _FAILED)
        self.close()

    def close(self) -> None:
        """Closes the connections; without a goodbye, the others take this process for lost."""
        for connection in self._connections.values():
            connection.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                connection.settimeout(None)
                selector.register(connection, selectors.EVENT_READ, index)
            while selector.get_map() and not self._left.is_set():
                for key, _ in selector.select(timeout=_PAUSE):
                    connection = self._connections[key.data]
                    word = _receive(connection) or ""
                    if word == _BYE:
                        selector.unregister(connection)
                    elif not self._left.is_set():
                        failed, _, other = word.partition(" ")
                        return self._lose(int(other or key.data), failed == _FAILED)

    def _lose(self, index: int, failed: bool) -> None:
        """Ends this process, and tells the others to."""
        for other, connection in self._connections.items():
            if other != index:
                with contextlib.suppress(OSError):
                    _send(connection, f"{_FAILED if failed else _GONE} {index}")
        self._lost.set()
        # What one has failed of is often about to end all, with a better message. One that is gone
        # ends them at once: JAX is about to abort where it is process 0.
        if failed and self._left.wait(_PATIENCE):
            return
        what = "has failed; its last line says why" if failed else "is gone"
        self._end(f"process {index} of the run {what}{self._resume}")


def _gather(coordinator: str, port: int, count: int, deadline: float) -> dict[int, socket.socket]:
    """Process 0: a connection from each of the others, by index."""
    found: dict[int, socket.socket] = {}
    try:
        listener = socket.create_server(("", port), backlog=count)
    except OSError as error:
        raise ValueError(
            f"coordinator is {coordinator!r}; allowed: a free port of this host. {error}"
        ) from error
    with listener, contextlib.ExitStack() as until_all_are_there:
        while len(found) < count - 1:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                missing = [str(index) for index in range(1, count) if index not in found]
                raise TimeoutError(
                    f"num_processes is {count}; missing at {coordinator}: process "
                    f"{', '.join(missing)}"
                ) from None
            hello = _hello(connection)
            if hello is None:  # somebody else's
                connection.close()
                continue
            until_all_are_there.enter_context(connection)
            index, of = hello
            if of != count or index in found:
                problem = (
                    f"process_id is {index} in two processes"
                    if of == count
                    else f"num_processes is {count} in process 0 and {of} in process {index}"
                )
                for other in [*found.values(), connection]:
                    with contextlib.suppress(OSError):
                        _send(other, problem)
                raise ValueError(f"{problem}; allowed: 1 to {count - 1}, each once, of {count}")
            found[index] = connection
        until_all_are_there.pop_all()
    for connection in found.values():
        _send(connection, _GO)
    return found


def _join(
    coordinator: str, host: str, port: int, count: int, index: int, deadline: float
) -> socket.socket:
    """Another process: its connection to process 0."""
    problem: object = "it did not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with contextlib.ExitStack() as unless_it_goes_on:
                connection = socket.create_connection((host.strip("[]"), port), timeout=left)
                unless_it_goes_on.enter_context(connection)
                _send(connection, json.dumps([index, count]))
                word = _receive(connection)
                if word == _GO:
                    unless_it_goes_on.pop_all()
                    return connection
            if word is not None:
                raise ValueError(word)
        except OSError as error:  # process 0 may be on its way
            problem = error
        time.sleep(min(_PAUSE, max(deadline - time.monotonic(), 0)))
    raise TimeoutError(f"coordinator is {coordinator!r}, where process 0 is not: {problem}")


def _hello(connection: socket.socket) -> tuple[int, int] | None:
    """Index and count that a process introduces itself with; None: it is none of ours."""
    connection.settimeout(5)
    try:
        index, count = json.loads(_receive(connection) or "")
    except (OSError, ValueError, TypeError):
        return None
    return int(index), int(count)


def _send(connection: socket.socket, word: str) -> None:
    connection.sendall(word.encode() + b"\n")


def _receive(connection: socket.socket) -> str | None:
    """A line; None: the other end is closed, or gone."""
    line = b""
    try:
        while not line.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                return None
            line += byte
    except TimeoutError:
        raise
    except OSError:
        return None
    return line.decode(errors="replace").strip()


def _keep_alive(connection: socket.socket, timeout: float) -> None:
    """Lets the kernel ask whether the other host is still there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    third = max(int(timeout / 3), 1)
    options = {"TCP_KEEPIDLE": third, "TCP_KEEPINTVL": third, "TCP_KEEPCNT": 2}
    for name, value in options.items():
        if hasattr(socket, name):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
