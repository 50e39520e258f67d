"""Checks of the fields of configs: each error names the option, its value and what is allowed."""

import numpy as np

from lats_optax.checks.options import check

MOST_COUNTED = 2**31 - 1
"""The largest number of steps, images or seconds."""

_FLOAT32 = np.finfo(np.float32)


def check_float32(field: str, value: float, *, positive: bool = False) -> None:
    """Refuses what would be negative, infinite or lost in the type that runs compute in."""
    least, most = float(_FLOAT32.tiny), float(_FLOAT32.max)
    zero = "" if positive else "0, or "
    allowed = f"{zero}{least:.2g} to {most:.2g}, the numbers of float32"
    check((value == 0 and not positive) or least <= value <= most, field, value, allowed)
