"""Bytes and time of one optimizer update at ResNet-50's shapes, as ratios to `optax.sgd`.

    python -m benchmarks.optimizer_step             on the device at hand
    python -m benchmarks.optimizer_step --tpu       also compiled for a TPU v5e (needs jax[tpu])
    python -m benchmarks.optimizer_step --gpu       also compiled for an H100 (needs jax[cuda12])

Bytes are XLA's own count for the compiled step (update and apply, parameters and state donated).
Times are taken in rounds: in each round every optimizer takes a few steps, one after the other in
turn, and a ratio is the median over the rounds of (its time / the time of sgd in the same round),
so that a noisy machine slows both. The closed loop selects a quantile every `update_every` steps
only; its figures are the average over such a cycle: a plain step, and a selection divided by the
length of the cycle.
"""

import argparse
import math
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
import optax

import lats_optax
from benchmarks import records, shapes
from lats_optax.control.selection import quantiles
from lats_optax.operators.parts import by_path
from lats_optax.prox import prox_l1
from lats_optax.quantile import kth_smallest

STEPS = 450_000  # 90 epochs of ImageNet at batch 256: the default update_every is then 1000
UPDATE_EVERY = 1000
TARGET = 0.9
SELECTION_PASSES = 9  # float32: 31 bits, four at a time, and one that leaves a survivor

# Facts of the H100 SXM in the form that XLA's compiler takes in the place of a GPU.
H100 = """gpu_device_info {
  cuda_compute_capability { major: 9 }  core_count: 132  fpus_per_core: 128
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  registers_per_core_limit: 65536
  registers_per_block_limit: 65536  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
  block_dim_limit_z: 65535  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  clock_rate_ghz: 1.98  device_memory_size: 84978434048 }
platform_name: "CUDA"  dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3" """


class Figures(NamedTuple):
    """What one optimizer costs: bytes a parameter, milliseconds a step."""

    bytes: float
    milliseconds: float
    ratio: float


def optimizers() -> dict[str, optax.GradientTransformation]:
    """The optimizers compared; all momenta and schedules as in the published ImageNet runs."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.256, STEPS // 20, STEPS)
    sgd = optax.sgd(rate, momentum=0.875)
    closed = lats_optax.target_sparsity(TARGET, rate, STEPS)
    scheduled = lats_optax.lats_threshold(rate, STEPS, final=0.02)
    return {
        "sgd": sgd,
        "sgd, again": sgd,  # how far apart two measurements of the same program are
        "adamw": optax.adamw(rate),
        "proximal_step": optax.chain(
            sgd, lats_optax.proximal_step(lambda count: 1e-5 * rate(count))
        ),
        "sgd and one multiply": optax.chain(sgd, multiply_by_support()),
        "frozen support": optax.chain(sgd, lats_optax.keep_support(lats_optax.support)),
        "soft_threshold, schedule": optax.chain(sgd, lats_optax.soft_threshold(scheduled)),
        "soft_threshold, closed loop": optax.chain(sgd, lats_optax.soft_threshold(closed)),
    }


def multiply_by_support() -> optax.GradientTransformation:
    """The least that a frozen support can cost: updates times bools that are read at each step."""

    def update(updates: Any, support: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda update, alive: update * alive, updates, support), support

    return optax.GradientTransformation(lats_optax.support, update)


def abstract_parameters() -> dict[str, jax.ShapeDtypeStruct]:
    """ResNet-50's parameters in float32, without values."""
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.resnet50().items()
    }


