"""Tables for the directive `printed`: what other programs know, in the form that a page needs."""

from pathlib import Path

from benchmarks.quality import results, scores, table
from lats_optax.training.presets import PRESETS

RESULTS = Path("benchmarks/results/quality.jsonl")


def quality(tasks: list[str]) -> None:
    """Print the table of each task of the quality benchmark, without headings and verdicts."""
    known = {task.task: task for task in scores.scores(results.read(RESULTS)[0])}
    for name in tasks:
        print("\n".join(table.task_table(known[name])))


def presets(prefixes: list[str]) -> None:
    """Print the presets whose names begin with one of the prefixes, as a table."""
    print("| command | what it does, what it takes and gives |\n|---|---|")
    for name, preset in PRESETS.items():
        if name.startswith(tuple(prefixes)):
            print(f"| `lats-train {name}` | {preset.summary} |")
