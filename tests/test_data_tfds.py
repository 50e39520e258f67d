"""Data sets in TFDS's own layout, read back: against Pillow, and by the names of their files."""

import io
import itertools
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from array_record.python import array_record_module
from PIL import Image

from lats_optax import cli, data
from lats_optax.data import prepare as preparing
from lats_optax.data.tfds_source import Records, open_builder
from lats_optax.training import loop
from lats_optax.training.config import DataConfig, TrainConfig
from lats_optax.training.experiment import build_experiment
from lats_optax.training.parallel import PmapEngine
from tests import matrix, small_imagenet, tiny

BROKEN = {"ILSVRC2012_val_00000004.JPEG", "n01440764_0.JPEG", "n01440764_3.JPEG"}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Directory, and the encoded images by file name."""
    path = tmp_path_factory.mktemp("imagenet")
    return path, small_imagenet.write(path, train=40, validation=21, classes=10)


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The same where three files are no images."""
    path = tmp_path_factory.mktemp("broken")
    small_imagenet.write(path, train=40, validation=21, classes=10, corrupt=BROKEN)
    return path


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """Directory, and the images of each split with their labels: TFDS's own builder of CIFAR-10."""
    from tensorflow_datasets.core.download import download_manager

    path = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    files = path / "files" / "cifar-10-batches-bin"
    files.mkdir(parents=True)
    (files / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    contents = {"train": [], "test": []}
    for name in [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]:
        stored = b""
        for _ in range(7):
            label, image = int(rng.integers(10)), rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)
            stored += bytes([label]) + image.transpose(2, 0, 1).tobytes()
            contents["test" if "test" in name else "train"].append((image, label))
        (files / name).write_bytes(stored)
    with pytest.MonkeyPatch.context() as patch:
        manager = download_manager.DownloadManager
        patch.setattr(manager, "download_and_extract", lambda self, url: str(files.parent))
        assert preparing.prepare("cifar10", str(path)) == str(path / "cifar10" / "3.0.2")
    return path, contents


def records_of(path, split, name="imagenet2012"):
    records = Records(open_builder(name, str(path)), split)
    return [records[i] for i in range(len(records))]


def pixels(batch_image, mean=MEAN, std=STD):
    return np.round((np.asarray(batch_image, np.float64) * std + mean) * 255).astype(np.uint8)


def take(batches, count):
    with_closing = list(itertools.islice(batches, count))
    batches.close()
    return with_closing


