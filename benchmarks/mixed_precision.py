"""Training in bfloat16 beside training in float32, over several seeds: accuracy and zeros.

    lats-prepare fashion_mnist --from DIR
    python -m benchmarks.mixed_precision --workdir runs/mixed_precision

Both are the trainer's own run of a preset that names its sparsity, from the same weights on the
same batches. In bfloat16 the layers compute; parameters and latent weights stay in float32. With a
working directory named, an interrupted run goes on from its checkpoint, and a finished one is not
run again.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.intervals import Interval, interval, paired
from lats_optax.training import experiment, loop
from lats_optax.training.config import TrainConfig
from lats_optax.training.presets import PRESETS

DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains in both, and prints the table; 1 where a run missed its sparsity."""
    parser = argparse.ArgumentParser(
        "benchmarks.mixed_precision", description=(__doc__ or "").splitlines()[0]
    )
    named = [name for name, preset in PRESETS.items() if preset.config.prune.target_sparsity]
    parser.add_argument("--preset", choices=named, default="fashion-mnist-lats")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--data", help="where the data set was prepared; default: TFDS's directory")
    parser.add_argument("--workdir", type=Path, help="where runs are kept; default: nowhere")
    options = parser.parse_args(arguments)
    for name in ("epochs", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; allowed: 1 or more")
    preset = PRESETS[options.preset].config
    base = dataclasses.replace(
        preset,
        epochs=options.epochs,
        data=dataclasses.replace(preset.data, data_dir=options.data),
    )
    accuracies: dict[str, dict[int, float]] = {dtype: {} for dtype in DTYPES}
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(options.seeds):
            for dtype in DTYPES:
                folder = (options.workdir or Path(temporary)) / f"{dtype}-{seed}"
                result = loop.fit(experiment.build_experiment(_config(base, dtype, seed, folder)))
                accuracies[dtype][seed] = result.test_accuracy
                target, size = base.prune.target_sparsity, result.sparsity.size
                assert target is not None
                wanted = round(target * size)
                missed += result.sparsity.zeros != wanted
                print(
                    f"{dtype}, seed {seed}: accuracy {result.test_accuracy:.2%}, "
                    f"{result.sparsity.zeros:,} of {size:,} zeros, {wanted:,} wanted",
                    flush=True,
                )
    print(report(accuracies))
    return 1 if missed else 0


def report(accuracies: dict[str, dict[int, float]]) -> str:
    """The table: a mean with its 95 % interval for each type, and that of the difference.

    >>> print(report({"float32": {0: 0.9, 1: 0.92}, "bfloat16": {0: 0.9, 1: 0.91}}))
    float32   91.00 ± 12.71 %
    bfloat16  90.50 ± 6.35 %
    bfloat16 - float32, paired: -0.50 ± 6.35 points, within the noise of a seed
    """
    rows = [
        f"{dtype:<9} {_percent(interval(list(values.values())))} %"
        for dtype, values in accuracies.items()
    ]
    first, second = DTYPES
    difference = paired(accuracies[second], accuracies[first])
    assert difference is not None
    if difference.seeds < 2:
        noise = "one seed has no interval"
    else:
        noise = f"{'within' if difference.contains_zero else 'beyond'} the noise of a seed"
    rows.append(f"{second} - {first}, paired: {_percent(difference)} points, {noise}")
    return "\n".join(rows)


def _percent(found: Interval) -> str:
    return f"{100 * found.mean:.2f} ± {100 * found.half_width:.2f}"


def _config(base: TrainConfig, dtype: str, seed: int, workdir: Path) -> TrainConfig:
    model = dataclasses.replace(base.model, dtype=dtype)
    return dataclasses.replace(
        base, model=model, seed=seed, workdir=workdir, resume=workdir.exists()
    )


if __name__ == "__main__":
    sys.exit(main())