def step_of(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """One update, applied."""

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return step


def compile_step(tx: optax.GradientTransformation, sharding: Any = None, **options: Any) -> Any:
    """The compiled step, for the default device or for the sharding of a compile-only one."""
    params = abstract_parameters()
    state = jax.eval_shape(tx.init, params)

    def place(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    lowered = jax.jit(step_of(tx), donate_argnums=(0, 1)).lower(
        place(params), place(state), place(params)
    )
    return lowered.compile(**options)


def bytes_accessed(compiled: Any) -> float:
    """XLA's count of the bytes that a program reads and writes."""
    return compiled.cost_analysis()["bytes accessed"]


def selection(latent: list[jax.Array], target: float) -> jax.Array:
    """The quantile as the closed loop selects it, in all its passes."""
    rank = round(target * sum(leaf.size for leaf in latent))
    weights = by_path(latent)
    return quantiles(jnp.asarray(True), jnp.zeros(1), weights, jnp.asarray([rank]), prox_l1)


def measure(
    rounds: int, repeats: int, json: Path | None = None, machine: str | None = None
) -> dict[str, Figures]:
    """Bytes and times of all optimizers on this device, and a record of them in the file `json`."""
    params = abstract_parameters()
    size = sum(leaf.size for leaf in params.values())
    programs, arguments, bytes_each = {}, {}, {}
    keys = jax.random.split(jax.random.key(0), len(params))

    def random(scale: float) -> dict[str, jax.Array]:
        return {
            name: scale * jax.random.normal(key, leaf.shape)
            for key, (name, leaf) in zip(keys, params.items())
        }

    gradients = random(1e-3)
    for name, tx in optimizers().items():
        programs[name] = compile_step(tx)
        bytes_each[name] = bytes_accessed(programs[name]) / size
        weights = random(0.03)
        # A first step outside the clock; it also makes the closed loop's first selection.
        arguments[name] = programs[name](weights, tx.init(weights), gradients)

    pruned = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim >= 2]
    select = jax.jit(partial(selection, target=TARGET)).lower(pruned).compile()
    one_pass = jax.jit(lambda leaves: kth_smallest(leaves, int(TARGET * size))).lower(pruned)
    closed, scheduled = "soft_threshold, closed loop", "soft_threshold, schedule"
    # XLA counts a loop's body once, and both sides of a conditional.
    selection_bytes = SELECTION_PASSES * bytes_accessed(one_pass.compile()) / size
    bytes_each[closed] = bytes_each[scheduled] + selection_bytes / UPDATE_EVERY

    times: dict[str, list[float]] = {name: [] for name in [*programs, "selection"]}
    names = list(programs)
    for _ in range(rounds):
        samples: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(repeats):
            # A step of each in turn, beginning with another one every time: as in training, what a
            # step needs is not in the caches, and no optimizer always follows the same other.
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                arguments[name] = jax.block_until_ready(programs[name](*arguments[name], gradients))
                samples[name].append(time.perf_counter() - start)
        for name in names:
            times[name].append(statistics.median(samples[name]))
        latent = jax.tree.leaves(optax.tree.get(arguments[scheduled][1], "latent"))
        start = time.perf_counter()
        jax.block_until_ready(select(latent))
        times["selection"].append(time.perf_counter() - start)
    # No step of the rounds but the first was due for a selection; its share is added here.
    assert 1 + rounds * repeats < UPDATE_EVERY
    times[closed] = [
        plain + selection / UPDATE_EVERY
        for plain, selection in zip(times[closed], times["selection"])
    ]
    figures = {
        name: Figures(
            bytes_each[name],
            1e3 * statistics.median(times[name]),
            statistics.median(own / base for own, base in zip(times[name], times["sgd"])),
        )
        for name in programs
    }
    print_table(figures)
    recorded = {
        "ms/step": lambda name: [1e3 * seconds for seconds in times[name]],
        "ratio to sgd": lambda name: [own / base for own, base in zip(times[name], times["sgd"])],
        "B/param": lambda name: [bytes_each[name]] * rounds,  # the compiled program is the same
    }
    for unit, values in recorded.items():
        records.write(
            json,
            "optimizer_step",
            {name: values(name) for name in programs},
            unit=unit,
            lower_is_better=True,
            settings={"repeats": repeats},
            machine=machine,
        )
    for name, base, note in (
        ("frozen support", "sgd and one multiply", ""),
        (closed, scheduled, f", averaged over {UPDATE_EVERY} updates"),
    ):
        ratio = statistics.median(a / b for a, b in zip(times[name], times[base]))
        print(
            f"{name} / {base}{note}: {bytes_each[name] / bytes_each[base]:.3f} in bytes, "
            f"{ratio:.3f} in time"
        )
    print(
        f"one selection of the {TARGET:.0%} quantile: "
        f"{1e3 * statistics.median(times['selection']):.0f} ms, {selection_bytes:.1f} B a parameter"
    )
    return figures


def print_table(figures: dict[str, Figures]) -> None:
    """Print the ratios to sgd."""
    print(f"{'optimizer':<28} {'B/param':>8} {'ratio':>6} {'ms/step':>8} {'ratio':>6}")
    for name, row in figures.items():
        print(
            f"{name:<28} {row.bytes:8.2f} {row.bytes / figures['sgd'].bytes:6.3f} "
            f"{row.milliseconds:8.2f} {row.ratio:6.3f}"
        )


def time_sort() -> None:
    """What a quantile by sorting costs, once, for comparison."""
    size = sum(leaf.size for leaf in abstract_parameters().values())
    values = jax.random.normal(jax.random.key(0), (size,))
    sort = jax.jit(lambda x: jnp.sort(jnp.abs(x))).lower(values).compile()
    start = time.perf_counter()
    jax.block_until_ready(sort(values))
    print(f"one sort of the same weights: {1e3 * (time.perf_counter() - start):.0f} ms")


def compile_elsewhere(platform_name: str) -> None:
    """Compile every step for an accelerator that is not there, and count."""
    from jax.experimental import topologies

    if platform_name == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
        options = {}
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
        )
        options = {"compiler_options": {"xla_gpu_autotune_level": "0"}}
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    size = sum(leaf.size for leaf in abstract_parameters().values())
    print(f"compiled for {topology.devices[0].device_kind}")
    print(f"{'optimizer':<28} {'B/param':>8} {'ratio':>6} {'fusions':>8} {'temporary MB':>13}")
    base = 0.0
    for name, tx in optimizers().items():
        program = compile_step(tx, sharding, **options)
        fusions, traffic = fused_traffic(program.as_text())
        base = base or traffic
        temporary = program.memory_analysis().temp_size_in_bytes / 1e6
        print(
            f"{name:<28} {traffic / size:8.2f} {traffic / base:6.3f} {fusions:8d} {temporary:13.1f}"
        )


