"""Data sets by name: where each comes from, and how its images become what a model takes."""

import os
from functools import partial
from typing import Any, Literal

from lats_optax.data import tfds_source
from lats_optax.data.pipeline import Dataset, numpy_dtype

SMALL = 64
"""Images of one size up to this many pixels a side are kept at it: padded, cropped and flipped."""

IMAGE_SIZE = 224
"""Other images become squares of this many pixels a side, if nothing else is asked for."""

# Mirrored, these mean something else or nothing.
_CHARACTERS = frozenset(
    {"emnist", "kmnist", "mnist", "mnist_corrupted", "omniglot", "svhn_cropped"}
)


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    eval_split: str | None = None,
    skip_corrupt: bool = False,
    workers: int = 0,
    synthetic_examples: int = 1_281_167,
    synthetic_classes: int = 1000,
) -> Dataset:
    """Opens a data set.

    ``"digits"`` is written to disk on first use, ``"synthetic"`` is noise; every other one is an
    image classification set of TFDS that ``lats-prepare`` has written as ArrayRecord.

    Args:
      name: which data set: ``name``, ``name/config`` or ``name/config:version``; without a version
        the newest that is there.
      data_dir: directory that holds TFDS data sets, on this machine or on gs://; ``None`` is TFDS's
        default: the environment variable ``TFDS_DATA_DIR``, or else ``~/tensorflow_datasets``.
      image_size: height and width of the images in a batch; ``None`` is 224, or what the images
        have where all have one size of at most 64 pixels a side.
      dtype: of the images in a batch.
      eval_split: the split to evaluate on; ``None`` is ``validation`` where there is one, or else
        ``test``.
      skip_corrupt: leave corrupt records out and count them; otherwise they are an error.
      workers: processes that read, decode and augment; 0: threads of this one.
      synthetic_examples: in the train split of ``"synthetic"``.
      synthetic_classes: of ``"synthetic"``.

    Raises:
      ValueError: there is no data set of that name, or an argument does not suit it.
      OSError: it is not prepared (the message has the command that does it), or has to be and the
        directory cannot be written.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as data_dir:
      ...     digits = load("digits", data_dir)
      >>> digits.num_train, digits.num_test, digits.num_classes
      (1437, 360, 10)
      >>> batch = next(digits.train_batches(64))
      >>> batch["image"].shape, batch["label"].shape
      ((64, 8, 8, 1), (64,))
    """
    directory = tfds_source.expand_directory(data_dir)
    shared: dict[str, Any] = {"dtype": dtype, "workers": workers}
    if name == "digits":
        return _digits(directory, image_size, eval_split, shared)
    if name == "synthetic":
        from lats_optax.data import synthetic

        size = IMAGE_SIZE if image_size is None else image_size
        _check_eval_split(name, eval_split, "test")
        return synthetic.make(
            synthetic_examples, synthetic_classes, size, threads=_threads(), **shared
        )
    return _tfds(name, directory, image_size, eval_split, shared | {"skip_corrupt": skip_corrupt})


def _digits(
    data_dir: str | None, image_size: int | None, eval_split: str | None, shared: dict[str, Any]
) -> Dataset:
    from lats_optax.data import digits

    _check_image_size("digits", image_size, digits.IMAGE_SHAPE)
    _check_eval_split("digits", eval_split, "test")
    builder = digits.prepare(data_dir)
    dtype = numpy_dtype(shared["dtype"])
    # All of it decoded is less than a megabyte, and to read and decode takes longer than a step.
    records = {split: tfds_source.Records(builder, split) for split in ("train", "test")}
    sources = {
        split: [digits.decode(stored[index]) for index in range(len(stored))]
        for split, stored in records.items()
    }
    return Dataset(
        name="digits",
        image_shape=digits.IMAGE_SHAPE,
        num_classes=builder.info.features["label"].num_classes,
        sources=sources,
        train_example=partial(digits.train_example, dtype=dtype),
        eval_example=partial(digits.eval_example, dtype=dtype),
        **shared,
    )


def _tfds(
    name: str,
    data_dir: str | None,
    image_size: int | None,
    eval_split: str | None,
    shared: dict[str, Any],
) -> Dataset:
    from lats_optax.data import images, normalization

    builder = tfds_source.open_builder(name, data_dir)
    image, label = tfds_source.image_and_label(builder)
    eval_split = tfds_source.eval_split_of(builder, eval_split)
    height, width, channels = builder.info.features[image].shape
    preprocessing: images.SmallImagePreprocessing | images.ImageNetPreprocessing
    if height is not None and width is not None and max(height, width) <= SMALL:
        shape = (height, width, channels)
        _check_image_size(name, image_size, shape)
        flip = builder.info.name not in _CHARACTERS
        preprocessing = images.SmallImagePreprocessing(shape, flip=flip)
    else:
        preprocessing = images.ImageNetPreprocessing(
            IMAGE_SIZE if image_size is None else image_size
        )
    mean, std = normalization.channel_mean_std(builder.info.name, preprocessing.shape[2])
    normalize = normalization.Normalization(mean, std, shared["dtype"])
    transform = tfds_source.Transform(preprocessing, normalize)
    return Dataset(
        name=name,
        image_shape=preprocessing.shape,
        num_classes=builder.info.features[label].num_classes,
        sources={split: tfds_source.Records(builder, split) for split in ("train", eval_split)},
        train_example=transform.train,
        eval_example=transform.eval,
        eval_split=eval_split,
        threads=_threads(),
        **shared,
    )


def _threads() -> int:
    """As many as there are cores: decoders release Python's lock. Each holds a batch or two."""
    return min(16, os.cpu_count() or 1)


def _check_image_size(name: str, image_size: int | None, shape: tuple[int, int, int]) -> None:
    height, width, _ = shape
    if image_size is not None and not image_size == height == width:
        raise ValueError(
            f"image_size is {image_size}; the images of {name!r} are {height}×{width} and stay so; "
            f"allowed: {f'{height} or ' if height == width else ''}None"
        )


def _check_eval_split(name: str, eval_split: str | None, only: str) -> None:
    if eval_split not in (None, only):
        raise ValueError(f"eval_split is {eval_split!r}; allowed for {name!r}: {only!r} or None")
