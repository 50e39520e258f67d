"""A long run in one process: whether memory stays flat, steps as fast, and the target exact.

    python -m benchmarks.long_run --steps 50000

It trains a small network on the digits to a named sparsity by the trainer's own loop, with an
evaluation and a checkpoint after each quarter, and prints one line a figure: the memory that the
process has allocated in the middle of each quarter, the time of a step in the second and in the
last thousand (the first compiles), and the zeros beside those wanted.

Memory is what malloc has given and not got back (glibc alone counts it), Python's objects included:
the program starts itself again with PYTHONMALLOC=malloc. The resident set would not do: it has also
what was freed, until the system takes it back.
"""

import argparse
import ctypes
import dataclasses
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from lats_optax.training import experiment, loop
from lats_optax.training.presets import PRESETS

_THOUSAND = 1000
_MIB = 2**20


class Memory(threading.Thread):
    """Samples the allocated memory of this process, in bytes, until it is closed."""

    def __init__(self, seconds: float = 0.5) -> None:
        """Starts to sample."""
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int]] = []
        self._seconds, self._end = seconds, threading.Event()
        self.start()

    def run(self) -> None:
        """Samples."""
        while not self._end.wait(self._seconds):
            self.samples.append((time.perf_counter(), allocated()))

    def close(self) -> None:
        """Ends the thread."""
        self._end.set()
        self.join()


class _Mallinfo2(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def allocated() -> int:
    """Bytes that malloc has given and not got back: of its arenas, and mapped one by one."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, and prints the figures."""
    parser = argparse.ArgumentParser(
        "benchmarks.long_run", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--steps", type=int, default=50_000, help="at least 4,000")
    options = parser.parse_args(arguments)
    if options.steps < 4 * _THOUSAND:
        parser.error(f"--steps is {options.steps}; allowed: {4 * _THOUSAND} or more")
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        parser.error("this program needs glibc 2.33 or newer, whose malloc counts what it gives")
    with tempfile.TemporaryDirectory() as directory:
        preset = PRESETS["digits-lats"].config
        config = dataclasses.replace(
            preset,
            model=dataclasses.replace(preset.model, width=0.25),
            workdir=Path(directory) / "run",
            log_every=_THOUSAND,
        )
        epochs = options.steps // experiment.build_experiment(config).steps_per_epoch
        quarter = -(-epochs // 4)
        config = dataclasses.replace(
            config, epochs=epochs, eval_every=quarter, checkpoint_every=quarter
        )
        memory = Memory()
        result = loop.fit(experiment.build_experiment(config))
        memory.close()
    print(report(result, memory.samples))
    return 0


def report(result: loop.RunResult, samples: Sequence[tuple[float, int]]) -> str:
    """The figures of a run, one a line."""
    speeds = [
        record["images_per_second"]
        for record in result.metrics
        if record["split"] == "train" and record["step"] % _THOUSAND == 0
    ]
    each = [1000 * result.config.data.batch_size / speed for speed in speeds]
    # The first thousand compile.
    first, last = each[1], each[-1]
    quarters = [_memory(samples, part) for part in (1 / 8, 3 / 8, 5 / 8, 7 / 8)]
    target = result.config.prune.target_sparsity
    assert target is not None
    wanted = round(target * result.sparsity.size)
    lines = [
        f"{result.metrics[-1]['step']:,} steps in {result.seconds:.0f} s",
        f"memory: {', '.join(f'{each / _MIB:.1f}' for each in quarters)} MiB in the four quarters, "
        f"{quarters[3] / quarters[1] - 1:+.2%} from the second to the last",
        f"step: {first:.3f} ms in the second thousand, {last:.3f} ms in the last, "
        f"{last / first - 1:+.1%}; median {statistics.median(each[1:]):.3f} ms",
        f"zeros: {result.sparsity.zeros:,} of {result.sparsity.size:,}, {wanted:,} wanted",
    ]
    return "\n".join(lines)


def _memory(samples: Sequence[tuple[float, int]], part: float) -> float:
    """The median over a tenth of the run, around a part of it."""
    begin, end = samples[0][0], samples[-1][0]
    around = begin + part * (end - begin)
    return statistics.median(
        size for at, size in samples if abs(at - around) <= 0.05 * (end - begin)
    )


if __name__ == "__main__":
    if os.environ.get("PYTHONMALLOC") != "malloc":
        os.environ["PYTHONMALLOC"] = "malloc"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
