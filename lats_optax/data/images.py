"""Encoded images to arrays of one size, on the host: cropping, flipping, resizing.

The published preprocessing is torchvision's on Pillow images. Evaluation is that, bit for bit, and
so is training with ``decoder="pillow"``, given the crop. With OpenCV the crops are the same; how
its pixels differ is told in `decoding`.

Pillow and OpenCV are imported where they are used: importing this is free.
"""

import dataclasses
import math
from typing import Literal

import numpy as np

from lats_optax.data.decoding import (
    converted,
    decode,
    decode_opencv,
    opencv,
    opened,
    resize_opencv,
)

# RandomResizedCrop as published: Szegedy et al., "Going Deeper with Convolutions", 2014.
_CROP_AREA = (0.08, 1.0)
_CROP_RATIO = (3 / 4, 4 / 3)
_CROP_TRIES = 10


def random_crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """The crop of RandomResizedCrop: 8 to 100 % of the area, width/height from 3/4 to 4/3.

    Area uniform and aspect ratio log-uniform, drawn until the crop fits into the image, ten times
    at most; then the largest centered crop whose aspect ratio is in the range.

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
    """Images of any size to squares: RandomResizedCrop and flip; resize and center crop.

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
        if self.decoder == "opencv" and opencv() is None:
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

        with opened(encoded) as image:
            box = random_crop_box(*image.size, rng)
            flip = rng.random() < 0.5
            pixels = None if self.decoder == "pillow" else decode_opencv(encoded, image)
            if pixels is None:
                image = converted(image, "RGB")
        if pixels is not None:
            left, top, right, bottom = box
            return resize_opencv(pixels[top:bottom, left:right], self.size, flip)
        resized = image.crop(box).resize((self.size, self.size), Image.Resampling.BILINEAR)
        return np.array(resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized)

    def eval(self, encoded: bytes) -> np.ndarray:
        """The image with its shorter side resized to ``resize``, and the center cut out.

        Args:
          encoded: the content of an image file.

        Returns:
          uint8 (size, size, 3).

        Raises:
          CorruptImageError: as ``decode``.
        """
        from PIL import Image

        short = round(self.size * 256 / 224) if self.resize is None else self.resize
        with opened(encoded) as image:
            image = converted(image, "RGB")
        shorter = min(image.size)
        width, height = (int(short * side / shorter) for side in image.size)
        resized = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return np.array(resized.crop((left, top, left + self.size, top + self.size)))


@dataclasses.dataclass(frozen=True)
class SmallImagePreprocessing:
    """Images that are all of one size, kept at it: pad, crop and flip; nothing for evaluation.

    Args:
      shape: (height, width, channels) of the images; 1 channel (gray) or 3 (RGB).
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


def _check_integer(name: str, value: object, least: int, which: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; allowed is an integer of at least {least}{which}")
