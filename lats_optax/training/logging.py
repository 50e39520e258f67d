"""What a run tells while it runs: metrics.jsonl, TensorBoard events, a progress bar."""

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import tqdm

from lats_optax.analysis import weight_summary
from lats_optax.analysis.weight_summary import WeightSummary
from lats_optax.files.atomic import replacing, set_filename
from lats_optax.files.storage import URL, growing
from lats_optax.training.events import EventFile
from lats_optax.training.parallel import Engine
from lats_optax.training.workdir import METRICS

Record = dict[str, Any]

# A store limits how often one object may be written.
_SYNC_SECONDS = 60


class MetricsLog:
    """Writes the metrics of a run, going on after `step`.

    Records of later steps, by a run that was interrupted after its last checkpoint, are dropped:
    they will be written again.

    Of several processes the primary one writes. All of them make it, write to it and leave it
    together, and each hears where that fails.

    Args:
      workdir: directory of the run, on a disk or in a store. A store cannot append: there the files
        grow on this machine and are copied as a whole, by `sync` and once a minute.
      step: the last step that is done.
      total_steps: steps of the whole run.
      parallel: the processes; None: this one alone.
      check: called before files are copied; raises where they must not be.

    Raises:
      OSError: a file cannot be read or written; names it. Later methods likewise.
      PrimaryError: the same, in the other processes.
    """

    def __init__(
        self,
        workdir: Path | URL,
        step: int,
        total_steps: int,
        parallel: Engine | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self._check = check
        self._enabled = parallel is None or parallel.is_primary
        self._on_primary = _at_once if parallel is None else parallel.on_primary
        self.records: list[Record] = []
        # None: quiet where standard error is not a terminal.
        disable = None if self._enabled else True
        self._bar = tqdm.tqdm(total=total_steps, initial=step, unit="step", disable=disable)

        def begin() -> None:
            self.records = [r for r in read_metrics(workdir / METRICS) if r["step"] <= step]
            self._place, self._synced = contextlib.ExitStack(), time.monotonic()
            directory, self._copy = self._place.enter_context(growing(workdir))
            path = directory / METRICS
            self._rewrite(path)
            self._file = path.open("a", buffering=1, encoding="utf-8")
            self._events = EventFile(directory, first_step=step + 1)

        self._on_primary(begin)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.closing(self._bar):
            if kind is None:
                self._on_primary(self._close)
            elif self._enabled:  # after an error the others may not be there
                self._close()

    def advance(self) -> None:
        """Counts a step."""
        self._bar.update()

    def sync(self) -> None:
        """Brings all records to where the run is; to be called before each checkpoint.

        Raises:
          OSError: they cannot be written.
          Others: as `check`.
        """
        if self._enabled:
            with self._writing():
                self._events.flush()
            self._send()

    def write(self, record: Record) -> None:
        """Writes a record: `split`, `step`, `epoch`, and metrics, which are floats."""

        def scalars() -> None:
            for name in record.keys() - {"split", "step"}:
                self._events.add_scalar(f"{record['split']}/{name}", record[name], record["step"])

        self._append(record, scalars)
        if not self._enabled:
            return
        if record["split"] == "train":
            self._bar.set_postfix(loss=record["loss"], accuracy=record["accuracy"], refresh=False)
        else:
            self._bar.write(_line(record))

    def write_weights(self, step: int, epoch: float, layers: Mapping[str, WeightSummary]) -> None:
        """Writes what has become of the weights of each layer, with histograms for TensorBoard."""
        record = {"split": "weights", "step": step, "epoch": epoch, **weight_summary.counts(layers)}

        def histograms() -> None:
            for name in ("pruned", "revived"):
                self._events.add_scalar(f"weights/{name}", record[name], step)
                for path, counts in record["layers"].items():
                    self._events.add_scalar(f"{name}/{path}", counts[name], step)
            for path, layer in layers.items():
                self._events.add_scalar(f"sparsity/{path}", layer.zeros / max(layer.size, 1), step)
                self._events.add_histogram(f"sparse/{path}", layer.weights, step)
                if layer.latent is not None:
                    self._events.add_histogram(f"latent/{path}", layer.latent, step)

        self._append(record, histograms)
        if self._enabled:
            pruned, revived = record["pruned"], record["revived"]
            self._bar.write(f"epoch {epoch:7.2f}  weights pruned {pruned:,}  revived {revived:,}")

    def _append(self, record: Record, add_events: Callable[[], None]) -> None:
        """Keeps a record, and writes it with its events."""
        self.records.append(record)

        def write() -> None:
            with self._writing():
                self._file.write(json.dumps(record) + "\n")
                add_events()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self.sync()

        self._on_primary(write)

    def _send(self) -> None:
        """Copies the files to the store, if the run is in one."""
        self._check()
        self._copy()
        self._synced = time.monotonic()

    def _close(self) -> None:
        # In turn, and all of them: on a disk that is full, closing a file may fail too.
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._place)
            stack.callback(self._send)
            stack.enter_context(self._writing())
            stack.callback(self._file.close)
            stack.callback(self._events.close)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Errors in it name the file."""
        try:
            yield
        except OSError as error:
            set_filename(error, self._file.name)
            raise

    def _rewrite(self, path: Path) -> None:
        with replacing(path) as kept:
            kept.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")


def _at_once(act: Callable[[], None]) -> None:
    act()


def read_metrics(path: Path | URL) -> list[Record]:
    """The records of a metrics file; none where there is no file.

    A last line without its end, by a run that was killed while it wrote, is left out.

    Warns:
      UserWarning: other lines are no records; they are left out.
    """
    records, lost = scan_metrics(path)
    if lost:
        some = ", ".join(map(str, lost[:5])) + (f" and {len(lost) - 5} more" if lost[5:] else "")
        message = f"{path}: no record can be read in line {some}, which is left out"
        warnings.warn(message, UserWarning, stacklevel=2)
    return records


def scan_metrics(path: Path | URL) -> tuple[list[Record], list[int]]:
    """As `read_metrics`, and the numbers of the lines that are no records instead of a warning."""
    if not path.exists():
        return [], []
    lines = path.read_bytes().splitlines(keepends=True)
    found = {n: _record(line) for n, line in enumerate(lines, 1) if line.endswith(b"\n")}
    records = [record for record in found.values() if record is not None]
    return records, [number for number, record in found.items() if record is None]


def _record(line: bytes) -> Record | None:
    """The record of a line; None where it has not what all records have."""
    try:
        record: Record = json.loads(line)
        step, numbers = record["step"], [record["epoch"]]
        if record["split"] == "weights":
            for counts in (record, *record["layers"].values()):
                numbers += [counts[name] for name in weight_summary.COUNTS]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    usable = isinstance(record["split"], str) and isinstance(step, int)
    return record if usable and all(isinstance(n, int | float) for n in numbers) else None


def _line(record: Record) -> str:
    sparsity = f"  sparsity {record['sparsity']:6.2%}" if "sparsity" in record else ""
    return (
        f"epoch {record['epoch']:7.2f}  {record['split']} loss {record['loss']:.4f}  "
        f"accuracy {record['accuracy']:6.2%}{sparsity}"
    )
