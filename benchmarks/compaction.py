"""What compacting a model brings: its size, its MACs and its time, against the dense one.

    python -m benchmarks.compaction
    python -m benchmarks.compaction --models resnet18 --image-size 128 --batch-size 8

In each layer but the classifier a fraction of the output channels is zeroed, by
`prox.prox_group_lasso` with a threshold of that layer's own; then `compaction.compact` makes the
smaller model. Weights are random, for times do not depend on them: the norms of channels are
log-normal, and what batch normalization knows is drawn too, so that the constants of dead channels
have either sign. Channels that have to go together are one group: those of a point-wise convolution
and of the depth-wise one behind it. A residual stream has many writers: "inner" leaves the streams
whole, "streams too" takes what all of its writers write to one of its channels as one group.

`--multiple-of 16` rounds the channels of each layer up: more MACs, perhaps in less time.

Dense and compacted models take turns: a round is one call of each, and a speed-up is the median
over the rounds of (time of the dense model / its own in the same round); in brackets are the
quartiles. The difference is the largest one between their logits, as a fraction of the largest
logit.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from benchmarks import records
from lats_optax import compaction, models
from lats_optax.analysis.macs import count_macs
from lats_optax.prox import prox_group_lasso

CLASSES = 1000
# On CPUs XLA has a path many times slower for maps that are smaller than the kernel, as the last
# ones of VGG-16 are for images of 32 pixels: most of what is gained there would be of that.
SIZES = {"digits-cnn": 8, "vgg16-bn": 64, "resnet20": 32, "resnet32": 32, "resnet56": 32}
"""Pixels of the images, where they are not 224."""


class Row(NamedTuple):
    """One model of the table; speed-ups are medians and quartiles over the rounds."""

    model: str
    zeros: str
    parameters: int
    macs: int
    milliseconds: float
    speed_up: float
    low: float
    high: float
    difference: float


class Variant(NamedTuple):
    """A model ready to run, with what is known of it before it is timed."""

    zeros: str
    parameters: int
    macs: int
    run: Callable[[], jax.Array]
    difference: float


# --- which channels go --------------------------------------------------------------------------


def groups(model: Any, streams: bool) -> list[list[str]]:
    """Layers whose channels of one number are zeroed together."""
    layers = list(model.plan())
    if isinstance(model, models.MobileNetV1):
        depthwise = [layer.replace("pointwise", "depthwise") for layer in layers[1:]]
        return [list(pair) for pair in zip(layers, depthwise)] + [layers[-1:]]
    if not hasattr(model, "blocks"):
        return [[layer] for layer in layers]
    inner, writers, stream = [], [], ["stem"]
    for name, spec, shortcut in model.blocks():
        *first, last = (f"{name}/conv{index}" for index in range(1, len(spec) + 1))
        inner += [[layer] for layer in first]
        if shortcut == "identity":
            stream.append(last)
        else:
            writers.append(stream)
            stream = [last] + [f"{name}/shortcut"] * (shortcut == "projection")
    return inner + [group for group in [*writers, stream] if streams or len(group) == 1]


def zeroed(arrays: dict[str, np.ndarray], together: list[list[str]], fraction: float) -> Any:
    """The variables with that fraction of the channels of each group zeroed."""
    arrays = dict(arrays)
    for layers in together:
        paths = [f"params/{layer}/kernel" for layer in layers]
        rows = [arrays[path].reshape(-1, arrays[path].shape[-1]) for path in paths]
        joined = np.concatenate(rows)
        norms = np.sort(np.sqrt(np.mean(np.square(joined), axis=0)))
        count = round(fraction * len(norms))
        # Between two norms; what is left is scaled to the size that all of it had.
        threshold = (norms[count - 1] + norms[count]) / 2 if count else 0.0
        sparse = np.array(prox_group_lasso(joined, threshold))
        sparse *= np.sqrt(np.mean(joined**2) / np.mean(sparse**2))
        ends = np.cumsum([len(part) for part in rows])[:-1]
        for path, part in zip(paths, np.split(sparse, ends)):
            arrays[path] = part.reshape(arrays[path].shape)
    return traverse_util.unflatten_dict(arrays, sep="/")


def random_arrays(model: nn.Module, images: jax.Array) -> dict[str, np.ndarray]:
    """Variables by path, drawn as the first lines of this file say."""
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    rng, arrays = np.random.default_rng(0), {}
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        if path.endswith("kernel"):
            array = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
            array *= rng.lognormal(sigma=0.3, size=leaf.shape[-1])
        elif path.endswith(("scale", "var")):
            array = rng.uniform(0.5, 1.5, size=leaf.shape)
        else:
            array = 0.2 * rng.normal(size=leaf.shape)
        arrays[path] = array.astype(np.float32)
    return arrays


# --- models that take turns ---------------------------------------------------------------------


def variants(name: str, options: argparse.Namespace) -> Iterator[Variant]:
    """The dense model, then the compacted ones."""
    model = models.create(name, num_classes=CLASSES, width=options.width)
    images = pictures(name, options)
    arrays = random_arrays(model, images)
    dense = compiled(model, arrays, images)
    plain = traverse_util.unflatten_dict(arrays, sep="/")
    yield Variant("none", *size(model, plain, images), partial(dense, place(plain), images), 0.0)
    whole = groups(model, streams=True)
    for streams in (False, True):
        together = groups(model, streams)
        if not streams and together == whole:
            continue
        what = "" if groups(model, streams=False) == whole else "inner, "
        what = what.replace("inner", "streams too") if streams else what
        for fraction in options.fractions:
            variables = zeroed(arrays, together, fraction)
            small = compaction.compact(model, variables, multiple_of=options.multiple_of)
            program = compiled(small.model, small.variables, images)
            run = partial(program, place(small.variables), images)
            expected = dense(place(variables), images)
            difference = jnp.abs(run() - expected).max() / jnp.abs(expected).max()
            counts = size(small.model, small.variables, images)
            yield Variant(f"{what}{fraction:.0%}", *counts, run, float(difference))


def compiled(model: nn.Module, variables: Any, images: jax.Array) -> Any:
    """A model's evaluation, compiled for variables of these shapes."""
    if "params" not in variables:
        variables = traverse_util.unflatten_dict(variables, sep="/")
    return jax.jit(partial(model.apply, train=False)).lower(variables, images).compile()


