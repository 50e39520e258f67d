"""Gram matrices over batches: `calibrate`, and what batches may be."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lats_optax import masks
from lats_optax.analysis.interpreter import Found
from lats_optax.calibration.accumulation import (
    Moments,
    Program,
    add_batch,
    make_program,
    shape_at,
    zeros_at,
)
from lats_optax.calibration.gram import Grams, collect
from lats_optax.checks.numbers import check_steps
from lats_optax.masks import MaskOrFunction

# The most inputs for which a Gram matrix is full: 268 MB in float32.
LARGEST = 8192


def calibrate(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    *,
    mask: MaskOrFunction = masks.prunable,
    largest: int = LARGEST,
) -> Grams:
    """Accumulate the Gram matrix of what each parameter is multiplied with.

    ``G = sum over batches of X^T X`` for every product ``X W`` of a parameter with activations:
    ``dot_general`` with any contracting and batch axes, and convolutions, whose X are patches. The
    function is traced to a jaxpr, which is evaluated with the accumulation in it, through ``jit``,
    ``checkpoint``, custom derivatives, ``scan``, ``while`` and ``cond``. A parameter is followed
    through casts, reshapes, transposes, slices, splits, concatenation along outputs and products
    with scalars. A scan over stacked layers gives a Gram matrix for each layer. Where a parameter
    is in several equal products, their Gram matrices add up.

    Batches are streamed; one program is compiled for each shape of them, and the sums stay on the
    device, in float32. Where a parameter is sharded, the rows of its Gram matrices are sharded over
    the same devices.

    Args:
      fn: a function ``(params, batch) -> anything`` that JAX can trace.
      params: a pytree of arrays.
      batches: an iterable of pytrees of arrays, of one structure.
      mask: which parameters are to be pruned; Gram matrices of others are not accumulated.
      largest: the most inputs for which a Gram matrix is full. Where there are more, it is
        block-diagonal, in the largest equal blocks that this allows; 1 gives diagonals, which are
        all that ``magnitude`` and ``wanda`` need.

    Returns:
      :class:`Grams`, for :func:`prune_with`. Its ``str()`` says which Gram matrices are singular or
      not full, and names parameters in several products or in none.

    Raises:
      TypeError: ``fn`` is not callable.
      ValueError: there are no batches; one is of another structure, type or number of dimensions,
        or ``fn`` does not take it; activations are not finite; the mask selects nothing that is in
        a product.

    Example:
      >>> import jax.numpy as jnp
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0]])]
      >>> grams = calibrate(fn, {"kernel": jnp.ones((2, 4))}, batches)
      >>> grams.products[0].matrices[0, 0, 0]
      Array([[10.,  2.],
             [ 2.,  4.]], dtype=float32)
      >>> print(grams)
      parameter  inputs  samples  Gram
      --------------------------------
      kernel      1×1×2        2  full
    """
    if not callable(fn):
        raise TypeError(f"fn: {fn!r} is not allowed; allowed are functions (params, batch) -> any")
    masks.check_arrays("params", params)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    names: list[str] = jax.tree.leaves(masks.paths(params))
    program = make_program(fn, params, leaves, mask, check_steps(largest, "largest"))
    chosen = program.chosen

    sums: dict[str, Moments] = {}
    broken: dict[str, jax.Array] = {}
    shapes: list[Any] = []
    told = program.nothing()
    count = 0
    for count, given in enumerate(_iterated(batches), 1):
        batch = _checked(given, count, shapes)
        if _shape_of(batch) not in shapes:
            told = _traced(program, leaves, batch, count)
            if not shapes:
                _check_any(told, names, chosen)
                sums = program.sums(told, zeros_at)
                broken = {key: jnp.asarray(-1) for key in sums}
            _check_same(told.moments, sums, count)
            shapes.append(_shape_of(batch))
        sums, broken = add_batch(program, sums, broken, leaves, batch, jnp.asarray(count))
    if not count:
        raise ValueError("batches: there are none; allowed are one or more")
    for key, number in jax.device_get(broken).items():
        if number >= 0:
            name = names[told.views[key].parameter]
            raise ValueError(
                f"batches: in batch {number} the activations that {name} is multiplied with are "
                "not finite, or their squares are not in float32"
            )
    return collect(sums, told, leaves, names, chosen, count)


def lower(
    fn: Callable[[Any, Any], Any],
    params: Any,
    batch: Any,
    *,
    mask: MaskOrFunction = masks.prunable,
    largest: int = LARGEST,
) -> Any:
    """The program that adds one batch to the Gram matrices, of shapes alone.

    Args:
      fn: as for :func:`calibrate`.
      params: a pytree of ``jax.ShapeDtypeStruct`` with shardings.
      batch: likewise.
      mask: as for :func:`calibrate`.
      largest: as for :func:`calibrate`.

    Returns:
      What ``jax.jit(...).lower`` gives: ``.compile().memory_analysis()`` says what a device holds.
    """
    leaves = jax.tree.leaves(params)
    program = make_program(fn, params, leaves, mask, largest)
    told = _traced(program, leaves, batch, 1)
    sums = program.sums(told, shape_at)
    number = jax.ShapeDtypeStruct((), jnp.int32)  # type: ignore[no-untyped-call]
    return add_batch.lower(program, sums, dict.fromkeys(sums, number), leaves, batch, number)


def _iterated(batches: Any) -> Iterable[Any]:
    if (
        isinstance(batches, Mapping)
        or hasattr(batches, "shape")
        or not hasattr(batches, "__iter__")
    ):
        raise ValueError(
            f"batches: {type(batches).__name__} is not allowed; allowed are iterables of batches, "
            "such as [batch]"
        )
    return batches


def _traced(program: Program, leaves: Sequence[jax.Array], batch: Any, count: int) -> Found:
    """What a batch gives, in shapes, or a ValueError where ``fn`` does not take it."""
    try:
        jax.eval_shape(program.fn, jax.tree.unflatten(program.structure, leaves), batch)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"batches: fn does not take batch {count}, of {_listed(_shape_of(batch)[1])}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    return program.traced(leaves, batch)


def _shape_of(batch: Any) -> Any:
    return jax.tree.structure(batch), [
        (jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(batch)
    ]


def _checked(given: Any, count: int, shapes: Sequence[Any]) -> Any:
    """A batch as arrays, or a ValueError where it is unlike the first."""
    masks.check_arrays(f"batches: in batch {count}", given)
    batch = jax.tree.map(jnp.asarray, given)
    if not shapes:
        return batch
    (structure, first), (its, own) = shapes[0], _shape_of(batch)
    alike = [(len(shape), dtype) for shape, dtype in first]
    if structure != its or alike != [(len(shape), dtype) for shape, dtype in own]:
        raise ValueError(
            f"batches: batch {count} has {_listed(own)}, and the first one {_listed(first)}; "
            "allowed are batches of one structure, whose arrays keep types and numbers of axes"
        )
    return batch


def _listed(arrays: Sequence[Any]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in arrays) or "no arrays"


def _check_any(told: Found, names: Sequence[str], chosen: Sequence[bool]) -> None:
    selected = [name for name, keep in zip(names, chosen) if keep]
    if not selected:
        raise ValueError(f"mask: it selects none of {masks.some(list(names))}")
    if not told.moments:
        why = [f"{names[at]} {reason}" for at, reason in told.notes.items() if chosen[at]]
        raise ValueError(
            "; ".join([f"fn: it multiplies activations with none of {masks.some(selected)}", *why])
        )


def _check_same(found: Mapping[str, Moments], sums: Mapping[str, Moments], count: int) -> None:
    its, own = ({key: each.gram.shape for key, each in m.items()} for m in (found, sums))
    if its != own:
        raise ValueError(
            f"batches: batch {count} is multiplied with other parameters, or along other axes, "
            "than the first one; allowed are batches that fn treats alike"
        )
