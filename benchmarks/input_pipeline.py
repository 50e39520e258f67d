"""Images per second and core: decoding, augmenting and normalizing JPEG files of ImageNet's size.

    python -m benchmarks.input_pipeline                   224 pixels, 32 images
    python -m benchmarks.input_pipeline --size 128 --seconds 60

One thread, pinned to one core. The images are crops of scikit-learn's two photographs and noise
with the spectrum of photographs, in JPEG files of about 110 kB, as in ImageNet. Times are the
processor's, without what other processes took of it. They are taken in rounds: in each round every
way takes the same few images, one way after the other, and a ratio is the median over the rounds of
(its speed / the speed of plain Pillow in the same round), so that a noisy machine slows all. Every
way of training takes the same crops.

"plain" are the lines that one would write: torchvision's operations on Pillow images, and the
usual ones on OpenCV's arrays. The last column is how far a training image is from plain Pillow's,
as the peak signal-to-noise ratio in dB over photographs and noise.
"""

import argparse
import io
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
from PIL import Image

from benchmarks import records
from lats_optax.data.decoding import decode
from lats_optax.data.images import ImageNetPreprocessing, random_crop_box
from lats_optax.data.normalization import IMAGENET_MEAN, IMAGENET_STD, Normalization

WIDTH, HEIGHT = 500, 375
QUALITY = {"photograph": 96, "noise": 92}  # about 110 kB on average
PER_ROUND = 4

Way = Callable[[bytes, np.random.Generator], np.ndarray]


