"""The model zoo, by name: Flax modules, one file an architecture. They know nothing of pruning."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from lats_optax.models.digits import DigitsCNN

__all__ = ["DigitsCNN", "create"]

_MODELS: dict[str, type[nn.Module]] = {"digits-cnn": DigitsCNN}


def create(
    name: str, *, num_classes: int, dtype: DTypeLike = jnp.float32, axis_name: str | None = None
) -> nn.Module:
    """Builds a model of the zoo.

    Args:
      name: which model.
      num_classes: number of logits.
      dtype: of the computation, ``jnp.bfloat16`` for mixed precision; parameters and batch
        statistics stay float32, and so are the logits.
      axis_name: mapped axis over which batch statistics are averaged; ``None`` leaves to each
        device the statistics of its own part of the batch.

    Returns:
      A module that is called as ``apply(variables, images, train, mutable=["batch_stats"])``, with
      images (batch, height, width, channels), and returns logits (batch, num_classes).

    Raises:
      ValueError: there is no model of that name.

    Example:
      >>> import jax
      >>> model = create("digits-cnn", num_classes=10)
      >>> images = jnp.zeros((2, 8, 8, 1))
      >>> key = jax.random.key(0, impl="rbg")  # on CPUs, compiles in a third of the time
      >>> variables = model.init(key, images, train=False)
      >>> model.apply(variables, images, train=False).shape
      (2, 10)
    """
    if name not in _MODELS:
        known = ", ".join(repr(known) for known in _MODELS)
        raise ValueError(f"model {name!r} is not known; known are {known}")
    return _MODELS[name](num_classes=num_classes, dtype=dtype, axis_name=axis_name)
