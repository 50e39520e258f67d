"""The types of arrays in annotations: jaxtyping's, which say dtype and shape.

Here belong the names that annotations of the core use, in jaxtyping's notation:

    Float[Array, "rows columns"]   a float array of two dimensions
    Float[Array, "*shape"]         of any shape, the same wherever one signature says ``*shape``
    Float[Array, "*#shape"]        one that broadcasts against ``*shape``
    Float[Array, "..."]            of any shape
    Float[Array, ""]               a scalar

An axis named once is there for the reader. jaxtyping is not needed at run time: without it
``Float[Array, "..."]`` is `jax.Array`. `tests/test_array_types.py` runs the core with it, and
checks every call.
"""

from typing import TYPE_CHECKING

import numpy as np
from jax import Array

__all__ = [
    "AnyArray",
    "Array",
    "Bool",
    "Count",
    "Float",
    "Integer",
    "Num",
    "Real",
    "Scalar",
    "Shaped",
]

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Integer, Num, Real, Shaped
else:
    try:
        from jaxtyping import Bool, Float, Integer, Num, Real, Shaped
    except ImportError:

        class _Plain:
            """What stands for each of jaxtyping's dtypes where it is not installed."""

            def __class_getitem__(cls, item: tuple[type, str]) -> type:
                return item[0]

        Bool = Float = Integer = Num = Real = Shaped = _Plain

AnyArray = Array | np.ndarray
"""An array of a device or of the host, where either is taken."""

Scalar = float | Float[AnyArray, ""]
"""A real number of the host or of a device, perhaps traced."""

Count = int | Integer[AnyArray, ""]
"""A number of steps, perhaps traced."""
