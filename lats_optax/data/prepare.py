"""Preparing a data set: TFDS downloads it, or takes files of a directory, and writes ArrayRecord.

TFDS's builders lean on TensorFlow for little more than opening files and encoding PNG images; here
they are helped out, so that those which need no more do without.
"""

import contextlib
import glob
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lats_optax.data import digits, fashion_mnist, folder
from lats_optax.data.tfds_source import (
    PrepareError,
    check_known,
    copy_to_store,
    expand_directory,
    image_and_label,
    open_builder,
    parse_name,
)
from lats_optax.files.storage import URL, as_path, temporary

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# TFDS would try ten times, over three minutes.
_DOWNLOAD_RETRIES = 4

_NEEDS_TENSORFLOW = (
    "TFDS prepares {name!r} with TensorFlow, which is not installed: pip install tensorflow, for "
    "this command alone"
)


def prepare(
    name: str,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    from_dir: str | None = None,
    overwrite: bool = False,
    *,
    images: str | None = None,
    called: str | None = None,
    held_out: float | None = None,
) -> str:
    """Writes a data set as ArrayRecord, unless it is there.

    Args:
      name: ``digits``, or a data set of TFDS: ``name``, ``name/config`` or ``name/config:version``;
        or ``folder``, images of one's own.
      data_dir: directory that holds TFDS data sets; ``None`` is TFDS's default. One on gs:// gets a
        copy of what is prepared in a temporary directory, which has to have room for it.
      manual_dir: directory with what cannot be downloaded, such as ImageNet's tar files; ``None``
        is ``downloads/manual`` in ``data_dir``.
      from_dir: directory with files that TFDS would download, under the names that they have
        there; what it lacks is downloaded. Fashion-MNIST's have to be the four that it consists
        of, however they are compressed; all others have to have the checksums that TFDS knows.
      overwrite: remove what is there of that version first.
      images: for ``folder``, where they are, in a subfolder for each class.
      called: for ``folder``, the name that the data set gets.
      held_out: for ``folder``, the part of the images that is tested on, as in `folder.read`.

    Returns:
      The directory that it is in.

    Raises:
      ValueError: there is no data set of that name, config or version, or it is not for image
        classification, or ``from_dir`` does not suit it, or ``images`` is no such folder.
      OSError: a directory cannot be read or written.
      PrepareError: TFDS cannot prepare it here; a file in ``from_dir`` is missing or damaged.
    """
    directory = expand_directory(data_dir)
    if name == "folder":
        if from_dir is not None or manual_dir is not None:
            raise ValueError("--from and --manual-dir are not allowed with folder PATH")
        return _prepare_folder(images, folder.check_name(called), held_out, directory, overwrite)
    own = {"PATH": images, "--name": called, "--held-out": held_out}
    if given := [f"{option} is {value!r}" for option, value in own.items() if value is not None]:
        raise ValueError(f"{' and '.join(given)}; allowed: none, but for lats-prepare folder")
    if directory is not None and isinstance(place := as_path(directory, "data_dir"), URL):
        return _prepare_in_store(place, name, manual_dir, from_dir, overwrite)
    if from_dir is not None and name in ("digits", "synthetic"):
        raise ValueError(_no_files(name, from_dir))
    if name == "digits":
        if overwrite:
            shutil.rmtree(digits.SklearnDigits(data_dir=directory).data_dir, ignore_errors=True)
        return digits.prepare(directory).data_dir
    if name == "synthetic":
        raise ValueError("data set 'synthetic' is noise that is made in memory; nothing to prepare")
    builder = _builder(name, directory)
    # Before anything is removed or written.
    files = None if from_dir is None else _files(name, builder, from_dir, manual_dir)
    if overwrite:
        shutil.rmtree(builder.data_dir, ignore_errors=True)
        # What was there has left its format in the builder.
        builder = _builder(name, directory)
    if os.path.exists(builder.data_dir):
        # Whole and in the right format, or an error that says what to do.
        return open_builder(_pinned(name, builder), directory).data_dir
    image, _ = image_and_label(builder)
    manual = _manual_dir(builder, directory, manual_dir)
    with _without_tensorflow(builder, image):
        if files is None:
            _download_and_prepare(name, builder, manual)
        else:
            _prepare_from(files, name, builder)
    return builder.data_dir


