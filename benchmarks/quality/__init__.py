"""Accuracy at equal sparsity: every pruning method on the same weights, batches and tasks.

    python -m benchmarks.quality --quick --jobs 2
    python -m benchmarks.quality.table benchmarks/results/quality.jsonl
    python -m benchmarks.quality.plot benchmarks/results/quality.jsonl quality.png

`tasks.py` says what is trained, `methods.py` how it is pruned, `run.py` runs one against the other
and writes a line of JSON a run; `table.py` and `plot.py` read these lines.
"""
