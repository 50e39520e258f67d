"""Encoded images to arrays, on the host: decoding, augmenting, normalising.

The published preprocessing is torchvision's on Pillow images. Evaluation is that, bit for bit, and
so is training with ``decoder="pillow"``, given the crop. With OpenCV, JPEG files are decoded to the
same pixels and cropped alike, but resized in another way: a blur of three taps that adds the
variance of Pillow's antialiasing, then bilinear interpolation. On photographs the two are 33 dB of
peak signal-to-noise ratio apart or more, at 224 pixels 45 in the median, or about one grey level.

Pillow and OpenCV are imported where they are used: importing this is free.
"""

import contextlib
import dataclasses
import functools
import io
import logging
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

# RandomResizedCrop as published: Szegedy et al., "Going Deeper with Convolutions", 2014.
_CROP_AREA = (0.08, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_TRIES = 10

_END_OF_JPEG = b"\xff\xd9"
# Where one output pixel spans more source pixels, three taps no longer stand in for antialiasing.
_MOST_BLURRED = 2.25

# Of the published code (data/imagenet.py) and of all of torchvision's ImageNet weights.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Over all pixels of the train split; github.com/kuangliu/pytorch-cifar, issue 19. (The smaller
# deviations that are also in use, 0.2023 …, are means of the deviations of single images.)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# Likewise; github.com/weiaicunzai/pytorch-cifar100, conf/global_settings.py, rounded.
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
# github.com/pytorch/examples, mnist/main.py.
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
# github.com/chatflip/CalculationMeanStd.
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,), (0.3530,)

_Statistics = tuple[tuple[float, ...], tuple[float, ...]]

