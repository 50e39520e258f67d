"""Batches against scikit-learn's own arrays: which examples, how often, in which order."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lats_optax import data
from lats_optax.data.digits import IMAGE_SHAPE, MEAN, STD
from tests import matrix


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def digits(data_dir):
    return data.load("digits", data_dir)


@pytest.fixture(scope="module")
def index_of():
    """Scikit-learn's images are all different, so pixels tell which example a row is."""
    images = load_digits().images.astype(np.uint8)
    table = {image.tobytes(): index for index, image in enumerate(images)}
    assert len(table) == 1797

    def index(image):
        ink = (np.asarray(image, np.float64) * STD + MEAN) * 16
        assert np.abs(ink - np.round(ink)).max() < 1e-4
        return table[np.round(ink)[..., 0].astype(np.uint8).tobytes()]

    return index


@pytest.fixture(scope="module")
def plain(digits):
    """The same data set with no augmentation: what comes out can be looked up."""
    return data.Dataset(**{**vars(digits), "train_example": lambda e, rng: digits.eval_example(e)})


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def same(a, b):
    return all(np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in x)


@pytest.mark.slow
def test_description(digits):
    assert digits.name == "digits"
    assert digits.image_shape == IMAGE_SHAPE == (8, 8, 1)
    assert (digits.num_classes, digits.num_train, digits.num_test) == (10, 1437, 360)


@pytest.mark.parametrize("batch_size", matrix.fast([1, 1437], [1]))
def test_train_batches_of_any_size(digits, batch_size):
    batches = digits.train_batches(batch_size)
    assert [len(next(batches)["label"]) for _ in range(2)] == [batch_size] * 2


@pytest.mark.parametrize(
    ("batch_size", "shard_count"), [(7, 1), (64, 1), (360, 1), (1000, 1), (37, 2), (8, 7), (51, 7)]
)
def test_eval_sees_every_test_example_once(digits, index_of, batch_size, shard_count):
    target = load_digits().target
    shards = [
        list(digits.eval_batches(batch_size, shard_index=i, shard_count=shard_count))
        for i in range(shard_count)
    ]
    assert len({len(batches) for batches in shards}) == 1, "shards would wait for each other"
    seen = []
    for batch in itertools.chain(*shards):
        assert batch["image"].shape == (batch_size, 8, 8, 1)
        assert batch["image"].dtype == batch["weight"].dtype == np.float32
        assert batch["label"].shape == batch["weight"].shape == (batch_size,)
        assert batch["label"].dtype == np.int32
        for image, label, weight in zip(batch["image"], batch["label"], batch["weight"]):
            assert weight in (0, 1)
            if weight:
                seen.append(index_of(image))
                assert label == target[seen[-1]]
    assert len(seen) == len(set(seen)) == 360


@pytest.mark.slow
def test_the_split_is_fixed_disjoint_and_stratified(digits, index_of):
    target = load_digits().target
    split = {
        name: [
            index_of(image)
            for b in digits.eval_batches(9, name)
            for image in b["image"][b["weight"] > 0]
        ]
        for name in ("train", "test")
    }
    assert sorted(split["train"] + split["test"]) == list(range(1797))
    # Accuracies are comparable from one version to the next only on the same 360 images.
    stored = np.sort(split["test"]).astype("<i8").tobytes()
    assert hashlib.sha256(stored).hexdigest().startswith("2fbaae31b8c6aad1")
    for digit, total in Counter(target).items():
        assert abs(np.sum(target[split["test"]] == digit) - total * 360 / 1797) < 1


@pytest.mark.slow
def test_training_images_are_normalized(digits):
    batches = list(digits.eval_batches(479, "train"))
    images = np.concatenate([batch["image"] for batch in batches])
    assert len(images) == 1437
    assert abs(images.mean()) < 1e-3
    assert abs(images.std() - 1) < 1e-3


