"""From the records of a split to examples, and what happens where a record is corrupt.

Wherever examples are made, in threads or in worker processes, they are made by the two classes
here. What they leave out goes with the batch to the process that takes it, and is counted there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Example = dict[str, Any]

SKIPPED = "skipped"
"""Key of the number of corrupt records that were met for the sake of an example."""

# Records drawn at random that are all corrupt: so many in a row are not a few bad ones.
_MOST_IN_A_ROW = 100


class Source(Protocol):
    """The examples of a split by random access: a list, or something that can be pickled."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int, /) -> Example:
        """The example of an index from 0; may raise ``CorruptRecordError``."""


class CorruptRecordError(ValueError):
    """A record cannot be read, or holds no image; the message says which and where it is."""


@dataclass(frozen=True, eq=False)
class TrainExamples:
    """``(index, rng)`` → the augmented example of that index.

    Where ``skip_corrupt``, the place of a corrupt record is taken by another one, drawn from
    ``rng``. So a batch depends on nothing but its number, the seed and the files: shards, workers
    and what was read before it do not matter.

    Attributes:
      source: examples by random access; raises ``CorruptRecordError``.
      transform: ``(example, rng)`` → example; raises ``CorruptRecordError``.
      skip_corrupt: whether corrupt records are replaced and counted, or an error.
    """

    source: Source
    transform: Callable[[Example, np.random.Generator], Example]
    skip_corrupt: bool

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        """The example, with the number of ``"skipped"`` records where ``skip_corrupt``."""
        for skipped in range(_MOST_IN_A_ROW):
            try:
                example = self.transform(self.source[index], rng)
            except CorruptRecordError as error:
                if not self.skip_corrupt:
                    raise _with_advice(error) from error.__cause__
                problem = error
                index = int(rng.integers(len(self.source)))
            else:
                return example | {SKIPPED: np.int32(skipped)} if self.skip_corrupt else example
        raise CorruptRecordError(
            f"{_MOST_IN_A_ROW} records in a row, drawn at random, are corrupt. The last: {problem}"
        )


@dataclass(frozen=True, eq=False)
class EvalExamples:
    """``index`` → the example of that index with ``"weight"`` 1; beyond the last, padding.

    Where ``skip_corrupt``, a corrupt record becomes padding, of ``"weight"`` 0.

    Attributes:
      source: as for ``TrainExamples``.
      transform: example → example; raises ``CorruptRecordError``.
      padding: an example of the same shapes.
      skip_corrupt: whether corrupt records are left out and counted, or an error.
    """

    source: Source
    transform: Callable[[Example], Example]
    padding: Example
    skip_corrupt: bool

    def __call__(self, index: int) -> Example:
        """The example, with the number of ``"skipped"`` records where ``skip_corrupt``."""
        example, weight, skipped = self.padding, 0, 0
        if index < len(self.source):
            try:
                example, weight = self.transform(self.source[index]), 1
            except CorruptRecordError as error:
                if not self.skip_corrupt:
                    raise _with_advice(error) from error.__cause__
                skipped = 1
        example = example | {"weight": np.float32(weight)}
        return example | {SKIPPED: np.int32(skipped)} if self.skip_corrupt else example


def _with_advice(error: CorruptRecordError) -> CorruptRecordError:
    return CorruptRecordError(f"{error}. --data.skip-corrupt leaves such records out, and counts.")
