"""Images per second of the training step: dense, sparse, the published way, and in PyTorch.

    python -m benchmarks.train_throughput                           ResNet-50, as for ImageNet
    python -m benchmarks.train_throughput --model resnet18 --batch-size 8 --image-size 128
    python -m benchmarks.train_throughput --tiny                    whether it works here

On the first device of the machine; bfloat16 on an accelerator and float32 on a CPU, unless told.
The batch is random and lies on the device, so that the step alone is measured. The JAX steps are
the trainer's own, by both engines, their state donated. "Thresholded in the layers" is the
published way, in JAX and in PyTorch: the optimizer has the latent weights, and each layer computes
``sign(w) relu(|w| - d)`` of its own before it uses them, differentiated as it stands. PyTorch,
where it is installed, runs `torch_resnet` in a process of its own, because the two may want
different versions of CUDA's libraries (`--torch-python` names an interpreter that has it).

All take turns: a round is some steps of each, with one wait for the device at its end; the first
round is not counted, and the order is reversed from round to round. The sparse step is that of a
named sparsity, which selects a quantile of the weights once in a thousand steps: a selection is
timed in each round too, and each step is given its thousandth. A ratio is the median over the
rounds of images per second over those of another step in the same round; in brackets are the
quartiles. Memory is the most that a step takes, by the compiler's report for JAX and by the
allocator's for PyTorch. What cannot be made or does not fit into `--minutes` is left out, with a
line. Needs JAX, Flax and optax alone.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

# PyTorch's process wants memory of the same device.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lats_optax
from benchmarks import records
from benchmarks.optimizer_step import selection
from lats_optax.target import default_update_every
from lats_optax.training import assembly
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
TARGET, THRESHOLD = 0.9, 0.02
# As the published ResNet-50 is trained.
OPTIMIZER = OptimizerConfig(
    learning_rate=0.256, momentum=0.875, weight_decay=2.0**-15, warmup_epochs=5, lr_update="epoch"
)
LABEL_SMOOTHING = 0.1
DENSE, SPARSE = PruneConfig(), PruneConfig(target_sparsity=TARGET)
IN_LAYERS, IN_TORCH = "thresholded in the layers", "PyTorch, thresholded in the layers"


class Step(NamedTuple):
    """A step in JAX: its engine, what is pruned, and whether the layers threshold their weights."""

    engine: type[Engine]
    prune: PruneConfig
    in_layers: bool = False


STEPS = {
    "dense": Step(PmapEngine, DENSE),
    "sparse": Step(PmapEngine, SPARSE),
    IN_LAYERS: Step(PmapEngine, DENSE, in_layers=True),
    "dense, jit": Step(JitEngine, DENSE),
    "sparse, jit": Step(JitEngine, SPARSE),
}
# The pairs whose ratio is printed below the table.
AGAINST = [("sparse", IN_LAYERS), ("sparse, jit", IN_LAYERS), ("sparse", IN_TORCH)]
TORCH_MODELS = ("resnet18", "resnet34", "resnet50", "resnet101")


class Runner(NamedTuple):
    """Something that takes steps: seconds for so many of them, and the most memory it took."""

    seconds: Callable[[int], float]
    peak_bytes: Callable[[], int | None]
    note: str


class PeerError(RuntimeError):
    """PyTorch's process has ended."""


class Result(NamedTuple):
    """Medians over the rounds, and the quartiles of the ratio to another step."""

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


def thresholded_in_layers(
    step: assembly.TrainStep, mask: Callable[[Any], Any]
) -> assembly.TrainStep:
    """A dense step whose layers run on ``sign(w) relu(|w| - d)`` of their weights.

    Args:
      step: of `assembly.bind_step`.
      mask: which parameters.

    Source: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity" (ICML
      2020), equation 3; d is that of the LATS schedule.
    """
    rate = lambda count: OPTIMIZER.learning_rate  # noqa: E731
    threshold = lats_optax.lats_threshold(rate, EPOCHS * STEPS_PER_EPOCH, final=THRESHOLD)
    dense = step.keywords["apply"]  # type: ignore[attr-defined]

    def taken(state: Any, batch: Any, mean: Any) -> Any:
        d = threshold(state.step)

        def apply(variables: Any, *args: Any, **options: Any) -> Any:
            sparse = jax.tree.map(
                lambda w, chosen: jnp.sign(w) * jax.nn.relu(jnp.abs(w) - d) if chosen else w,
                variables["params"],
                mask(variables["params"]),
            )
            return dense({**variables, "params": sparse}, *args, **options)

        return step(state, batch, mean, apply=apply)  # type: ignore[call-arg]

    return taken


