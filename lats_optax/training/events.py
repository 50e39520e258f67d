"""Events for TensorBoard, written where they are added: a disk that is full is an error there.

tensorboardX's own writer does so in a thread. Where that fails, it prints a traceback, and what is
added then waits for it forever.
"""

import contextlib
import itertools
import os
import socket
import time
from pathlib import Path

from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter

from lats_optax.analysis.weight_summary import Histogram
from lats_optax.training.workdir import EVENTS

_COUNT = itertools.count()
_FLUSH_SECONDS = 120


class EventFile:
    """A new file of events.

    Args:
      directory: where it is made.
      first_step: of this file; TensorBoard hides what other files say of it and of later ones.
    """

    def __init__(self, directory: Path, first_step: int):
        self._writer = RecordWriter(str(directory / _file_name()))
        self._flushed = time.monotonic()
        self._write(Event(file_version="brain.Event:2"), 0)
        start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
        self._write(Event(session_log=start), first_step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Adds a number."""
        self._add(summary.scalar(tag, value), step)

    def add_histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        """Adds a histogram."""
        counts, edges = histogram.counts, histogram.edges
        middles = (edges[1:] + edges[:-1]) / 2
        raw = summary.histogram_raw(
            tag,
            min=-histogram.limit,
            max=histogram.limit,
            num=int(counts.sum()),
            # To the width of a bin, as TensorBoard shows the numbers themselves.
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
        )
        self._add(raw, step)

    def flush(self) -> None:
        """Hands all of it to the system."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Brings all of it to the disk."""
        with contextlib.closing(self._writer):
            self._writer.flush()

    def _add(self, found: Summary, step: int) -> None:
        self._write(Event(summary=found), step)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _write(self, event: Event, step: int) -> None:
        event.wall_time, event.step = time.time(), step
        self._writer.write(event.SerializeToString())


def _file_name() -> str:
    """A name that no file has, by which TensorBoard knows it and sorts it behind older ones."""
    return f"{EVENTS}{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_COUNT)}"
