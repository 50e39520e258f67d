"""What checks a call against its array annotations, for jaxtyping's import hook.

A general type checker would also refuse an int for a float, which Python allows. Here a value is
held against the annotations of arrays alone, within tuples and unions too; other annotations pass.
"""

import functools
import inspect
import types
import typing

import jax
import numpy as np
from jaxtyping import AbstractArray


def check(function):
    """The function, which raises where an argument or its value is not of the annotated type."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*arguments, **keywords):
        bound = signature.bind(*arguments, **keywords)
        for name, value in bound.arguments.items():
            require(f"argument {name}", value, signature.parameters[name].annotation)
        result = function(*arguments, **keywords)
        require("result", result, signature.return_annotation)
        return result

    return checked


def require(what, value, annotation):
    if not fits(value, annotation):
        kind = f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else repr(value)
        raise TypeError(f"{what}: {kind} is not {annotation}")


def fits(value, annotation):
    """Whether a value may be of a type, as far as its arrays tell."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, kind) for kind in inner)
    if origin is tuple and isinstance(value, tuple) and ... not in inner:
        return len(value) == len(inner) and all(map(fits, value, inner))
    if isinstance(annotation, type) and issubclass(annotation, AbstractArray):
        return isinstance(value, annotation)
    if annotation is float or annotation is int:  # within a union with arrays
        return not isinstance(value, jax.Array | np.ndarray)
    return True
