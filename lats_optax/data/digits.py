"""The 1,797 handwritten digits that ship with scikit-learn, as a TFDS data set.

Real data without a download: the first use writes it, in the format that ImageNet is read from.
Here are what is written, how it is read back, and the augmentation.
"""

import contextlib
import io
import logging
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from lats_optax.data.tfds_source import INFO, copy_to_store
from lats_optax.files.storage import URL, as_path, temporary

logger = logging.getLogger(__name__)

IMAGE_SHAPE = (8, 8, 1)
NUM_TEST = 360
# Mean and standard deviation of the train split's pixels, on a scale from 0 to 1.
MEAN, STD = 0.3054, 0.3761
# scikit-learn counts ink from 0 to 16. Stored times 15, the PNGs are legible and nothing is lost.
_INK_TO_PIXEL, _MAX_PIXEL = 15, 240


class SklearnDigits(tfds.core.GeneratorBasedBuilder):
    """TFDS builder: ``image`` is an 8×8 gray PNG of ink × 15, ``label`` the digit."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. TFDS would look for checksums beside this file, with an undeclared
    # dependency of its own.
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of scikit-learn, with a fixed stratified split.",
            homepage="https://scikit-learn.org/stable/datasets/toy_dataset.html",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=IMAGE_SHAPE, encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        # Half a second to import, and needed once in the lifetime of a data directory.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)),
            test_size=NUM_TEST,
            stratify=digits.target,
            random_state=0,
        )
        return {
            "train": self._generate_examples(digits.images, digits.target, train),
            "test": self._generate_examples(digits.images, digits.target, test),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices:
            # A file object of encoded bytes: TFDS encodes an array by way of TensorFlow.
            png = io.BytesIO()
            Image.fromarray((images[index] * _INK_TO_PIXEL).astype(np.uint8)).save(png, "PNG")
            png.seek(0)
            yield int(index), {"image": png, "label": int(labels[index])}


def prepare(data_dir: str | None) -> SklearnDigits:
    """Returns the builder of the data set, which is written first where it is missing.

    TFDS writes to a temporary directory that it renames at the end, so what an interrupted
    preparation leaves behind is never taken for the data set.

    Args:
      data_dir: directory that holds TFDS data sets; ``None`` is TFDS's default.

    Raises:
      OSError: the directory cannot be written.
    """
    if data_dir is not None and isinstance(place := as_path(data_dir, "data_dir"), URL):
        _copy_unless_there(place)
        return SklearnDigits(data_dir=data_dir)
    builder = SklearnDigits(data_dir=data_dir)
    if builder.data_path.exists():
        return builder
    logger.info("Preparing the digits data set in %s", builder.data_dir)
    try:
        # TFDS reports on stdout and draws five progress bars on stderr for half a second's work.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
    except OSError:
        # Another process that began at the same time has renamed its directory first: same data.
        if not builder.data_path.exists():
            raise
    return SklearnDigits(data_dir=data_dir)


def _copy_unless_there(place: URL) -> None:
    version = PurePosixPath(SklearnDigits.name, str(SklearnDigits.VERSION))
    if (place / version / INFO).is_file():
        return
    with temporary() as directory:
        copy_to_store(prepare(str(directory)).data_dir, directory, place)


def decode(stored: dict[str, Any]) -> dict[str, Any]:
    """A stored example with its image as float32 (8, 8, 1), ink from 0 to 1."""
    pixels = np.asarray(Image.open(io.BytesIO(stored["image"])), np.float32)
    return {"image": pixels[..., None] / _MAX_PIXEL, "label": np.int32(stored["label"])}


def train_example(
    example: dict[str, Any], rng: np.random.Generator, dtype: Any = np.float32
) -> dict[str, Any]:
    """Shifts a decoded image by up to one pixel each way (zero filled), and normalizes it."""
    down, right = divmod(int(rng.integers(9)), 3)
    padded = np.zeros((10, 10, 1), np.float32)
    padded[1:9, 1:9] = example["image"]
    return example | {"image": _normalize(padded[down : down + 8, right : right + 8], dtype)}


def eval_example(example: dict[str, Any], dtype: Any = np.float32) -> dict[str, Any]:
    """Normalizes a decoded image."""
    return example | {"image": _normalize(example["image"], dtype)}


def _normalize(ink: np.ndarray, dtype: Any) -> np.ndarray:
    return ((ink - MEAN) / STD).astype(dtype)
