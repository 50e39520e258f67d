"""Signals that end a run wait until a checkpoint is written.

Ctrl-C, the SIGTERM of a machine that is taken away, the SIGHUP of a terminal that is closed.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class PreemptedError(RuntimeError):
    """A run of several processes has ended early, after a checkpoint: one was sent SIGTERM."""


class PreemptionHandler:
    """While it is entered, a first signal is noted, and a second one acts as it always does.

    A KeyboardInterrupt that leaves it says how to go on. Where SIGHUP is ignored, as under `nohup`,
    it stays so.

    Outside the main thread, where Python hands out no signals, nothing is noted. Neither is it with
    `enabled` False, for runs of several processes: those agree on a step to stop at by
    `Engine.preempted`.
    """

    def __init__(self, enabled: bool = True):
        self.requested = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "PreemptionHandler":
        if self._enabled:
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()
        # What Python raises at a second signal has no message.
        if isinstance(error, KeyboardInterrupt) and not error.args:
            error.args = ("interrupted at once; --resume goes on from the last checkpoint",)

    def error(self, message: str) -> BaseException:
        """What ends the run once its checkpoint is written."""
        return KeyboardInterrupt(message) if self._enabled else PreemptedError(message)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
