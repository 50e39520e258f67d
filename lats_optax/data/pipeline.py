"""One input path for every data set: examples by random access, shuffled and batched by Grain.

What is particular to one data set (how it is found, decoded, augmented) is in other files. Grain is
imported where it is used: importing this is free.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lats_optax.data.examples import SKIPPED, EvalExamples, Example, Source, TrainExamples

if TYPE_CHECKING:
    import grain

# Grain's own endless repetition has one example more than Python can index.
_ENDLESS = 2**62

Batch = dict[str, np.ndarray]


class Batches(Iterator[Batch]):
    """The batches of a sequence, prefetched, from any position on.

    Attributes:
      skipped: corrupt records that were left out of the batches that this has given.
    """

    def __init__(self, sequence: "grain.MapDataset[Batch]", threads: int, workers: int):
        """Computes nothing yet.

        Args:
          sequence: the batches by random access.
          threads: that compute batches, where there are no workers.
          workers: processes that compute batches; 0: none.
        """
        self._sequence = sequence
        self._threads, self._workers = threads, workers
        self._position = 0
        self._prefetched: grain.DatasetIterator[Batch] | None = None
        self.skipped = 0

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
          CorruptRecordError: a record of it cannot be read, or holds no image.
        """
        if self._prefetched is None:
            self._prefetched = self._prefetch()
        batch: Batch = next(self._prefetched)
        self._position += 1
        self.skipped += int(np.sum(batch.pop(SKIPPED, 0)))
        return batch

    def get_state(self) -> dict[str, int]:
        """Where this is, for ``set_state`` of one with any number of threads and workers."""
        return {"next_index": self._position}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Goes to where another one was."""
        self.close()
        self._position = state["next_index"]

    def close(self) -> None:
        """Stops threads and workers; the next batch starts them again."""
        if self._prefetched is not None:
            self._prefetched.close()
            self._prefetched = None

    def _prefetch(self) -> "grain.DatasetIterator[Batch]":
        import grain

        remaining = self._sequence.slice(slice(self._position, None))
        threads = 1 if self._workers else self._threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
        prefetched = remaining.to_iter_dataset(options)
        if self._workers:
            from absl import flags

            # Grain reads flags of its own, which a program that is not absl's has not parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            # Worker i has the batches i, i + n, …, which come in the order of the sequence.
            prefetched = prefetched.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2),
                worker_init_fn=_begin_worker,
            )
        return iter(prefetched)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set that is at hand, and how its examples become batches.

    Attributes:
      name: what ``load`` calls it.
      image_shape: (height, width, channels) of the images in a batch.
      num_classes: labels are 0 … num_classes − 1.
      sources: the examples of each split, by random access.
      train_example: ``(example, rng)`` → ``{"image", "label"}``, augmented and normalized.
      eval_example: ``example`` → ``{"image", "label"}``, normalized.
      eval_split: the split that evaluation is on.
      dtype: of the images in a batch.
      skip_corrupt: whether corrupt records are left out and counted, or an error.
      threads: that compute batches, where there are no workers.
      workers: processes that compute batches; 0: none. Sources and functions are pickled for them,
        and a script that uses them has to begin its work under ``if __name__ == "__main__":``.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    sources: Mapping[str, Source] = field(repr=False)
    train_example: Callable[[Example, np.random.Generator], Example] = field(repr=False)
    eval_example: Callable[[Example], Example] = field(repr=False)
    eval_split: str = "test"
    dtype: Literal["float32", "bfloat16"] = "float32"
    skip_corrupt: bool = False
    threads: int = 1
    workers: int = 0

    @property
    def num_train(self) -> int:
        """Number of examples in the train split."""
        return len(self.sources["train"])

    @property
    def num_test(self) -> int:
        """Number of examples in the split that evaluation is on."""
        return len(self.sources[self.eval_split])

    def train_batches(
        self, batch_size: int, seed: int = 0, shard_index: int = 0, shard_count: int = 1
    ) -> Batches:
        """An endless iterator over the train split, shuffled again every epoch.

        Epochs follow one another without a gap, and a batch may span two of them: every example is
        seen once an epoch, for any batch size. The shards take turns over the same shuffled
        sequence, so the examples of a global step do not depend on the number of shards, nor on
        that of workers. With ``skip_corrupt``, the place of a corrupt record is taken by another.

        Args:
          batch_size: examples in a batch of this shard.
          seed: what the order and the augmentation are drawn from.
          shard_index: which of the shards this is; usually ``jax.process_index()``.
          shard_count: how many shards share the split; usually ``jax.process_count()``.

        Returns:
          An iterator of ``{"image": (batch, height, width, channels) of dtype, normalized,
          "label": int32 (batch,)}``. ``get_state()`` is a dict that JSON can hold; after
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
        examples = TrainExamples(self.sources["train"], self.train_example, self.skip_corrupt)
        batches = (
            grain.MapDataset.range(self.num_train)
            .seed(seed)
            .shuffle()
            .random_map(examples)
            .repeat(_ENDLESS // self.num_train)
            .slice(slice(shard_index, None, shard_count))
            .batch(batch_size)
        )
        return Batches(batches, self.threads, self.workers)

    def eval_batches(
        self,
        batch_size: int,
        split: str | None = None,
        shard_index: int = 0,
        shard_count: int = 1,
    ) -> Batches:
        """An iterator over a split, every example once, in the order in which it is stored.

        Every batch has ``batch_size`` rows, and every shard yields the same number of batches, so
        that shapes are static and collectives meet. What fills them up has weight 0; with
        ``skip_corrupt``, so have corrupt records.

        Args:
          batch_size: rows in a batch of this shard; may exceed the split.
          split: one of ``sources``; ``None`` is ``eval_split``.
          shard_index: which of the shards this is.
          shard_count: how many shards share the split.

        Returns:
          An iterator of ``{"image": (batch, height, width, channels) of dtype, "label": int32
          (batch,), "weight": float32 (batch,), 1 for an example and 0 for padding}``.

        Raises:
          ValueError: an argument is out of its range.
        """
        import grain

        _check_shard(shard_index, shard_count)
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        split = self.eval_split if split is None else split
        if split not in self.sources:
            raise ValueError(f"split is {split!r}; {self.name!r} has {_listed(self.sources)}")
        source = self.sources[split]
        padding = {
            "image": np.zeros(self.image_shape, numpy_dtype(self.dtype)),
            "label": np.int32(0),
        }
        examples = EvalExamples(source, self.eval_example, padding, self.skip_corrupt)
        rows = batch_size * shard_count
        batches = (
            grain.MapDataset.range(math.ceil(len(source) / rows) * rows)
            .map(examples)
            .slice(slice(shard_index, None, shard_count))
            .batch(batch_size)
        )
        return Batches(batches, self.threads, self.workers)


def numpy_dtype(name: Literal["float32", "bfloat16"]) -> np.dtype[Any]:
    """NumPy's dtype of that name.

    >>> numpy_dtype("bfloat16").itemsize
    2
    """
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _begin_worker(index: int, count: int) -> None:
    """What a worker process does first."""
    del index, count
    # Ctrl-C reaches every process of a terminal. The one that trains finishes its step first, and
    # may need a batch for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # One that was killed cannot stop its workers.
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _check_shard(shard_index: int, shard_count: int) -> None:
    if shard_count < 1:
        raise ValueError(f"shard_count is {shard_count}; it must be at least 1")
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index is {shard_index}; it must be from 0 to {shard_count - 1}")


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(repr(name) for name in names)
