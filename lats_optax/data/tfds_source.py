"""A data set that TFDS has prepared as ArrayRecord: found on disk, checked, read record by record.

It is opened from its directory alone: no code of TFDS's catalog is imported, which may need
TensorFlow.
"""

import bisect
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from lats_optax.data.examples import CorruptRecordError, Example
from lats_optax.files.storage import URL, as_path

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_NAME = re.compile(r"(?P<name>\w+)(?:/(?P<config>[\w.-]+))?(?::(?P<version>\d+\.\d+\.\d+))?")
INFO = "dataset_info.json"


class PrepareError(RuntimeError):
    """A data set cannot be prepared here; the message says why and what would help."""


class Preprocessing(Protocol):
    """From an encoded image to uint8 pixels; raises ``ValueError`` where it is corrupt."""

    def train(self, encoded: bytes, rng: np.random.Generator, /) -> np.ndarray:
        """Augmented."""

    def eval(self, encoded: bytes, /) -> np.ndarray:
        """Not augmented."""


@dataclass(frozen=True)
class Transform:
    """From a record to ``{"image", "label"}``, normalized."""

    preprocessing: Preprocessing
    normalization: Callable[[np.ndarray], np.ndarray]

    def train(self, record: Example, rng: np.random.Generator) -> Example:
        """The example, augmented; raises ``CorruptRecordError``."""
        return self._example(record, lambda encoded: self.preprocessing.train(encoded, rng))

    def eval(self, record: Example) -> Example:
        """The example; raises ``CorruptRecordError``."""
        return self._example(record, self.preprocessing.eval)

    def _example(self, record: Example, pixels: Callable[[bytes], np.ndarray]) -> Example:
        try:
            image = pixels(record["image"])
        except ValueError as error:
            raise CorruptRecordError(f"{record['where']} is corrupt: {error}") from error
        return {"image": self.normalization(image), "label": record["label"]}


@dataclass(frozen=True)
class Where:
    """What a record is called in an error."""

    dataset: str
    split: str
    index: int
    shard: str
    position: int
    file_name: str | None = None

    def __str__(self) -> str:
        """One line."""
        file_name = f" ({self.file_name})" if self.file_name else ""
        return (
            f"record {self.index} of the {self.split} split of {self.dataset!r}{file_name}, which "
            f"is record {self.position} of {self.shard},"
        )


