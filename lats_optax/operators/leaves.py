"""Operators of one array over the leaves of pytrees, and the float types that they compute in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from lats_optax import compatibility
from lats_optax.array_types import Array, Float


def over_leaves(function: Callable[..., Array], x: Any, strength: Any, **keywords: Any) -> Any:
    """``function(array, strength, **keywords)`` of each leaf, computed in at least float32."""
    for leaf in jax.tree.leaves(strength):
        check_not_negative("strength", leaf)

    def one(leaf: Any, d: Any) -> Float[Array, "..."]:
        leaf = as_real(leaf)
        # Sixteen-bit weights are thresholded in float32, so that d is not rounded to their grid.
        wide = upcast(leaf)
        d = jnp.asarray(d, wide.dtype)
        check_broadcasts(d, leaf.shape)
        z = function(wide, d, **keywords)
        return z if z.dtype == leaf.dtype else positive_zero(z.astype(leaf.dtype))

    try:
        strengths = compatibility.broadcast(strength, x)
    except ValueError as error:
        raise ValueError(
            f"strength: the structure {jax.tree.structure(strength)} is neither a scalar nor that "
            f"of x, {jax.tree.structure(x)}"
        ) from error
    return jax.tree.map(one, x, strengths)


def compute_dtype(dtype: DTypeLike) -> DTypeLike:
    """The dtype in which weights of a float dtype are compared with a threshold."""
    # promote_types would refuse sixteen-bit types under strict promotion.
    return dtype if jnp.dtype(dtype).itemsize >= 4 else jnp.float32


def as_real(x: Any) -> Float[Array, "..."]:
    """A float array, of integers too; complex numbers are a TypeError."""
    try:
        x = jnp.asarray(x)
    except TypeError as error:
        raise TypeError(f"x: {x!r} is not allowed; allowed are real arrays") from error
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise TypeError(f"x: {x.dtype} is complex; proximal operators take real arrays")
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def upcast(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A float array in the precision in which it is compared with a threshold."""
    return x.astype(compute_dtype(x.dtype))


def positive_zero(z: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The array with +0.0 for -0.0."""
    # What underflows, in a product or in a cast, may have become -0.0. The difference is +0.0 and
    # has the derivative of z, which a zero within a living group needs.
    return jnp.where(z == 0, z - lax.stop_gradient(z), z)


def check_broadcasts(d: Float[Array, "..."], shape: tuple[int, ...]) -> None:
    """Refuses a strength that does not broadcast to a shape."""
    try:
        fits = np.broadcast_shapes(d.shape, shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"strength: its shape {d.shape} does not broadcast against {shape}")


def check_not_negative(name: str, value: Any) -> None:
    """Refuses what is no real number >= 0, as far as it is known without waiting for a device."""
    if isinstance(value, jax.Array):
        return  # it may be traced, and reading it would block
    array = np.asarray(value)
    # A NaN among others makes one of the values NaN, and is seen there.
    real = jnp.isdtype(array.dtype, ("bool", "real floating", "integral"))
    if not real or (array.ndim == 0 and np.isnan(array)):
        raise ValueError(f"{name}: {value!r} is not allowed; allowed are numbers >= 0")
    if np.any(array < 0):
        raise ValueError(f"{name}: {value} is negative; allowed are numbers >= 0")


def by_the_compiler(function: Callable[..., Any], *arrays: Array, out: Any = None) -> Any:
    """A function of arrays that the compiler divides over devices.

    The types of explicit sharding do not divide windows, and axes that are made of one another.

    Args:
      function: of arrays, to one array.
      *arrays: of one mesh.
      out: the `PartitionSpec` of its value under explicit sharding. Default (None): on all devices.
    """
    sharding = compatibility.explicit_sharding(arrays[0])
    if sharding is None:
        return function(*arrays)
    if out is None:
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]  # type: ignore[no-untyped-call]
        out = PartitionSpec(*(None,) * jax.eval_shape(function, *shapes).ndim)  # type: ignore[no-untyped-call]
    # Arrays may have a mesh where no `jax.set_mesh` is around them.
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        return jax.sharding.auto_axes(function, out_sharding=out)(*arrays)