def pictures(count: int, seed: int = 0, scale: int = 1) -> list[np.ndarray]:
    """Photographs and noise in turn, uint8 (375, 500, 3) times ``scale``, or upright."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    made = []
    for i in range(count):
        size = (WIDTH * scale, HEIGHT * scale)[:: -1 if i % 4 == 3 else 1]
        if i % 2:
            made.append(noise(*size, rng))
            continue
        photograph = photographs[i // 2 % len(photographs)]
        zoom = min(photograph.width / size[0], photograph.height / size[1]) * rng.uniform(0.8, 1)
        w, h = size[0] * zoom, size[1] * zoom
        left, top = rng.uniform(0, photograph.width - w), rng.uniform(0, photograph.height - h)
        box = (left, top, left + w, top + h)
        made.append(np.array(photograph.resize(size, Image.Resampling.LANCZOS, box=box)))
    return made


def noise(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose amplitude falls as 1/frequency, with channels that go together, as in nature."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * rng.random((3, *frequency.shape)))
    independent = np.fft.irfft2(phases / frequency, s=(height, width))
    independent /= independent.std(axis=(1, 2), keepdims=True)
    mixing = np.array([[1.0, 0.0, 0.0], [0.95, 0.3, 0.0], [0.9, 0.3, 0.3]])
    channels = 120 + 50 * np.tensordot(mixing, independent, 1)
    return np.clip(np.moveaxis(channels, 0, -1), 0, 255).astype(np.uint8)


def encode(image: np.ndarray, image_format: str = "JPEG", **options: Any) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, image_format, **options)
    return file.getvalue()


def plain_normalize(image: np.ndarray) -> np.ndarray:
    """The formula as it is written."""
    scaled = image.astype(np.float32) / np.float32(255)
    return (scaled - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)


def plain_pillow(size: int) -> Way:
    """Torchvision's training operations on Pillow images; uint8."""

    def train(encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        image = image.crop(random_crop_box(*image.size, rng))
        image = image.resize((size, size), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image)

    return train


def plain_pillow_eval(size: int) -> Way:
    """Torchvision's evaluation operations on Pillow images; uint8."""

    def evaluate(encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        del rng
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        short = round(size * 256 / 224)
        width, height = (int(short * side / min(image.size)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return np.asarray(image.crop((left, top, left + size, top + size)))

    return evaluate


def plain_opencv(size: int, interpolation: int) -> Way:
    """The usual operations on OpenCV's arrays; uint8."""

    def train(encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
        image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        left, top, right, bottom = random_crop_box(image.shape[1], image.shape[0], rng)
        crop = image[top:bottom, left:right]
        resized = cv2.resize(crop, (size, size), interpolation=interpolation)
        return cv2.flip(resized, 1) if rng.random() < 0.5 else resized

    return train


def ways_of_training(size: int) -> dict[str, tuple[Way, Callable[[np.ndarray], np.ndarray]]]:
    """Everything that makes a training image: (augmentation, normalization)."""
    normalize = Normalization(IMAGENET_MEAN, IMAGENET_STD)
    bfloat16 = Normalization(IMAGENET_MEAN, IMAGENET_STD, "bfloat16")
    pillow = ImageNetPreprocessing(size, decoder="pillow").train
    opencv = ImageNetPreprocessing(size, decoder="opencv").train
    return {
        "plain Pillow": (plain_pillow(size), plain_normalize),
        "plain OpenCV, INTER_LINEAR": (plain_opencv(size, cv2.INTER_LINEAR), plain_normalize),
        "plain OpenCV, INTER_AREA": (plain_opencv(size, cv2.INTER_AREA), plain_normalize),
        "ours, Pillow": (pillow, normalize),
        "ours, OpenCV (the default)": (opencv, normalize),
        "ours, OpenCV, bfloat16": (opencv, bfloat16),
    }


def all_ways(size: int) -> dict[str, Way]:
    """What is timed, by its name in the table."""

    def chained(augment: Way, normalize: Callable[[np.ndarray], np.ndarray]) -> Way:
        return lambda encoded, rng: normalize(augment(encoded, rng))

    training = ways_of_training(size)
    normalize = Normalization(IMAGENET_MEAN, IMAGENET_STD)
    bfloat16 = Normalization(IMAGENET_MEAN, IMAGENET_STD, "bfloat16")
    evaluate = ImageNetPreprocessing(size).eval
    image = np.random.default_rng(0).integers(256, size=(size, size, 3), dtype=np.uint8)
    rgb = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    return {
        **{f"train: {name}": chained(*both) for name, both in training.items()},
        "eval: plain Pillow": chained(plain_pillow_eval(size), plain_normalize),
        "eval: ours": chained(lambda encoded, rng: evaluate(encoded), normalize),
        "decode: Pillow": lambda encoded, rng: decode(encoded),
        "decode: OpenCV": lambda encoded, rng: cv2.imdecode(np.frombuffer(encoded, np.uint8), rgb),
        **{
            f"no normalization: {name}": augment
            for name, (augment, _) in training.items()
            if name in ("plain Pillow", "ours, Pillow", "ours, OpenCV (the default)")
        },
        "normalize: plain": lambda encoded, rng: plain_normalize(image),
        "normalize: ours, float32": lambda encoded, rng: normalize(image),
        "normalize: ours, bfloat16": lambda encoded, rng: bfloat16(image),
    }


def measure(
    encoded: list[bytes], size: int, seconds: float, json: Path | None = None
) -> dict[str, tuple[float, float]]:
    """(images per second, ratio to plain Pillow) of every way; `json` gets those of all rounds."""
    ways = all_ways(size)
    names = list(ways)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    turn = 0
    # The first round is outside of the clock: imports, tables, caches.
    while turn < 2 or time.perf_counter() < end:
        files = [encoded[(turn * PER_ROUND + i) % len(encoded)] for i in range(PER_ROUND)]
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            rng = np.random.default_rng(turn)
            start = time.process_time()
            for file in files:
                ways[name](file, rng)
            if turn:
                speeds[name].append(PER_ROUND / (time.process_time() - start))
        turn += 1
    base = speeds["train: plain Pillow"]
    ratios = {
        name: [own / plain for own, plain in zip(values, base)] for name, values in speeds.items()
    }
    for unit, of in (("images/s", speeds), ("ratio to plain Pillow", ratios)):
        records.write(
            json,
            "input_pipeline",
            of,
            unit=unit,
            lower_is_better=False,
            settings={"images": len(encoded), "size": size},
        )
    return {
        name: (statistics.median(values), statistics.median(ratios[name]))
        for name, values in speeds.items()
    }


def distances(encoded: list[bytes], size: int, crops: int = 4) -> dict[str, float]:
    """The median over images and crops of the peak signal-to-noise ratio to plain Pillow, in dB."""
    training = ways_of_training(size)
    found: dict[str, list[float]] = {name: [] for name in training}
    for index, file in enumerate(encoded * crops):
        made = {
            name: augment(file, np.random.default_rng(index)).astype(np.float64)
            for name, (augment, _) in training.items()
        }
        for name, image in made.items():
            error = np.mean((image - made["plain Pillow"]) ** 2)
            found[name].append(10 * np.log10(255**2 / error) if error else np.inf)
    return {f"train: {name}": float(np.median(values)) for name, values in found.items()}


def pin() -> str:
    """Keeps this process on one core, where the system has a way to; says which."""
    if not hasattr(os, "sched_setaffinity"):
        return "not pinned"
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return f"pinned to core {core}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=32, help="how many different ones")
    parser.add_argument("--size", type=int, default=224, help="height and width of the output")
    parser.add_argument("--scale", type=int, default=1, help="times 500×375 pixels")
    parser.add_argument("--seconds", type=float, default=30)
    records.add_argument(parser)
    options = parser.parse_args()
    for name in ("images", "size", "scale", "seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} is {getattr(options, name)}; allowed is more than 0")
    cv2.setNumThreads(0)
    encoded = [
        encode(image, quality=QUALITY["noise" if i % 2 else "photograph"])
        for i, image in enumerate(pictures(options.images, scale=options.scale))
    ]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {pin()}, "
        f"Pillow {PIL.__version__}, OpenCV {cv2.__version__}, NumPy {np.__version__}"
    )
    print(
        f"{len(encoded)} JPEG files of {WIDTH * options.scale}×{HEIGHT * options.scale}, "
        f"{statistics.mean(map(len, encoded)) / 1e3:.0f} kB on average, to {options.size} pixels"
    )
    figures = measure(encoded, options.size, options.seconds, options.json)
    far = distances(encoded, options.size)
    print(f"{'':<46} {'images/s':>9} {'ratio':>6} {'dB':>6}")
    for name, (speed, ratio) in figures.items():
        decibels = f"{far[name]:6.1f}" if name in far else ""
        print(f"{name:<46} {speed:9.0f} {ratio:6.2f} {decibels}")


if __name__ == "__main__":
    main()