class Records:
    """The records of a split: image still encoded, label, and what the record is called."""

    def __init__(self, builder: "tfds.core.DatasetBuilder", split: str):
        """Opens no file yet."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        info = builder.info
        self._dataset, self._split = info.name, split
        self._features = info.features
        self._image, self._label = image_and_label(builder)
        self._num_classes = info.features[self._label].num_classes
        self._files = info.splits[split].file_instructions
        self._ends = list(itertools.accumulate(file.take for file in self._files))
        self._reader = ArrayRecordDataSource(self._files)

    def __len__(self) -> int:
        """Number of records."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        """``{"image": bytes, "label": int32, "where"}``.

        Raises:
          CorruptRecordError: the record cannot be read.
        """
        import tensorflow_datasets as tfds

        decoders = {self._image: tfds.decode.SkipDecoding()}
        try:
            stored = self._reader[index]
            # Of a file that was cut short, ArrayRecord makes records without content.
            if not stored:
                raise ValueError("it is empty")
            example = self._features.deserialize_example_np(stored, decoders=decoders)
            image, label = example[self._image], example[self._label]
            if image is None or label is None or not 0 <= label < self._num_classes:
                raise ValueError(
                    f"its label is {label}; allowed: 0 to {self._num_classes - 1}"
                    if image is not None
                    else "it holds no image"
                )
        # ArrayRecord, protobuf and TFDS raise errors of any type.
        except Exception as error:
            problem = str(error).partition("\n")[0]
            raise CorruptRecordError(f"{self._where(index)} cannot be read: {problem}") from error
        file_name = example.get("file_name")
        return {
            "image": image,
            "label": np.int32(label),
            "where": self._where(index, file_name),
        }

    def _where(self, index: int, file_name: bytes | None = None) -> Where:
        file = bisect.bisect_right(self._ends, index)
        position = index - (self._ends[file] - self._files[file].take)
        return Where(
            dataset=self._dataset,
            split=self._split,
            index=index,
            shard=os.fspath(self._files[file].filename),
            position=position + self._files[file].skip,
            file_name=None if file_name is None else file_name.decode(errors="replace"),
        )


def expand_directory(data_dir: str | os.PathLike[str] | None) -> str | None:
    """The directory of data sets with ``~`` expanded; None stays None, TFDS's default.

    Raises:
      NotADirectoryError: it is a file.
      StoreError: it is in a store that cannot be reached.
      ValueError: it is in a store that ArrayRecord cannot read.
    """
    if data_dir is None:
        return None
    # TFDS expands "~" in some of the places where it uses a path, and not in others.
    directory = as_path(data_dir, "data_dir")
    if isinstance(directory, URL) and not str(directory).startswith("gs://"):
        allowed = "a directory of this machine, to which it is copied or mounted, or one on gs://"
        raise ValueError(
            f"data_dir is {str(directory)!r}, which ArrayRecord does not read; allowed: {allowed}"
        )
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"data_dir is {str(directory)!r}, a file; allowed: a directory")
    return str(directory)


def copy_to_store(made: str | os.PathLike[str], directory: Path, place: URL) -> URL:
    """Copies a data set that was prepared on this machine, in the place of one that is there.

    Args:
      made: the directory of its version.
      directory: that holds data sets, above it.
      place: the one in the store that gets a copy.

    Returns:
      The copy.
    """
    target = place / Path(made).relative_to(directory).as_posix()
    files = sorted(file.name for file in Path(made).iterdir())
    target.remove(target.names())
    target.upload(Path(made), [file for file in files if file != INFO])
    target.upload(Path(made), [INFO])  # without which no data set is whole
    return target


def open_builder(
    name: str, data_dir: str | None, command: str | None = None
) -> "tfds.core.DatasetBuilder":
    """The newest version of a data set that is on disk.

    Args:
      name: ``name``, ``name/config``, ``name:version`` or ``name/config:version``.
      data_dir: directory that holds TFDS data sets; ``None`` is TFDS's default.
      command: what prepares it, but for the directory. Default (None): ``lats-prepare`` and its
        name.

    Raises:
      ValueError: TFDS knows no data set of that name, and none is there.
      FileNotFoundError: it is not there, or not whole, or not in ArrayRecord; the message has the
        command that prepares it.
    """
    import tensorflow_datasets as tfds

    parsed = parse_name(name)
    root = data_dir or os.fspath(tfds.core.constants.DATA_DIR)
    command = command or f"lats-prepare {name}"
    command += f" --data-dir {data_dir}" if data_dir else ""
    path = os.path.join(root, parsed.name)
    if not as_path(path).is_dir():
        check_known(name)
        missing = path if as_path(root).is_dir() else root
        raise FileNotFoundError(
            f"data set {name!r} is not prepared, there is no directory {missing}: {command}"
        )
    if parsed.config:
        path = os.path.join(path, parsed.config)
    elif not _versions(path):
        configs = [c for c in _listdir(path) if _versions(os.path.join(path, c))]
        if len(configs) > 1:
            choice = ", ".join(f"{parsed.name}/{config}" for config in configs)
            raise ValueError(f"data set {name!r} has several configs in {root}; allowed: {choice}")
        path = os.path.join(path, *configs)
    versions = _versions(path)
    if parsed.version and parsed.version in versions:
        versions = [parsed.version]
    elif parsed.version:
        there = f" (there is {', '.join(versions)})" if versions else ""
        raise FileNotFoundError(
            f"data set {name!r} is not prepared, {path} has no version {parsed.version}{there}: "
            f"{command}"
        )
    if not versions:
        unfinished = any(entry.startswith("incomplete.") for entry in _listdir(path))
        why = "was not prepared to the end" if unfinished else "is not prepared"
        raise FileNotFoundError(f"data set {name!r} {why}, {path} has no version of it: {command}")
    path = os.path.join(path, versions[-1])
    if INFO not in _listdir(path):
        raise FileNotFoundError(
            f"data set {name!r} is not whole, {path} has no {INFO}: {command} --overwrite"
        )
    try:
        builder = tfds.builder_from_directory(path)
    # TFDS and protobuf raise errors of all kinds for a damaged file.
    except Exception as error:
        problem = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"data set {name!r} is not whole, {path}/{INFO} or features.json beside it cannot be "
            f"read ({problem}): {command} --overwrite"
        ) from error
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise FileNotFoundError(
            f"data set {name!r} is in {path} as {builder.info.file_format.value}, which needs "
            "TensorFlow; prepare it as ArrayRecord, in another directory or with --overwrite in "
            f"the place of that one: {command} --overwrite"
        )
    here = set(_listdir(path))
    for split in builder.info.splits.values():
        lost = [file for file in split.filenames if os.path.basename(file) not in here]
        if lost:
            raise FileNotFoundError(
                f"data set {name!r} is not whole, {path} lacks {len(lost)} of the "
                f"{len(split.filenames)} files of {split.name!r}, such as {sorted(lost)[0]}: "
                f"{command} --overwrite"
            )
    return builder


class Name(NamedTuple):
    """A data set's full name."""

    name: str
    config: str | None
    version: str | None