def jax_runner(options: argparse.Namespace, way: Step) -> Runner:
    """The trainer's step, compiled, on a batch that stays on the device."""
    config = config_of(options, way.prune)
    parallel = way.engine(jax.devices()[:1])
    model = assembly.make_model(config, CLASSES, parallel.axis_name)
    optimizer = make_optimizer(config, STEPS_PER_EPOCH)
    phase = optimizer.phases[0]
    pure = assembly.bind_step(config, model, phase, parallel.split, parallel.whole)
    if way.in_layers:
        pure = thresholded_in_layers(pure, optimizer.mask)
    step = parallel.compile_update(pure)
    random = np.random.default_rng(0)
    images = random.standard_normal((options.batch_size, *image_shape(options)), np.float32)
    batch = parallel.shard(
        {
            "image": images.astype(jnp.dtype(options.dtype)),
            "label": random.integers(CLASSES, size=options.batch_size, dtype=np.int32),
        }
    )
    state = parallel.create(assembly.bind_state(config, model, phase, image_shape(options)))
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

    seconds(1)  # so that what comes next finds the memory taken
    return Runner(seconds, lambda: peak, f"compiled in {took:.0f} s")


def torch_runner(options: argparse.Namespace, in_layers: bool) -> Runner:
    """The same step in PyTorch, in a process of its own.

    Raises:
      PeerError: that process ends before it has taken a step.
    """
    arguments = {
        "model": options.model,
        "batch-size": options.batch_size,
        "image-size": options.image_size,
        "dtype": options.dtype,
        "learning-rate": OPTIMIZER.learning_rate / OPTIMIZER.warmup_epochs,  # as the JAX step's
        "momentum": OPTIMIZER.momentum,
        "weight-decay": OPTIMIZER.weight_decay,
        "label-smoothing": LABEL_SMOOTHING,
        "threshold": THRESHOLD if in_layers else 0.0,
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
            raise PeerError(f"PyTorch's process ended with exit code {process.wait()}; see above")
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
    runners: dict[str, Runner], batch_size: int, steps: int, rounds: int, until: float = math.inf
) -> dict[str, list[float]]:
    """Images per second of all runners in turn, of each round.

    Args:
      runners: by name.
      batch_size: images in a step.
      steps: of each in a round.
      rounds: how many are counted; fewer, but two, where the time is up.
      until: when that is, by `time.perf_counter`.
    """
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        if turn > 2 and time.perf_counter() > until:
            break
        for name in list(runners)[:: -1 if turn % 2 else 1]:
            seconds = runners[name].seconds(steps)
            if turn:
                speeds[name].append(batch_size * steps / seconds)
    return speeds


def summarize(
    speeds: dict[str, list[float]], batch_size: int, base: str = "dense"
) -> dict[str, Result]:
    """Medians, and ratios to one of the runners."""
    results = {}
    for name, own in speeds.items():
        ratios = [mine / other for mine, other in zip(own, speeds[base])]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        middle = statistics.median(own)
        results[name] = Result(
            middle, 1e3 * batch_size / middle, statistics.median(ratios), low, high
        )
    return results


def print_table(runners: dict[str, Runner], speeds: dict[str, list[float]], batch: int) -> None:
    """Prints the table, and the ratios of some pairs."""
    print(f"{'step':<34} {'images/s':>9} {'ms/step':>8}  {'ratio to dense':<21} {'memory GB':>9}")
    for name, row in summarize(speeds, batch).items():
        peak = runners[name].peak_bytes()
        memory = "" if peak is None else f"{peak / 1e9:9.2f}"
        print(
            f"{name:<34} {row.images_per_second:9.1f} {row.milliseconds:8.2f}  "
            f"{_ratio(row):<21} {memory}"
        )
    for name, base in AGAINST:
        if name in speeds and base in speeds:
            print(f"{name} / {base}: {_ratio(summarize(speeds, batch, base)[name])}")


