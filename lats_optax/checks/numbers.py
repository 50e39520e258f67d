"""Checks of plain numbers: each names the argument, the value and what is allowed.

Here belong checks of one number. Checks of transforms, states and trees are in `arguments.py`, and
those of schedules in `control/schedules.py`.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

# What an optimizer can count in int32.
_MOST_COUNTED = 2**31 - 1


def is_number(value: Any) -> bool:
    """Whether a value is one real number: of Python, NumPy or JAX, and not a bool."""
    array = np.asarray(value)
    return array.ndim == 0 and jnp.isdtype(array.dtype, ("real floating", "integral"))


def check_steps(steps: Any, name: str = "steps", most: int = _MOST_COUNTED) -> int:
    """``steps`` as an int >= 1, or a ValueError that names the argument."""
    # An int beyond 64 bits is no number to NumPy.
    whole = type(steps) is int or (is_number(steps) and float(steps).is_integer())
    if whole and 1 <= steps <= most:
        return int(steps)
    bound = f" and <= {most}" if whole and steps > most else ""
    raise ValueError(f"{name}: {steps!r} is not allowed; allowed are whole numbers >= 1{bound}")


def check_threshold(name: str, value: Any) -> float:
    """``value`` as a finite float >= 0, or a ValueError that names the argument."""
    if not (is_number(value) and math.isfinite(value) and value >= 0):
        shown = value if is_number(value) else repr(value)
        raise ValueError(f"{name}: {shown} is not allowed; allowed are finite numbers >= 0")
    return float(value)


def check_above(
    name: str, value: Any, least: int, *, inclusive: bool = False, infinite: bool = False
) -> float:
    """A number above a bound, or a ValueError that names the argument."""
    known = is_number(value)
    if known and (infinite or math.isfinite(value)):
        number = float(value)
        if number > least or (inclusive and number == least):
            return number
    kind, more = ("numbers", ", inf among them") if infinite else ("finite numbers", "")
    allowed = f"{kind} {'>=' if inclusive else '>'} {least}{more}"
    raise ValueError(f"{name}: {value!r} is not allowed; allowed are {allowed}")


def check_fraction(name: str, value: Any) -> float:
    """``value`` as a float in (0, 1], or a ValueError that names the argument."""
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name}: {value!r} is not allowed; allowed are numbers in (0, 1]")
    return float(value)