def parse_name(name: str) -> Name:
    """The parts of a data set's full name.

    Raises:
      ValueError: it is not of that form.

    >>> parse_name("imagenette/160px-v2:1.0.0")
    Name(name='imagenette', config='160px-v2', version='1.0.0')
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"data set {name!r} is not a name; allowed: NAME, NAME/CONFIG, NAME:1.2.3 or "
            "NAME/CONFIG:1.2.3"
        )
    return Name(**match.groupdict())


def check_known(name: str) -> None:
    """Checks that TFDS's catalog has a data set of that name.

    Raises:
      ValueError: it has not; the message lists names that are near.
    """
    import difflib

    from tensorflow_datasets.core import registered

    # `tfds.list_builders` looks into the network as well, and needs TensorFlow for it.
    known = ["digits", "synthetic", *registered.list_imported_builders()]
    plain = parse_name(name).name
    if plain not in known:
        near = difflib.get_close_matches(plain, known)
        suggestion = (
            f"perhaps you meant {' or '.join(map(repr, near))}"
            if near
            else (
                "allowed: 'digits', 'synthetic', and image classification sets of "
                "https://www.tensorflow.org/datasets/catalog"
            )
        )
        raise ValueError(
            f"data set {name!r} is not known; {suggestion}. Of a folder of images, lats-prepare "
            f"folder PATH --name {plain} makes one"
        )


def image_and_label(builder: "tfds.core.DatasetBuilder") -> tuple[str, str]:
    """The names of the features that hold image and label.

    Raises:
      ValueError: the data set is not one of images with one label each.
    """
    import tensorflow_datasets as tfds

    info = builder.info
    names: list[str] = []
    for kind, word in ((tfds.features.Image, "image"), (tfds.features.ClassLabel, "label")):
        found = [name for name, feature in info.features.items() if type(feature) is kind]
        # Where there are several (CIFAR-100 has coarse labels too), the data set says which.
        supervised = [name for name in info.supervised_keys or () if name in found]
        chosen = found if len(found) == 1 else supervised
        if len(chosen) != 1:
            has = f"it has {', '.join(map(repr, found))}" if found else "it has none"
            raise ValueError(
                f"data set {info.name!r} is not for image classification: one feature has to be "
                f"the {word}, and {has}"
            )
        names += chosen
    return names[0], names[1]


def eval_split_of(builder: "tfds.core.DatasetBuilder", eval_split: str | None) -> str:
    """The split that evaluation is on: ``validation`` where there is one, or else ``test``.

    Raises:
      ValueError: the data set lacks it, or a train split.
    """
    splits = list(builder.info.splits)
    names = [eval_split] if eval_split else ["validation", "test"]
    for wanted in (["train"], names):
        if not any(name in splits for name in wanted):
            raise ValueError(
                f"data set {builder.info.name!r} has no split {' or '.join(map(repr, wanted))}; "
                f"it has {', '.join(map(repr, splits)) or 'none'}"
            )
    return next(name for name in names if name in splits)


def _versions(path: str) -> list[str]:
    """The versions in a directory, the newest last."""
    found = [entry for entry in _listdir(path) if re.fullmatch(r"\d+\.\d+\.\d+", entry)]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def _listdir(path: str) -> Sequence[str]:
    directory = as_path(path)
    return sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
