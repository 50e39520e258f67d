"""What a run tells while it runs: metrics.jsonl, TensorBoard events, a progress bar."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import tensorboardX
import tqdm

from lats_optax.atomic import replacing
from lats_optax.training import statistics
from lats_optax.training.statistics import Histogram, LayerStatistics
from lats_optax.training.workdir import METRICS

Record = dict[str, Any]


class MetricsLog:
    """Writes the metrics of a run, going on after `step`.

    Records of later steps, by a run that was interrupted after its last checkpoint, are dropped:
    they will be written again.

    Args:
      workdir: directory of the run.
      step: the last step that is done.
      total_steps: steps of the whole run.
      enabled: False in the processes that keep silent.
    """

    def __init__(self, workdir: Path, step: int, total_steps: int, enabled: bool = True):
        self._enabled = enabled
        self.records: list[Record] = []
        # None: quiet where standard error is not a terminal.
        disable = None if enabled else True
        self._bar = tqdm.tqdm(total=total_steps, initial=step, unit="step", disable=disable)
        if enabled:
            path = workdir / METRICS
            self.records = [r for r in read_metrics(path) if r["step"] <= step]
            self._rewrite(path)
            self._file = path.open("a", buffering=1, encoding="utf-8")
            self._events = tensorboardX.SummaryWriter(str(workdir), purge_step=step + 1)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._enabled:
            self._file.close()
            self._events.close()

    def advance(self) -> None:
        """Counts a step."""
        self._bar.update()

    def write(self, record: Record) -> None:
        """Writes a record: `split`, `step`, `epoch`, and metrics, which are floats."""
        self._append(record)
        if not self._enabled:
            return
        for name in record.keys() - {"split", "step"}:
            self._events.add_scalar(f"{record['split']}/{name}", record[name], record["step"])
        if record["split"] == "train":
            self._bar.set_postfix(loss=record["loss"], accuracy=record["accuracy"], refresh=False)
        else:
            self._bar.write(_line(record))

    def write_weights(self, step: int, epoch: float, layers: Mapping[str, LayerStatistics]) -> None:
        """Writes what has become of the weights of each layer, with histograms for TensorBoard."""
        record = {"split": "weights", "step": step, "epoch": epoch, **statistics.counts(layers)}
        self._append(record)
        if not self._enabled:
            return
        for name in ("pruned", "revived"):
            self._events.add_scalar(f"weights/{name}", record[name], step)
            for path, counts in record["layers"].items():
                self._events.add_scalar(f"{name}/{path}", counts[name], step)
        for path, layer in layers.items():
            self._events.add_scalar(f"sparsity/{path}", layer.zeros / max(layer.size, 1), step)
            self._add_histogram(f"sparse/{path}", layer.weights, step)
            if layer.latent is not None:
                self._add_histogram(f"latent/{path}", layer.latent, step)
        pruned, revived = record["pruned"], record["revived"]
        self._bar.write(f"epoch {epoch:7.2f}  weights pruned {pruned:,}  revived {revived:,}")

    def _add_histogram(self, tag: str, histogram: Histogram, step: int) -> None:
        counts, edges = histogram.counts, histogram.edges
        middles = (edges[1:] + edges[:-1]) / 2
        self._events.add_histogram_raw(
            tag,
            min=-histogram.limit,
            max=histogram.limit,
            num=int(counts.sum()),
            # To the width of a bin, as TensorBoard shows the numbers themselves.
            sum=float(counts @ middles),
            sum_squares=float(counts @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def _append(self, record: Record) -> None:
        self.records.append(record)
        if self._enabled:
            self._file.write(json.dumps(record) + "\n")

    def _rewrite(self, path: Path) -> None:
        with replacing(path) as kept:
            kept.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics file; none where there is no file.

    A last line without its end, by a run that was killed while it wrote, is left out.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(record: Record) -> str:
    sparsity = f"  sparsity {record['sparsity']:6.2%}" if "sparsity" in record else ""
    return (
        f"epoch {record['epoch']:7.2f}  {record['split']} loss {record['loss']:.4f}  "
        f"accuracy {record['accuracy']:6.2%}{sparsity}"
    )
