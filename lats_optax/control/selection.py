"""The quantile that the closed loop steers by: selected where it is due, and only there.

Here belongs what a selection of `quantile.py` needs to live within JAX's transformations: one
conditional for all copies under `vmap`, one compilation for all calls that are not jitted, a
derivative, and a refusal of weights that differ between the devices of a `shard_map`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from lats_optax.array_types import Array, Bool, Float, Integer
from lats_optax.compatibility import varying_axes
from lats_optax.operators.parts import TreeOperator, parts_of
from lats_optax.quantile import Measured, Rows, below_the_largest, select

Weights = Mapping[str, Float[Array, "..."]]


def quantiles(
    due: Bool[Array, ""],
    previous: Float[Array, " rows"],
    weights: Weights,
    ranks: Integer[Array, " rows"],
    operator: TreeOperator,
) -> Float[Array, " rows"]:
    """The ``ranks[i]``-th smallest magnitude, where it is due: of all weights, or of each leaf.

    Where a quantile is not finite, or no magnitude is larger, it is the largest finite magnitude
    that is smaller, and 0 where there is none: a threshold that leaves something. Its derivative is
    that of the magnitude that it is: the mean of them, where several tie.

    Args:
      due: bool scalar, whether to select.
      previous: float [n], the result where it is not due.
      weights: real arrays by path, of fewer than 2**32 entries together, or each.
      ranks: integers [n]: one for all together, or one for each of the arrays.
      operator: the operator under which magnitudes are taken.

    Returns:
      Float [n], of the type of ``previous``.

    Raises:
      ValueError: within a `shard_map` the arrays differ between devices.

    Example:
      >>> weights = {"kernel": jnp.array([3.0, -1.0, 2.0, 0.5])}
      >>> from lats_optax.prox import prox_l1
      >>> quantiles(jnp.array(True), jnp.zeros(1), weights, jnp.array([3]), prox_l1)
      Array([2.], dtype=float32)
    """
    _check_equal_on_devices(weights)
    return _jitted(due, previous, weights, ranks, _Identity(operator))


@dataclasses.dataclass(frozen=True, eq=False)
class _Identity:
    """An operator as a static argument: one that has no hash can be one too."""

    operator: TreeOperator

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.operator is self.operator

    def __hash__(self) -> int:
        return id(self.operator)


# Without jit here, a call outside of one would trace and compile the loop at every step.
@functools.partial(jax.jit, static_argnums=4, inline=True)
def _jitted(
    due: Bool[Array, ""],
    previous: Float[Array, " rows"],
    weights: Weights,
    ranks: Integer[Array, " rows"],
    static: _Identity,
) -> Float[Array, " rows"]:
    return _selected(static.operator, due, previous, weights, ranks)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _selected(
    operator: TreeOperator,
    due: Bool[Array, ""],
    previous: Float[Array, " rows"],
    weights: Weights,
    ranks: Integer[Array, " rows"],
) -> Float[Array, " rows"]:
    def compute(weights: Weights, ranks: Array) -> Array:
        rows = _rows(operator, weights, len(previous))
        return below_the_largest(rows, select(rows, ranks, dtype=previous.dtype))

    return _when(due, compute, (weights, ranks), previous)


def _rows(operator: TreeOperator, weights: Weights, number: int) -> Rows:
    """The arrays that are compared, in one list for all or one for each."""
    all_of_them = [
        Measured.of(part.gather(weights), part.operator) for part in parts_of(operator, weights)
    ]
    return [all_of_them] if number == 1 else [[each] for each in all_of_them]


@_selected.defjvp
def _derivative(
    operator: TreeOperator, primals: Any, tangents: Any
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    # The selection compares bit patterns: without this rule its derivative would be zero.
    due, _, weights, _ = primals
    _, previous, slopes, _ = tangents
    found = _selected(operator, *primals)

    def magnitudes(weights: Weights) -> list[list[Array]]:
        rows = _rows(operator, weights, len(found))
        return [[each.magnitude(each.array).astype(found.dtype) for each in row] for row in rows]

    of_each = zip(*jax.jvp(magnitudes, (weights,), (slopes,)), found)
    each = [_slope(list(zip(values, changes)), q) for values, changes, q in of_each]
    return found, jnp.where(due, jnp.stack(each), previous)


def _slope(pairs: list[tuple[Array, Array]], found: Float[Array, ""]) -> Float[Array, ""]:
    """The derivative of a quantile, from magnitudes and their derivatives."""
    # The nearest, and not those that are equal: another program may round a magnitude otherwise.
    distances = [jnp.abs(magnitude - found) for magnitude, _ in pairs]
    least = functools.reduce(jnp.minimum, [jnp.min(d, initial=jnp.inf) for d in distances])
    chosen = [distance == least for distance in distances]
    total = sum(jnp.sum(jnp.where(it, slope, 0.0)) for it, (_, slope) in zip(chosen, pairs))
    return jnp.where(found > 0, total / sum(jnp.sum(it) for it in chosen), 0.0)


def _when(
    due: Bool[Array, ""],
    compute: Callable[..., Array],
    operands: Any,
    otherwise: Float[Array, "..."],
) -> Float[Array, "..."]:
    """``compute(*operands)`` where it is due, in a conditional that stays one under `vmap`.

    `vmap` makes of a conditional with a predicate of its own for each copy a computation of both
    branches, always. Here it is computed for all copies where it is due for any.
    """

    @custom_vmap
    def conditional(due: Array, operands: Any, otherwise: Array) -> Array:
        return lax.cond(due, lambda: compute(*operands), lambda: otherwise)

    @conditional.def_vmap
    def batched(
        size: int, is_batched: Any, due: Array, operands: Any, otherwise: Array
    ) -> tuple[Array, bool]:
        axes = jax.tree.map(lambda each: 0 if each else None, is_batched[1])
        computes = jax.vmap(compute, in_axes=axes, axis_size=size)
        if not is_batched[2]:
            otherwise = jnp.broadcast_to(otherwise, (size, *otherwise.shape))
        # Again by way of this function: a second `vmap` finds a conditional too.
        computed = _when(jnp.any(due), computes, operands, otherwise)
        return jnp.where(due.reshape(-1, *(1,) * (otherwise.ndim - 1)), computed, otherwise), True

    return conditional(due, operands, otherwise)


def _check_equal_on_devices(weights: Weights) -> None:
    axes = {name for array in weights.values() for name in varying_axes(array)}
    if axes:
        names = ", ".join(map(repr, sorted(axes)))
        raise ValueError(
            f"target_sparsity: within shard_map the latent weights vary over {names}, so that each "
            "device would select a quantile of its own; allowed are weights that are the same on "
            "all devices (average the gradients over the axis, by jax.lax.pmean), and sharded ones "
            "in an update outside of shard_map, under jax.jit"
        )