def same(a, b):
    return all(np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


def test_imagenet_is_described_and_stored_as_it_came(imagenet):
    path, files = imagenet
    loaded = data.load("imagenet2012", path)
    assert (loaded.num_train, loaded.num_test, loaded.num_classes) == (40, 21, 1000)
    assert loaded.eval_split == "validation"
    assert loaded.image_shape == (224, 224, 3)
    stored = [record for split in ("train", "validation") for record in records_of(path, split)]
    assert {r["where"].file_name: r["image"] for r in stored} == files
    import tensorflow_datasets as tfds

    folder = Path(tfds.__file__).parent / "datasets" / "imagenet2012"
    synsets = (folder / "labels.txt").read_text().split()
    held_out = (folder / "validation_labels.txt").read_text().split()
    for record in stored:
        name = record["where"].file_name
        number = re.fullmatch(r"ILSVRC2012_val_(\d+).JPEG", name)
        synset = held_out[int(number[1]) - 1] if number else name.partition("_")[0]
        assert synsets[record["label"]] == synset


@pytest.mark.parametrize(("batch_size", "shard_count"), [(8, 1), (5, 2)])
def test_evaluation_is_a_resize_and_a_center_crop_by_pillow(imagenet, batch_size, shard_count):
    path, files = imagenet
    loaded = data.load("imagenet2012", path, image_size=32)
    expected = {}
    for record in records_of(path, "validation"):
        image = Image.open(io.BytesIO(files[record["where"].file_name])).convert("RGB")
        scale = 37 / min(image.size)  # 32 · 256 / 224, rounded
        width, height = (int(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - 32) / 2), round((height - 32) / 2)
        crop = np.asarray(image.crop((left, top, left + 32, top + 32)))
        expected[crop.tobytes()] = record["label"]
    seen = Counter()
    for shard in range(shard_count):
        for batch in loaded.eval_batches(batch_size, None, shard, shard_count):
            assert batch["image"].dtype == np.float32
            assert batch["image"].shape == (batch_size, 32, 32, 3)
            assert set(batch) == {"image", "label", "weight"}
            for image, label, weight in zip(*(batch[k] for k in ("image", "label", "weight"))):
                if weight:
                    key = pixels(image).tobytes()
                    assert expected[key] == label
                    seen[key] += 1
    assert seen == Counter(expected.keys())


def test_sixteen_bit_images_are_the_same_rounded(imagenet):
    wide, narrow = (
        next(data.load("imagenet2012", imagenet[0], image_size=32, dtype=d).train_batches(8))
        for d in ("float32", "bfloat16")
    )
    assert narrow["image"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(wide["image"].astype(ml_dtypes.bfloat16), narrow["image"])
    padded = list(
        data.load("imagenet2012", imagenet[0], image_size=32, dtype="bfloat16").eval_batches(16)
    )
    assert {batch["image"].dtype for batch in padded} == {np.dtype(ml_dtypes.bfloat16)}


def test_cifar_keeps_its_images_and_labels(cifar):
    path, contents = cifar
    loaded = data.load("cifar10", path)
    assert (loaded.num_train, loaded.num_test, loaded.num_classes) == (35, 7, 10)
    assert (loaded.eval_split, loaded.image_shape) == ("test", (32, 32, 3))
    mean, std = np.array([0.4914, 0.4822, 0.4465]), np.array([0.2470, 0.2435, 0.2616])
    for split in ("train", "test"):
        expected = Counter((image.tobytes(), label) for image, label in contents[split])
        assert expected == Counter(
            (pixels(image, mean, std).tobytes(), int(label))
            for batch in loaded.eval_batches(7, split)
            for image, label in zip(batch["image"], batch["label"])
        )
    # Padded by four and cropped, mirrored or not: each is a part of one of the images.
    padded = [
        side
        for image, _ in contents["train"]
        for side in (np.pad(image, ((4, 4), (4, 4), (0, 0))),)
    ]
    windows = {
        np.ascontiguousarray(p[i : i + 32, j : j + 32][:, ::flip]).tobytes()
        for p in padded
        for i in range(9)
        for j in range(9)
        for flip in (1, -1)
    }
    for image in next(loaded.train_batches(35))["image"]:
        assert pixels(image, mean, std).tobytes() in windows


@pytest.mark.slow
def test_order_and_resumption_do_not_depend_on_workers_or_shards(imagenet):
    def load(workers):
        return data.load("imagenet2012", imagenet[0], image_size=16, workers=workers)

    whole = take(load(0).train_batches(8, seed=3), 12)  # runs into the third epoch
    assert all(set(batch) == {"image", "label"} for batch in whole)
    half = [take(load(0).train_batches(4, 3, i, 2), 12) for i in range(2)]
    for batch, *parts in zip(whole, *half):
        together = np.stack([part["image"] for part in parts], axis=1)
        np.testing.assert_array_equal(together.reshape(batch["image"].shape), batch["image"])
    two = load(2).train_batches(8, seed=3)
    assert same([next(two) for _ in range(5)], whole[:5])
    state = json.loads(json.dumps(two.get_state()))
    two.close()
    for workers in (0, 3):
        resumed = load(workers).train_batches(8, seed=3)
        resumed.set_state(state)
        assert same(take(resumed, 7), whole[5:])
        assert resumed.get_state() == {"next_index": 12}


@pytest.mark.parametrize("workers", matrix.fast([0, 2], [0]))
def test_a_corrupt_image_is_named(broken, workers):
    loaded = data.load("imagenet2012", broken, image_size=16, workers=workers)
    index, where = next(
        (i, record["where"])
        for i, record in enumerate(records_of(broken, "validation"))
        if record["where"].file_name in BROKEN
    )
    shard = broken / "imagenet2012/5.1.0/imagenet2012-validation.array_record-00000-of-00001"
    assert where.shard == str(shard)
    with pytest.raises(data.CorruptRecordError) as raised:
        list(loaded.eval_batches(8))
    assert str(raised.value) == (
        f"record {index} of the validation split of 'imagenet2012' (ILSVRC2012_val_00000004.JPEG), "
        f"which is record {index} of {shard}, is corrupt: 12 bytes are no image, which begin with "
        "b'not an i'. --data.skip-corrupt leaves such records out, and counts."
    )


def test_a_corrupt_image_for_training_is_named(broken):
    loaded = data.load("imagenet2012", broken, image_size=16)
    with pytest.raises(data.CorruptRecordError, match=r"n01440764_[03].JPEG"):
        take(loaded.train_batches(8), 5)


@pytest.mark.parametrize("workers", matrix.fast([0, 1], [0]))
def test_corrupt_images_are_skipped_and_counted(broken, workers):
    loaded = data.load("imagenet2012", broken, image_size=16, skip_corrupt=True, workers=workers)
    evaluation = loaded.eval_batches(8)
    rows = [weight for batch in evaluation for weight in batch["weight"]]
    assert (sum(rows), len(rows), evaluation.skipped) == (20, 24, 1)
    batches = loaded.train_batches(8, seed=1)
    for _ in range(10):  # two epochs, with two corrupt records in each
        batch = next(batches)
        assert set(batch) == {"image", "label"}
        assert len(batch["label"]) == 8
    assert batches.skipped >= 4
    batches.close()


def test_those_that_take_their_place_do_not_depend_on_shards(broken):
    loaded = data.load("imagenet2012", broken, image_size=16, skip_corrupt=True)
    whole = loaded.train_batches(8, seed=1)
    parts = [loaded.train_batches(4, 1, i, 2) for i in range(2)]
    for _ in range(10):
        labels = np.stack([next(part)["label"] for part in parts], axis=1).reshape(-1)
        np.testing.assert_array_equal(next(whole)["label"], labels)
    assert whole.skipped == sum(part.skipped for part in parts) >= 4


def test_flipped_bytes_in_a_file_and_a_file_cut_short(imagenet, tmp_path):
    path, _ = imagenet
    shutil.copytree(path, tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "imagenet2012/5.1.0/imagenet2012-train.array_record-00000-of-00001"
    whole = shard.read_bytes()

    def unreadable():
        reader = array_record_module.ArrayRecordReader(str(shard))
        for index in range(40):
            try:
                reader.read([index])
            except RuntimeError:
                yield index

    for at in range(2000, 60000, 999):
        content = bytearray(whole)
        content[at] ^= 0xFF
        shard.write_bytes(content)
        if len(found := list(unreadable())) == 1:
            break
    with pytest.raises(data.CorruptRecordError) as raised:
        records_of(tmp_path, "train")
    assert str(raised.value).startswith(
        f"record {found[0]} of the train split of 'imagenet2012', which is record {found[0]} of "
        f"{shard}, cannot be read: Corrupted Riegeli/records file"
    )
    loaded = data.load("imagenet2012", tmp_path, image_size=16, skip_corrupt=True)
    batches = loaded.eval_batches(40, "train")
    assert (next(batches)["weight"].sum(), batches.skipped) == (39, 1)

    for length in (65536, 0):
        shard.write_bytes(content[:length])
        with pytest.raises(data.CorruptRecordError, match="record 0 of the train split"):
            next(data.load("imagenet2012", tmp_path, image_size=16).eval_batches(8, "train"))
    loaded = data.load("imagenet2012", tmp_path, image_size=16, skip_corrupt=True)
    with pytest.raises(data.CorruptRecordError, match="100 records in a row, drawn at random, are"):
        next(loaded.train_batches(8))


@pytest.mark.slow
def test_workers_leave_the_accelerators_alone():
    def state(example, rng):
        import os

        import jax

        return example | {"label": np.int32([len(jax._src.xla_bridge._backends), os.getpid()])}

    noise = data.load("synthetic", image_size=2, synthetic_examples=64, workers=1)
    batches = data.Dataset(**vars(noise) | {"train_example": state}).train_batches(4)
    (batch,) = take(batches, 1)
    assert {int(pid) for _, pid in batch["label"]}.isdisjoint({os.getpid()})
    assert not batch["label"][:, 0].any()


def test_synthetic_images_are_of_any_size():
    noise = data.load("synthetic", image_size=12, synthetic_examples=100, synthetic_classes=7)
    assert (noise.num_train, noise.num_test, noise.num_classes) == (100, 5, 7)
    batches = take(noise.train_batches(20), 5)
    assert Counter(np.concatenate([b["label"] for b in batches])) == Counter(
        i % 7 for i in range(100)
    )
    images = np.stack([b["image"] for b in batches])
    assert (images.shape, images.dtype) == ((5, 20, 12, 12, 3), np.float32)
    assert abs(images.mean()) < 0.05
    assert abs(images.std() - 1) < 0.05


def without(path, pattern):
    for file in path.glob(pattern):
        file.unlink()


def as_tfrecord(path):
    info = path / INFO
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))


def unfinished(path):
    (path / "imagenet2012/5.1.0").rename(path / "imagenet2012/incomplete.ABC_5.1.0")


COMMAND = "lats-prepare imagenet2012 --data-dir {path}"
INFO = "imagenet2012/5.1.0/dataset_info.json"


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (
            lambda path: shutil.rmtree(path),
            {},
            f"is not prepared, there is no directory {{path}}: {COMMAND}",
        ),
        (
            lambda path: shutil.rmtree(path / "imagenet2012"),
            {},
            f"is not prepared, there is no directory {{path}}/imagenet2012: {COMMAND}",
        ),
        (
            unfinished,
            {},
            "was not prepared to the end, {path}/imagenet2012 has no version of it: " + COMMAND,
        ),
        (
            lambda path: without(path, "*/*/dataset_info.json"),
            {},
            "is not whole, {path}/imagenet2012/5.1.0 has no dataset_info.json: "
            f"{COMMAND} --overwrite",
        ),
        (
            lambda path: (path / INFO).write_text("{ garbage"),
            {},
            "is not whole, {path}/imagenet2012/5.1.0/dataset_info.json or features.json beside it "
            "cannot be read (",
        ),
        (
            lambda path: [file.unlink() for file in (path / INFO).parent.iterdir()],
            {},
            "is not whole, {path}/imagenet2012/5.1.0 has no dataset_info.json: "
            f"{COMMAND} --overwrite",
        ),
        (
            lambda path: without(path, "*/*/*train*"),
            {},
            "is not whole, {path}/imagenet2012/5.1.0 lacks 1 of the 1 files of 'train', such as "
            f"imagenet2012-train.array_record-00000-of-00001: {COMMAND} --overwrite",
        ),
        (
            as_tfrecord,
            {},
            "is in {path}/imagenet2012/5.1.0 as tfrecord, which needs TensorFlow; prepare it as "
            "ArrayRecord, in another directory or with --overwrite in the place of that one: "
            f"{COMMAND} --overwrite",
        ),
        (
            None,
            {"name": "imagenet2012:5.0.0"},
            "is not prepared, {path}/imagenet2012 has no version 5.0.0 (there is 5.1.0): "
            "lats-prepare imagenet2012:5.0.0 --data-dir {path}",
        ),
        (None, {"name": "imagnet2012"}, "is not known; perhaps you meant 'imagenet2012'"),
        (None, {"name": "a b"}, "is not a name; allowed: NAME, NAME/CONFIG"),
        (None, {"eval_split": "tests"}, "has no split 'tests'; it has 'train', 'validation'"),
    ],
)
def test_what_is_not_there_is_said_with_the_command(imagenet, tmp_path, change, arguments, message):
    path = tmp_path / "data"
    shutil.copytree(imagenet[0], path)
    if change:
        change(path)
    with pytest.raises((OSError, ValueError)) as raised:
        data.load(**{"name": "imagenet2012", "data_dir": path} | arguments)
    name = arguments.get("name", "imagenet2012")
    assert str(raised.value).startswith(f"data set {name!r} " + message.format(path=path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("cifar10", {"image_size": 64}, "image_size is 64; the images of 'cifar10' are 32×32"),
        ("digits", {"image_size": 28}, "are 8×8 and stay so; allowed: 8 or None"),
        ("digits", {"eval_split": "train"}, "eval_split is 'train'; allowed for 'digits': 'test'"),
        ("imagenet2012", {"image_size": 0}, "size is 0"),
        ("synthetic", {"eval_split": "x"}, "eval_split is 'x'"),
    ],
)
def test_arguments_that_do_not_suit_a_data_set(imagenet, cifar, name, arguments, message):
    path = cifar[0] if name == "cifar10" else imagenet[0]
    with pytest.raises(ValueError, match=message):
        data.load(name, path, **arguments)


