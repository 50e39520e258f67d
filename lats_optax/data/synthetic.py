"""Noise in the shape of a data set, of any size: what a training step costs without its input.

Images are drawn once, labels are a function of the index, nothing is decoded; batches are made as
those of every other data set are.
"""

from typing import Literal

import numpy as np

from lats_optax.data.examples import Example
from lats_optax.data.pipeline import Dataset, numpy_dtype

NUM_TEST = 50_000
"""Examples of the test split, or a 20th of the train split where that is less."""

_IMAGES = 64


class Noise:
    """Examples by random access: one of 64 images, the label index mod ``num_classes``."""

    def __init__(self, length: int, images: np.ndarray, num_classes: int):
        """Takes the images that the examples take turns in."""
        self._length, self._images, self._num_classes = length, images, num_classes

    def __len__(self) -> int:
        """Number of examples."""
        return self._length

    def __getitem__(self, index: int) -> Example:
        """The example of an index."""
        if not 0 <= index < self._length:
            raise IndexError(f"index is {index}; it must be from 0 to {self._length - 1}")
        image = self._images[index % _IMAGES]
        return {"image": image, "label": np.int32(index % self._num_classes)}


def make(
    num_examples: int,
    num_classes: int,
    image_size: int,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    threads: int = 1,
    workers: int = 0,
) -> Dataset:
    """A data set of normalized noise.

    Args:
      num_examples: in the train split.
      num_classes: labels are 0 … num_classes − 1.
      image_size: height and width; there are three channels.
      dtype: of the images.
      threads: as in ``Dataset``.
      workers: as in ``Dataset``.

    Example:
      >>> noise = make(1000, num_classes=10, image_size=32)
      >>> noise.num_train, noise.num_test
      (1000, 50)
      >>> next(noise.train_batches(16))["image"].shape
      (16, 32, 32, 3)
    """
    shape = (image_size, image_size, 3)
    images = np.random.default_rng(0).standard_normal((_IMAGES, *shape), np.float32)
    images = images.astype(numpy_dtype(dtype))
    num_test = min(NUM_TEST, -(-num_examples // 20))
    return Dataset(
        name="synthetic",
        image_shape=shape,
        num_classes=num_classes,
        sources={
            "train": Noise(num_examples, images, num_classes),
            "test": Noise(num_test, images, num_classes),
        },
        train_example=_as_it_is,
        eval_example=dict,
        dtype=dtype,
        threads=threads,
        workers=workers,
    )


def _as_it_is(example: Example, rng: np.random.Generator) -> Example:
    del rng
    return example