def _prepare_folder(
    images: str | None, name: str, held_out: float | None, data_dir: str | None, overwrite: bool
) -> str:
    """A data set of one's own images, on this machine or copied to a store."""
    import tensorflow_datasets as tfds

    if images is None:
        raise ValueError("PATH is missing; allowed: lats-prepare folder PATH --name NAME")
    found = folder.read(images, held_out)
    root = as_path(data_dir or os.fspath(tfds.core.constants.DATA_DIR))
    there = root / name / folder.VERSION
    if there.is_dir() and not overwrite:
        again = f"lats-prepare folder {images} --name {name}"
        builder = open_builder(f"{name}:{folder.VERSION}", data_dir, again)
        if folder.differs(found, builder):
            raise ValueError(
                f"data set {name!r} is in {there} already, made of other images; allowed: another "
                "--name, or --overwrite"
            )
        return str(there)
    if isinstance(root, URL):
        with temporary() as directory:
            return str(copy_to_store(_write_folder(name, found, str(directory)), directory, root))
    return _write_folder(name, found, data_dir)


def _write_folder(name: str, found: folder.Folder, data_dir: str | None) -> str:
    builder = folder.make_builder(name, found, data_dir)
    shutil.rmtree(builder.data_dir, ignore_errors=True)
    with _quiet():
        # What was there has left its format in the builder.
        folder.make_builder(name, found, data_dir).download_and_prepare(file_format="array_record")
    return os.fspath(builder.data_dir)


def _prepare_in_store(
    place: URL, name: str, manual_dir: str | None, from_dir: str | None, overwrite: bool
) -> str:
    """As `prepare`, on this machine, and then copied."""
    if not overwrite:
        if name == "digits":
            return os.fspath(digits.prepare(str(place)).data_dir)
        with contextlib.suppress(FileNotFoundError):
            return os.fspath(open_builder(name, str(place)).data_dir)
    with temporary() as directory:
        made = prepare(name, str(directory), manual_dir, from_dir)
        return str(copy_to_store(made, directory, place))


def _builder(name: str, data_dir: str | None) -> "tfds.core.DatasetBuilder":
    """TFDS's own; its configs and versions are its own to check."""
    import tensorflow_datasets as tfds

    parsed = parse_name(name)
    check_known(name)
    try:
        # With no format: TFDS raises where there is a copy in another one.
        builder_cls = tfds.builder_cls(parsed.name)
        with _quiet():
            return builder_cls(data_dir=data_dir, config=parsed.config, version=parsed.version)
    except ImportError as error:
        raise PrepareError(_missing(name, error)) from error
    except (ValueError, AssertionError) as error:
        raise ValueError(f"data set {name!r}: {_first_line(error)}") from error


def _pinned(name: str, builder: "tfds.core.DatasetBuilder") -> str:
    config = f"/{builder.builder_config.name}" if builder.builder_config else ""
    return f"{parse_name(name).name}{config}:{builder.version}"


