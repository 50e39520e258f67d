"""Encoded images to pixels: Pillow for all formats, OpenCV for the JPEG files of training.

With OpenCV, JPEG files are decoded to the same pixels as Pillow's, but resized in another way: a
blur of three taps that adds the variance of Pillow's antialiasing, then bilinear interpolation. On
photographs the two are 33 dB of peak signal-to-noise ratio apart or more, at 224 pixels 45 in the
median, or about one gray level.

Pillow and OpenCV are imported where they are used: importing this is free.
"""

import contextlib
import functools
import io
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_END_OF_JPEG = b"\xff\xd9"
# Where one output pixel spans more source pixels, three taps no longer stand in for antialiasing.
_MOST_BLURRED = 2.25


class CorruptImageError(ValueError):
    """Bytes that are no image, or not all of one; the message says what is wrong with them."""


def decode(encoded: bytes, channels: int = 3) -> np.ndarray:
    """The pixels of an encoded image, in any format, as Pillow converts them.

    An orientation in EXIF data is not applied, as in torchvision's loader.

    Args:
      encoded: the content of an image file.
      channels: 3 for RGB or 1 for gray; other images are converted, alpha is dropped.

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
    with opened(encoded) as image:
        pixels = np.array(converted(image, "RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


@contextlib.contextmanager
def opened(encoded: bytes) -> Iterator["Image"]:
    """The image with its header read; errors inside name the kind of bytes."""
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


def converted(image: "Image", mode: str) -> "Image":
    """Decodes all of an image."""
    # Pillow would warn that a palette's transparency is lost; it is lost for other images as well.
    image.load()
    image.info.pop("transparency", None)
    return image if image.mode == mode else image.convert(mode)


@functools.cache
def opencv() -> Any:
    """OpenCV, or None where it cannot be imported."""
    try:
        import cv2
    except ImportError as error:
        logger.info("Pillow decodes all images, more slowly: OpenCV is missing (%s)", error)
        return None
    return cv2


def decode_opencv(encoded: bytes, image: "Image") -> np.ndarray | None:
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
    cv2 = opencv()
    if cv2 is None:
        return None
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    pixels: np.ndarray | None = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    return pixels


def resize_opencv(image: np.ndarray, size: int, flip: bool) -> np.ndarray:
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
