"""Normalization of images: against a loop over pixels; statistics by the name of a data set."""

import math
import pickle

import ml_dtypes
import numpy as np
import pytest

from lats_optax.data.normalization import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    NORMALIZATION,
    Normalization,
    channel_mean_std,
)


@pytest.mark.parametrize("name", sorted(NORMALIZATION))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_normalization_against_a_loop(name, dtype):
    mean, std = NORMALIZATION[name]
    image = np.random.default_rng(0).integers(256, size=(7, 9, len(mean)), dtype=np.uint8)
    made = Normalization(mean, std, dtype)(image)
    assert made.dtype == (np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    expected = np.empty(image.shape)
    for index in np.ndindex(image.shape):
        expected[index] = (float(image[index]) / 255 - mean[index[-1]]) / std[index[-1]]
    # Half a unit in the last of 24 or 8 bits of what is at most 4, and float32's rounding of terms.
    np.testing.assert_allclose(
        made.astype(np.float64), expected, rtol=0, atol=1e-6 if dtype == "float32" else 2**-7
    )


def test_normalization_of_batches_and_views():
    normalize = Normalization(IMAGENET_MEAN, IMAGENET_STD)
    batch = np.random.default_rng(0).integers(256, size=(2, 3, 4, 5, 3), dtype=np.uint8)
    made = normalize(batch)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(made[i, j], normalize(batch[i, j]))
    view = batch[0, 0, :, ::-1]
    np.testing.assert_array_equal(normalize(view), made[0, 0, :, ::-1])
    assert normalize(batch[:0]).shape == (0, 3, 4, 5, 3)
    assert pickle.loads(pickle.dumps(normalize)) == normalize


def test_statistics_of_unknown_data_sets():
    assert channel_mean_std("mnist", 1) == ((0.1307,), (0.3081,))
    assert channel_mean_std("imagenette/320px-v2:1.0.0", 3)[0] == IMAGENET_MEAN
    assert channel_mean_std("oxford_flowers102", 3)[1] == IMAGENET_STD
    assert channel_mean_std("kmnist", 1) == ((0.5,), (0.5,))
    # A data set of that name and other channels is not the one that was measured.
    assert channel_mean_std("mnist", 3)[0] == IMAGENET_MEAN


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalization((), ()), r"mean is \(\); allowed is a tuple of a number for each"),
        (lambda: Normalization((123.7,), (58.4,)), r"mean is \(123\.7,\); .* scale from 0 to 1"),
        (lambda: Normalization((math.nan,), (0.5,)), "mean is"),
        (lambda: Normalization((0.5,), (0.0,)), r"std is \(0\.0,\); zeros"),
        (lambda: Normalization((0.5,), (0.5, 0.5)), "mean has 1 channels and std 2"),
        (lambda: Normalization((0.5,), (0.5,), "float16"), "dtype is 'float16'; allowed are"),
        (
            lambda: Normalization((0.5,), (0.5,))(np.zeros((2, 2, 1), np.float32)),
            r"image is float32 of shape \(2, 2, 1\); allowed is uint8",
        ),
        (
            lambda: Normalization((0.5,), (0.5,))(np.zeros((2, 2, 3), np.uint8)),
            r"of shape \(2, 2, 3\); allowed is uint8 of shape \(…, height, width, 1\)",
        ),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
