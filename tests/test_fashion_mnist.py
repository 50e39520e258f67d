"""Fashion-MNIST from its four idx files: read, damaged, prepared, trained on."""

import dataclasses
import gzip
import io
import struct
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from lats_optax import cli, data
from lats_optax.data import fashion_mnist
from lats_optax.training.config import PruneConfig
from lats_optax.training.presets import PRESETS
from tests import tiny

TRAIN, TEST = 48, 20
TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = fashion_mnist.FILES.values()


def idx(array, magic=None, shape=None, level=1):
    """The compressed idx file of a uint8 array; the header may say something else."""
    shape = array.shape if shape is None else shape
    magic = 0x0800 + array.ndim if magic is None else magic
    header = struct.pack(f">{1 + len(shape)}I", magic, *shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), level)


def contents(train=TRAIN, test=TEST):
    """Arrays of random images, by name of file; every label occurs."""
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (n, 28, 28)) for name, n in zip("ab", (train, test))}
    return {
        TRAIN_IMAGES: images["a"],
        TRAIN_LABELS: np.arange(train) % 10,
        TEST_IMAGES: images["b"],
        TEST_LABELS: np.arange(test) * 7 % 10,
    }


def write(directory, arrays=None):
    directory.mkdir(exist_ok=True)
    for name, array in (arrays or contents()).items():
        (directory / name).write_bytes(idx(array))
    return directory


@pytest.fixture
def _small(monkeypatch):
    """A data set of fewer examples, here and in TFDS's builder."""
    from tensorflow_datasets.image_classification import mnist

    monkeypatch.setattr(fashion_mnist, "NUM_EXAMPLES", {"train": TRAIN, "test": TEST})
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", TRAIN)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", TEST)


