"""One input path for every data set: a TFDS data source, read, shuffled and batched by Grain.

What is particular to one data set (how it is prepared, decoded, augmented) is in a file of its own;
a new one is a loader here. TFDS and Grain are imported where they are used: importing this is free.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import grain

# Grain's own endless repetition has one example more than Python can index.
_ENDLESS = 2**62

Batch = dict[str, np.ndarray]
Example = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set that is on disk, and how its examples become batches.

    Attributes:
      name: what ``load`` calls it.
      image_shape: (height, width, channels) of the images in a batch.
      num_classes: labels are 0 … num_classes − 1.
      sources: the examples of each split, by random access; a data set that fits into memory is
        kept there decoded.
      train_example: ``(example, rng)`` → ``{"image", "label"}``, augmented and normalised.
      eval_example: ``example`` → ``{"image", "label"}``, normalised.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    sources: Mapping[str, Sequence[Example]] = field(repr=False)
    train_example: Callable[[Example, np.random.Generator], Example] = field(repr=False)
    eval_example: Callable[[Example], Example] = field(repr=False)

    @property
    def num_train(self) -> int:
        """Number of examples in the train split."""
        return len(self.sources["train"])

    @property
    def num_test(self) -> int:
        """Number of examples in the test split."""
        return len(self.sources["test"])

    def train_batches(
        self, batch_size: int, seed: int = 0, shard_index: int = 0, shard_count: int = 1
    ) -> "grain.DatasetIterator[Batch]":
        """An endless iterator over the train split, shuffled anew every epoch.

        Epochs follow one another without a gap, and a batch may span two of them: every example is
        seen once an epoch, whatever the batch size. The shards take turns over the same shuffled
        sequence, so the examples of a global step do not depend on the number of shards.

        Args:
          batch_size: examples in a batch of this shard.
          seed: what the order and the augmentation are drawn from.
          shard_index: which of the shards this is; usually ``jax.process_index()``.
          shard_count: how many shards share the split; usually ``jax.process_count()``.

        Returns:
          An iterator of ``{"image": float32 (batch, height, width, channels), normalised, "label":
          int32 (batch,)}``. ``get_state()`` is a dict that JSON can hold; after
          ``set_state(state)``, on an iterator made with the same arguments, come exactly the
          batches that would have followed.

        Raises:
          ValueError: an argument is out of its range.
        """
        import grain

        _check_shard(shard_index, shard_count)
        limit = self.num_train // shard_count
        if not 1 <= batch_size <= limit:
            of = f" of {shard_count}" if shard_count > 1 else ""
            raise ValueError(
                f"batch_size is {batch_size}; it must be from 1 to {limit}, the examples that a "
                f"shard{of} has in the train split of {self.name!r}"
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        return iter(
            grain.MapDataset.source(self.sources["train"])
            .seed(seed)
            .shuffle()
            .random_map(self.train_example)
            .repeat(_ENDLESS // self.num_train)
            .slice(slice(shard_index, None, shard_count))
            .batch(batch_size)
            .to_iter_dataset(_read_options())
        )

    def eval_batches(
        self, batch_size: int, split: str = "test", shard_index: int = 0, shard_count: int = 1
    ) -> "grain.DatasetIterator[Batch]":
        """An iterator over a split, every example once, in the order in which it is stored.

        Every batch has ``batch_size`` rows, and every shard yields the same number of batches, so
        that shapes are static and collectives meet. What fills them up has weight 0.

        Args:
          batch_size: rows in a batch of this shard; may exceed the split.
          split: ``"train"`` or ``"test"``.
          shard_index: which of the shards this is.
          shard_count: how many shards share the split.

        Returns:
          An iterator of ``{"image": float32 (batch, height, width, channels), "label": int32
          (batch,), "weight": float32 (batch,), 1 for an example and 0 for padding}``.

        Raises:
          ValueError: an argument is out of its range.
        """
        import grain

        _check_shard(shard_index, shard_count)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if split not in self.sources:
            raise ValueError(f"split is {split!r}; {self.name!r} has {_listed(self.sources)}")
        source = self.sources[split]
        padding = {
            "image": np.zeros(self.image_shape, np.float32),
            "label": np.int32(0),
            "weight": np.float32(0),
        }

        def example(index: int) -> Example:
            if index >= len(source):
                return padding
            return self.eval_example(source[index]) | {"weight": np.float32(1)}

        rows = batch_size * shard_count
        return iter(
            grain.MapDataset.range(math.ceil(len(source) / rows) * rows)
            .map(example)
            .slice(slice(shard_index, None, shard_count))
            .batch(batch_size)
            .to_iter_dataset(_read_options())
        )


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Opens a data set; ``"digits"`` is written to disk on first use.

    Args:
      name: which data set.
      data_dir: directory that holds TFDS data sets; ``None`` is TFDS's default: the environment
        variable ``TFDS_DATA_DIR``, or else ``~/tensorflow_datasets``.

    Raises:
      ValueError: there is no data set of that name.
      OSError: a data set has to be prepared and the directory cannot be written.

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
    if name not in _LOADERS:
        raise ValueError(f"data set {name!r} is not known; known are {_listed(_LOADERS)}")
    # TFDS expands "~" in some of the places where it uses a path, and not in others.
    return _LOADERS[name](None if data_dir is None else os.path.expanduser(data_dir))


def _digits(data_dir: str | None) -> Dataset:
    from lats_optax.data import digits

    builder = digits.prepare(data_dir)
    # All of it decoded is less than a megabyte, and to read and decode takes longer than a step.
    sources = {
        split: [digits.decode(stored) for stored in _source(builder, split)]
        for split in ("train", "test")
    }
    return Dataset(
        name="digits",
        image_shape=digits.IMAGE_SHAPE,
        num_classes=builder.info.features["label"].num_classes,
        sources=sources,
        train_example=digits.train_example,
        eval_example=digits.eval_example,
    )


_LOADERS: dict[str, Callable[[str | None], Dataset]] = {"digits": _digits}


def _source(builder: Any, split: str) -> Sequence[Example]:
    """The examples as stored: TFDS's own decoder complains where there is Pillow but no OpenCV."""
    import tensorflow_datasets as tfds

    return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})


def _read_options() -> "grain.ReadOptions":
    """One thread that works on the next batches while the step runs."""
    import grain

    return grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)


def _check_shard(shard_index: int, shard_count: int) -> None:
    if shard_count < 1:
        raise ValueError(f"shard_count is {shard_count}; it must be at least 1")
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index is {shard_index}; it must be from 0 to {shard_count - 1}")


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in names)
