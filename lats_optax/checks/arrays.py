"""Whether the arrays that are given are those that a model has."""

from collections.abc import Collection, Mapping
from typing import Any

Shape = tuple[int, ...]

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""The float types that models are kept in."""


def misfits(
    given: Mapping[str, Any],
    wanted: Mapping[str, set[Shape]],
    dtypes: Collection[str] | None = None,
) -> list[str]:
    """What is wrong with each array that is too many, too few or not as it should be.

    Args:
      given: arrays, or what else has a shape and a dtype, by name.
      wanted: the shapes that each may have.
      dtypes: the names of those that are allowed; None: any.

    Returns:
      One text for each misfit, sorted: what has another name than it should then stands near its
      place.

    Example:
      >>> import numpy as np
      >>> misfits({"a": np.zeros(3), "b": np.ones(2)}, {"a": {(2,)}, "c": {()}}, ["float64"])
      ['a is (3,), wanted (2,)', 'b is unknown, (2,)', 'c is missing, wanted ()']
    """
    problems = [f"{name} is unknown, {given[name].shape}" for name in given if name not in wanted]
    for name, shapes in wanted.items():
        shape = " or ".join(map(str, sorted(shapes)))
        if name not in given:
            problems.append(f"{name} is missing, wanted {shape}")
        elif given[name].shape not in shapes:
            problems.append(f"{name} is {given[name].shape}, wanted {shape}")
        elif dtypes is not None and given[name].dtype.name not in dtypes:
            problems.append(f"{name} is {given[name].dtype}, wanted {', '.join(dtypes)}")
    return sorted(problems)