def _manual_dir(
    builder: "tfds.core.DatasetBuilder", data_dir: str | None, manual_dir: str | None
) -> str:
    """Where the files are that cannot be downloaded, if the data set has any."""
    import tensorflow_datasets as tfds

    root = data_dir or os.fspath(tfds.core.constants.DATA_DIR)
    manual = os.path.join(root, "downloads", "manual") if manual_dir is None else manual_dir
    manual = os.path.abspath(os.path.expanduser(manual))
    if builder.name == "imagenet2012":
        files = [f"ILSVRC2012_img_{part}.tar" for part in ("train", "val")]
        lacking = [file for file in files if not os.path.isfile(os.path.join(manual, file))]
        if lacking:
            raise FileNotFoundError(
                f"{manual} has no {' and no '.join(lacking)}; they are to be had on "
                "https://image-net.org/download-images after registration, and --manual-dir says "
                "where they are"
            )
    elif builder.MANUAL_DOWNLOAD_INSTRUCTIONS and not os.path.isdir(manual):
        instructions = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise FileNotFoundError(
            f"there is no directory {manual}; --manual-dir names another. TFDS says: {instructions}"
        )
    return manual


class _LocalFiles(NamedTuple):
    """Files that TFDS takes in the place of downloads.

    Attributes:
      directory: where they are.
      checksums: by URL, of files that may differ from those that TFDS knows.
    """

    directory: str
    checksums: dict[str, Any]


def _files(
    name: str, builder: "tfds.core.DatasetBuilder", from_dir: str, manual_dir: str | None
) -> _LocalFiles:
    """The files of a directory, which are checked as far as they can be before TFDS has them."""
    from tensorflow_datasets.core.download import checksums

    if not _downloads(builder):
        raise ValueError(_no_files(name, from_dir))
    directory = os.path.abspath(os.path.expanduser(from_dir))
    if manual_dir is not None:
        raise ValueError("--from and --manual-dir are both given; allowed: one of the two")
    if not os.path.isdir(directory):
        raise ValueError(f"--from is {from_dir!r}; allowed: a directory that is there")
    names = {url: info.filename for url, info in builder.url_infos.items() if info.filename}
    paths = {url: os.path.join(directory, file) for url, file in names.items()}
    if builder.name == "fashion_mnist":
        try:
            fashion_mnist.check(directory)
        except (OSError, ValueError) as error:
            raise PrepareError(f"data set {name!r}: {error}") from error
        # Debian's files have the same contents as the published ones, compressed again.
        return _LocalFiles(
            directory, {url: checksums.compute_url_info(path) for url, path in paths.items()}
        )
    if not any(map(os.path.isfile, paths.values())):
        raise PrepareError(
            f"{directory} has none of the files that TFDS downloads for {name!r}, such as "
            f"{sorted(names.values())[0]}"
        )
    return _LocalFiles(directory, {})


def _downloads(builder: "tfds.core.DatasetBuilder") -> bool:
    """Whether all files of a data set are downloaded, under names that TFDS knows."""
    known = any(info.filename for info in (builder.url_infos or {}).values())
    return known and not builder.MANUAL_DOWNLOAD_INSTRUCTIONS


def _no_files(name: str, from_dir: str) -> str:
    return (
        f"--from is {from_dir!r}; allowed for data sets that TFDS downloads, and {name!r} is not "
        "one of them"
    )


def _prepare_from(files: _LocalFiles, name: str, builder: "tfds.core.DatasetBuilder") -> None:
    """Runs TFDS's builder where its download manager finds these files."""
    make = builder._make_download_manager

    def make_download_manager(*args: Any, **kwargs: Any) -> Any:
        manager = make(*args, **kwargs)
        manager._url_infos = manager._url_infos | files.checksums
        return manager

    builder._make_download_manager = make_download_manager
    root = os.fspath(builder.data_dir_root)
    os.makedirs(root, exist_ok=True)
    # TFDS goes by the names of archives: it would use again what it has extracted from others.
    with tempfile.TemporaryDirectory(prefix=".extracted.", dir=root) as extracted:
        _download_and_prepare(name, builder, files.directory, extracted)


