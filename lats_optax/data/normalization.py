"""What is subtracted from images and what they are divided by, and where the numbers are from."""

import dataclasses
import functools

import numpy as np

# Of the published code (data/imagenet.py) and of all of torchvision's ImageNet weights.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Over all pixels of the train split; github.com/kuangliu/pytorch-cifar, issue 19. (The smaller
# deviations that are also in use, 0.2023 …, are means of the deviations of single images.)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# Likewise; github.com/weiaicunzai/pytorch-cifar100, conf/global_settings.py, rounded.
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
# github.com/pytorch/examples, mnist/main.py.
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
# Over all pixels of the train split: 0.28604 and 0.35302.
FASHION_MNIST_MEAN, FASHION_MNIST_STD = (0.2860,), (0.3530,)

_MeanStd = tuple[tuple[float, ...], tuple[float, ...]]

# (mean, standard deviation) of each channel on a scale from 0 to 1, by the data set's TFDS name.
NORMALIZATION: dict[str, _MeanStd] = {
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


def channel_mean_std(name: str, channels: int) -> _MeanStd:
    """Mean and standard deviation of a data set's channels, for ``Normalization``.

    Args:
      name: the data set's TFDS name; what follows a ``/`` or ``:`` (config, version) is ignored.
      channels: channels of its images.

    Returns:
      ``NORMALIZATION``'s entry. For a data set that has none: ImageNet's for three channels, which
      are near those of any photographs, and else 0.5 for all, which maps [0, 1] to [−1, 1].

    Example:
      >>> channel_mean_std("cifar10:3.0.2", 3)[0]
      (0.4914, 0.4822, 0.4465)
      >>> channel_mean_std("kmnist", 1)
      ((0.5,), (0.5,))
    """
    known = NORMALIZATION.get(name.partition("/")[0].partition(":")[0])
    if known is not None and len(known[0]) == channels:
        return known
    if channels == len(IMAGENET_MEAN):
        return IMAGENET_MEAN, IMAGENET_STD
    return (0.5,) * channels, (0.5,) * channels


@dataclasses.dataclass(frozen=True)
class Normalization:
    """(image / 255 − mean) / std for each channel, computed in float32.

    Args:
      mean: of each channel, on a scale from 0 to 1.
      std: standard deviation of each channel, on the same scale.
      dtype: of the result, ``"float32"`` or ``"bfloat16"``.

    Raises:
      ValueError: an argument is out of its range.

    Example:
      >>> normalize = Normalization(mean=(0.5,), std=(0.25,))
      >>> float(normalize(np.full((1, 1, 1), 255, np.uint8))[0, 0, 0])
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
        """Normalizes an image, or an array of them.

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
        normalized = image.reshape(-1, row) * scale
        normalized += offset
        if self.dtype == "bfloat16":
            import ml_dtypes

            normalized = normalized.astype(ml_dtypes.bfloat16)
        return normalized.reshape(image.shape)


@functools.lru_cache(maxsize=16)
def _factors(
    mean: tuple[float, ...], std: tuple[float, ...], width: int
) -> tuple[np.ndarray, np.ndarray]:
    """1 / (255 std) and −mean / std, float32, for a row of pixels."""
    scale = 1 / (255 * np.asarray(std, np.float64))
    offset = -np.asarray(mean, np.float64) / std
    return np.tile(scale.astype(np.float32), width), np.tile(offset.astype(np.float32), width)
