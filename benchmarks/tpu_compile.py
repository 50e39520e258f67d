"""The training step of each ImageNet preset, compiled by the TPU compiler where there is no TPU.

    python -m benchmarks.tpu_compile                          all presets; v5e:2x4 and a pod
    python -m benchmarks.tpu_compile --presets imagenet-resnet50-lats --topologies v5e:16x16

Needs jax[tpu], whose compiler runs on any Linux machine. Each preset's step, exactly as the trainer
makes it, is compared with the dense step of the same settings; figures are a chip's:

    GFLOP, GB     XLA's count of the operations and of the bytes read and written in one step
    ratio         GB over those of the dense step
    memory        arguments + temporaries + outputs − outputs in the place of arguments, in GB
    collectives   how many there are in the compiled program, and the MB that they return

XLA counts both sides of a conditional and the body of a loop once. A preset that names its sparsity
selects a quantile every some steps, in a conditional: its GB are those of the same step with a
schedule in the place of the selection, plus eight reads of the weights divided by that number of
steps; memory and collectives are of the real program. Steps whose programs differ in nothing but
the contents of a table of thresholds are compiled once.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.optimizer_step import SELECTION_PASSES, bytes_accessed
from lats_optax.target import default_update_every, kth_smallest
from lats_optax.training import loop
from lats_optax.training.config import PruneConfig, TrainConfig
from lats_optax.training.optimizer import make_optimizer
from lats_optax.training.parallel import DataParallel
from lats_optax.training.presets import PRESETS

TRAINING_IMAGES, CLASSES, IMAGE_SHAPE = 1_281_167, 1000, (224, 224, 3)  # of ImageNet
TOPOLOGIES = ("v5e:2x4", "v5e:16x16")
KINDS = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    "|ragged-all-to-all"
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


class Facts(NamedTuple):
    """What the compiler says of one program, for one chip; sizes in bytes."""

    flops: float
    bytes_accessed: float
    arguments: int
    temporaries: int
    memory: int
    collectives: dict[str, tuple[int, int]]
    compile_seconds: float


def lower_step(config: TrainConfig, devices: Sequence[Any], batch_per_chip: int) -> Any:
    """The trainer's own step for these devices, before compilation; no array is made."""
    model, optimizer, state = _parts(config)
    chips = (len(devices), batch_per_chip)
    batch = {
        "image": jax.ShapeDtypeStruct((*chips, *IMAGE_SHAPE), jnp.dtype(config.model.dtype)),
        "label": jax.ShapeDtypeStruct(chips, jnp.int32),
    }
    step = loop.make_train_step(config, model, optimizer)
    return DataParallel(devices).train_step(step).lower(state, batch)


def facts(lowered: Any) -> Facts:
    """Compiles a program and asks what there is to know of it."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Facts(
        flops=compiled.cost_analysis()["flops"],
        bytes_accessed=bytes_accessed(compiled),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        memory=memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        collectives=collectives(compiled.as_text()),
        compile_seconds=seconds,
    )


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Kind -> how many there are in a compiled program, and the bytes that they return.

    One in a loop counts once. Of an asynchronous pair the second half counts, which returns what
    the whole does.
    """
    found: dict[str, tuple[int, int]] = {}
    for result, kind in re.findall(rf" = (\S.*?) ({KINDS})(?:-done)?\(", text):
        count, size = found.get(kind, (0, 0))
        found[kind] = count + 1, size + _size(result)
    return found


def same_program(text: str) -> str:
    """A lowered program without the contents of its tables of float32: constants of one dimension.

    No pass of the compiler looks into a table that is read at a position which is not known before
    the program runs, so that programs which are equal in the rest compile to the same thing.
    """
    return re.sub(r'dense<"0x[0-9A-F]*"> : (tensor<\d+xf32>)', r"dense<...> : \1", text)


def selection_bytes(config: TrainConfig, device: Any) -> float:
    """Bytes that one selection of the quantile reads and writes."""
    _, optimizer, state = _parts(config)
    sharding = jax.sharding.SingleDeviceSharding(device)
    pruned = jax.tree.leaves(optimizer.mask(state.params))
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, chosen in zip(jax.tree.leaves(state.params), pruned)
        if chosen
    ]
    assert config.prune.target_sparsity is not None
    rank = round(config.prune.target_sparsity * sum(leaf.size for leaf in leaves))
    select = jax.jit(lambda leaves: kth_smallest(leaves, rank)).lower(leaves)
    return SELECTION_PASSES * bytes_accessed(select.compile())


