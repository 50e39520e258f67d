"""N:M sparsity compared: 2:4 and 1:4, the same program as `benchmarks.quality` with other methods.

    python -m benchmarks.quality.patterns --tune --jobs 2
    python -m benchmarks.quality.patterns --jobs 2
    python -m benchmarks.quality.table benchmarks/results/patterns.jsonl

Sparsity 50 % stands for 2:4, 75 % for 1:4.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

from benchmarks.quality import run
from benchmarks.quality.methods import Method, dense
from benchmarks.quality.peers import patterns
from benchmarks.quality.results import DENSE, OURS
from benchmarks.quality.tasks import all_tasks
from benchmarks.quality.workers import Registry

OUT = "benchmarks/results/patterns.jsonl"

METHODS = (
    Method(DENSE, "", dense, prunes=False),
    Method(OURS, "this library's groups.n_of_m", patterns.soft),
    Method("hard", "groups.n_of_m, hard", patterns.hard),
    Method("one-shot", "Mishra et al., 2021", patterns.one_shot),
    Method("sr-ste", "Zhou et al., ICLR 2021", patterns.sr_ste),
)


def load(directory: Path) -> Registry:
    """The tasks, at the sparsities of the patterns, and the methods."""
    tasks = all_tasks(directory)
    sparsities = tuple(patterns.PATTERNS)
    changed = partial(
        dataclasses.replace, sparsities=sparsities, tuned_at=sparsities[-1:], tuning_seeds=3
    )
    return Registry(
        {
            "lenet": changed(tasks["lenet"], quick_sparsities=sparsities),
            "char": changed(tasks["char"]),
        },
        {method.name: method for method in METHODS},
    )


if __name__ == "__main__":
    raise SystemExit(run.main(["--out", OUT, *sys.argv[1:]], load))
