"""A small `imagenet2012`, written by TFDS's own builder from tar files such as ImageNet's.

For tests that need real JPEG files in the true layout; there is nothing to download.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from lats_optax.data.prepare import prepare


def jpeg(rng: np.random.Generator, height: int, width: int) -> bytes:
    """A smooth color image: what decoders that differ a little agree on to a few gray levels."""
    coarse = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def write(
    data_dir: Path,
    train: int = 40,
    validation: int = 20,
    classes: int = 1000,
    sizes: tuple[int, int] = (40, 90),
    seed: int = 0,
    corrupt: frozenset[str] | set[str] = frozenset(),
) -> dict[str, bytes]:
    """Prepares `imagenet2012` in a directory.

    Args:
      data_dir: where data sets are kept.
      train: number of training images.
      validation: number of validation images, at most 50,000.
      classes: how many of the 1,000 the training images are spread over.
      sizes: range of heights and widths, in pixels.
      seed: of sizes and contents.
      corrupt: names of the files that hold other bytes than an image.

    Returns:
      The encoded image of each file name; `train` and `validation` are in no other set.
    """
    import tensorflow_datasets as tfds

    rng = np.random.default_rng(seed)
    labels = Path(tfds.__file__).parent / "datasets" / "imagenet2012" / "labels.txt"
    synsets = labels.read_text().split()[:classes]

    def image(name: str) -> bytes:
        height, width = rng.integers(sizes[0], sizes[1] + 1, 2)
        encoded = jpeg(rng, int(height), int(width))
        return b"not an image" if name in corrupt else encoded

    by_synset: dict[str, dict[str, bytes]] = {}
    for index in range(train):
        synset = synsets[index * len(synsets) // train % len(synsets)]
        name = f"{synset}_{index}.JPEG"
        by_synset.setdefault(synset, {})[name] = image(name)
    names = [f"ILSVRC2012_val_{index:08d}.JPEG" for index in range(1, validation + 1)]
    held_out = {name: image(name) for name in names}

    manual = data_dir / "downloads" / "manual"
    manual.mkdir(parents=True, exist_ok=True)
    parts = {f"{synset}.tar": _tar(files) for synset, files in by_synset.items()}
    (manual / "ILSVRC2012_img_train.tar").write_bytes(_tar(parts))
    (manual / "ILSVRC2012_img_val.tar").write_bytes(_tar(held_out))
    prepare("imagenet2012", str(data_dir))
    return held_out | {name: file for files in by_synset.values() for name, file in files.items()}


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()