def _download_and_prepare(
    name: str, builder: "tfds.core.DatasetBuilder", manual: str, extracted: str | None = None
) -> None:
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader

    downloader.MAX_RETRIES = _DOWNLOAD_RETRIES
    settings = tfds.download.DownloadConfig(
        manual_dir=manual if os.path.isdir(manual) else None,
        # What is prepared there is not in ArrayRecord.
        try_download_gcs=False,
        extract_dir=extracted,
    )
    try:
        with _quiet():
            builder.download_and_prepare(file_format="array_record", download_config=settings)
    except ImportError as error:
        raise PrepareError(_missing(name, error)) from error
    except requests.exceptions.RequestException as error:
        url = getattr(error.request, "url", "what TFDS downloads it from")
        raise PrepareError(
            f"data set {name!r} cannot be downloaded: {url} cannot be reached "
            f"({type(error).__name__}){_advice(builder)}"
        ) from error
    except OSError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise PrepareError(f"TFDS cannot prepare {name!r}: {kind}: {_first_line(error)}") from error


@contextlib.contextmanager
def _without_tensorflow(builder: "tfds.core.DatasetBuilder", image: str) -> Iterator[None]:
    """Where TensorFlow is missing, stands in for it with what Python and Pillow can do."""
    from importlib.util import find_spec

    from tensorflow_datasets.core.utils import lazy_imports_utils

    if find_spec("tensorflow") is not None:
        yield
        return
    module = vars(lazy_imports_utils.tensorflow)
    before = dict(module)
    module["_module"] = _Files()
    builder._generate_examples = _encoding_arrays(builder._generate_examples, image)
    if builder.name == "imagenet2012":
        builder._fix_image = lambda name, file: _rgb_jpeg(file)
    try:
        yield
    finally:
        module.clear()
        module.update(before)


class _Files:
    """The part of TensorFlow that opens files; the rest is said to be missing."""

    # Of names in archives, which are strings already.
    compat = SimpleNamespace(as_text=str)
    io = SimpleNamespace(
        gfile=SimpleNamespace(
            GFile=open,
            exists=os.path.exists,
            glob=glob.glob,
            isdir=os.path.isdir,
            listdir=os.listdir,
        )
    )

    def __getattr__(self, name: str) -> Any:
        raise ImportError(f"tensorflow.{name} is needed", name="tensorflow")


def _encoding_arrays(generate: Callable[..., Any], image: str) -> Callable[..., Any]:
    """Examples whose images, where they are arrays, are handed to TFDS as PNG files."""

    def generate_examples(*args: Any, **kwargs: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        from PIL import Image

        for key, example in generate(*args, **kwargs):
            pixels = example[image]
            if isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8:
                png = io.BytesIO()
                gray = pixels.shape[-1] == 1
                Image.fromarray(pixels[..., 0] if gray else pixels).save(png, "PNG")
                png.seek(0)
                example = example | {image: png}
            yield key, example

    return generate_examples


def _rgb_jpeg(file: Any) -> io.BytesIO:
    """ImageNet has 22 JPEG files in CMYK and a PNG file: these become what the others are."""
    from PIL import Image, UnidentifiedImageError

    encoded = io.BytesIO(file.read())
    with contextlib.suppress(UnidentifiedImageError):
        image = Image.open(encoded)
        if image.format != "JPEG" or image.mode == "CMYK":
            encoded = io.BytesIO()
            image.convert("RGB").save(encoded, "JPEG", quality=95)
    encoded.seek(0)
    return encoded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves the progress bars alone, and silences TFDS's reports and advice around them."""
    loggers = [logging.getLogger(name) for name in ("absl", "urllib3")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _advice(builder: "tfds.core.DatasetBuilder") -> str:
    if not _downloads(builder):
        return ""
    debian = f"; {fashion_mnist.DEBIAN}" if builder.name == "fashion_mnist" else ""
    return f"; --from DIR takes its files from a directory{debian}"


def _missing(name: str, error: ImportError) -> str:
    if error.name == "tensorflow":
        return _NEEDS_TENSORFLOW.format(name=name)
    package = error.name or str(error)
    return f"TFDS prepares {name!r} with {package}, which is not installed: pip install {package}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