def record(options: argparse.Namespace, speeds: dict[str, list[float]]) -> None:
    """Writes the speeds of all rounds, and their ratios to the dense step, to `options.json`."""
    device = jax.devices()[0]
    dense = speeds["dense"]
    for unit, values in {
        "images/s": speeds,
        "ratio to dense": {
            name: [mine / other for mine, other in zip(own, dense)] for name, own in speeds.items()
        },
    }.items():
        records.write(
            options.json,
            "train_throughput",
            values,
            unit=unit,
            lower_is_better=False,
            settings={
                name: getattr(options, name)
                for name in ("model", "batch_size", "image_size", "dtype", "steps")
            },
            machine=None if device.platform == "cpu" else device.device_kind,
        )


def _ratio(row: Result) -> str:
    return f"{row.ratio:.3f} [{row.low:.3f} … {row.high:.3f}]"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked, with what depends on the machine filled in."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet50", help="model of the zoo")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="what layers compute in")
    parser.add_argument("--steps", type=int, default=20, help="steps of each in a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--torch", action=argparse.BooleanOptionalAction, help="measure PyTorch")
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with PyTorch")
    parser.add_argument("--minutes", type=float, default=9, help="that it may take")
    parser.add_argument("--tiny", action="store_true", help="other defaults: whether it works")
    records.add_argument(parser)
    known, _ = parser.parse_known_args(arguments)
    if known.tiny:
        parser.set_defaults(model="resnet18", batch_size=2, image_size=32, steps=1, rounds=2)
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error("--minutes: allowed is more than 0")
    for name, least in (("batch_size", 1), ("image_size", 1), ("steps", 1), ("rounds", 2)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')}: allowed is {least} or more")
    # Of all steps the very first alone, before all rounds, is then due for a selection.
    if options.steps * (options.rounds + 1) >= UPDATE_EVERY:
        parser.error(
            f"--steps: allowed with {options.rounds} rounds is "
            f"{(UPDATE_EVERY - 1) // (options.rounds + 1)} or less"
        )
    if options.dtype is None:
        options.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if options.torch and options.model not in TORCH_MODELS:
        parser.error(f"--torch: allowed with --model {', '.join(TORCH_MODELS)}")
    if options.torch and not has_torch(options):
        parser.error("--torch: PyTorch is not installed here; allowed with a --torch-python")
    try:
        config = config_of(options, DENSE)
        model = assembly.make_model(config, CLASSES)
        phase = make_optimizer(config, STEPS_PER_EPOCH).phases[0]
        jax.eval_shape(assembly.bind_state(config, model, phase, image_shape(options)))
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


def make_runners(options: argparse.Namespace, until: float) -> dict[str, Runner]:
    """All that can be made here before it is time to measure; a line for each."""
    makers: dict[str, Callable[[], Runner]] = {
        name: partial(jax_runner, options, way) for name, way in STEPS.items()
    }
    if torch_is_wanted(options):
        makers["PyTorch"] = partial(torch_runner, options, in_layers=False)
        makers[IN_TORCH] = partial(torch_runner, options, in_layers=True)
    runners: dict[str, Runner] = {}
    for name, make in makers.items():
        if len(runners) > 1 and time.perf_counter() > until:
            print(f"{name}: left out, there is no time for it (see --minutes)")
            continue
        try:
            runners[name] = make()
            print(f"{name}: {runners[name].note}", flush=True)
        except (jax.errors.JaxRuntimeError, PeerError) as error:
            if name == "dense":  # what all others are compared with
                raise
            print(f"{name}: left out, {str(error).splitlines()[0]}", flush=True)
    return runners


def main(arguments: list[str] | None = None) -> dict[str, Result]:
    """Print the table; returns the ratios to the dense step."""
    begin = time.perf_counter()
    options = parse(arguments)
    device = jax.devices()[0]
    machine = f" ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"
    print(
        f"{device.device_kind}{machine if device.platform == 'cpu' else ''}; jax {jax.__version__}"
        f"; {options.model}, batch {options.batch_size}, {options.image_size}×"
        f"{options.image_size}, {options.dtype}; {options.rounds} rounds of {options.steps} steps"
    )
    seconds = 60 * options.minutes
    runners = make_runners(options, begin + 0.7 * seconds)
    sizes = (options.batch_size, options.steps, options.rounds)
    speeds = measure(runners, *sizes, until=begin + seconds)
    print_table(runners, speeds, options.batch_size)
    record(options, speeds)
    return summarize(speeds, options.batch_size)


if __name__ == "__main__":
    main()
