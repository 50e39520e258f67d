"""A folder of images, one subfolder a class, as a TFDS data set.

`lats-prepare folder PATH --name NAME` comes here. Everything is looked at before anything is
written: every image is decoded once. From then on the data set is one like ImageNet.

TFDS and Pillow are imported where they are used: importing this is free.
"""

import contextlib
import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lats_optax.data.decoding import CorruptImageError, converted, opened

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

HELD_OUT = 0.1
"""Part of each class that is tested on, where the folder does not say what is."""

VERSION = "1.0.0"

_NAME = re.compile("[a-z][a-z0-9_]*")
# What splits are called: in folders, and in TFDS.
_SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
# TFDS's own decoder, TensorFlow's, reads these; other images are stored as PNG.
_STORED_AS_THEY_ARE = ("JPEG", "MPO", "PNG")
_GRAY = ("1", "L")


class ImageFile(NamedTuple):
    """An image and its class.

    Attributes:
      path: where it is.
      name: its path within the folder, which corrupt records are named by.
      label: the index of its class.
    """

    path: Path
    name: str
    label: int


class _Kind(NamedTuple):
    """Height, width and channels, 1 for gray."""

    height: int
    width: int
    channels: int


@dataclass(frozen=True)
class Folder:
    """What is in a folder of images.

    Attributes:
      classes: their names, sorted; a label is an index.
      splits: the images by split, ``train`` first.
      shape: (height, width, channels) of all images; height and width are None where they differ.
    """

    classes: tuple[str, ...]
    splits: Mapping[str, tuple[ImageFile, ...]]
    shape: tuple[int | None, int | None, int]


def check_name(name: str | None) -> str:
    """A name for the data set, which no other one has.

    Raises:
      ValueError: it is not one; the message says what is allowed.

    >>> check_name("Mine")
    Traceback (most recent call last):
    ValueError: --name is 'Mine'; allowed: lower-case letters, digits and _, a letter first
    """
    if name is None or not _NAME.fullmatch(name):
        given = "missing" if name is None else repr(name)
        raise ValueError(
            f"--name is {given}; allowed: lower-case letters, digits and _, a letter first"
        )
    from tensorflow_datasets.core import registered

    if name in ("digits", "folder", "synthetic", *registered.list_imported_builders()):
        raise ValueError(f"--name is {name!r}, which is another data set; allowed: any other name")
    return name


def read(directory: str | os.PathLike[str], held_out: float | None = None) -> Folder:
    """Finds the images of a folder, and decodes each of them once.

    Subfolders ``train`` and ``test``, ``val``, ``valid`` or ``validation``, if there are no others,
    are splits with a subfolder for each class. Otherwise every subfolder is a class, and a part of
    each, drawn at random but always the same, is the split ``test``. Images may lie deeper below
    their class. Hidden files are left out, and those whose names do not end as an image's do.

    Args:
      directory: the folder.
      held_out: part of the images of each class that are tested on, 0 < held_out < 1. Default
        (None): 0.1. Only where there is no split to evaluate on.

    Raises:
      OSError: the folder or an image cannot be read.
      ValueError: it is not such a folder, or an image is corrupt; the message says which.
    """
    if held_out is not None and not 0 < held_out < 1:
        raise ValueError(f"--held-out is {held_out}; allowed: 0 < held_out < 1")
    root = Path(directory).expanduser()
    if not root.is_dir():
        what = "is no folder" if root.exists() else "is not there"
        raise ValueError(f"{root} {what}; allowed: a folder with one subfolder for each class")
    subfolders = _subfolders(root)
    if not subfolders:
        raise ValueError(f"{root} has no subfolders; allowed: one with images for each class")
    if "train" in subfolders and set(subfolders) <= set(_SPLITS):
        roots = _splits_of(root, subfolders)
    else:
        roots = {"train": root}
    if held_out is not None and len(roots) > 1:
        raise ValueError(
            f"--held-out is {held_out}; allowed: none for {root}, which has splits of its own, "
            f"{' and '.join(roots)}"
        )
    classes = _classes_of(roots)
    splits = {split: _images(root, below, classes) for split, below in roots.items()}
    shape = _common_shape([image.path for images in splits.values() for image in images])
    if len(splits) == 1:
        splits = _split(splits["train"], HELD_OUT if held_out is None else held_out)
    return Folder(classes, splits, shape)