def place(variables: Any) -> Any:
    """The variables on the device."""
    return jax.tree.map(jnp.asarray, variables)


def size(model: nn.Module, variables: Any, images: jax.Array) -> tuple[int, int]:
    """Parameters, and MACs for one image."""
    counted = count_macs(partial(model.apply, train=False), variables, images[:1])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return parameters, counted.dense


def pictures(name: str, options: argparse.Namespace) -> jax.Array:
    """A random batch."""
    pixels = options.image_size or SIZES.get(name, 224)
    shape = (options.batch_size, pixels, pixels, 3)
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def measure(
    name: str, found: list[Variant], rounds: int, json: Path | None = None, **settings: Any
) -> list[Row]:
    """Rounds of all variants in turn; `json` gets them, with the settings."""
    times: list[list[float]] = [[] for _ in found]
    for turn in range(rounds + 1):
        order = range(len(found))
        for index in order if turn % 2 else reversed(order):
            start = time.perf_counter()
            found[index].run().block_until_ready()
            if turn:  # what comes first is not counted
                times[index].append(time.perf_counter() - start)
    for unit, base in (("ms", None), ("times the time of dense", times[0])):
        values = {
            f"{name}, {variant.zeros}": [
                1e3 * mine if base is None else mine / dense
                for mine, dense in zip(own, base or own)
            ]
            for variant, own in zip(found, times)
        }
        records.write(
            json, "compaction", values, unit=unit, lower_is_better=True, settings=settings
        )
    rows = []
    for variant, own in zip(found, times):
        ratios = [dense / mine for dense, mine in zip(times[0], own)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        counts = variant.parameters, variant.macs
        milliseconds = 1e3 * statistics.median(own)
        rows.append(
            Row(name, variant.zeros, *counts, milliseconds, middle, low, high, variant.difference)
        )
    return rows


def print_table(rows: list[Row]) -> None:
    """Prints the rows of one model."""
    for row in rows:
        speed = f"{row.speed_up:.2f} [{row.low:.2f} … {row.high:.2f}]"
        print(
            f"{row.model:<13} {row.zeros:<17} {row.parameters / 1e6:8.3f} M "
            f"{row.macs / 1e9:8.4f} G {row.milliseconds:9.2f}  {speed:<20} "
            f"{row.difference:10.1e}",
            flush=True,
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = ["resnet50", "mobilenet-v1", "vgg16-bn"]
    parser.add_argument("--models", nargs="+", default=default, help="of the zoo, without spikes")
    parser.add_argument("--fractions", nargs="+", type=float, default=[0.5, 0.7], help="of zeros")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument(
        "--image-size", type=int, help="default: 224, or less for models of small images"
    )
    parser.add_argument("--width", type=float, default=1.0, help="multiplier of all channels")
    parser.add_argument("--multiple-of", type=int, default=1, help="channels are rounded to")
    parser.add_argument("--rounds", type=int, default=15)
    records.add_argument(parser)
    options = parser.parse_args(arguments)
    for name, least in (("batch_size", 1), ("image_size", 1), ("multiple_of", 1), ("rounds", 2)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is {value}; allowed: {least} or more")
    for fraction in options.fractions:
        if not 0 < fraction < 1:
            parser.error(f"--fractions: {fraction} is not allowed; numbers between 0 and 1 are")
    for name in options.models:
        if name.startswith("sew-"):
            parser.error(f"--models: {name} is not allowed; models without spikes are")
        try:
            model = models.create(name, num_classes=CLASSES, width=options.width)
            jax.eval_shape(
                partial(model.init, train=False), jax.random.key(0), pictures(name, options)
            )
        except ValueError as error:
            parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> list[Row]:
    """Print the table."""
    options = parse(arguments)
    print(
        f"{jax.devices()[0].device_kind} ({platform.processor() or platform.machine()}), "
        f"{os.cpu_count()} cores, jax {jax.__version__}; batch {options.batch_size}, "
        f"{options.rounds} rounds"
    )
    print(
        f"{'model':<13} {'channels zero':<17} {'parameters':>10} {'mult.-adds':>10} {'ms':>9}  "
        f"{'speed-up':<20} {'difference':>10}"
    )
    rows = []
    for name in options.models:
        kept = ("batch_size", "image_size", "width", "multiple_of")
        settings = {key: getattr(options, key) for key in kept}
        found = list(variants(name, options))
        rows += measure(name, found, options.rounds, options.json, **settings)
        print_table(rows[-sum(row.model == name for row in rows) :])
    return rows


if __name__ == "__main__":
    main()