@pytest.mark.parametrize("shard_count", matrix.fast([1, 2], [2]))
def test_training_sees_every_example_once_an_epoch(plain, index_of, shard_count):
    iterators = [plain.train_batches(479, 5, i, shard_count) for i in range(shard_count)]
    # 1437 = 3·479: six batches of one shard, or three of each of two, are two epochs. The shards
    # take turns, so the images of a step are in the order of the whole when zipped.
    batches = [[next(it)["image"] for it in iterators] for _ in range(6 // shard_count)]
    order = [index_of(image) for batch in batches for turn in zip(*batch) for image in turn]
    first, second = order[:1437], order[1437:]
    assert len(set(first)) == 1437
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.slow
def test_a_global_batch_does_not_depend_on_the_number_of_shards(digits):
    whole = take(digits.train_batches(300, seed=3), 6)  # runs into the next epoch
    parts = [take(digits.train_batches(100, 3, i, 3), 6) for i in range(3)]
    for step, batch in enumerate(whole):
        together = np.stack([part[step]["image"] for part in parts], axis=1)
        np.testing.assert_array_equal(together.reshape(batch["image"].shape), batch["image"])


@pytest.mark.slow
def test_labels_belong_to_the_training_images(plain, index_of):
    target = load_digits().target
    for batch in take(plain.train_batches(64), 25):
        assert [target[index_of(image)] for image in batch["image"]] == batch["label"].tolist()
        assert (batch["image"].dtype, batch["label"].dtype) == (np.float32, np.int32)


@pytest.mark.slow
def test_augmentation_shifts_by_at_most_one_pixel(digits, plain):
    """Every image is one of the nine shifts of the image that the plain data set has there."""
    background = np.float32((0 - MEAN) / STD)
    shifts = Counter()
    augmented, original = (next(d.train_batches(400, seed=1))["image"] for d in (digits, plain))
    for image, source in zip(augmented, original):
        padded = np.pad(source[..., 0], 1, constant_values=background)
        found = [
            (down, right)
            for down in range(3)
            for right in range(3)
            if np.array_equal(image[..., 0], padded[down : down + 8, right : right + 8])
        ]
        assert found
        shifts.update(found[:1])
    assert len(shifts) == 9


@pytest.mark.slow
def test_seed_decides_order_and_augmentation(digits):
    first, again, other = (take(digits.train_batches(64, seed), 3) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("stop", matrix.fast([0, 1, 9], [9]))
def test_resumed_iterator_continues_where_it_stopped(digits, stop):
    iterator = digits.train_batches(200, seed=2)
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 8)  # runs into the next epoch
    fresh = digits.train_batches(200, seed=2)
    fresh.set_state(state)
    assert same(take(fresh, 8), expected)
    iterator.set_state(state)
    assert same(take(iterator, 8), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: data.load("digts"), "data set 'digts' is not known; perhaps you meant 'digits'"),
        (lambda d: d.train_batches(0), "batch_size is 0; it must be from 1 to 1437"),
        (lambda d: d.train_batches(1438), "batch_size is 1438; it must be from 1 to 1437"),
        (lambda d: d.train_batches(719, 0, 0, 2), "batch_size is 719; it must be from 1 to 718"),
        (lambda d: d.train_batches(8, seed=-1), "seed is -1; it must not be negative"),
        (lambda d: d.train_batches(8, 0, 2, 2), "shard_index is 2; it must be from 0 to 1"),
        (lambda d: d.train_batches(8, 0, 0, 0), "shard_count is 0; it must be at least 1"),
        (lambda d: d.eval_batches(0), "batch_size is 0; it must be at least 1"),
        (lambda d: d.eval_batches(8, "val"), "split is 'val'; 'digits' has 'train', 'test'"),
        (lambda d: d.eval_batches(8, shard_index=-1), "shard_index is -1; it must be from 0 to 0"),
    ],
)
def test_wrong_arguments_are_named(digits, call, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        call(digits)


def test_preparing_again_changes_nothing(digits, data_dir, caplog):
    def files():
        return {path: path.stat().st_mtime_ns for path in data_dir.rglob("*")}

    before = files()
    with caplog.at_level("INFO", logger="lats_optax"):
        data.load("digits", data_dir)
    assert files() == before
    assert not caplog.records


def test_unwritable_directory(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="file"):
        data.load("digits", file)


SCRIPT = """
import importlib.machinery, sys

find_spec = importlib.machinery.PathFinder.find_spec

def without(name, path=None, target=None):  # as on a machine where neither is installed
    absent = name.partition(".")[0] in ("tensorflow", "cv2")
    return None if absent else find_spec(name, path, target)

importlib.machinery.PathFinder.find_spec = without
from lats_optax import data
heavy = {"grain", "tensorflow_datasets", "sklearn", "PIL"} & set(sys.modules)
assert not heavy, heavy
digits = data.load("digits", sys.argv[1])
assert next(digits.train_batches(8))["image"].shape == (8, 8, 8, 1)
"""


@pytest.mark.slow
def test_two_processes_prepare_at_once_quietly_and_without_tensorflow(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    processes = [
        subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert outputs == [("", "")] * 2
    assert [process.returncode for process in processes] == [0, 0]
    assert os.listdir(tmp_path / "sklearn_digits") == ["1.0.0"]