class Compiler:
    """Compiles the steps of configs for one topology, no program twice."""

    def __init__(self, devices: Sequence[Any], batch_per_chip: int):
        self.devices = devices
        self.batch_per_chip = batch_per_chip
        self.known: dict[str, tuple[str, Facts]] = {}
        self.selections: dict[str, float] = {}

    def step(self, config: TrainConfig, name: str) -> tuple[str, Facts]:
        """The facts of a step, and the name of the first one that compiled to the same."""
        lowered = lower_step(config, self.devices, self.batch_per_chip)
        key = same_program(lowered.as_text())
        if key not in self.known:
            self.known[key] = name, facts(lowered)
            compiled = self.known[key][1]
            print(
                f"  compiled {name}: {compiled.compile_seconds:.0f} s, "
                f"{compiled.bytes_accessed / 1e9:.2f} GB, memory {compiled.memory / 1e9:.2f} GB",
                file=sys.stderr,
                flush=True,
            )
        return self.known[key]

    def row(self, config: TrainConfig, name: str) -> dict[str, Any]:
        """A row of the table: a step's facts, and the ratio to the dense step."""
        twin = dataclasses.replace(config, prune=PruneConfig())
        base = self.step(twin, f"{name}, dense")[1]
        same, own = self.step(config, name)
        moved = own.bytes_accessed
        if config.prune.target_sparsity is not None:
            prune = dataclasses.replace(
                config.prune, target_sparsity=None, final_threshold=0.1, update_every=None
            )
            scheduled = dataclasses.replace(config, prune=prune)
            steps = config.epochs * _steps_per_epoch(config)
            every = config.prune.update_every or default_update_every(steps)
            if config.model.name not in self.selections:
                self.selections[config.model.name] = selection_bytes(config, self.devices[0])
            selection = self.selections[config.model.name] / every
            moved = self.step(scheduled, f"{name}, schedule")[1].bytes_accessed + selection
        return own._asdict() | {
            "preset": name,
            "bytes_accessed": moved,
            "ratio": moved / base.bytes_accessed,
            "more_collectives": own.collectives != base.collectives,
            "compiled_as": same,
        }


def print_row(row: dict[str, Any]) -> None:
    """Prints a row as soon as it is known: a compilation takes minutes."""
    kinds = row["collectives"].items()
    found = ", ".join(f"{count} {kind} ({size / 1e6:.1f} MB)" for kind, (count, size) in kinds)
    compiled = f"{row['compile_seconds']:.0f} s"
    if row["compiled_as"] != row["preset"]:
        compiled = f"same program as {row['compiled_as']}"
    print(
        f"{row['preset']:<34} {row['flops'] / 1e9:6.0f} {row['bytes_accessed'] / 1e9:7.2f} "
        f"{row['ratio']:6.3f} {row['memory'] / 1e9:7.2f}  {found or 'none'}; {compiled}",
        flush=True,
    )


def print_worst(rows: list[dict[str, Any]]) -> None:
    """Prints what all rows stay within."""
    more = [row["preset"] for row in rows if row["more_collectives"]]
    print(
        f"at most: ratio {max(row['ratio'] for row in rows):.3f}, "
        f"memory {max(row['memory'] for row in rows) / 1e9:.2f} GB; "
        f"collectives that the dense step has not: {', '.join(more) or 'none'}",
        flush=True,
    )


def main() -> None:
    """Print a table for each topology."""
    known = [name for name in PRESETS if name.startswith("imagenet-")]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--presets", nargs="+", choices=known, default=known)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES, help="as JAX names them")
    parser.add_argument("--batch-per-chip", type=int, default=128)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--json", type=Path, help="a file to append the rows to, one a line")
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
        print(
            f"{topology}: {len(devices)} × {devices[0].device_kind}, {options.batch_per_chip} "
            f"images a chip, {options.dtype}; jax {jax.__version__}, libtpu {version('libtpu')}"
        )
        print(f"{'preset':<34} {'GFLOP':>6} {'GB':>7} {'ratio':>6} {'memory':>7}  collectives")
        compiler, rows = Compiler(devices, options.batch_per_chip), []
        for name in options.presets:
            config = PRESETS[name].config
            model = dataclasses.replace(config.model, dtype=options.dtype)
            try:
                row = compiler.row(dataclasses.replace(config, model=model), name)
            except jax.errors.JaxRuntimeError as error:
                # The compiler's own word on a program that is too large for a chip.
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                print(f"{name:<34} does not fit: {_first_line(error)}", flush=True)
                continue
            print_row(row)
            rows.append(row)
            if options.json:
                with options.json.open("a") as file:
                    settings = {"topology": topology, "dtype": options.dtype}
                    print(json.dumps(settings | row), file=file)
        if rows:
            print_worst(rows)


def _parts(config: TrainConfig) -> tuple[Any, Any, Any]:
    """Model, optimizer and the shapes of their state."""
    model = loop.make_model(config, CLASSES)
    optimizer = make_optimizer(config, _steps_per_epoch(config))
    state = jax.eval_shape(lambda: loop.make_state(config, model, optimizer, IMAGE_SHAPE))
    return model, optimizer, state


def _steps_per_epoch(config: TrainConfig) -> int:
    return TRAINING_IMAGES // config.data.batch_size


def _size(result: str) -> int:
    """Bytes of an array or a tuple of them, as the text of a program names its type."""
    total = 0
    for dtype, axes in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", result):
        size = BYTES[dtype]
        for axis in filter(None, axes.split(",")):
            size *= int(axis)
        total += size
    return total


def _first_line(error: Exception) -> str:
    return next(line for line in str(error).splitlines() if line.strip())


if __name__ == "__main__":
    main()
