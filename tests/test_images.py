"""Preprocessing against the same operations written out on Pillow images, and against NumPy loops.

Every kind of file that Pillow writes and every place at which one can be cut short; the statistics
of crops and flips; what OpenCV's way differs by.
"""

import dataclasses
import io
import math
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from benchmarks.input_pipeline import encode, pictures
from lats_optax.data import images
from lats_optax.data.decoding import CorruptImageError, decode, decode_opencv, opened
from lats_optax.data.images import ImageNetPreprocessing, SmallImagePreprocessing

PHOTOGRAPH, NOISE = pictures(2)
PHOTOGRAPH_JPEG = encode(PHOTOGRAPH, quality=90)
PILLOW = ImageNetPreprocessing(decoder="pillow")
OPENCV = ImageNetPreprocessing(decoder="opencv")


def rng(seed=0):
    return np.random.default_rng(seed)


def plain(encoded, mode="RGB"):
    """What torchvision's loader gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a transparency that is lost
        return Image.open(io.BytesIO(encoded)).convert(mode)


def converted(mode, image_format, image=PHOTOGRAPH, **options):
    file = io.BytesIO()
    Image.fromarray(image).convert(mode).save(file, image_format, **options)
    return file.getvalue()


def transparent_palette():
    return converted("P", "PNG", transparency=bytes(range(256)))


def rotated_by_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    return encode(PHOTOGRAPH, exif=exif)


def with_thumbnail():
    """A JPEG file with another one, end marker included, in its header."""
    thumbnail = encode(PHOTOGRAPH[::8, ::8])
    return encode(PHOTOGRAPH, exif=b"Exif\0\0" + thumbnail)


def sixteen_bits():
    file = io.BytesIO()
    Image.fromarray(PHOTOGRAPH[..., 0].astype(np.uint16) * 257).save(file, "PNG")
    return file.getvalue()


FILES = {
    "JPEG": PHOTOGRAPH_JPEG,
    "progressive JPEG": encode(PHOTOGRAPH, progressive=True),
    "JPEG without subsampling": encode(PHOTOGRAPH, subsampling=0),
    "JPEG in RGB": encode(PHOTOGRAPH, keep_rgb=True),
    "gray JPEG": converted("L", "JPEG"),
    "CMYK JPEG": converted("CMYK", "JPEG"),
    "rotated JPEG": rotated_by_exif(),
    "JPEG with a thumbnail": with_thumbnail(),
    "JPEG with bytes after it": PHOTOGRAPH_JPEG + b"\0 camera",
    "PNG": encode(PHOTOGRAPH, "PNG"),
    "gray PNG": converted("L", "PNG"),
    "RGBA PNG": converted("RGBA", "PNG"),
    "LA PNG": converted("LA", "PNG"),
    "1-bit PNG": converted("1", "PNG"),
    "palette PNG": converted("P", "PNG"),
    "transparent palette PNG": transparent_palette(),
    "16-bit PNG": sixteen_bits(),
    "GIF": converted("P", "GIF"),
    "BMP": encode(PHOTOGRAPH, "BMP"),
    "WebP": encode(PHOTOGRAPH, "WEBP"),
    "TIFF": encode(PHOTOGRAPH, "TIFF"),
}
EACH_FILE = pytest.mark.parametrize("encoded", FILES.values(), ids=FILES)

# Published preprocessing, written out.


def published_eval(encoded, size, resize):
    image = plain(encoded)
    if image.width <= image.height:
        image = image.resize((resize, int(resize * image.height / image.width)), Image.BILINEAR)
    else:
        image = image.resize((int(resize * image.width / image.height), resize), Image.BILINEAR)
    top, left = round((image.height - size) / 2), round((image.width - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def published_train(encoded, size, generator):
    image = plain(encoded)
    box = images.random_crop_box(image.width, image.height, generator)
    image = image.crop(box).resize((size, size), Image.BILINEAR)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if generator.random() < 0.5 else pixels


def decibels(a, b):
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


@EACH_FILE
@pytest.mark.parametrize("channels", [3, 1])
def test_decode_is_pillows_conversion(encoded, channels):
    pixels = decode(encoded, channels)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    expected = np.asarray(plain(encoded, "RGB" if channels == 3 else "L"))
    np.testing.assert_array_equal(pixels, expected.reshape(375, 500, channels))


@EACH_FILE
def test_eval_is_the_published_one(encoded):
    np.testing.assert_array_equal(PILLOW.eval(encoded), published_eval(encoded, 224, 256))


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (500, 375),
        (375, 500),
        (256, 256),
        (224, 224),
        (333, 257),
        (257, 999),
        (1, 1),
        (3, 40),
        (90, 7),
    ],
)
@pytest.mark.parametrize(("size", "resize"), [(224, None), (32, None), (64, 64), (33, 40)])
def test_eval_at_every_size(width, height, size, resize):
    encoded = encode(np.asarray(Image.fromarray(NOISE).resize((width, height))), "PNG")
    preprocessing = ImageNetPreprocessing(size, resize)
    expected = published_eval(encoded, size, resize or round(size * 256 / 224))
    np.testing.assert_array_equal(preprocessing.eval(encoded), expected)
    assert preprocessing.shape == expected.shape


@EACH_FILE
def test_training_with_pillow_is_the_published_one(encoded):
    for seed in range(3):
        expected = published_train(encoded, 224, rng(seed))
        np.testing.assert_array_equal(PILLOW.train(encoded, rng(seed)), expected)


@EACH_FILE
def test_training_with_opencv_is_nearly_the_published_one(encoded):
    for seed in range(3):
        made = OPENCV.train(encoded, rng(seed))
        assert made.shape == (224, 224, 3)
        assert made.dtype == np.uint8
        assert decibels(made, published_train(encoded, 224, rng(seed))) > 40


@pytest.mark.parametrize("size", [32, 48, 96, 160, 224, 320])
def test_opencv_resizes_as_pillow_antialiases(size):
    preprocessing = ImageNetPreprocessing(size, decoder="opencv")
    for picture in (PHOTOGRAPH, NOISE):
        encoded = encode(picture, quality=90)
        for seed in range(6):
            made = preprocessing.train(encoded, rng(seed)).astype(float)
            expected = published_train(encoded, size, rng(seed)).astype(float)
            near = decibels(made, expected)
            assert near > 33
            # Neither brighter, nor of more or less contrast, nor moved.
            assert abs(np.mean(made - expected)) < 1
            assert 0.96 < made.std() / expected.std() < 1.04
            for axis in (0, 1):
                for step in (-1, 1):
                    moved = np.roll(made, step, axis)
                    assert decibels(moved[1:-1, 1:-1], expected[1:-1, 1:-1]) < near - 3


@pytest.mark.parametrize("name", FILES)
def test_opencv_decodes_to_pillows_pixels(name):
    encoded = FILES[name]
    with opened(encoded) as image:
        pixels = decode_opencv(encoded, image)
    if "JPEG" not in name or name in ("CMYK JPEG", "JPEG with bytes after it"):
        assert pixels is None  # left to Pillow
    else:
        np.testing.assert_array_equal(pixels, np.asarray(plain(encoded)))


def test_auto_is_opencv():
    made = ImageNetPreprocessing().train(PHOTOGRAPH_JPEG, rng())
    np.testing.assert_array_equal(made, OPENCV.train(PHOTOGRAPH_JPEG, rng()))
    assert np.any(made != PILLOW.train(PHOTOGRAPH_JPEG, rng()))


@pytest.mark.parametrize("preprocessing", [PILLOW, OPENCV], ids=["pillow", "opencv"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 3), (100, 7)])
def test_images_smaller_than_the_crop(preprocessing, shape):
    encoded = encode(np.full((*shape, 3), 128, np.uint8))
    for seed in range(10):
        assert np.all(preprocessing.train(encoded, rng(seed)) == 128)
    assert np.all(preprocessing.eval(encoded) == 128)


# Crops and flips.


def test_crops_are_in_the_image_and_in_range():
    generator = rng()
    for width, height in [(500, 375), (375, 500), (64, 64)]:
        touched = set()
        for _ in range(500):
            left, top, right, bottom = images.random_crop_box(width, height, generator)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            w, h = right - left, bottom - top
            if w < width and h < height:
                touched |= {(left == 0, "left"), (right == width, "right")}
                touched |= {(top == 0, "top"), (bottom == height, "bottom")}
            # Width and height are rounded to whole pixels.
            assert (w - 0.5) / (h + 0.5) <= 4 / 3
            assert (w + 0.5) / (h - 0.5) >= 3 / 4
            assert (w + 0.5) * (h + 0.5) >= 0.08 * width * height
        assert {(True, side) for side in ("left", "right", "top", "bottom")} <= touched


def test_crops_have_the_published_distribution():
    side = 10_000
    generator = rng()
    boxes = np.array([images.random_crop_box(side, side, generator) for _ in range(4000)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    area, log_ratio = width * height / side**2, np.log(width / height)
    # Rejection of what does not fit, all at once.
    draws = rng(1)
    areas = draws.uniform(0.08, 1, 20_000)
    ratios = draws.uniform(-math.log(4 / 3), math.log(4 / 3), 20_000)
    fits = np.sqrt(areas) * np.exp(np.abs(ratios) / 2) <= 1
    assert scipy.stats.ks_2samp(area, areas[fits]).pvalue > 0.01
    assert scipy.stats.ks_2samp(log_ratio, ratios[fits]).pvalue > 0.01
    # Every crop of up to three quarters of the area fits: uniform, whatever its aspect ratio.
    small = area[area < 0.75]
    assert scipy.stats.kstest((small - 0.08) / 0.67, "uniform").pvalue > 0.01
    # Places are uniform over those that are possible.
    for edge, length in ((boxes[:, 0], width), (boxes[:, 1], height)):
        movable = length < 0.9 * side
        place = edge[movable] / (side - length[movable])
        assert scipy.stats.kstest(place, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1000, 10), (493, 0, 506, 10)),  # too wide for every crop of 8 %: the center, 4:3
        ((10, 1000), (0, 493, 10, 506)),  # 3:4
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_crops_of_extreme_images(size, expected):
    assert images.random_crop_box(*size, rng()) == expected


def test_the_crop_is_the_box_that_was_drawn():
    y, x = np.mgrid[:256, :256].astype(np.uint8)
    encoded = encode(np.stack([x, y, np.zeros_like(x)], -1), "PNG")
    preprocessing = ImageNetPreprocessing(64)
    flips = 0
    for seed in range(40):
        left, top, right, bottom = images.random_crop_box(256, 256, rng(seed))
        made = preprocessing.train(encoded, rng(seed)).astype(int)
        flipped = made[0, 0, 0] > made[0, -1, 0]
        flips += flipped
        made = made[:, ::-1] if flipped else made
        half_w, half_h = (right - left) / 128, (bottom - top) / 128  # of an output pixel
        middles = (left + half_w - 0.5, top + half_h - 0.5, right - half_w - 0.5)
        got = (made[0, 0, 0], made[0, 0, 1], made[0, -1, 0])
        np.testing.assert_allclose(got, middles, atol=1.5)
        np.testing.assert_allclose(made[-1, 0, 1], bottom - half_h - 0.5, atol=1.5)
    assert 10 <= flips <= 30


def test_pad_and_crop_against_loops():
    image = rng(5).integers(1, 256, size=(6, 5, 3), dtype=np.uint8)
    encoded = encode(image, "PNG")
    preprocessing = SmallImagePreprocessing((6, 5, 3), padding=2)
    possible = {}
    for down in range(5):
        for right in range(5):
            crop = np.zeros_like(image)
            for i in range(6):
                for j in range(5):
                    y, x = i + down - 2, j + right - 2
                    if 0 <= y < 6 and 0 <= x < 5:
                        crop[i, j] = image[y, x]
            possible[crop.tobytes()] = (down, right, False)
            possible[crop[:, ::-1].tobytes()] = (down, right, True)
    assert len(possible) == 50
    generator = rng()
    counts = dict.fromkeys(possible.values(), 0)
    for _ in range(2500):
        counts[possible[preprocessing.train(encoded, generator).tobytes()]] += 1
    assert scipy.stats.chisquare(list(counts.values())).pvalue > 0.01
    np.testing.assert_array_equal(preprocessing.eval(encoded), image)


def test_small_images_without_augmentation():
    image = rng().integers(256, size=(28, 28, 1), dtype=np.uint8)
    encoded = encode(image[..., 0], "PNG")
    preprocessing = SmallImagePreprocessing((28, 28, 1), padding=0, flip=False)
    for made in (preprocessing.train(encoded, rng()), preprocessing.eval(encoded)):
        np.testing.assert_array_equal(made, image)


@pytest.mark.parametrize("method", ["train", "eval"])
def test_small_images_of_another_size(method):
    encoded = encode(np.zeros((32, 30, 3), np.uint8), "PNG")
    arguments = (rng(),) if method == "train" else ()
    with pytest.raises(ValueError, match=r"size 32×30 .* takes 32×32"):
        getattr(SmallImagePreprocessing(), method)(encoded, *arguments)


PREPROCESSING = [
    (PILLOW, PHOTOGRAPH_JPEG),
    (OPENCV, PHOTOGRAPH_JPEG),
    (SmallImagePreprocessing((375, 500, 3)), FILES["PNG"]),
]


@pytest.mark.parametrize(("preprocessing", "encoded"), PREPROCESSING)
def test_the_generator_decides_also_in_another_process(preprocessing, encoded):
    first, again, copy, other = (
        one.train(encoded, rng(seed))
        for one, seed in [
            (preprocessing, 3),
            (preprocessing, 3),
            (pickle.loads(pickle.dumps(preprocessing)), 3),
            (preprocessing, 4),
        ]
    )
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, copy)
    assert np.any(first != other)
    assert first.flags.c_contiguous
    assert first.flags.writeable


# Bytes that are not images, or not whole ones.


def outcome(make, encoded):
    """The pixels, or None where the bytes are called corrupt."""
    try:
        return make(encoded)
    except CorruptImageError:
        return None


SMALL = PHOTOGRAPH[::5, ::5]
CUT = {
    "JPEG": encode(SMALL),
    "progressive JPEG": encode(SMALL, progressive=True),
    "gray JPEG": converted("L", "JPEG", SMALL),
    "CMYK JPEG": converted("CMYK", "JPEG", SMALL),
    "JPEG with a thumbnail": encode(SMALL, exif=b"Exif\0\0" + encode(SMALL[::4, ::4])),
    "PNG": encode(SMALL, "PNG"),
    "GIF": converted("P", "GIF", SMALL),
    "BMP": encode(SMALL, "BMP"),
    "WebP": encode(SMALL, "WEBP"),
    "TIFF": encode(SMALL, "TIFF"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it also warns, of TIFF's tags
@pytest.mark.parametrize(("name", "encoded"), CUT.items(), ids=CUT)
def test_a_file_cut_short_is_an_error_or_whole(name, encoded):
    length = len(encoded)
    ends = {*range(16), *range(0, length, length // 60), *range(length - 16, length)}
    if "JPEG" in name:  # after every marker, the end marker of a thumbnail included
        ends |= {i + 2 for i in range(length - 2) if encoded[i] == 0xFF and encoded[i + 1]}
    makes = [
        decode,
        lambda e: ImageNetPreprocessing(32, decoder="pillow").train(e, rng()),
        lambda e: ImageNetPreprocessing(32, decoder="opencv").train(e, rng()),
        ImageNetPreprocessing(32).eval,
    ]
    for make in makes:
        whole = make(encoded)
        for end in sorted(ends):
            made = outcome(make, encoded[:end])
            if made is not None:
                # The last bytes of some formats hold no pixels.
                assert end > 0.95 * length
                assert "JPEG" not in name
                np.testing.assert_array_equal(made, whole)


@pytest.mark.parametrize("name", ["JPEG", "progressive JPEG", "JPEG with a thumbnail"])
@pytest.mark.parametrize("preprocessing", [PILLOW, OPENCV], ids=["pillow", "opencv"])
def test_zeros_in_place_of_the_end(name, preprocessing):
    encoded = FILES[name]
    for keep in (0.5, 0.9):
        zeroed = encoded[: int(keep * len(encoded))].ljust(2 * len(encoded), b"\0")
        for make in (decode, preprocessing.eval, lambda e: preprocessing.train(e, rng())):
            assert outcome(make, zeroed) is None


def test_damaged_bytes_are_corrupt_images_or_images(capfd):
    generator = rng()
    for name in ("JPEG", "PNG", "GIF", "TIFF", "WebP", "transparent palette PNG"):
        for _ in range(30):
            damaged = bytearray(FILES[name])
            for position in generator.integers(len(damaged) // 20, size=6):
                damaged[position] = generator.integers(256)
            for preprocessing in (PILLOW, OPENCV):
                made = outcome(lambda e, p=preprocessing: p.train(e, rng()), bytes(damaged))
                assert made is None or made.shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        (b"", "0 bytes are no image$"),
        (b"<html>not found</html>", "22 bytes are no image, which begin with b'<html>no'"),
        (PHOTOGRAPH_JPEG[:-2], "bytes of a corrupt image: the end of the file is missing"),
        (FILES["PNG"][:-5000], "bytes of a corrupt image: image file is truncated"),
    ],
)
def test_what_is_wrong_is_said(encoded, message):
    for make in (decode, PILLOW.eval, lambda e: OPENCV.train(e, rng())):
        with pytest.raises(CorruptImageError, match=message):
            make(encoded)


# Arguments.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImageNetPreprocessing(0), "size is 0; allowed is an integer of at least 1"),
        (lambda: ImageNetPreprocessing(224.0), r"size is 224\.0; allowed is an integer"),
        (lambda: ImageNetPreprocessing(True), "size is True; allowed is an integer"),
        (
            lambda: ImageNetPreprocessing(224, 200),
            r"resize is 200; allowed is an integer of at least 224 \(size\)",
        ),
        (
            lambda: ImageNetPreprocessing(decoder="turbo"),
            "decoder is 'turbo'; allowed are 'auto', 'pillow' and 'opencv'",
        ),
        (lambda: SmallImagePreprocessing((32, 32)), r"shape is \(32, 32\); allowed is \(height"),
        (lambda: SmallImagePreprocessing((32, 32, 2)), "with 1 or 3 channels"),
        (lambda: SmallImagePreprocessing((0, 32, 3)), "of integers"),
        (lambda: SmallImagePreprocessing(padding=-1), "padding is -1; allowed is an integer of at"),
        (lambda: decode(PHOTOGRAPH_JPEG, 4), "channels is 4; allowed are 1 and 3"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_configurations_are_frozen():
    for configuration, name in [(PILLOW, "size"), (SmallImagePreprocessing(), "padding")]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(configuration, name, 1)


SCRIPT = """
import sys
sys.modules["cv2"] = None  # as on a machine where it is not installed
import numpy as np
from lats_optax.data.images import ImageNetPreprocessing
assert "PIL" not in sys.modules
encoded = sys.stdin.buffer.read()
made = ImageNetPreprocessing(64).train(encoded, np.random.default_rng(0))
plain = ImageNetPreprocessing(64, decoder="pillow").train(encoded, np.random.default_rng(0))
assert np.array_equal(made, plain)
try:
    ImageNetPreprocessing(decoder="opencv")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_without_opencv():
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        input=PHOTOGRAPH_JPEG,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().strip() == (
        "decoder is 'opencv', which cannot be imported (pip install opencv-python-headless); "
        "allowed here are 'auto' and 'pillow'"
    )