def fused_traffic(text: str) -> tuple[int, float]:
    """Number of fusions in a compiled step, and the bytes of their operands and results.

    The accelerators' own counts include padding, prefetches and both sides of conditionals, or
    are missing; this is what the fused passes over the parameters read and write.
    """
    entry = text[text.index("\nENTRY ") :]
    sizes: dict[str, float] = {}
    fusions, traffic = 0, 0.0
    for line in entry.splitlines():
        found = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = (.+?) ([\w-]+)\((.*?)\)", line)
        if not found:
            continue
        name, result, operation, operands = found.groups()
        arrays = re.findall(r"(f32|s32|pred)\[([\d,]*)\]", result)
        sizes[name] = sum(
            4.0 * math.prod(int(axis) for axis in axes.split(",") if axis) for _, axes in arrays
        )
        read = sum(sizes.get(operand, 0.0) for operand in re.findall(r"%([\w.-]+)", operands))
        if operation == "fusion" and read + sizes[name] > 1024:  # not the scalars of a schedule
            fusions += 1
            traffic += read + sizes[name]
    return fusions, traffic


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5, help="steps of each optimizer in a round")
    parser.add_argument("--sort", action="store_true", help="also time one sort (slow on CPUs)")
    parser.add_argument("--tpu", action="store_true", help="also compile for a TPU v5e")
    parser.add_argument("--gpu", action="store_true", help="also compile for an H100")
    records.add_argument(parser)
    options = parser.parse_args()
    if 1 + options.rounds * options.repeats >= UPDATE_EVERY:
        parser.error(f"--rounds times --repeats: allowed is less than {UPDATE_EVERY - 1}")
    device = jax.devices()[0]
    print(
        f"{device.device_kind} ({platform.processor() or platform.machine()}), "
        f"{os.cpu_count()} cores, jax {jax.__version__}, optax {optax.__version__}"
    )
    machine = None if device.platform == "cpu" else device.device_kind
    measure(options.rounds, options.repeats, options.json, machine)
    if options.sort:
        time_sort()
    for name in ("tpu", "gpu"):
        if getattr(options, name):
            compile_elsewhere(name)


if __name__ == "__main__":
    main()
