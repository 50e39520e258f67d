"""Gram matrices of what each parameter of a function is multiplied with, over batches.

Here belong `calibrate` and what it returns. The interpreter that meets the products is in
`analysis/interpreter.py`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lats_optax import masks
from lats_optax.analysis.interpreter import Found, Traced, interpret
from lats_optax.analysis.tables import table
from lats_optax.analysis.views import View
from lats_optax.checks.numbers import check_steps
from lats_optax.masks import MaskOrFunction

# The most inputs for which a Gram matrix is full: 268 MB in float32.
LARGEST = 8192


class Moments(NamedTuple):
    """What is accumulated of a product: the Gram matrices and the number of samples behind them."""

    gram: jax.Array
    samples: jax.Array


@dataclass(frozen=True)
class Gram:
    """The Gram matrices ``X^T X`` of one product of a parameter.

    Attributes:
      path: of the parameter, such as ``Dense_0/kernel``.
      matrices: float32 [matrices, groups, blocks, size, size]. Matrices are the layers of a stack,
        experts, or other batch axes; groups are those of a convolution. The ``blocks * size``
        inputs are one block unless they are more than ``largest``.
      view: how the parameter's entries make matrices [..., groups, inputs, outputs].
      samples: rows of X, the fewest of any matrix.
      silent: how many inputs were zero in every sample, over all matrices.
    """

    path: str
    matrices: jax.Array
    view: View
    samples: int
    silent: int

    @property
    def inputs(self) -> int:
        """Number of inputs of one matrix."""
        return self.matrices.shape[2] * self.matrices.shape[3]

    @property
    def kind(self) -> str:
        """``full``, ``block-diagonal`` or ``diagonal``."""
        blocks, size = self.matrices.shape[2:4]
        if blocks == 1:
            return "full"
        return "diagonal" if size == 1 else "block-diagonal"

    @property
    def singular(self) -> str:
        """Why it cannot be inverted without damping; "" where nothing says so."""
        if self.silent:
            return f"singular: {self.silent:,} inputs are always zero"
        if self.samples < self.matrices.shape[3]:
            return f"singular: {self.samples:,} samples"
        return ""

    def unpack(self, leaf: jax.Array) -> jax.Array:
        """The parameter as matrices [matrices, groups, inputs, outputs], float32."""
        found = self.view.restore(leaf.astype(jnp.float32))
        return found.reshape(*self.matrices.shape[:2], self.inputs, -1)

    def pack(self, matrices: jax.Array, leaf: jax.Array) -> jax.Array:
        """The parameter with these matrices in it; what did not change stays bit for bit."""
        wide = leaf.astype(jnp.float32)
        before, transpose = jax.vjp(self.view.restore, wide)
        (covered,) = transpose(jnp.ones_like(before))
        (values,) = transpose(matrices.reshape(before.shape))
        changed = (covered > 0) & (values != wide)
        return jnp.where(changed, values.astype(leaf.dtype), leaf)


@dataclass(frozen=True)
class Grams:
    """The Gram matrices of a function; ``str()`` is the table.

    Attributes:
      products: one entry for each parameter in a product, or for each part of it that has one of
        its own.
      repeated: parameters in several products, and what was made of that, by path.
      missing: parameters in the mask that are in no product, and why, by path.
      batches: how many were seen.
      shapes: of the parameters, by path.
    """

    products: tuple[Gram, ...]
    repeated: Mapping[str, str]
    missing: Mapping[str, str]
    batches: int
    shapes: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        """The table: a line for each product, then remarks."""
        rows = [
            (
                gram.path,
                "×".join(map(str, (*gram.matrices.shape[:2], gram.inputs))),
                f"{gram.samples:,}",
                gram.kind,
                gram.singular,
            )
            for gram in self.products
        ]
        head = ("parameter", "inputs", "samples", "Gram", "")
        lines = table(head, rows, left=(0, 3))
        lines += [f"{path}: {what}" for path, what in self.repeated.items()]
        lines += [f"not calibrated: {path}: {why}" for path, why in self.missing.items()]
        return "\n".join(lines)


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
    program = _program(fn, params, leaves, mask, check_steps(largest, "largest"))
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
                sums = {key: program.zeros(key, told, _zeros_on) for key in told.moments}
                broken = {key: jnp.asarray(-1) for key in sums}
            _check_same(told.moments, sums, count)
            shapes.append(_shape_of(batch))
        sums, broken = _add(program, sums, broken, leaves, batch, jnp.asarray(count))
    if not count:
        raise ValueError("batches: there are none; allowed are one or more")
    for key, number in jax.device_get(broken).items():
        if number >= 0:
            name = names[told.views[key].parameter]
            raise ValueError(
                f"batches: in batch {number} the activations that {name} is multiplied with are "
                "not finite, or their squares are not in float32"
            )
    return _grams(sums, told, leaves, names, chosen, count)


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
    program = _program(fn, params, leaves, mask, largest)
    told = _traced(program, leaves, batch, 1)
    sums = {key: program.zeros(key, told, _shape_on) for key in told.moments}
    number = jax.ShapeDtypeStruct((), jnp.int32)  # type: ignore[no-untyped-call]
    return _add.lower(program, sums, dict.fromkeys(sums, number), leaves, batch, number)


# --- one batch ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Program:
    """What one batch is put through: it is compiled once for all calls that are alike.

    Attributes:
      fn: the function.
      structure: of the parameters.
      chosen: which leaves are measured.
      largest: the most inputs for which a Gram matrix is full.
      places: where the Gram matrices of each leaf lie.
    """

    fn: Callable[[Any, Any], Any]
    structure: Any
    chosen: tuple[bool, ...]
    largest: int
    places: tuple["_Place", ...]

    def nothing(self) -> Found:
        return Found(self.measure)

    def measure(self, view: View, activations: jax.Array) -> Any:
        if not self.chosen[view.parameter]:
            return ()
        return _moments(activations, self.largest, self.places[view.parameter])

    def run(self, leaves: Sequence[jax.Array], batch: Any) -> Found:
        """Everything that one batch gives."""
        jaxpr = jax.make_jaxpr(self.fn)(jax.tree.unflatten(self.structure, leaves), batch)
        inputs = [Traced(leaf, View(at, _itself), False) for at, leaf in enumerate(leaves)]
        inputs += [Traced(leaf, None, True) for leaf in jax.tree.leaves(batch)]
        found = self.nothing()
        interpret(jaxpr, inputs, found)
        found.moments = {key: each for key, each in found.moments.items() if each}
        return found

    def zeros(self, key: str, told: Found, make: Callable[..., Any]) -> Moments:
        """Where the sums begin, each made from its shape and its place."""
        gram, samples = told.moments[key]
        place = self.places[told.views[key].parameter]
        return Moments(make(gram, place.sharding(gram.shape)), make(samples, None))


def _program(
    fn: Any, params: Any, leaves: Sequence[Any], mask: MaskOrFunction, largest: int
) -> _Program:
    chosen = tuple(jax.tree.leaves(masks.resolve(mask, params)))
    return _Program(fn, jax.tree.structure(params), chosen, largest, tuple(map(_placed, leaves)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _add(
    program: _Program,
    sums: dict[str, Moments],
    broken: dict[str, jax.Array],
    leaves: Sequence[jax.Array],
    batch: Any,
    number: jax.Array,
) -> Any:
    sums = jax.tree.map(jnp.add, sums, program.run(leaves, batch).moments)
    # Which batch was the first that is not finite is told at the end, without waiting for each.
    broken = {
        key: jnp.where((at < 0) & ~jnp.all(jnp.isfinite(sums[key].gram)), number, at)
        for key, at in broken.items()
    }
    return sums, broken


def _traced(program: _Program, leaves: Sequence[jax.Array], batch: Any, count: int) -> Found:
    """What a batch gives, in shapes."""
    try:
        jax.eval_shape(program.fn, jax.tree.unflatten(program.structure, leaves), batch)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"batches: fn does not take batch {count}, of {_listed(_shape_of(batch)[1])}: "
            f"{type(error).__name__}: {reason}"
        ) from error
    found = program.nothing()

    def run(leaves: Sequence[jax.Array], batch: Any) -> dict[str, Moments]:
        nonlocal found
        found = program.run(leaves, batch)
        return found.moments

    moments = jax.eval_shape(run, leaves, batch)
    found.moments = moments
    return found


def _moments(activations: jax.Array, largest: int, place: "_Place") -> Moments:
    """The Gram matrices of activations [batch, samples, inputs]."""
    batch, samples, inputs = activations.shape
    size = max(side for side in range(1, min(inputs, largest) + 1) if inputs % side == 0)

    x = activations.astype(jnp.float32).reshape(batch, samples, inputs // size, size)
    if size == 1:
        gram = jnp.sum(x * x, axis=1)[..., None]
    else:
        held = None
        its = jax.typeof(x).sharding
        if AxisType.Explicit in its.mesh.axis_types:
            # Samples may lie on several devices: the type of their sum has to be said.
            spec = PartitionSpec(its.spec[0], None, None, None)  # type: ignore[no-untyped-call]
            held = NamedSharding(its.mesh, spec)
        highest = lax.Precision.HIGHEST
        gram = jnp.einsum("bski,bskj->bkij", x, x, precision=highest, out_sharding=held)
    return Moments(place.constrain(gram), jnp.asarray(samples, jnp.float32))


@dataclass(frozen=True)
class _Place:
    """Where the Gram matrices of a parameter lie: rows over the devices that it is sharded over.

    Attributes:
      mesh: of the parameter; None: it is on one device. Under explicit axes the types decide.
      axes: those that the parameter is sharded over.
    """

    mesh: Any = None
    axes: tuple[str, ...] = ()

    def sharding(self, shape: Sequence[int]) -> NamedSharding | None:
        """That of Gram matrices [..., rows, columns]."""
        if self.mesh is None or AxisType.Explicit in self.mesh.axis_types:
            return None
        devices = int(np.prod([self.mesh.shape[axis] for axis in self.axes]))
        rows = self.axes if self.axes and shape[-2] % devices == 0 else None
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * (len(shape) - 2), rows))  # type: ignore[no-untyped-call]

    def constrain(self, gram: jax.Array) -> jax.Array:
        sharding = self.sharding(gram.shape)
        return gram if sharding is None else lax.with_sharding_constraint(gram, sharding)  # type: ignore[no-untyped-call]


def _placed(leaf: jax.Array) -> _Place:
    if not isinstance(leaf.sharding, NamedSharding):
        return _Place()
    names: list[str] = []
    for entry in leaf.sharding.spec:
        if entry is not None:
            names += [entry] if isinstance(entry, str) else entry
    return _Place(leaf.sharding.mesh, tuple(names))


def _zeros_on(shape: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> jax.Array:
    zeros = jnp.zeros(shape.shape, shape.dtype)
    return zeros if sharding is None else jax.device_put(zeros, sharding)


def _shape_on(shape: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def _itself(leaf: jax.Array) -> jax.Array:
    return leaf


# --- what batches may be --------------------------------------------------------------------------


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


# --- what is found --------------------------------------------------------------------------------


def _grams(
    sums: Mapping[str, Moments],
    told: Found,
    leaves: Sequence[jax.Array],
    names: Sequence[str],
    chosen: Sequence[bool],
    count: int,
) -> Grams:
    """The products by parameter: equal ones are one already; others must not overlap."""
    kept: list[Gram] = []
    repeated: dict[str, str] = {}
    missing: dict[str, str] = {}
    for at, (name, leaf) in enumerate(zip(names, leaves)):
        keys = [key for key in sums if told.views[key].parameter == at]
        places = sum(len(told.uses[key]) for key in keys)
        found, taken = [], jnp.zeros(leaf.shape, bool)
        for key in sorted(keys, key=lambda key: -_size(sums[key])):
            covered = _covered(told.views[key], leaf)
            if jnp.max(covered) > 1:
                told.notes[at] = "an entry stands in several places of one product"
            elif jnp.any(taken & (covered > 0)):
                repeated[name] = (
                    f"in {places} products, along different axes; its Gram matrix is that of the "
                    "largest"
                )
            else:
                found.append(_gram(name, sums[key], told.views[key]))
                taken |= covered > 0
        kept += found
        if found and places > len(found) and name not in repeated:
            repeated[name] = f"in {places} products; their Gram matrices are added"
        if chosen[at] and not found:
            missing[name] = told.notes.get(at, "in no product with activations")
        elif found and not jnp.all(taken):
            missing[name] = "a part of it is in no product, and stays as it is"
    shapes = {name: leaf.shape for name, leaf in zip(names, leaves)}
    return Grams(tuple(kept), repeated, missing, count, shapes)


def _covered(view: View, leaf: jax.Array) -> jax.Array:
    """How many entries of the matrices each entry of a parameter is."""
    like = jnp.zeros(leaf.shape, jnp.float32)
    made, transpose = jax.vjp(view.restore, like)
    return transpose(jnp.ones_like(made))[0]


def _size(moments: Moments) -> float:
    return float(jnp.sum(moments.samples)) * moments.gram[..., 0].size


def _gram(name: str, moments: Moments, view: View) -> Gram:
    *stack, batch, blocks, size, _ = moments.gram.shape
    matrices = int(np.prod(stack, dtype=int))
    sides = (matrices, batch) if view.grouped else (matrices * batch, 1)
    gram = moments.gram.reshape(*sides, blocks, size, size)
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    silent = int(jnp.sum(diagonal == 0))
    return Gram(name, gram, view, int(jnp.min(moments.samples)), silent)
