"""Images per second of the training step: dense, sparse, by both engines, and in PyTorch.

    python -m benchmarks.train_throughput                           ResNet-50, as for ImageNet
    python -m benchmarks.train_throughput --model resnet18 --batch-size 8 --image-size 128

On the first device of the machine; bfloat16 on an accelerator and float32 on a CPU, unless told.
The batch is random and lies on the device, so that the step alone is measured. The JAX steps are
the trainer's own, their state donated; PyTorch, where it is installed, runs `torch_resnet` in a
process of its own, because the two may want different versions of CUDA's libraries
(`--torch-python` names an interpreter that has it). All take turns: a round is some steps of each,
with one wait for the device at its end; the first round is not counted, and the order is reversed
from round to round. The sparse step is that of a named sparsity, which selects a quantile of the
weights once in a thousand steps: a selection is timed in each round too, and each step is given
its thousandth. A ratio is the median over the rounds of images per second over those of the
dense JAX step in the same round; in brackets are the quartiles.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# PyTorch's process wants memory of the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.optimizer_step import selection
from lats_optax.target import default_update_every
from lats_optax.training import experiment
from lats_optax.training.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PruneConfig,
    TrainConfig,
)
from lats_optax.training.optimizer import make_optimizer
from lats_optax.training.parallel import Engine, JitEngine, PmapEngine

CLASSES, STEPS_PER_EPOCH, EPOCHS = 1000, 5004, 100
UPDATE_EVERY = default_update_every(EPOCHS * STEPS_PER_EPOCH)
TARGET = 0.9
# As the published ResNet-50 is trained.
OPTIMIZER = OptimizerConfig(
    learning_rate=0.256, momentum=0.875, weight_decay=2.0**-15, warmup_epochs=5, decay="epoch"
)
LABEL_SMOOTHING = 0.1
DENSE, SPARSE = PruneConfig(), PruneConfig(target_sparsity=TARGET)
STEPS: dict[str, tuple[type[Engine], PruneConfig]] = {
    "dense": (PmapEngine, DENSE),
    "sparse": (PmapEngine, SPARSE),
    "dense, jit": (JitEngine, DENSE),
    "sparse, jit": (JitEngine, SPARSE),
}
TORCH_MODELS = ("resnet18", "resnet34", "resnet50", "resnet101")


class Runner(NamedTuple):
    """Something that takes steps: seconds for so many of them, and the most memory it took."""

    seconds: Callable[[int], float]
    peak_bytes: Callable[[], int | None]
    note: str


class Result(NamedTuple):
    """Medians over the rounds, and the quartiles of the ratio to the dense step."""

    images_per_second: float
    milliseconds: float
    ratio: float
    low: float
    high: float


def config_of(options: argparse.Namespace, prune: PruneConfig) -> TrainConfig:
    """The published settings with this model and batch."""
    return TrainConfig(
        data=DataConfig(batch_size=options.batch_size),
        model=ModelConfig(name=options.model, dtype=options.dtype),
        optimizer=OPTIMIZER,
        prune=prune,
        label_smoothing=LABEL_SMOOTHING,
        epochs=EPOCHS,
    )


def image_shape(options: argparse.Namespace) -> tuple[int, int, int]:
    """Height, width and channels of the images."""
    return options.image_size, options.image_size, 1 if options.model.startswith("digits") else 3


def jax_runner(options: argparse.Namespace, kind: type[Engine], prune: PruneConfig) -> Runner:
    """The trainer's step, compiled, on a batch that stays on the device."""
    config = config_of(options, prune)
    parallel = kind(jax.devices()[:1])
    model = experiment.make_model(config, CLASSES, parallel.axis_name)
    phase = make_optimizer(config, STEPS_PER_EPOCH).phases[0]
    step = parallel.compile_update(experiment.bind_step(config, model, phase, parallel.split))
    random = np.random.default_rng(0)
    images = random.standard_normal((options.batch_size, *image_shape(options)), np.float32)
    batch = parallel.shard(
        {
            "image": images.astype(jnp.dtype(options.dtype)),
            "label": random.integers(CLASSES, size=options.batch_size, dtype=np.int32),
        }
    )
    state = parallel.create(experiment.bind_state(config, model, phase, image_shape(options)))
    start = time.perf_counter()
    # Ahead of time, for its memory analysis: the device's own peak would be that of all programs.
    compiled = step.lower(state, batch).compile()
    took = time.perf_counter() - start
    batch = jax.device_put(batch, compiled.input_shardings[0][1])
    memory = compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes

    @jax.jit
    def select(latent: list[jax.Array]) -> jax.Array:
        return selection(latent, TARGET)

    def seconds(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        for _ in range(steps):
            state, _ = compiled(state, batch)
        jax.block_until_ready(state)
        elapsed = time.perf_counter() - start
        if config.prune.enabled:
            latent = jax.tree.leaves(optax.tree.get(state.opt_state, "latent"))
            start = time.perf_counter()
            jax.block_until_ready(select(latent))
            elapsed += steps / UPDATE_EVERY * (time.perf_counter() - start)
        return elapsed

    return Runner(seconds, lambda: peak, f"compiled in {took:.0f} s")


def torch_runner(options: argparse.Namespace) -> Runner:
    """The same step in PyTorch, in a process of its own."""
    arguments = {
        "model": options.model,
        "batch-size": options.batch_size,
        "image-size": options.image_size,
        "dtype": options.dtype,
        "learning-rate": OPTIMIZER.learning_rate / OPTIMIZER.warmup_epochs,  # as the JAX step's
        "momentum": OPTIMIZER.momentum,
        "weight-decay": OPTIMIZER.weight_decay,
        "label-smoothing": LABEL_SMOOTHING,
    }
    command = [options.torch_python, "-m", "benchmarks.torch_resnet"]
    command += [f"--{name}={value}" for name, value in arguments.items()]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    peak: int | None = None

    def answer() -> dict[str, Any]:
        line = stdout.readline()
        if not line:
            sys.exit(f"PyTorch's process ended with exit code {process.wait()}; see above")
        return json.loads(line)

    def seconds(steps: int) -> float:
        nonlocal peak
        print(steps, file=stdin, flush=True)
        reply = answer()
        peak = reply["peak_bytes"]
        return reply["seconds"]

    made = answer()
    return Runner(
        seconds, lambda: peak, f"torch {made['version']} on {made['device']}, {made['made']}"
    )


def measure(
    runners: dict[str, Runner], batch_size: int, steps: int, rounds: int
) -> dict[str, Result]:
    """Rounds of all runners in turn."""
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name in list(runners)[:: -1 if turn % 2 else 1]:
            seconds = runners[name].seconds(steps)
            if turn:
                speeds[name].append(batch_size * steps / seconds)
    results = {}
    for name, own in speeds.items():
        ratios = [mine / base for mine, base in zip(own, speeds["dense"])]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        middle = statistics.median(own)
        results[name] = Result(
            middle, 1e3 * batch_size / middle, statistics.median(ratios), low, high
        )
    return results


def print_table(runners: dict[str, Runner], results: dict[str, Result]) -> None:
    """Prints the table."""
    print(f"{'step':<11} {'images/s':>9} {'ms/step':>8}  {'ratio to dense':<21} {'memory GB':>9}")
    for name, row in results.items():
        peak = runners[name].peak_bytes()
        ratio = f"{row.ratio:.3f} [{row.low:.3f} … {row.high:.3f}]"
        memory = "" if peak is None else f"{peak / 1e9:9.2f}"
        print(
            f"{name:<11} {row.images_per_second:9.1f} {row.milliseconds:8.2f}  {ratio:<21} {memory}"
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked, with what depends on the machine filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="model of the zoo")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="what layers compute in")
    parser.add_argument("--steps", type=int, default=20, help="steps of each in a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, help="measure PyTorch")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    options = parser.parse_args(arguments)
    for name, least in (("batch_size", 1), ("image_size", 1), ("steps", 1), ("rounds", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: allowed is {least} or more")
    # Of all steps the first alone, which is not counted, is then due for a selection.
    if options.steps * (options.rounds + 1) > UPDATE_EVERY:
        parser.error(
            f"--steps: allowed with {options.rounds} rounds is "
            f"{UPDATE_EVERY // (options.rounds + 1)} or less"
        )
    if options.dtype is None:
        options.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if options.torch and options.model not in TORCH_MODELS:
        parser.error(f"--torch: allowed with --model {', '.join(TORCH_MODELS)}")
    if options.torch and not has_torch(options):
        parser.error("--torch: PyTorch is not installed here; allowed with a --torch-python")
    try:
        config = config_of(options, DENSE)
        model = experiment.make_model(config, CLASSES)
        phase = make_optimizer(config, STEPS_PER_EPOCH).phases[0]
        jax.eval_shape(experiment.bind_state(config, model, phase, image_shape(options)))
    except ValueError as error:
        parser.error(str(error))
    return options


def has_torch(options: argparse.Namespace) -> bool:
    """Whether PyTorch is installed here; another interpreter is taken at its word."""
    here = options.torch_python == sys.executable
    return not here or importlib.util.find_spec("torch") is not None


def torch_is_wanted(options: argparse.Namespace) -> bool:
    """Whether PyTorch is to be measured; says so where it cannot be."""
    if options.torch is not None:
        return options.torch
    if options.model not in TORCH_MODELS:
        print(f"PyTorch: left out, there is no {options.model} in benchmarks/torch_resnet.py")
        return False
    if not has_torch(options):
        print("PyTorch: left out, it is not installed here (see --torch-python)")
        return False
    return True


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    """Print the table."""
    options = parse(arguments)
    device = jax.devices()[0]
    machine = f" ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"
    print(
        f"{device.device_kind}{machine if device.platform == 'cpu' else ''}; jax {jax.__version__}"
        f"; {options.model}, batch {options.batch_size}, {options.image_size}×"
        f"{options.image_size}, {options.dtype}; {options.rounds} rounds of {options.steps} steps"
    )
    runners = {}
    for name, (kind, prune) in STEPS.items():
        runners[name] = jax_runner(options, kind, prune)
        print(f"{name}: {runners[name].note}", flush=True)
    if torch_is_wanted(options):
        runners["PyTorch"] = torch_runner(options)
        print(f"PyTorch: {runners['PyTorch'].note}", flush=True)
    results = measure(runners, options.batch_size, options.steps, options.rounds)
    print_table(runners, results)
    return results


if __name__ == "__main__":
    main()
