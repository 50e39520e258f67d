"""The training step of each ImageNet preset, compiled by the TPU compiler where there is no TPU.

    python -m benchmarks.tpu_compile                          all presets; v5e:2x4 and a pod
    python -m benchmarks.tpu_compile --presets imagenet-resnet50-lats --topologies v5e:16x16
    python -m benchmarks.tpu_compile --engines pmap jit:8     the state divided over eight chips too
    python -m benchmarks.tpu_compile --json programs.json     goes on where it was interrupted

Needs jax[tpu], whose compiler runs on any Linux machine. Each preset's step, exactly as the trainer
makes it, is compared with the dense step of the same settings; figures are a chip's:

    GFLOP        operations in one step, as XLA counts them
    GB, ratio    bytes that one step moves between the chip's memory (HBM) and its cores, and
                 these over those of the dense step
    XLA          the same ratio of XLA's own count, which counts what is fetched ahead into the
                 cores' memory (VMEM) three times, and one of a selection's nine reads in each step
    memory       arguments + temporaries + outputs − outputs in the place of arguments, in GB
    state        arguments alone: the training state and the chip's images, in GB
    collectives  how many there are in the compiled program, and the MB that they return

A preset that names its sparsity selects a quantile of the weights every some steps, in nine reads
of them; GB hold the mean over these steps. Steps whose programs differ in nothing but the contents
of a table of thresholds are compiled once.

Under the jit engine the optimizer's update with its closed loop is compiled alone as well: a step
gathers weights for the forward pass, and its collectives do not show that a selection gathers none.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

from benchmarks.optimizer_step import SELECTION_PASSES, bytes_accessed
from lats_optax.target import default_update_every
from lats_optax.training import assembly
from lats_optax.training.config import PruneConfig, TrainConfig
from lats_optax.training.optimizer import make_optimizer
from lats_optax.training.parallel import Engine, JitEngine, PmapEngine
from lats_optax.training.presets import PRESETS

TRAINING_IMAGES, CLASSES, IMAGE_SHAPE = 1_281_167, 1000, (224, 224, 3)  # of ImageNet
TOPOLOGIES = ("v5e:2x4", "v5e:16x16")
KINDS = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    "|ragged-all-to-all"
)
# What moves nothing, or has been counted where it began.
STILL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "conditional", "after-all"),
    *("copy-done", "slice-done", "all-reduce-done", "partition-id", "replica-id"),
}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


class Facts(NamedTuple):
    """What the compiler says of one program, for one chip; sizes in bytes."""

    flops: float
    xla_bytes: float
    bytes: float
    arguments: int
    temporaries: int
    memory: int
    collectives: dict[str, list[int]]
    compile_seconds: float


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      preset: its name.
      facts: of its own program.
      bytes: in one step, the mean over many.
      ratio: of these to those of the dense step.
      xla_ratio: the same of XLA's count of the two programs.
      more_collectives: whether its collectives are not those of the dense step.
      same_as: the step that was compiled, which may be another one that is the same program.
    """

    preset: str
    facts: Facts
    bytes: float
    ratio: float
    xla_ratio: float
    more_collectives: bool
    same_as: str


def lower_step(config: TrainConfig, engine: Engine, batch_per_chip: int) -> Any:
    """The trainer's own step for an engine's devices, before compilation; no array is made."""
    model, phase, state = _parts(config, engine.axis_name)
    images = len(engine.devices) * batch_per_chip
    batch = {
        "image": jax.ShapeDtypeStruct((images, *IMAGE_SHAPE), jnp.dtype(config.model.dtype)),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }
    step = assembly.bind_step(config, model, phase, engine.split, engine.whole)
    return engine.compile_update(step).lower(*engine.abstract(state, batch))


def lower_update(config: TrainConfig, engine: Engine) -> Any:
    """The optimizer's update alone, with its closed loop if it has one, before compilation."""
    _, phase, state = _parts(config, engine.axis_name)
    arguments, _ = engine.abstract((state.params, state.opt_state, state.params), {})
    return jax.jit(phase.transform.update).lower(*arguments)