@pytest.mark.slow
def test_nothing_to_evaluate_on_is_an_error(broken, tmp_path):
    shard = broken / "imagenet2012/5.1.0/imagenet2012-validation.array_record-00000-of-00001"
    shutil.copytree(broken, tmp_path / "data")
    (tmp_path / "data" / shard.relative_to(broken)).write_bytes(b"")
    chosen = DataConfig(
        name="imagenet2012",
        data_dir=str(tmp_path / "data"),
        batch_size=8,
        image_size=8,
        skip_corrupt=True,
    )
    model = tiny.Model(num_classes=1000, axis_name=PmapEngine.axis_name)
    experiment = build_experiment(TrainConfig(data=chosen, workdir=tmp_path / "run"), model=model)
    state = experiment.parallel.place(experiment.initial_state())
    with pytest.raises(data.CorruptRecordError, match="every record that 'imagenet2012' is"):
        loop.evaluate(experiment, state)


def prepare_cli(capfd, *arguments):
    code = cli.prepare(list(arguments))
    out, err = capfd.readouterr()
    return code, out, [line for line in err.splitlines() if line.startswith("lats-prepare")]


def test_the_command_prepares_what_is_read(imagenet, tmp_path, capfd):
    shutil.copytree(imagenet[0] / "downloads", tmp_path / "downloads")
    code, out, errors = prepare_cli(capfd, "imagenet2012", "--data-dir", str(tmp_path))
    assert (code, out, errors) == (0, f"{tmp_path}/imagenet2012/5.1.0\n", [])
    digits = prepare_cli(capfd, "digits", "--data-dir", str(tmp_path), "--overwrite")
    assert digits == (0, f"{tmp_path}/sklearn_digits/1.0.0\n", [])

    as_tfrecord(tmp_path)
    code, _, errors = prepare_cli(capfd, "imagenet2012", "--data-dir", str(tmp_path))
    assert code == 2
    assert "as tfrecord" in errors[0]
    code, _, _ = prepare_cli(capfd, "imagenet2012", "--data-dir", str(tmp_path), "--overwrite")
    assert code == 0
    assert data.load("imagenet2012", tmp_path).num_train == 40


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("imagenet2012", ["/manual has no ILSVRC2012_img_train.tar and no ILSVRC2012_img_val.tar"]),
        ("cifr10", ["'cifr10' is not known; perhaps you meant 'cifar10'"]),
        ("synthetic", ["nothing to prepare"]),
        ("imagenette/huge", ["imagenette/huge", "not found"]),
        ("imagenette:9.9.9", ["cannot be loaded at version 9.9.9, only: 1.0.0"]),
        ("ag_news_subset", ["not for image classification"]),
    ],
)
def test_what_cannot_be_prepared_is_one_line(tmp_path, capfd, name, words):
    code, out, errors = prepare_cli(capfd, name, "--data-dir", str(tmp_path))
    assert code in (1, 2)
    assert out == ""
    (error,) = errors
    for word in words:
        assert word in error