def prepare(capfd, *arguments):
    """Exit code, standard output, and the lines of the command on standard error."""
    code = cli.prepare([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("lats-prepare")]


def test_arrays_are_those_of_the_files(tmp_path):
    arrays = fashion_mnist.read_idx(write(tmp_path))
    assert list(arrays) == ["train_images", "train_labels", "test_images", "test_labels"]
    for (name, array), expected in zip(arrays.items(), contents().values()):
        assert array.dtype == (np.uint8 if "images" in name else np.int32)
        assert array.flags.writeable
        np.testing.assert_array_equal(array, expected)


@pytest.mark.usefixtures("_small")
def test_what_is_prepared_is_read_back(tmp_path, capfd):
    files, data_dir = write(tmp_path / "files"), tmp_path / "data"
    command = ["fashion_mnist", "--from", files, "--data-dir", data_dir]
    code, out, errors = prepare(capfd, *command)
    assert (code, out, errors) == (0, f"{data_dir}/fashion_mnist/3.0.1\n", [])
    # Neither archives nor what was in them.
    left = [path for path in data_dir.rglob("*") if path.is_file()]
    assert {path.parent for path in left} == {data_dir / "fashion_mnist" / "3.0.1"}
    assert not list(data_dir.glob(".*"))

    loaded = data.load("fashion_mnist", data_dir)
    assert (loaded.num_train, loaded.num_test, loaded.num_classes) == (TRAIN, TEST, 10)
    assert (loaded.image_shape, loaded.eval_split) == ((28, 28, 1), "test")
    arrays = contents()
    expected = {
        image.astype(np.uint8).tobytes(): label
        for image, label in zip(arrays[TEST_IMAGES], arrays[TEST_LABELS])
    }
    (batch,) = loaded.eval_batches(TEST)
    assert (batch["image"].shape, batch["image"].dtype) == ((TEST, 28, 28, 1), np.float32)
    pixels = np.round((batch["image"].astype(np.float64) * 0.3530 + 0.2860) * 255)
    for image, label in zip(pixels.astype(np.uint8), batch["label"], strict=True):
        assert expected.pop(image.tobytes()) == label
    assert not expected
    # Training crops and flips: each image is a window of one that is padded by four pixels.
    windows = {
        np.ascontiguousarray(padded[i : i + 28, j : j + 28][:, ::flip]).tobytes()
        for image in arrays[TRAIN_IMAGES]
        for padded in [np.pad(image.astype(np.uint8), 4)]
        for i in range(9)
        for j in range(9)
        for flip in (1, -1)
    }
    batches = loaded.train_batches(TRAIN)
    image = next(batches)["image"].astype(np.float64)
    batches.close()
    for window in np.round((image * 0.3530 + 0.2860) * 255).astype(np.uint8):
        assert window.tobytes() in windows


@pytest.mark.usefixtures("_small")
def test_prepared_and_trained_on(tmp_path, capfd, monkeypatch):
    files, data_dir = write(tmp_path / "files"), tmp_path / "data"
    assert prepare(capfd, "fashion_mnist", "--from", files, "--data-dir", data_dir)[0] == 0
    # A model that compiles faster for eight devices than the one of the preset.
    tiny.add_to_zoo(monkeypatch)
    arguments = ["fashion-mnist-lats", "--data.data-dir", str(data_dir), "--data.batch-size", "8"]
    arguments += ["--model.name", "tiny", "--model.width", "None"]
    arguments += ["--epochs", "1", "--workdir", str(tmp_path / "run")]
    assert cli.train(arguments) == 0
    out = capfd.readouterr().out
    assert "95.0" in out
    assert "test accuracy" in out


@pytest.mark.parametrize(
    ("name", "pruned", "target"),
    [
        ("fashion-mnist", "fashion-mnist-lats", 0.95),
        ("fashion-mnist-vit", "fashion-mnist-vit-target", 0.9),
    ],
)
def test_the_presets_differ_in_what_is_pruned_alone(name, pruned, target):
    dense, sparse = PRESETS[name].config, PRESETS[pruned].config
    assert not dense.prune.enabled
    assert sparse.prune == PruneConfig(target_sparsity=target)
    assert dense == dataclasses.replace(sparse, prune=dense.prune, workdir=dense.workdir)


@pytest.mark.usefixtures("_small")
def test_other_files_are_not_taken_for_those_of_before(tmp_path, capfd):
    """Archives of one name, whose contents TFDS keeps by that name."""
    for number in range(2):
        arrays = contents() | {TEST_IMAGES: np.full((TEST, 28, 28), number)}
        files = write(tmp_path / f"files{number}", arrays)
        command = ["fashion_mnist", "--from", files, "--data-dir", tmp_path, "--overwrite"]
        assert prepare(capfd, *command)[0] == 0
        (batch,) = data.load("fashion_mnist", tmp_path).eval_batches(TEST)
        assert np.round((batch["image"] * 0.3530 + 0.2860) * 255).max() == number


WHOLE = {name: idx(array) for name, array in contents().items()}
FEW = contents(train=TRAIN - 1)


def at(content, position, byte):
    changed = bytearray(content)
    changed[position] ^= byte
    return bytes(changed)


DAMAGE = {
    "missing": ({TRAIN_IMAGES: None}, "has no {file}"),
    "missing labels": ({TEST_LABELS: None}, "has no {file}"),
    "empty": ({TEST_IMAGES: b""}, "{file} is not an idx file of 3 axes: it begins with b''"),
    "not gzip": ({TRAIN_LABELS: b"<html>"}, "{file} is not a whole gzip file: Not a gzipped"),
    "cut short": (
        {TRAIN_IMAGES: WHOLE[TRAIN_IMAGES][:9000]},
        "{file} is not a whole gzip file: Compressed file ended",
    ),
    "cut in the header": (
        {TEST_LABELS: WHOLE[TEST_LABELS][:5]},
        "{file} is not a whole gzip file: Compressed file ended",
    ),
    "flipped bits": (
        {TEST_IMAGES: at(idx(contents()[TEST_IMAGES], level=0), 5000, 0x10)},
        "{file} is not a whole gzip file: CRC check failed",
    ),
    "not deflated": (
        {TEST_IMAGES: at(WHOLE[TEST_IMAGES], 10, 0xFF)},
        "{file} is not a whole gzip file: Error -3",
    ),
    "more behind it": (
        {TRAIN_LABELS: WHOLE[TRAIN_LABELS] + b"more"},
        "{file} is not a whole gzip file: Not a gzipped",
    ),
    "another file": (
        {TRAIN_IMAGES: gzip.compress(b"not idx at all, but text of more than 16 bytes")},
        "{file} is not an idx file of 3 axes: it begins with b'not ', and b'\\x00\\x00\\x08\\x03'",
    ),
    "no header": ({TEST_LABELS: gzip.compress(b"\0\0\x08\1\0")}, "not an idx file of 1 axis"),
    "labels for images": (
        {TEST_IMAGES: WHOLE[TEST_LABELS]},
        "{file} is not an idx file of 3 axes: it begins with b'\\x00\\x00\\x08\\x01'",
    ),
    "another type": (
        {TEST_LABELS: idx(contents()[TEST_LABELS], magic=0x0D01)},
        "{file} is not an idx file of 1 axis",
    ),
    "another size": (
        {TEST_IMAGES: idx(np.zeros((TEST, 32, 32)))},
        "{file} declares images of 32×32 pixels; allowed: 28×28",
    ),
    "too few bytes": (
        {TEST_IMAGES: idx(contents()[TEST_IMAGES], shape=(TEST + 1, 28, 28))},
        "{file} declares 16,464 bytes of values and has 15,680",
    ),
    "too many bytes": (
        {TEST_LABELS: idx(contents()[TEST_LABELS], shape=(TEST - 1,))},
        "{file} declares 19 bytes of values and has more",
    ),
    "too many declared": (
        {TRAIN_IMAGES: idx(contents()[TRAIN_IMAGES], shape=(2**32 - 1, 28, 28))},
        "{file} declares 4,294,967,295 examples; allowed: at most 60,000",
    ),
    "labels of others": (
        {TRAIN_LABELS: idx(FEW[TRAIN_LABELS])},
        "{file} has 47 labels for the 48 images of train-images-idx3-ubyte.gz",
    ),
    "no such class": (
        {TEST_LABELS: idx(np.full(TEST, 10))},
        "{file} has a label 10; allowed: 0 to 9",
    ),
    "another number": (
        {TRAIN_IMAGES: idx(FEW[TRAIN_IMAGES]), TRAIN_LABELS: idx(FEW[TRAIN_LABELS])},
        "{file} has 47 images; Fashion-MNIST has 48 there",
    ),
}


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named_and_nothing_is_written(tmp_path, capfd, case):
    changes, message = DAMAGE[case]
    files = tmp_path / "files"
    files.mkdir()
    for name, content in (WHOLE | changes).items():
        if content is not None:
            (files / name).write_bytes(content)
    code, out, errors = prepare(
        capfd, "fashion_mnist", "--from", files, "--data-dir", tmp_path / "data"
    )
    assert (code, out) == (1, "")
    (error,) = errors
    assert error.startswith(f"lats-prepare: error: data set 'fashion_mnist': {files}")
    assert message.format(file=next(iter(changes))) in error
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


@pytest.mark.usefixtures("_small")
def test_damaged_files_do_not_cost_the_data_set_that_is_there(tmp_path, capfd):
    files = write(tmp_path / "files")
    command = ["fashion_mnist", "--from", files, "--data-dir", tmp_path / "data", "--overwrite"]
    assert prepare(capfd, *command)[0] == 0
    (files / TEST_IMAGES).unlink()
    assert prepare(capfd, *command)[0] == 1
    assert data.load("fashion_mnist", tmp_path / "data").num_test == TEST


def test_what_a_header_declares_is_not_allocated(tmp_path):
    write(tmp_path)
    (tmp_path / TRAIN_IMAGES).write_bytes(idx(np.zeros((1, 28, 28)), shape=(60_000, 28, 28)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="declares 47,040,000 bytes of values and has 784"):
            fashion_mnist.read_idx(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_smaller_set_is_none(tmp_path):
    with pytest.raises(ValueError, match=r"has 48 images; Fashion-MNIST has 60,000 there"):
        fashion_mnist.check(write(tmp_path))


def test_a_file_that_cannot_be_opened(tmp_path, capfd):
    (write(tmp_path) / TEST_LABELS).unlink()
    (tmp_path / TEST_LABELS).mkdir()
    code, _, (error,) = prepare(capfd, "fashion_mnist", "--from", tmp_path)
    assert code == 1
    assert str(tmp_path / TEST_LABELS) in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--from", "."], "allowed for data sets that TFDS downloads, and 'digits'"),
        (["synthetic", "--from", "."], "and 'synthetic' is not one of them"),
        (["imagenet2012", "--from", "."], "and 'imagenet2012' is not one of them"),
        (["fashion_mnist", "--from", "nowhere"], "--from is 'nowhere'; allowed: a directory that"),
        (["fashion_mnist", "--from", ".", "--manual-dir", "."], "both given; allowed: one of"),
    ],
)
def test_a_directory_that_does_not_suit(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, (error,) = prepare(capfd, *arguments, "--data-dir", tmp_path / "data")
    assert (code, out) == (2, "")
    assert message in error
    assert not any(tmp_path.iterdir())


def test_no_network_names_the_option_and_the_package(tmp_path, capfd, monkeypatch):
    import requests

    def get(self, url, **settings):
        raise requests.ConnectionError("no", request=requests.Request("GET", url))

    monkeypatch.setattr(requests.Session, "get", get)
    code, _, (error,) = prepare(capfd, "fashion_mnist", "--data-dir", tmp_path)
    assert code == 1
    assert error.endswith(
        "cannot be reached (ConnectionError); --from DIR takes its files from a directory; "
        "Debian's package dataset-fashion-mnist has the files in /usr/share/datasets/fashion-mnist"
    )


def test_the_help_has_the_option(capfd):
    with pytest.raises(SystemExit, match="0"):
        cli.prepare(["--help"])
    assert "--from" in capfd.readouterr().out


# Any other data set that TFDS downloads


def cifar10(directory):
    """The archive of CIFAR-10, with two images in each of its files."""
    directory.mkdir()
    batches = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files = {name: bytes(2 * 3073) for name in batches}
    files["batches.meta.txt"] = "\n".join(f"class{i}" for i in range(10)).encode()
    with tarfile.open(directory / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return directory


def test_an_archive_of_another_data_set(tmp_path, capfd, monkeypatch):
    from tensorflow_datasets.core.download import download_manager

    files, data_dir = cifar10(tmp_path / "files"), tmp_path / "data"
    command = ["cifar10", "--from", files, "--data-dir", data_dir]
    code, _, (error,) = prepare(capfd, *command)
    assert code == 1
    assert f"downloaded to {files}/cifar-10-binary.tar.gz, has wrong checksum" in error
    assert not list(data_dir.rglob("*.array_record*"))
    monkeypatch.setattr(
        download_manager.DownloadManager,
        "_register_or_validate_checksums",
        lambda self, **info: None,
    )
    code, out, _ = prepare(capfd, *command)
    assert (code, out) == (0, f"{data_dir}/cifar10/3.0.2\n")
    loaded = data.load("cifar10", data_dir)
    assert (loaded.num_train, loaded.num_test) == (10, 2)


def test_a_directory_without_the_archive(tmp_path, capfd):
    code, _, (error,) = prepare(capfd, "cifar10", "--from", tmp_path)
    assert code == 1
    assert f"{tmp_path} has none of the files that TFDS downloads for 'cifar10', such as" in error
    assert Path(error.split()[-1]).name == "cifar-10-binary.tar.gz"