def facts(lowered: Any) -> Facts:
    """Compiles a program and asks what there is to know of it."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Facts(
        flops=compiled.cost_analysis()["flops"],
        xla_bytes=bytes_accessed(compiled),
        bytes=moved_bytes(text),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        memory=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        collectives=collectives(text),
        compile_seconds=seconds,
    )


def collectives(text: str) -> dict[str, list[int]]:
    """Kind -> how many there are in a compiled program, and the bytes that they return.

    One in a loop counts once. Of an asynchronous pair the second half counts, which returns what
    the whole does.
    """
    found: dict[str, list[int]] = {}
    for result, kind in re.findall(rf" = (\S.*?) ({KINDS})(?:-done)?\(", text):
        count, size = found.get(kind, [0, 0])
        found[kind] = [count + 1, size + _size(result)]
    return found


def moved_bytes(text: str) -> float:
    """Bytes that a compiled program moves to and from memory outside the cores.

    Operands and results of all that runs in every step, so not of a conditional's branches; those
    in a memory space other than the chip's own, S(1), do not count.
    """
    entry = text[text.index("\nENTRY ") :]
    outside: dict[str, list[float]] = {}
    total = 0.0
    for line in entry.splitlines():
        found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:,|$)", line)
        if not found or "ConcatBitcast" in line:
            continue
        name, result, operation, operands = found.groups()
        outside[name] = [0.0 if space else size for size, space in _arrays(result)]
        read = [outside.get(operand, [0.0]) for operand in re.findall(r"%([\w.-]+)", operands)]
        if operation == "copy-start":  # of which the result names both ends
            total += sum(outside[name][:2])
        elif operation == "slice-start":  # reads of its operand no more than it returns
            size = _arrays(result)[1][0]
            total += outside[name][1] + (size if read[0][0] else 0.0)
        elif operation not in STILL:
            total += sum(outside[name]) + sum(map(sum, read))
    return total


def same_program(text: str) -> str:
    """A lowered program without the contents of its tables of float32: constants of one dimension.

    No pass of the compiler looks into a table that is read at a position which is not known before
    the program runs, so that programs which are equal in the rest compile to the same thing.
    """
    return re.sub(r'dense<"0x[0-9A-F]*"> : (tensor<\d+xf32>)', r"dense<...> : \1", text)


class Compiler:
    """Compiles the steps of configs for one topology, no program twice.

    Args:
      engine: of the topology's devices.
      batch_per_chip: images.
      store: a file of programs compiled before, one a line; new ones are appended. None: no file.
    """

    def __init__(self, engine: Engine, batch_per_chip: int, store: Path | None = None):
        self.engine = engine
        self.batch_per_chip = batch_per_chip
        self.store = store
        self.known: dict[str, tuple[str, Facts]] = {}
        if store is not None and store.exists():
            for line in store.read_text().splitlines():
                saved = json.loads(line)
                self.known[saved["key"]] = saved["name"], Facts(**saved["facts"])

    def step(self, config: TrainConfig, name: str) -> tuple[str, Facts]:
        """The facts of a step, and the name of the first one that was the same program."""
        return self._facts(lower_step(config, self.engine, self.batch_per_chip), name)

    def update(self, config: TrainConfig, name: str) -> Facts:
        """The facts of the optimizer's update alone."""
        return self._facts(lower_update(config, self.engine), f"{name}, update")[1]

    def _facts(self, lowered: Any, name: str) -> tuple[str, Facts]:
        key = self._key(same_program(lowered.as_text()))
        if key not in self.known:
            self.known[key] = name, facts(lowered)
            if self.store is not None:
                saved = {"key": key, "name": name, "facts": self.known[key][1]._asdict()}
                with self.store.open("a") as file:
                    print(json.dumps(saved), file=file)
        return self.known[key]

    def row(self, config: TrainConfig, name: str) -> Row:
        """A step's facts beside those of the dense step."""
        dense = dataclasses.replace(config, prune=PruneConfig())
        base = self.step(dense, name if dense == config else f"{name}, dense")[1]
        same, own = self.step(config, name)
        moved = own.bytes
        if config.prune.target_sparsity is not None:
            steps = config.epochs * _steps_per_epoch(config)
            every = config.prune.update_every or default_update_every(steps)
            moved += SELECTION_PASSES * latent_bytes(config) / every
        return Row(
            preset=name,
            facts=own,
            bytes=moved,
            ratio=moved / base.bytes,
            xla_ratio=own.xla_bytes / base.xla_bytes,
            more_collectives=own.collectives != base.collectives,
            same_as=same,
        )

    def _key(self, text: str) -> str:
        devices = self.engine.devices
        kind = f"{devices[0].device_kind} {len(devices)} {jax.__version__} {_libtpu()}"
        return hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()


def latent_bytes(config: TrainConfig) -> int:
    """The size of the latent weights: what a selection reads several times."""
    latent = optax.tree.get(_parts(config, None)[2].opt_state, "latent")
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(latent))


def print_row(row: Row) -> None:
    """Prints a row as soon as it is known: a compilation takes minutes."""
    compiled = f"{row.facts.compile_seconds:.0f} s"
    if row.same_as != row.preset:
        compiled = f"the program of {row.same_as}"
    print(
        f"{row.preset:<30} {row.facts.flops / 1e9:6.0f} {row.bytes / 1e9:6.2f} {row.ratio:6.3f} "
        f"{row.xla_ratio:6.3f} {row.facts.memory / 1e9:7.2f} {row.facts.arguments / 1e9:6.3f}  "
        f"{_listed(row.facts.collectives)}; {compiled}",
        flush=True,
    )