def make_builder(name: str, folder: Folder, data_dir: str | None) -> "tfds.core.DatasetBuilder":
    """TFDS's builder of the data set: ``image``, ``label`` and ``file_name``.

    Args:
      name: of the data set.
      folder: of `read`.
      data_dir: directory that holds TFDS data sets; None is TFDS's default.
    """
    import tensorflow_datasets as tfds

    class Images(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """One folder's images."""

        VERSION = tfds.core.Version(VERSION)
        url_infos = None  # as in `digits`

        def _info(self) -> tfds.core.DatasetInfo:
            features = {
                "image": tfds.features.Image(shape=folder.shape),
                "label": tfds.features.ClassLabel(names=list(folder.classes)),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description=f"A folder of images, prepared as {name!r}.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
            del dl_manager  # nothing to download
            return {
                split: self._generate_examples(images) for split, images in folder.splits.items()
            }

        def _generate_examples(
            self, images: tuple[ImageFile, ...]
        ) -> Iterator[tuple[str, dict[str, Any]]]:
            for image in images:
                encoded = io.BytesIO(_stored(image.path, folder.shape[2]))
                yield image.name, {"image": encoded, "label": image.label, "file_name": image.name}

    Images.name = name
    return Images(data_dir=data_dir)


def differs(folder: Folder, builder: "tfds.core.DatasetBuilder") -> bool:
    """Whether a data set that was prepared is of other images, as far as numbers and names tell."""
    info = builder.info
    sizes = {split: len(images) for split, images in folder.splits.items()}
    classes = tuple(info.features["label"].names)
    return classes != folder.classes or sizes != {
        name: split.num_examples for name, split in info.splits.items()
    }


def _splits_of(root: Path, subfolders: list[str]) -> dict[str, Path]:
    """Split → its folder."""
    roots: dict[str, Path] = {}
    for name in sorted(subfolders, key=list(_SPLITS).index):
        split = _SPLITS[name]
        if split in roots:
            raise ValueError(
                f"{root} has {roots[split].name} and {name}, which are both the split {split}; "
                "allowed: one of the two"
            )
        roots[split] = root / name
    return roots


def _classes_of(roots: Mapping[str, Path]) -> tuple[str, ...]:
    """The names of the classes, those of the train split."""
    train = roots["train"]
    classes = _subfolders(train)
    if len(classes) < 2:
        has = f"one class, {classes[0]!r}" if classes else "no subfolders"
        raise ValueError(f"{train} has {has}; allowed: two classes or more, a subfolder for each")
    for name in classes:
        # TFDS keeps names as lines of a file.
        if name != name.strip() or "\n" in name or "\r" in name or not name.isprintable():
            raise ValueError(
                f"{train} has the class {name!r}; allowed: names that can be printed, without "
                "space around them"
            )
    for split, below in roots.items():
        if more := sorted(set(_subfolders(below)) - set(classes)):
            raise ValueError(
                f"{below} has the class {more[0]!r}, which {train} has not; allowed in {split}: "
                "classes of train"
            )
    return tuple(classes)


def _images(root: Path, below: Path, classes: tuple[str, ...]) -> tuple[ImageFile, ...]:
    """The images of a split, by class and name."""
    found, ignored = [], []
    for label, name in enumerate(classes):
        if not (below / name).is_dir():  # a class that is not tested on
            continue
        here = []
        for path in _files(below / name):
            if path.suffix.lower() in _suffixes():
                here.append(ImageFile(path, path.relative_to(root).as_posix(), label))
            else:
                ignored.append(path)
        if not here:
            raise ValueError(
                f"{below / name} has no images; allowed: at least one, with a name that ends as "
                ".jpg, .png or another image's does"
            )
        found += here
    if ignored:
        warnings.warn(
            f"{below}: files left out, which are no images by their names: {len(ignored)}, such "
            f"as {ignored[0]}",
            stacklevel=2,
        )
    if not found:
        raise ValueError(f"{below} has no images; allowed: a subfolder with images for each class")
    return tuple(found)


def _split(images: tuple[ImageFile, ...], held_out: float) -> dict[str, tuple[ImageFile, ...]]:
    """The same part of each class, of two images or more, for the test."""
    rng = np.random.default_rng(0)
    test: set[int] = set()
    labels = np.array([image.label for image in images])
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        number = min(max(1, round(held_out * len(indices))), len(indices) - 1)
        test |= set(indices[:number].tolist())
    if not test:
        raise ValueError(
            "no class has more than one image, so that none can be held out; allowed: two images "
            "or more of a class"
        )
    return {
        "train": tuple(image for index, image in enumerate(images) if index not in test),
        "test": tuple(image for index, image in enumerate(images) if index in test),
    }


def _subfolders(directory: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in directory.iterdir()
        if entry.is_dir() and not entry.name.startswith(".")
    )


def _files(directory: Path) -> list[Path]:
    """The files below a directory that are not hidden, sorted; links are followed, once."""
    found, seen = [], set()
    for here, below, names in os.walk(directory, followlinks=True):
        seen.add(os.path.realpath(here))
        below[:] = [
            name
            for name in below
            if not name.startswith(".") and os.path.realpath(os.path.join(here, name)) not in seen
        ]
        found += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _suffixes() -> frozenset[str]:
    """How the names of images end that Pillow can open."""
    from PIL import Image

    Image.init()
    return frozenset(
        suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN
    )


def _common_shape(paths: list[Path]) -> tuple[int | None, int | None, int]:
    """The shape of all images, or what they have in common of it."""
    workers = min(16, os.cpu_count() or 1)  # decoders release Python's lock
    with _without_advice(), ThreadPoolExecutor(workers) as pool:
        kinds, broken = set(), []
        for path, found in zip(paths, pool.map(_decoded, paths)):
            if isinstance(found, _Kind):
                kinds.add(found)
            else:
                broken.append(f"{path} is no image that can be read: {found}")
    if broken:
        more = f", and {len(broken) - 1} others are none" if len(broken) > 1 else ""
        raise ValueError(f"{broken[0]}{more}; repair or remove such files")
    channels = max(kind.channels for kind in kinds)
    sizes = {(kind.height, kind.width) for kind in kinds}
    height, width = sizes.pop() if len(sizes) == 1 else (None, None)
    return height, width, channels


def _decoded(path: Path) -> _Kind | str:
    """What kind of image a file is, or why it is none."""
    try:
        with opened(path.read_bytes()) as image:
            converted(image, image.mode)
            return _Kind(image.height, image.width, 1 if image.mode in _GRAY else 3)
    except CorruptImageError as error:
        return str(error)


def _stored(path: Path, channels: int) -> bytes:
    """The content of an image file, as it is stored."""
    encoded = path.read_bytes()
    with _without_advice(), opened(encoded) as image:
        if image.format in _STORED_AS_THEY_ARE:
            return encoded
        png = io.BytesIO()
        converted(image, "L" if channels == 1 else "RGB").save(png, "PNG")
        return png.getvalue()


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Pillow warns of what is unusual in files that it reads all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