def test_no_network_is_one_line(tmp_path, capfd, monkeypatch):
    import requests

    def get(self, url, **settings):
        raise requests.ConnectionError("no", request=requests.Request("GET", url))

    monkeypatch.setattr(requests.Session, "get", get)
    code, _, errors = prepare_cli(capfd, "cifar10", "--data-dir", str(tmp_path))
    assert code == 1
    assert errors == [
        "lats-prepare: error: data set 'cifar10' cannot be downloaded: https://www.cs.toronto.edu/"
        "~kriz/cifar-10-binary.tar.gz cannot be reached (ConnectionError); --from DIR takes its "
        "files from a directory"
    ]


def test_images_of_another_color_space_or_format_become_rgb_jpegs():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for image, form in (
        (Image.fromarray(gray).convert("CMYK"), "JPEG"),
        (Image.fromarray(gray).convert("RGBA"), "PNG"),
    ):
        file = io.BytesIO()
        image.save(file, form)
        file.seek(0)
        fixed = Image.open(preparing._rgb_jpeg(file))
        assert (fixed.format, fixed.mode, fixed.size) == ("JPEG", "RGB", (16, 16))
        expected = np.asarray(image.convert("RGB"), int)
        assert np.abs(np.asarray(fixed, int) - expected).mean() < 3


@pytest.mark.slow
def test_a_run_skips_counts_and_says_so(broken, tmp_path, monkeypatch, capsys):
    tiny.add_to_zoo(monkeypatch)
    arguments = ["digits", "--data.name", "imagenet2012", "--data.data-dir", str(broken)]
    arguments += ["--model.name", "tiny"]
    arguments += ["--data.image-size", "8", "--data.batch-size", "8", "--epochs", "2"]
    workdir = tmp_path / "run"
    assert cli.train([*arguments, "--workdir", str(workdir)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lats-train: error: record ")
    assert error.count("\n") == 1
    # A run that has met one goes on with it.
    arguments += ["--data.skip-corrupt", "--resume", "--workdir", str(workdir)]
    assert cli.train(arguments) == 0
    out = capsys.readouterr().out
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    (train,) = [r["skipped"] for r in records if r["split"] == "train" and r["step"] == 10]
    assert train >= 4
    assert f"skipped       {train} corrupt records in training, 1 in the last evaluation" in out
    assert cli.train([*arguments, "--epochs", "2"]) == 0
    assert f"skipped       {train} corrupt records in training" in capsys.readouterr().out