def print_worst(rows: list[Row]) -> None:
    """Prints what all rows stay within."""
    more = [row.preset for row in rows if row.more_collectives]
    print(
        f"at most: ratio {max(row.ratio for row in rows):.3f}, "
        f"memory {max(row.facts.memory for row in rows) / 1e9:.2f} GB; "
        f"collectives that the dense step has not: {', '.join(more) or 'none'}",
        flush=True,
    )


def engine_of(name: str, devices: Sequence[Any]) -> Engine:
    """The engine that `--engines` names, for devices that need not be there.

    Raises:
      ValueError: there is none of that name, or its number does not divide that of the devices.
    """
    kind, colon, fsdp = name.partition(":")
    if kind == "jit" and ((fsdp.isdecimal() and int(fsdp)) or not colon):
        return JitEngine(devices, fsdp=int(fsdp or 1))
    if name != "pmap":
        raise ValueError(f"{name!r}; allowed: pmap, jit, and jit:N with N of 1 or more")
    return PmapEngine(devices)


def print_table(compiler: Compiler, options: argparse.Namespace) -> None:
    """Compiles and prints all presets for one engine."""
    print(
        f"{'preset':<30} {'GFLOP':>6} {'GB':>6} {'ratio':>6} {'XLA':>6} "
        f"{'memory':>7} {'state':>6}  collectives"
    )
    rows = []
    for name in options.presets:
        config = PRESETS[name].config
        model = dataclasses.replace(config.model, dtype=options.dtype)
        config = dataclasses.replace(config, model=model)
        try:
            row = compiler.row(config, name)
        except jax.errors.JaxRuntimeError as error:
            # The compiler's own word on a program that is too large for a chip.
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{name:<30} does not fit: {_first_line(error)}", flush=True)
            continue
        print_row(row)
        rows.append(row)
        # By pmap every chip updates all weights, and asks no other.
        if compiler.engine.axis_name is None and config.prune.enabled:
            alone = compiler.update(config, name).collectives
            print(f"{'its update alone':>30} {_listed(alone)}", flush=True)
    if rows:
        print_worst(rows)


def main() -> None:
    """Print a table for each topology and engine."""
    known = [name for name in PRESETS if name.startswith("imagenet-")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=known, default=known)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES, help="as JAX names them")
    parser.add_argument("--engines", nargs="+", default=["pmap"], help="pmap, jit, jit:FSDP")
    parser.add_argument("--batch-per-chip", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--json", type=Path, help="file of compiled programs: added to, and not compiled again"
    )
    options = parser.parse_args()
    if options.batch_per_chip < 1:
        parser.error("--batch-per-chip: allowed is 1 or more")
    if importlib.util.find_spec("libtpu") is None:
        parser.error("the TPU compiler is not installed here: pip install 'jax[tpu]'")

    # The CPU runs what little runs; the TPU's library is asked for its compiler alone.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

    for topology in options.topologies:
        try:
            devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        except jax.errors.JaxRuntimeError as error:
            parser.error(f"--topologies: {topology}: {_first_line(error)}")
        for name in options.engines:
            try:
                engine = engine_of(name, devices)
            except ValueError as error:
                parser.error(f"--engines: {error}")
            print(
                f"{topology}: {len(devices)} × {devices[0].device_kind}, {name}, "
                f"{options.batch_per_chip} images a chip, {options.dtype}; jax {jax.__version__}, "
                f"{_libtpu()}"
            )
            print_table(Compiler(engine, options.batch_per_chip, options.json), options)


def _parts(config: TrainConfig, axis_name: str | None) -> tuple[Any, Any, Any]:
    """Model, phase and the shapes of their state."""
    model = assembly.make_model(config, CLASSES, axis_name)
    phase = make_optimizer(config, _steps_per_epoch(config)).phases[0]
    return model, phase, jax.eval_shape(assembly.bind_state(config, model, phase, IMAGE_SHAPE))


def _steps_per_epoch(config: TrainConfig) -> int:
    return TRAINING_IMAGES // config.data.batch_size


def _libtpu() -> str:
    installed = importlib.util.find_spec("libtpu") is not None
    return f"libtpu {version('libtpu')}" if installed else "no libtpu"


def _size(result: str) -> int:
    """Bytes of an array or a tuple of them, as the text of a program names its type."""
    return sum(size for size, _ in _arrays(result))


def _arrays(result: str) -> list[tuple[int, bool]]:
    """For each array of a type, its bytes and whether it is in a memory space of its own."""
    arrays = []
    for dtype, axes, layout in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", result):
        size = BYTES[dtype] * math.prod(int(axis) for axis in axes.split(",") if axis)
        arrays.append((size, "S(" in layout))
    return arrays


def _listed(collectives: dict[str, list[int]]) -> str:
    """Collectives as a line of the table has them."""
    found = (f"{n} {kind} ({size / 1e6:.2f} MB)" for kind, (n, size) in collectives.items())
    return ", ".join(found) or "none"


def _first_line(error: Exception) -> str:
    return next(line for line in str(error).splitlines() if line.strip())


if __name__ == "__main__":
    main()
