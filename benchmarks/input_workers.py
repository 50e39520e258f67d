"""Images per second of the whole input pipeline, against the number of worker processes.

    python -m benchmarks.input_workers                        workers 0, 1, 2 and 4
    python -m benchmarks.input_workers --workers 0 8 16 32 --records 4096

Makes JPEG files of ImageNet's size (those of `input_pipeline`), puts them into tar files as
ImageNet comes in, prepares these with the library and reads batches as the trainer does:
ArrayRecord, shuffled, decoded, cropped, flipped and normalized to 224 pixels. With 0 workers the
threads of one process do all of that. Each number of workers has its turn in every round; starting
them is not counted, and a figure is the median over the rounds.

Two figures each: images per second of the clock, which other work on the machine lowers, and of the
processor's time, over all processes, which it hardly does. The limit is what the machine's cores
could do if nothing but the images took time: the rate of one core, in one thread without a
pipeline, times their number.
"""

import argparse
import contextlib
import io
import itertools
import multiprocessing
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from benchmarks.input_pipeline import QUALITY, all_ways, encode, pictures
from lats_optax import data
from lats_optax.data.prepare import prepare

SIZE = 224
NAME = "imagenet2012"


def write_records(directory: Path, encoded: Sequence[bytes], count: int) -> None:
    """Prepares ImageNet with these files in turn as its training images, in so many records."""
    import tensorflow_datasets as tfds

    labels = Path(tfds.__file__).parent / "datasets" / NAME / "labels.txt"
    synsets = labels.read_text().split()
    per_class: dict[str, dict[str, bytes]] = {}
    for index in range(count):
        synset = synsets[index % len(synsets)]
        files = per_class.setdefault(synset, {})
        files[f"{synset}_{index}.JPEG"] = encoded[index % len(encoded)]
    manual = directory / "downloads" / "manual"
    manual.mkdir(parents=True)
    parts = {f"{synset}.tar": _tar(files) for synset, files in per_class.items()}
    (manual / "ILSVRC2012_img_train.tar").write_bytes(_tar(parts))
    held_out = {"ILSVRC2012_val_00000001.JPEG": encoded[0]}
    (manual / "ILSVRC2012_img_val.tar").write_bytes(_tar(held_out))
    prepare(NAME, str(directory))


class Rate(NamedTuple):
    """Images per second: of the clock, and of the processor's time."""

    clock: float
    processor: float


def processor_seconds() -> float:
    """What this process and its workers have taken of the processor; NaN without Linux's /proc."""
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return float("nan")
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def rate_of(make: Callable[[], int], seconds: float) -> Rate:
    """The rate of something that makes images and says how many."""
    count, start, used = 0, time.perf_counter(), processor_seconds()
    while not count or time.perf_counter() - start < seconds:
        count += make()
    return Rate(count / (time.perf_counter() - start), count / (processor_seconds() - used))


def pipeline_rate(batches: data.Batches, seconds: float) -> Rate:
    """That of batches which are taken as fast as they come."""

    def take() -> int:
        return len(next(batches)["label"])

    # What was computed ahead of the clock does not count: workers hold two batches each.
    for _ in range(4):
        take()
    return rate_of(take, seconds)


def core_rate(
    way: Callable[[bytes, np.random.Generator], np.ndarray],
    encoded: Sequence[bytes],
    seconds: float,
) -> Rate:
    """That of one thread."""
    rng, files = np.random.default_rng(0), itertools.cycle(encoded)

    def make() -> int:
        way(next(files), rng)
        return 1

    make()
    return rate_of(make, seconds)


def measure(directory: Path, encoded: Sequence[bytes], options: argparse.Namespace) -> list[Rate]:
    """The rate with each number of workers, and below them those of one core: see `main`."""
    ways = all_ways(SIZE)
    alone = [ways["train: ours, OpenCV (the default)"], ways["decode: OpenCV"]]
    rounds: list[list[Rate]] = []
    for _ in range(options.rounds):
        rates = []
        for workers in options.workers:
            dataset = data.load(NAME, str(directory), image_size=SIZE, workers=workers)
            with contextlib.closing(dataset.train_batches(options.batch_size)) as batches:
                rates.append(pipeline_rate(batches, options.seconds))
        rounds.append(rates + [core_rate(way, encoded, options.seconds) for way in alone])
    return [Rate(*map(statistics.median, zip(*each))) for each in zip(*rounds)]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--records", type=int, default=2048)
    parser.add_argument("--images", type=int, default=64, help="how many of them are different")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5, help="of each in a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    least = {"images": 1, "batch_size": 1, "seconds": 0, "rounds": 1}
    least["records"] = options.batch_size
    for name, allowed in least.items():
        if getattr(options, name) < allowed:
            parser.error(f"--{name.replace('_', '-')}: allowed is {allowed} or more")
    if min(options.workers) < 0:
        parser.error("--workers: allowed is 0 or more")
    return options


def main(arguments: list[str] | None = None) -> list[Rate]:
    """Print the table; returns its figures from top to bottom."""
    options = parse(arguments)
    encoded = [
        encode(image, quality=QUALITY["noise" if i % 2 else "photograph"])
        for i, image in enumerate(pictures(options.images))
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{platform.processor() or platform.machine()}, {cores} cores, OpenCV {cv2.__version__}; "
        f"{options.records} records of {statistics.mean(map(len, encoded)) / 1e3:.0f} kB, "
        f"batches of {options.batch_size}"
    )
    with tempfile.TemporaryDirectory() as directory:
        write_records(Path(directory), encoded, options.records)
        rates = measure(Path(directory), encoded, options)
    limit = rates[len(options.workers)].processor * (cores or 1)
    print(f"{'images per second':<44} {'clock':>7} {'of the limit':>12} {'processor':>9}")
    names = [f"{workers} workers" for workers in options.workers]
    names += ["one core: decode, augment, normalize", "one core: decode"]
    for name, rate in zip(names, rates, strict=True):
        print(f"{name:<44} {rate.clock:7.0f} {rate.clock / limit:12.0%} {rate.processor:9.0f}")
    print(f"{f'the limit: {cores} cores, all on images':<44} {limit:7.0f}")
    return rates


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


if __name__ == "__main__":
    main()
