"""Laws: how the threshold of a closed loop rises until a named sparsity is reached.

Here belong the laws that `target_sparsity` takes. A law says one of two things, over the K steps
until the target is reached: in which proportions the threshold rises, or which sparsity the model
has on the way. Laws that name a final threshold, and no sparsity, are in `thresholds.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lats_optax.array_types import Array, Float

Numbers = TypeVar("Numbers", float, Array, np.ndarray)
Curve = Callable[[Float[np.ndarray, " n"]], Float[np.ndarray, " n"]]


@dataclass(frozen=True)
class Law:
    """The way to a named sparsity.

    Attributes:
      increments: from the learning rates of the K steps, float64 [K], to non-negative numbers in
        the proportions in which the threshold rises, float64 [K]; None: the threshold is the
        quantile at ``fraction`` of the target.
      fraction: from x = t / K in (0, 1] to the part of the target that the quantile is taken at.
    """

    increments: Callable[[Float[np.ndarray, " K"]], Float[np.ndarray, " K"]] | None
    fraction: Curve


def cubic(x: Numbers) -> Numbers:
    """The cubic curve ``1 - (1 - x)^3``: steep at first, flat at the end.

    Args:
      x: numbers in [0, 1].

    Example:
      >>> cubic(0.5)
      0.875

    Source: Zhu and Gupta, "To prune, or not to prune" (2017).
    """
    return 1 - (1 - x) ** 3


def constant_l1() -> Law:
    """The threshold rises in proportion to the learning rate, as that of LATS.

    ``d_{t+1} - d_t`` in proportion to ``eta_t``: the implied L1 coefficient is about constant.

    Returns:
      A law for :func:`lats_optax.target_sparsity`.

    Example:
      >>> constant_l1().increments(np.array([0.2, 0.1]))
      array([0.2, 0.1])

    Source: Chen et al., "A Unified Framework for Soft Threshold Pruning" (ICLR 2023).
    """
    return Law(lambda rates: rates, np.ones_like)


def threshold_curve(curve: Curve = cubic) -> Law:
    """The threshold rises along a curve: ``d_t`` in proportion to ``curve(t / K)``.

    Args:
      curve: a non-decreasing function of an array of x in [0, 1], with ``curve(0) = 0``. Default:
        :func:`cubic`.

    Returns:
      A law for :func:`lats_optax.target_sparsity`.

    Raises:
      ValueError: from ``target_sparsity``, a curve that falls or is not finite somewhere, or that
        is constant.

    Example:
      >>> threshold_curve().increments(np.ones(2))
      array([0.875, 0.125])
    """

    def increments(rates: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
        steps = len(rates)
        return np.diff(_evaluated("curve", curve, np.arange(steps + 1) / steps))

    return Law(increments, np.ones_like)


def sparsity_curve(curve: Curve = cubic) -> Law:
    """The sparsity rises along a curve: ``target * curve(t / K)`` after t steps.

    The threshold is the quantile of the latent magnitudes at that sparsity.

    Args:
      curve: a function of an array of x in [0, 1] with values in [0, 1] and ``curve(1) = 1``.
        Default: :func:`cubic`.

    Returns:
      A law for :func:`lats_optax.target_sparsity`.

    Raises:
      ValueError: from ``target_sparsity``, a curve with a value outside [0, 1], or that does not
        end at 1.

    Example:
      >>> sparsity_curve().fraction(np.array([0.5, 1.0]))
      array([0.875, 1.   ])

    Source: Zhu and Gupta, "To prune, or not to prune" (2017); Glentis Georgoulakis et al.,
    "Feather" (BMVC 2023).
    """

    def fraction(x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        values = _evaluated("curve", curve, x)
        inside = (values >= 0) & (values <= 1)
        if not inside.all():
            raise ValueError(
                f"curve: {values[~inside][0]} at x = {x[~inside][0]:g} is not allowed; allowed are "
                "numbers in [0, 1]"
            )
        return values

    end = _evaluated("curve", curve, np.ones(1))[0]
    if end != 1:
        raise ValueError(f"curve: it ends at {end}, and not at 1, where the target is reached")
    return Law(None, fraction)


def _evaluated(name: str, curve: Curve, x: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """A curve at points, float64, and finite."""
    values = np.broadcast_to(np.asarray(curve(x), np.float64), x.shape)
    if not np.all(np.isfinite(values)):
        step = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"{name}: {values[step]} at x = {x[step]:g} is not finite")
    return values