# (mean, standard deviation) of each channel on a scale from 0 to 1, by the data set's TFDS name.
NORMALISATION: dict[str, _Statistics] = {
    "imagenet2012": (IMAGENET_MEAN, IMAGENET_STD),
    # Subsets of ImageNet, for which no others are in use.
    "imagenet2012_subset": (IMAGENET_MEAN, IMAGENET_STD),
    "imagenette": (IMAGENET_MEAN, IMAGENET_STD),
    "imagewang": (IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": (CIFAR10_MEAN, CIFAR10_STD),
    "cifar100": (CIFAR100_MEAN, CIFAR100_STD),
    "mnist": (MNIST_MEAN, MNIST_STD),
    "fashion_mnist": (FASHION_MNIST_MEAN, FASHION_MNIST_STD),
}


class CorruptImageError(ValueError):
    """Bytes that are no image, or not all of one; the message says what is wrong with them."""


def channel_statistics(name: str, channels: int) -> _Statistics:
    """Mean and standard deviation of a data set's channels, for ``Normalisation``.

    Args:
      name: the data set's TFDS name; what follows a ``/`` or ``:`` (config, version) is ignored.
      channels: channels of its images.

    Returns:
      ``NORMALISATION``'s entry. For a data set that has none: ImageNet's for three channels, which
      are near those of any photographs, and else 0.5 for all, which maps [0, 1] to [−1, 1].

    Example:
      >>> channel_statistics("cifar10:3.0.2", 3)[0]
      (0.4914, 0.4822, 0.4465)
      >>> channel_statistics("kmnist", 1)
      ((0.5,), (0.5,))
    """
    known = NORMALISATION.get(name.partition("/")[0].partition(":")[0])
    if known is not None and len(known[0]) == channels:
        return known
    if channels == len(IMAGENET_MEAN):
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * channels, (0.5,) * channels


def decode(encoded: bytes, channels: int = 3) -> np.ndarray:
    """The pixels of an encoded image, in whatever format, as Pillow converts them.

    An orientation in EXIF data is not applied, as in torchvision's loader.

    Args:
      encoded: the content of an image file.
      channels: 3 for RGB or 1 for grey; other images are converted, alpha is dropped.

    Returns:
      uint8 (height, width, channels).

    Raises:
      CorruptImageError: the bytes are no image or the file is cut short. Flipped bits inside of
        JPEG data are not detected by any decoder.
      ValueError: ``channels`` is neither 1 nor 3.

    Example:
      >>> import io, PIL.Image
      >>> file = io.BytesIO()
      >>> PIL.Image.new("RGB", (5, 2), "red").save(file, "PNG")
      >>> decode(file.getvalue()).shape
      (2, 5, 3)
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels!r}; allowed are 1 and 3")
    with _opened(encoded) as image:
        pixels = np.array(_converted(image, "RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def random_crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The crop of RandomResizedCrop: 8 to 100 % of the area, width/height from 3/4 to 4/3.

    Area uniform and aspect ratio log-uniform, drawn until the crop fits into the image, ten times
    at most; then the largest centred crop whose aspect ratio is in the range.

    Args:
      width: of the image, in pixels.
      height: of the image, in pixels.
      rng: what it is drawn from.

    Returns:
      (left, top, right, bottom) in pixels.

    Example:
      >>> random_crop_box(500, 100, np.random.default_rng(0))
      (76, 10, 143, 98)
    """
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(*_CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w = min(width, round(height * _CROP_RATIO[1]))
    h = min(height, round(width / _CROP_RATIO[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclasses.dataclass(frozen=True)
class ImageNetPreprocessing:
    """Images of any size to squares: RandomResizedCrop and flip; resize and centre crop.

    Args:
      size: height and width of the output.
      resize: what evaluation resizes the shorter side to before it crops; ``None`` is 256/224 of
        ``size``, rounded.
      decoder: what decodes and resizes JPEG files for training. ``"auto"`` is OpenCV where it is
        installed, which is 1.4 times as fast (``benchmarks/input_pipeline.py``), or else Pillow.
        They differ as the module's docstring says; both draw the same crops and flips.

    Raises:
      ValueError: an argument is out of its range, or ``decoder`` is not installed.

    Example:
      >>> import io, PIL.Image
      >>> file = io.BytesIO()
      >>> PIL.Image.new("RGB", (500, 375), "red").save(file, "JPEG")
      >>> preprocessing = ImageNetPreprocessing(size=128)
      >>> preprocessing.train(file.getvalue(), np.random.default_rng(0)).shape
      (128, 128, 3)
      >>> preprocessing.eval(file.getvalue()).shape
      (128, 128, 3)
    """

    size: int = 224
    resize: int | None = None
    decoder: Literal["auto", "pillow", "opencv"] = "auto"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        _check_integer("size", self.size, 1)
        if self.resize is not None:
            _check_integer("resize", self.resize, self.size, " (size)")
        if self.decoder not in ("auto", "pillow", "opencv"):
            raise ValueError(
                f"decoder is {self.decoder!r}; allowed are 'auto', 'pillow' and 'opencv'"
            )
        if self.decoder == "opencv" and _opencv() is None:
            raise ValueError(
                "decoder is 'opencv', which cannot be imported (pip install "
                "opencv-python-headless); allowed here are 'auto' and 'pillow'"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the output."""
        return self.size, self.size, 3

    def train(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        """A random crop, flipped in half of the cases.

        Args:
          encoded: the content of an image file.
          rng: what crop and flip are drawn from.

        Returns:
          uint8 (size, size, 3).

        Raises:
          CorruptImageError: as ``decode``.
        """
        from PIL import Image

        with _opened(encoded) as image:
            box = random_crop_box(*image.size, rng)
            flip = rng.random() < 0.5
            pixels = None if self.decoder == "pillow" else _decode_opencv(encoded, image)
            if pixels is None:
                image = _converted(image, "RGB")
        if pixels is not None:
            left, top, right, bottom = box
            return _resize_opencv(pixels[top:bottom, left:right], self.size, flip)
        resized = image.crop(box).resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.array(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized)

    def eval(self, encoded: bytes) -> np.ndarray:
        """The image with its shorter side resized to ``resize``, and the centre cut out.

        Args:
          encoded: the content of an image file.

        Returns:
          uint8 (size, size, 3).

        Raises:
          CorruptImageError: as ``decode``.
        """
        from PIL import Image

        short = round(self.size * 256 / 224) if self.resize is None else self.resize
        with _opened(encoded) as image:
            image = _converted(image, "RGB")
        shorter = min(image.size)
        width, height = (int(short * side / shorter) for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return np.array(resized.crop((left, top, left + self.size, top + self.size)))


@dataclasses.dataclass(frozen=True)
class SmallImagePreprocessing:
    """Images that are all of one size, kept at it: pad, crop and flip; nothing for evaluation.

    Args:
      shape: (height, width, channels) of the images; 1 channel (grey) or 3 (RGB).
      padding: rows and columns of zeros (black) that training adds on each side, before it crops
        back to ``shape``; 4 for CIFAR (He et al., 2015).
      flip: whether training mirrors half of the images; not for digits and letters.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> import io, PIL.Image
      >>> file = io.BytesIO()
      >>> PIL.Image.new("RGB", (32, 32), "red").save(file, "PNG")
      >>> SmallImagePreprocessing().train(file.getvalue(), np.random.default_rng(0)).shape
      (32, 32, 3)
    """

    shape: tuple[int, int, int] = (32, 32, 3)
    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if (
            not isinstance(self.shape, tuple)
            or len(self.shape) != 3
            or not all(isinstance(side, int) and side >= 1 for side in self.shape)
            or self.shape[2] not in (1, 3)
        ):
            raise ValueError(
                f"shape is {self.shape!r}; allowed is (height, width, channels) of integers, with "
                "1 or 3 channels"
            )
        _check_integer("padding", self.padding, 0)

    def train(self, encoded: bytes, rng: np.random.Generator) -> np.ndarray:
        """The padded image cropped at random, flipped in half of the cases.

        Args:
          encoded: the content of an image file.
          rng: what crop and flip are drawn from.

        Returns:
          uint8 of ``shape``.

        Raises:
          CorruptImageError: as ``decode``.
          ValueError: the image is of another size.
        """
        image = self.eval(encoded)
        height, width, channels = self.shape
        pad = self.padding
        padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), np.uint8)
        padded[pad : pad + height, pad : pad + width] = image
        top, left = rng.integers(2 * pad + 1, size=2)
        crop = padded[top : top + height, left : left + width]
        if self.flip and rng.random() < 0.5:
            crop = crop[:, ::-1]
        return np.ascontiguousarray(crop)

    def eval(self, encoded: bytes) -> np.ndarray:
        """The image as it is.

        Args:
          encoded: the content of an image file.

        Returns:
          uint8 of ``shape``.

        Raises:
          CorruptImageError: as ``decode``.
          ValueError: the image is of another size.
        """
        image = decode(encoded, self.shape[2])
        if image.shape != self.shape:
            raise ValueError(
                f"the image is of size {image.shape[0]}×{image.shape[1]} (height × width); this "
                f"preprocessing takes {self.shape[0]}×{self.shape[1]} alone"
            )
        return image


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """(image / 255 − mean) / std for each channel, computed in float32.

    Args:
      mean: of each channel, on a scale from 0 to 1.
      std: standard deviation of each channel, on the same scale.
      dtype: of the result, ``"float32"`` or ``"bfloat16"``.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> normalise = Normalisation(mean=(0.5,), std=(0.25,))
      >>> float(normalise(np.full((1, 1, 1), 255, np.uint8))[0, 0, 0])
      2.0
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if not isinstance(values, tuple) or not values or not all(0 <= v <= 1 for v in values):
                raise ValueError(
                    f"{name} is {values!r}; allowed is a tuple of a number for each channel, on a "
                    "scale from 0 to 1"
                )
        if not all(self.std):
            raise ValueError(f"std is {self.std!r}; zeros are not allowed")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has {len(self.mean)} channels and std {len(self.std)}; allowed is the same "
                "number"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; allowed are 'float32' and 'bfloat16'")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Normalises an image, or an array of them.

        Args:
          image: uint8 (…, height, width, channels).

        Returns:
          An array of ``dtype`` and the same shape.

        Raises:
          ValueError: the array is not uint8, or has another number of channels.
        """
        channels = len(self.mean)
        if image.dtype != np.uint8 or image.ndim < 3 or image.shape[-1] != channels:
            raise ValueError(
                f"image is {image.dtype} of shape {image.shape}; allowed is uint8 of shape "
                f"(…, height, width, {channels})"
            )
        # One multiplication and one addition a value, along rows: with the channels alone as the
        # innermost axis NumPy takes eight times as long, and a table of the 256 values three times.
        row = image.shape[-2] * channels
        scale, offset = _factors(self.mean, self.std, image.shape[-2])
        normalised = image.reshape(-1, row) * scale
        normalised += offset
        if self.dtype == "bfloat16":
            import ml_dtypes

            normalised = normalised.astype(ml_dtypes.bfloat16)
        return normalised.reshape(image.shape)


@functools.lru_cache(maxsize=16)
def _factors(
    mean: tuple[float, ...], std: tuple[float, ...], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """1 / (255 std) and −mean / std, float32, for a row of pixels."""
    scale = 1 / (255 * np.asarray(std, np.float64))
    offset = -np.asarray(mean, np.float64) / std
    return np.tile(scale.astype(np.float32), width), np.tile(offset.astype(np.float32), width)


@contextlib.contextmanager
def _opened(encoded: bytes) -> Iterator["Image"]:
    """The image with its header read; whatever goes wrong inside says what the bytes are."""
    from PIL import Image, UnidentifiedImageError

    try:
        file = io.BytesIO(encoded)
        with Image.open(file) as image:
            # Opening reads up to the compressed pixels. Were zeros in the place of a lost end (or
            # had the end marker of a thumbnail been taken for it), they would be decoded as well.
            if image.format == "JPEG" and encoded.rfind(_END_OF_JPEG, file.tell()) < 0:
                raise CorruptImageError("the end of the file is missing")
            yield image
    except (MemoryError, Warning):
        raise
    except UnidentifiedImageError:
        begins = f", which begin with {bytes(encoded[:8])!r}" if encoded else ""
        raise CorruptImageError(f"{len(encoded)} bytes are no image{begins}") from None
    # Pillow's decoders raise what they meet: OSError, SyntaxError, struct.error, zlib.error …
    except Exception as error:
        raise CorruptImageError(f"{len(encoded)} bytes of a corrupt image: {error}") from error


def _converted(image: "Image", mode: str) -> "Image":
    """Decodes all of an image."""
    # Pillow would warn that a palette's transparency is lost; it is lost for other images as well.
    image.load()
    image.info.pop("transparency", None)
    return image if image.mode == mode else image.convert(mode)


@functools.cache
def _opencv() -> Any:
    """OpenCV, or None where it cannot be imported."""
    try:
        import cv2
    except ImportError as error:
        logger.info("Pillow decodes all images, more slowly: OpenCV is missing (%s)", error)
        return None
    return cv2


def _decode_opencv(encoded: bytes, image: "Image") -> np.ndarray | None:
    """The RGB pixels of a JPEG file, or None for what is left to Pillow.

    OpenCV turns CMYK, palettes and 16 bits into RGB in ways of its own, and some of its versions
    fill in what a file that was cut short lacks.
    """
    if (
        image.format != "JPEG"
        or image.mode not in ("RGB", "L")
        or not encoded.endswith(_END_OF_JPEG)
    ):
        return None
    cv2 = _opencv()
    if cv2 is None:
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels: np.ndarray | None = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    return pixels


def _resize_opencv(image: np.ndarray, size: int, flip: bool) -> np.ndarray:
    """Resizes to a square, nearly as Pillow's antialiased bilinear filter does, but faster.

    Pillow's filter is a triangle as wide as the output pixels' distance s, of variance s²/6;
    interpolation in the input grid alone is one of variance 1/6. The taps (a, 1 − 2a, a) add 2a.
    """
    import cv2

    height, width = image.shape[:2]
    while max(height, width) > _MOST_BLURRED * size:
        height, width = round(height / 2), round(width / 2)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if max(height, width) > size:
        sides = [max(0.0, ((side / size) ** 2 - 1) / 12) for side in (width, height)]
        across, down = (np.array([a, 1 - 2 * a, a], np.float32) for a in sides)
        image = cv2.sepFilter2D(image, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    return cv2.flip(image, 1) if flip else image


def _check_integer(name: str, value: object, least: int, which: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; allowed is an integer of at least {least}{which}")
