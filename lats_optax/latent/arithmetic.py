"""The arithmetic of one leaf: the step of a latent weight, and the update that a parameter gets.

Here belongs what rounding asks for: a weight is zero where the method makes it zero, and nowhere
else, in every float type. Sixteen-bit weights are moved in float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from lats_optax.array_types import Array, Bool, Float
from lats_optax.compatibility import with_dtype
from lats_optax.operators.leaves import compute_dtype
from lats_optax.operators.protocol import Operator


def first_latent(w: Any, d: Float[Array, ""], operator: Operator, dtype: DTypeLike | None) -> Any:
    """The latent weights that a leaf begins with, or their shape where the leaf is one.

    Args:
      w: the parameter.
      d: the threshold before the first step, a scalar.
      operator: as it is before the first step.
      dtype: of the latent weights; None: that of the parameter.
    """
    dtype = w.dtype if dtype is None else dtype

    def preimage(w: Float[Array, "*shape"], d: Float[Array, ""]) -> Float[Array, "*shape"]:
        wide = w.astype(compute_dtype(dtype))
        return operator.preimage(wide, d.astype(wide.dtype)).astype(dtype)

    if not isinstance(w, jax.ShapeDtypeStruct):
        return preimage(w, d)
    return with_dtype(w, jnp.dtype(dtype))


def move(
    theta: Float[Array, "*shape"],
    update: Any,
    frozen: Bool[Array, ""] | None,
) -> Float[Array, "*shape"]:
    """The latent weights after an update.

    Args:
      theta: the latent weights.
      update: of their shape.
      frozen: whether zeros stay zero, and nothing else becomes zero; None: no.
    """
    wide = compute_dtype(theta.dtype)
    moved = _round_to(theta.astype(wide) + jnp.asarray(update, wide), theta.dtype)
    if frozen is None:
        return moved
    # A survivor that lands on zero exactly would be taken for dead from then on.
    alive = jnp.where(moved == 0, _finfo(theta.dtype).tiny, moved)
    return jnp.where(frozen, jnp.where(theta == 0, 0.0, alive), moved)


def difference(
    target: Float[Array, "*shape"], w: Float[Array, "*shape"], update: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The update w' - w, such that w + (w' - w) is zero where w' is."""
    dtype = wider(update, w)
    wide = compute_dtype(dtype)
    target = _alive(target.astype(wide), w.dtype).astype(wide)
    return _round_to(target - w.astype(wide), dtype)


def living_difference(
    target: Float[Array, "*shape"], w: Float[Array, "*shape"], update: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The update w' - w, such that w + (w' - w) is zero where w' is and nowhere else.

    Where w' is lost beside w, the rounded difference is -w and would prune a weight that is alive
    in the latent weights; the next float towards zero leaves one ulp of it.
    """
    rounded = difference(target, w, update)
    target = _alive(target.astype(compute_dtype(w.dtype)), w.dtype)
    lost = (rounded == -w.astype(rounded.dtype)) & (target != 0)
    return jnp.where(lost, rounded * (1 - float(_finfo(rounded.dtype).eps)), rounded)


def wider(update: Float[Array, "*shape"], w: Float[Array, "*shape"]) -> np.dtype[Any]:
    """The float type of the update, unless it is too narrow for w + (0 - w) to be zero."""
    return update.dtype if update.dtype.itemsize > w.dtype.itemsize else w.dtype


def _round_to(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """A float32 or float64 array in the given dtype, as every reader of it sees it.

    XLA may leave out a rounding to sixteen bits where arithmetic in float32 follows. What is
    compared with the threshold would then differ from what the state keeps.
    """
    info = _finfo(dtype)
    if info.bits <= 16:
        # reduce_precision takes subnormal numbers for zero, which in float16 are weights.
        small = jnp.abs(x) < info.tiny.astype(x.dtype)
        x = jnp.where(small, x, lax.reduce_precision(x, info.nexp, info.nmant))
    return x.astype(dtype)


def _alive(x: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """As :func:`_round_to`, but what is not zero stays so: float16 would lose small weights."""
    rounded = _round_to(x, dtype)
    if rounded.dtype == x.dtype:
        return rounded
    least = jnp.copysign(_finfo(dtype).smallest_subnormal.astype(x.dtype), x).astype(dtype)
    return jnp.where((rounded == 0) & (x != 0), least, rounded)


def _finfo(dtype: DTypeLike) -> Any:
    return jnp.finfo(dtype)  # type: ignore[no-untyped-call]
