"""Pruning a language model of 7 billion parameters on a TPU pod, compiled where there is no TPU.

    python -m benchmarks.tpu_calibration
    python -m benchmarks.tpu_calibration --topology v5e:8x8 --windows 32

Needs jax[tpu], whose compiler runs on any Linux machine. A decoder layer of Llama 2 7B is divided
over the chips as its training would divide it: columns of the matrices that go in and rows of those
that come out over one axis of the mesh, windows over the other. Compiled are what one batch adds to
the Gram matrices of the layer, and the solver of its largest matrix, which runs on one chip. Layers
go one after the other, so that this is all that a chip holds beside its part of the other layers;
figures are a chip's, in MB, by the compiler's report.

Source of the sizes: Touvron et al., "Llama 2" (2023), table 1 and the released configuration.
"""

import argparse
import functools
import math
import os
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lats_optax.calibration import batches, prune
from lats_optax.calibration.budgets import PerLayer
from lats_optax.calibration.solvers import METHODS
from lats_optax.models import DecoderLayer, Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
)
# How training divides a layer: what goes in by columns, what comes out by rows.
DIVIDED = {"o_proj": ("model", None), "down_proj": ("model", None)}


def main(args: Sequence[str] | None = None) -> None:
    """Compile, and print what a chip holds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--topology", default="v5e:4x8", help="of the pod; default: v5e:4x8")
    parser.add_argument("--data", type=int, default=4, help="chips along the windows; default: 4")
    parser.add_argument("--windows", type=int, default=16, help="in a batch; default: 16")
    parser.add_argument("--length", type=int, default=2048, help="tokens of one; default: 2048")
    options = parser.parse_args(args)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        pod = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    except Exception as error:
        parser.error(f"argument --topology: {str(error).splitlines()[0]}")
    chips = len(pod.devices)
    if chips % options.data or options.windows % options.data:
        parser.error(f"argument --data: {options.data} divides not both {chips} and the windows")
    mesh = topologies.make_mesh(pod, (options.data, chips // options.data), ("data", "model"))

    shapes = jax.eval_shape(Llama(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    whole = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    layer = jax.tree.map_with_path(functools.partial(_placed, mesh), shapes["layers_0"])
    hidden = _shape((options.windows, options.length, CONFIG.hidden_size), mesh, "data")
    print(f"{whole / 1e9:.2f} billion parameters, {chips} chips of {options.topology}; MB a chip:")
    print(f"{4 * whole / chips / 1e6:>9,.0f}  of all parameters, float32, divided over all chips")

    begin = time.monotonic()
    lowered = batches.lower(_apply, layer, hidden)
    _report("one batch into the Gram matrices of a layer", lowered.compile(), begin)
    inputs, outputs = CONFIG.intermediate_size, CONFIG.hidden_size
    one = SingleDeviceSharding(pod.devices[0])
    blocks = math.ceil(inputs / batches.LARGEST)
    arrays = [
        jax.ShapeDtypeStruct((1, *shape), jnp.float32, sharding=one)
        for shape in (
            (1, inputs, outputs),
            (1, blocks, inputs // blocks, inputs // blocks),
        )
    ]
    zeros = jax.ShapeDtypeStruct((1,), jnp.int32, sharding=one)
    for name in ("sparsegpt", "lats"):
        begin = time.monotonic()
        compiled = prune.solve_matrices.lower(METHODS[name], PerLayer, *arrays, zeros).compile()
        _report(f"{name} of the largest matrix, {inputs} x {outputs}", compiled, begin)


def _apply(params: Any, hidden: jax.Array) -> Any:
    return DecoderLayer(CONFIG).apply({"params": params}, hidden)


def _shape(shape: Sequence[int], mesh: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(tuple(shape), jnp.float32, sharding=sharding)


def _placed(mesh: Any, path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
    module = path[-2].key
    axes = DIVIDED.get(module, (None, "model")) if leaf.ndim == 2 else (None,)
    return _shape(leaf.shape, mesh, *axes)


def _report(what: str, compiled: Any, begin: float) -> None:
    memory = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    gathered = compiled.as_text().count(" all-gather")
    print(
        f"{arguments / 1e6:>9,.0f}  of arguments, {temporaries / 1e6:,.0f} of temporaries: {what} "
        f"({gathered} all-gathers; compiled in {time.monotonic() - begin:.0f} s)"
    )


if __name__ == "__main__":
    main()
