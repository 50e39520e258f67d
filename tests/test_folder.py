"""Folders of images: found, checked, prepared, read back and trained on."""

import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from lats_optax import cli, data
from lats_optax.data import decoding, folder
from tests import tiny

CLASSES = ("big birds", "cats", "dogs")


def pixels(label, number, size=(9, 12), channels=3):
    """An image of noise, whose class shows in one of its channels."""
    rng = np.random.default_rng((label, number))
    array = rng.integers(0, 90, (*size, 3))
    array[..., label] += 150
    return array.astype(np.uint8)[..., : channels if channels == 3 else 1].squeeze()


def write(root, numbers=(7, 8, 9), suffix="png", size=None, channels=3):
    """A class for each number; without a size, every image has its own."""
    for label, (name, count) in enumerate(zip(CLASSES, numbers)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            own = (8 + number, 14 - number) if size is None else size
            array = pixels(label, number, own, channels)
            Image.fromarray(array).save(root / name / f"{number}.{suffix}")
    return root


def prepare(capfd, *arguments):
    """Exit code, standard output, and the lines of the command on standard error."""
    code = cli.prepare([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("lats-prepare")]


def names(loaded, split):
    source = loaded.sources[split]
    return {source[index]["where"].file_name for index in range(len(source))}


def test_what_is_prepared_is_read_back(tmp_path, capfd):
    root, data_dir = write(tmp_path / "mine"), tmp_path / "data"
    command = ["folder", root, "--name", "mine", "--data-dir", data_dir]
    assert prepare(capfd, *command) == (0, f"{data_dir}/mine/1.0.0\n", [])
    loaded = data.load("mine", data_dir, image_size=16)
    assert (loaded.num_train, loaded.num_test, loaded.num_classes) == (21, 3, 3)
    assert (loaded.image_shape, loaded.eval_split) == ((16, 16, 3), "test")
    # Every image once, and of each class about a tenth is tested on.
    held_out = names(loaded, "test")
    assert {name.split("/")[0] for name in held_out} == set(CLASSES)
    everything = {str(path.relative_to(root)) for path in root.rglob("*.png")}
    assert names(loaded, "train") == everything - held_out
    builder = tfds.builder_from_directory(str(data_dir / "mine" / "1.0.0"))
    assert builder.info.features["label"].names == list(CLASSES)
    for example in (loaded.sources["train"][index] for index in range(21)):
        name = example["where"].file_name
        assert CLASSES[example["label"]] == name.split("/")[0]
        assert example["image"] == (root / name).read_bytes()
    batch = next(loaded.train_batches(8))
    assert batch["image"].shape == (8, 16, 16, 3)
    assert [int(np.argmax(image.mean((0, 1)))) for image in batch["image"]] == list(batch["label"])

    # The same again changes nothing; other images are not taken for these.
    before = {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    assert prepare(capfd, *command)[0] == 0
    assert before == {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}
    shutil.copy(root / "cats" / "0.png", root / "cats" / "new.png")
    code, out, (line,) = prepare(capfd, *command)
    assert (code, out) == (2, "")
    assert f"'mine' is in {data_dir}/mine/1.0.0 already" in line
    assert prepare(capfd, *command, "--overwrite")[0] == 0
    assert data.load("mine", data_dir).num_train == 22


def test_the_images_that_are_held_out_are_always_the_same(tmp_path):
    found = folder.read(write(tmp_path / "a"), held_out=0.3)
    other = folder.read(write(tmp_path / "b"), held_out=0.3)
    held_out = [[image.name for image in f.splits["test"]] for f in (found, other)]
    assert held_out[0] == held_out[1]
    assert [name.split("/")[0] for name in held_out[0]] == [
        *["big birds"] * 2,
        *["cats"] * 2,
        *["dogs"] * 3,
    ]


@pytest.mark.parametrize(
    ("subfolders", "splits"),
    [
        (["train", "test"], {"train": 24, "test": 24}),
        (["train", "val"], {"train": 24, "validation": 24}),
        (["train", "valid", "test"], {"train": 24, "validation": 24, "test": 24}),
        (["train"], {"train": 21, "test": 3}),
    ],
)
def test_splits_of_its_own(tmp_path, subfolders, splits):
    for name in subfolders:
        write(tmp_path / "own" / name)
    found = folder.read(tmp_path / "own")
    assert {split: len(images) for split, images in found.splits.items()} == splits
    assert found.classes == CLASSES


def test_a_class_may_be_called_train(tmp_path):
    write(tmp_path / "own")
    shutil.copytree(tmp_path / "own" / "cats", tmp_path / "own" / "train")
    assert folder.read(tmp_path / "own").classes == (*CLASSES, "train")


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "bmp", "gif", "webp", "tiff", "ppm"])
def test_formats(tmp_path, suffix):
    root = write(tmp_path / "own", (2, 2), suffix)
    found = folder.read(root)
    builder = folder.make_builder("mine", found, str(tmp_path / "data"))
    builder.download_and_prepare(file_format="array_record")
    loaded = data.load("mine", tmp_path / "data", image_size=8)
    example = loaded.sources["train"][0]
    # JPEG and PNG files as they are, all others as PNG, which TFDS can decode too.
    kept = (root / example["where"].file_name).read_bytes()
    begins = kept if suffix in ("png", "jpg", "JPEG") else b"\x89PNG"
    assert example["image"].startswith(begins)
    with Image.open(root / example["where"].file_name) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(decoding.decode(example["image"]), expected)


@pytest.mark.parametrize(
    ("how", "shape"),
    [
        ({"size": (28, 20)}, (28, 20, 3)),
        ({"size": (28, 20), "channels": 1}, (28, 20, 1)),
        ({}, (None, None, 3)),
        ({"channels": 1}, (None, None, 1)),
    ],
    ids=["one size", "one size, gray", "sizes", "sizes, gray"],
)
def test_images_of_one_size_stay_as_they_are(tmp_path, how, shape):
    found = folder.read(write(tmp_path / "own", (2, 2), **how))
    assert found.shape == shape
    folder.make_builder("mine", found, str(tmp_path)).download_and_prepare(
        file_format="array_record"
    )
    loaded = data.load("mine", tmp_path)
    assert loaded.image_shape == ((224, 224, 3) if shape[0] is None else shape)


@pytest.mark.filterwarnings("default:.* files left out")
def test_what_is_left_out(tmp_path, capfd):
    root = write(tmp_path / "own", (3, 3))
    (root / ".hidden").mkdir()
    (root / "cats" / ".DS_Store").write_text("x")
    (root / "cats" / "notes.txt").write_text("x")
    (root / "cats" / "deeper").mkdir()
    shutil.move(root / "cats" / "0.png", root / "cats" / "deeper" / "0.png")
    os.symlink(root / "cats", root / "cats" / "deeper" / "again")
    command = ["folder", root, "--name", "mine", "--data-dir", tmp_path / "data"]
    code, _, (line,) = prepare(capfd, *command)
    assert code == 0
    assert line.startswith("lats-prepare: warning: ")
    assert line.endswith(f"no images by their names: 1, such as {root}/cats/notes.txt")
    loaded = data.load("mine", tmp_path / "data")
    everything = names(loaded, "train") | names(loaded, "test")
    assert {name for name in everything if "cats" in name} == {
        "cats/1.png",
        "cats/2.png",
        "cats/deeper/0.png",
    }


def broken(root):
    content = (root / "cats" / "0.png").read_bytes()
    (root / "cats" / "0.png").write_bytes(content[: len(content) // 2])
    (root / "dogs" / "1.png").write_text("no image")


def without_images(root):
    for path in (root / "dogs").iterdir():
        path.unlink()


def with_one_class(root):
    for name in CLASSES[1:]:
        shutil.rmtree(root / name)


def with_another_class_to_test(root):
    (root / "train").mkdir()
    for name in CLASSES:
        shutil.move(root / name, root / "train")
    (root / "test" / "cows").mkdir(parents=True)


def with_two_validations(root):
    for name in ("train", "val", "valid"):
        (root / name).mkdir()
    for name in CLASSES:
        shutil.move(root / name, root / "train")


def with_a_line_break(root):
    (root / "cats").rename(root / "ca\nts")


MISTAKES = {
    "broken": (broken, [], ["cats/0.png", "no image that can be read", "1 others", "remove"]),
    "empty class": (without_images, [], ["/dogs has no images"]),
    "one class": (with_one_class, [], ["one class, 'big birds'", "two classes or more"]),
    "class of test alone": (with_another_class_to_test, [], ["'cows'", "classes of train"]),
    "two validations": (with_two_validations, [], ["val and valid", "one of the two"]),
    "line break": (with_a_line_break, [], [r"'ca\nts'", "printed"]),
    "empty folder": (lambda root: [shutil.rmtree(root), root.mkdir()], [], ["no subfolders"]),
    "no folder": (lambda root: shutil.rmtree(root), [], ["is not there"]),
    "a file": (lambda root: [shutil.rmtree(root), root.write_text("")], [], ["is no folder"]),
    "capitals": (None, ["--name", "Mine"], ["--name is 'Mine'", "lower-case"]),
    "slash": (None, ["--name", "a/b"], ["--name is 'a/b'"]),
    "of TFDS": (None, ["--name", "mnist"], ["'mnist'", "another data set"]),
    "digits": (None, ["--name", "digits"], ["'digits'", "another data set"]),
    "held out all": (None, ["--held-out", "1"], ["--held-out is 1.0", "< 1"]),
    "from": (None, ["--from", "x"], ["--from", "not allowed"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, capfd, case):
    spoil, more, words = MISTAKES[case]
    root = write(tmp_path / "own", (3, 3, 3))
    if spoil is not None:
        spoil(root)
    command = ["folder", root, "--name", "mine", "--data-dir", tmp_path / "data", *more]
    code = cli.prepare([str(argument) for argument in command])
    out, err = capfd.readouterr()
    assert code in (1, 2)
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("lats-prepare: error: ")
    for word in words:
        assert word in line
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["folder"], ["--name is missing"]),
        (["folder", "--name", "mine"], ["PATH is missing"]),
        (["digits", "--name", "mine"], ["--name is 'mine'", "folder"]),
        (["cifar10", "x", "--held-out", "0.2"], ["PATH is 'x'", "--held-out is 0.2"]),
    ],
)
def test_arguments_that_do_not_go_together(tmp_path, capfd, arguments, words):
    code, out, (line,) = prepare(capfd, *arguments, "--data-dir", tmp_path)
    assert (code, out) == (2, "")
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir())


def test_splits_of_its_own_hold_nothing_out(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / split, (1, 1))
    with pytest.raises(ValueError, match=r"^--held-out is 0\.5; allowed: none for"):
        folder.read(tmp_path, held_out=0.5)


def test_single_images_cannot_be_held_out(tmp_path):
    with pytest.raises(ValueError, match="two images or more of a class"):
        folder.read(write(tmp_path / "own", (1, 1)))


def test_a_data_set_that_is_not_there_names_the_command(tmp_path):
    with pytest.raises(ValueError, match="lats-prepare folder PATH --name mine"):
        data.load("mine", tmp_path)


def test_trained_on(tmp_path, capfd, monkeypatch):
    root = write(tmp_path / "own", (12, 12, 12), size=(8, 8))
    data_dir, workdir = tmp_path / "data", tmp_path / "run"
    assert prepare(capfd, "folder", root, "--name", "mine", "--data-dir", data_dir)[0] == 0
    # A model that compiles faster for eight devices than the one of the preset.
    tiny.add_to_zoo(monkeypatch)
    command = ["fashion-mnist-lats", "--data.name", "mine", "--data.data-dir", str(data_dir)]
    command += ["--data.batch-size", "8", "--model.name", "tiny", "--model.width", "None"]
    command += ["--prune.target-sparsity", "0.5"]
    assert cli.train([*command, "--epochs", "1", "--workdir", str(workdir)]) == 0
    assert "test accuracy" in capfd.readouterr().out
    assert (workdir / "model.safetensors").is_file()
