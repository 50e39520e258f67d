"""Ctrl-C, and the SIGTERM of a machine that is taken away, wait until a checkpoint is written."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """While it is entered, a first signal is noted, and a second one acts as it always does.

    A KeyboardInterrupt that leaves it says how to go on.

    Outside the main thread, where Python hands out no signals, nothing is noted. Neither is it with
    `enabled` False, for runs of several processes: they could not agree on a step to stop at.
    """

    def __init__(self, enabled: bool = True):
        self.requested = False
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if self._enabled:
            for number in (signal.SIGINT, signal.SIGTERM):
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

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
