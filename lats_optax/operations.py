"""Counting multiply-adds: what a function costs, parameter by parameter, dense and sparse.

Here belongs the walk over a jaxpr that finds every product of arrays and the parameter that each
belongs to, and the table that prints the counts.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from lats_optax import masks


@dataclass(frozen=True)
class ParameterOperations:
    """One parameter array: its path, shape and zeros, and the multiply-adds that it takes part in.

    Attributes:
      path: such as ``Dense_0/kernel``.
      shape: of the array.
      zeros: how many of its entries are zero; None where only its shape was given.
      dense: multiply-adds, zeros included.
      effective: those with an entry that is not zero; None where ``zeros`` is.
    """

    path: str
    shape: tuple[int, ...]
    zeros: int | None
    dense: int
    effective: int | None

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros, in [0, 1]; None where only the shape is known."""
        return None if self.zeros is None else self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True)
class OperationsReport:
    """The multiply-adds of one call; ``str()`` is the table.

    Attributes:
      parameters: one entry for each parameter array, in the order of the tree.
      other: multiply-adds of which neither operand is a parameter, such as attention scores.
      unknown_loops: how many ``while`` loops were counted as one iteration, because nothing says
        how many they take.
      uncounted: primitives that may multiply arrays and cannot be looked into.
    """

    parameters: tuple[ParameterOperations, ...]
    other: int
    unknown_loops: int
    uncounted: tuple[str, ...]

    @property
    def dense(self) -> int:
        """All multiply-adds, zeros included."""
        return self.other + sum(parameter.dense for parameter in self.parameters)

    @property
    def effective(self) -> int | None:
        """All but those with a parameter that is zero; None where only shapes were given."""
        total = self.other
        for parameter in self.parameters:
            if parameter.effective is None:
                return None
            total += parameter.effective
        return total

    def __str__(self) -> str:
        """The table: the parameters that multiply anything, the total, and what deserves a look."""
        rows = [
            (
                parameter.path,
                "×".join(map(str, parameter.shape)) or "scalar",
                "" if parameter.sparsity is None else f"{parameter.sparsity:.2%}",
                parameter.dense,
                parameter.effective,
            )
            for parameter in self.parameters
            if parameter.dense
        ]
        if self.other:
            rows.append(("no parameter", "", "", self.other, self.other))
        rows.append(("multiply-adds", "", "", self.dense, self.effective))
        names = max(len("parameter"), *(len(row[0]) for row in rows))
        shapes = max(len("shape"), *(len(row[1]) for row in rows))
        lines = [
            f"{'parameter':<{names}}  {'shape':>{shapes}}  sparsity  {'dense':>17}  "
            f"{'effective':>17}"
        ]
        for name, shape, sparsity, dense, effective in rows:
            shown = "" if effective is None else f"{effective:,}"
            lines.append(
                f"{name:<{names}}  {shape:>{shapes}}  {sparsity:>8}  {dense:>17,}  {shown:>17}"
            )
        rule = "-" * len(lines[0])
        lines[1:1], lines[-1:-1] = [rule], [rule]
        if self.unknown_loops:
            lines.append(
                f"while loops of unknown length, counted as one iteration: {self.unknown_loops}"
            )
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        return "\n".join(line.rstrip() for line in lines)


def count_operations(fn: Callable[..., Any], *args: Any, params: int = 0) -> OperationsReport:
    """Count the multiply-adds of a function, dense and with sparse parameters.

    A product of arrays takes ``M N K`` multiply-adds; a convolution one for each output entry,
    input channel of its group and tap of its kernel, taps on the padding included, as published
    counts have it. A transposed convolution is counted without the zeros between its inputs. Every
    entry of a parameter takes part in equally many, so a parameter of sparsity s has
    ``(1 - s) * dense`` effective ones. Elementwise arithmetic, biases, normalisation and pooling
    are not counted, nor are zeros among activations.

    Nothing is computed: the function is traced to a jaxpr, and through ``jit``, ``checkpoint``,
    custom derivatives, ``scan`` (times its length), ``cond`` (the dearest branch), ``pmap`` and
    ``shard_map`` (all devices together). A parameter is followed through casts, reshapes,
    transposes, slices, concatenation and arithmetic with constants and other parameters. Where one
    is indexed with what a loop counts, as a stack of layers is, its mean sparsity stands for that
    of each slice.

    Args:
      fn: any function that JAX can trace; anything static in it is bound beforehand, with
        ``functools.partial`` or a lambda.
      *args: its arguments: pytrees of arrays, or of ``jax.ShapeDtypeStruct``. A batch of one gives
        the counts of one example.
      params: which argument holds the parameters. Arrays there give their sparsity; from shapes
        alone come the dense counts.

    Returns:
      An :class:`OperationsReport`.

    Raises:
      ValueError: ``params`` is not the number of an argument, or that has no arrays.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]]), "bias": jnp.ones(2)}
      >>> fn = lambda params, x: jax.nn.relu(x @ params["kernel"] + params["bias"])
      >>> print(count_operations(fn, params, jax.ShapeDtypeStruct((1, 3), jnp.float32)))
      parameter      shape  sparsity              dense          effective
      --------------------------------------------------------------------
      kernel           3×2    50.00%                  6                  3
      --------------------------------------------------------------------
      multiply-adds                                   6                  3
    """
    if isinstance(params, bool) or not isinstance(params, int) or not 0 <= params < len(args):
        raise ValueError(
            f"params: {params!r} is not the number of an argument; allowed are 0 to {len(args) - 1}"
            if args
            else "params: there are no arguments; pass those of the function behind it"
        )
    leaves = jax.tree.leaves(args[params])
    if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves):
        raise ValueError(
            f"params: argument {params} is not a pytree of arrays; which one has the parameters?"
        )
    weights = [_Weight.whole(index, leaf) for index, leaf in enumerate(leaves)]
    inputs: list[_Value] = []
    for number, argument in enumerate(args):
        found = len(jax.tree.leaves(argument))
        inputs += weights if number == params else [_ACTIVATION] * found
    tally = _Tally()
    _walk(jax.make_jaxpr(fn)(*args).jaxpr, inputs, tally, 1)

    names = jax.tree.leaves(masks.paths(args[params]))
    parameters = []
    for index, (name, leaf, weight) in enumerate(zip(names, leaves, weights)):
        shape, known = tuple(leaf.shape), _has_values(leaf)
        zeros = int((1 - weight.parts[0].density) * math.prod(shape)) if known else None
        effective = round(tally.effective[index]) if known else None
        parameters.append(
            ParameterOperations(name, shape, zeros, round(tally.dense[index]), effective)
        )
    return OperationsReport(
        tuple(parameters),
        round(tally.dense[None]),
        tally.unknown_loops,
        tuple(sorted(tally.uncounted)),
    )


# --- what a value is ----------------------------------------------------------------------------


class _Part(NamedTuple):
    """A parameter's share of the entries of a weight, and how much of that is not zero."""

    parameter: int
    share: Fraction
    density: Fraction


@dataclass(frozen=True, eq=False)
class _Weight:
    """A value that depends on parameters and constants alone.

    Attributes:
      entries: how many entries of parameters went into it.
      parts: which parameters its entries are from; the shares add up to 1.
      nonzero: makes the bools that tell which entries are not zero; None where that is not known
        entry by entry. It is called for slices alone: models may be large.
    """

    entries: int
    parts: tuple[_Part, ...]
    nonzero: Callable[[], Any] | None = None

    @staticmethod
    def whole(index: int, leaf: Any) -> "_Weight":
        size, full = math.prod(leaf.shape), Fraction(1)
        # Random keys, which some libraries keep among the parameters, have no zeros.
        if not size or not _has_values(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return _Weight(size, (_Part(index, full, full),))
        part = _Part(index, full, Fraction(int(jnp.count_nonzero(leaf)), size))
        return _Weight(size, (part,), lambda: jnp.asarray(leaf) != 0)

    def anywhere(self) -> "_Weight":
        """The weight, with its mean sparsity for that of each of its entries."""
        return _Weight(self.entries, self.parts)

    def filled(self) -> "_Weight":
        """The weight after something that need not leave zeros zero."""
        parts = tuple(part._replace(density=Fraction(1)) for part in self.parts)
        return _Weight(self.entries, parts)


_CONSTANT, _ACTIVATION = "constant", "activation"
_Value = _Weight | str  # or one of these two


@dataclass
class _Tally:
    """Multiply-adds by the index of a parameter; None stands for those without one."""

    dense: defaultdict[int | None, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    effective: defaultdict[int, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    unknown_loops: int = 0
    uncounted: set[str] = field(default_factory=set)

    def add(self, operations: int, weight: _Weight | None) -> None:
        if weight is None:
            self.dense[None] += operations
            return
        for parameter, share, density in weight.parts:
            self.dense[parameter] += operations * share
            self.effective[parameter] += operations * share * density

    def merge(self, other: "_Tally") -> None:
        for index, operations in other.dense.items():
            self.dense[index] += operations
        for number, operations in other.effective.items():
            self.effective[number] += operations
        self.unknown_loops += other.unknown_loops
        self.uncounted |= other.uncounted


def _join(a: _Value, b: _Value) -> _Value:
    """What a value is that may be either: of two iterations, or of two branches."""
    if a is b or _ACTIVATION in (a, b):
        return a if a is b else _ACTIVATION
    if isinstance(a, _Weight):
        return a if isinstance(b, _Weight) and a.parts == b.parts else a.filled()
    return b.filled() if isinstance(b, _Weight) else _CONSTANT


def _same(a: _Value, b: _Value) -> bool:
    if isinstance(a, _Weight) and isinstance(b, _Weight):
        return a.parts == b.parts
    return a is b


def _largest(inputs: Sequence[_Value]) -> _Weight | None:
    """Which weight an operation on several is put down to."""
    weights = [value for value in inputs if isinstance(value, _Weight)]
    return max(weights, key=lambda weight: weight.entries, default=None)


def _combine(inputs: Sequence[_Value]) -> _Value:
    """What comes of several values, whatever is done with them."""
    if _ACTIVATION in inputs:
        return _ACTIVATION
    weight = _largest(inputs)
    return _CONSTANT if weight is None else weight.filled()


def _has_values(leaf: Any) -> bool:
    return not isinstance(leaf, jax.ShapeDtypeStruct)


# --- the walk -----------------------------------------------------------------------------------


def _walk(jaxpr: Jaxpr, inputs: Sequence[_Value], tally: _Tally, times: int) -> list[_Value]:
    """Adds what a jaxpr multiplies, when it is run so many times, and tells what comes out."""
    values: dict[Any, _Value] = dict.fromkeys(jaxpr.constvars, _CONSTANT)
    values.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> _Value:
        return _CONSTANT if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        rule = _RULES.get(eqn.primitive.name, _other)
        outputs = rule(eqn, [read(atom) for atom in eqn.invars], tally, times)
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _dot(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    left, right = map(_shape, eqn.invars)
    (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
    free = [n for axis, n in enumerate(right) if axis not in {*contracted, *batch}]
    return _product(eqn, inputs, tally, times * math.prod(left) * math.prod(free))


def _convolution(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    left, right, out = map(_shape, [*eqn.invars, *eqn.outvars])
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs, result = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    operations = out[result[0]] * out[result[1]] * right[rhs[1]]
    spatial = zip(lhs[2:], rhs[2:], result[2:], eqn.params["lhs_dilation"])
    for axis, tap, position, dilation in spatial:
        taps = out[position] * right[tap]
        # Between dilated inputs lie zeros, which are in no published count.
        operations *= taps if dilation == 1 else min(taps, left[axis] * right[tap])
    return _product(eqn, inputs, tally, times * operations)


def _product(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, operations: int) -> list[_Value]:
    tally.add(operations, _largest(inputs))
    return [_combine(inputs)]


def _scan(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    body, length = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
    first = eqn.params["num_consts"]
    last = first + eqn.params["num_carry"]
    consts, carry, rows = inputs[:first], inputs[first:last], _anywhere(inputs[last:])
    carry = _settle(lambda carry: _walk(body, [*consts, *carry, *rows], _Tally(), 0), carry)
    outputs = _walk(body, [*consts, *carry, *rows], tally, times * length)
    # What is stacked is no longer the array that it was in the body.
    return [*carry, *_anywhere(outputs[last - first :])]


def _while(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    test, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
    middle = eqn.params["cond_nconsts"]
    first = middle + eqn.params["body_nconsts"]
    consts = inputs[middle:first]
    carry = _settle(lambda carry: _walk(body, [*consts, *carry], _Tally(), 0), inputs[first:])
    iteration = _Tally()
    _walk(test, [*inputs[:middle], *carry], iteration, times)
    _walk(body, [*consts, *carry], iteration, times)
    if any(iteration.dense.values()):
        iteration.unknown_loops += 1
    tally.merge(iteration)
    return carry


def _settle(outputs: Callable[[list[_Value]], list[_Value]], carry: list[_Value]) -> list[_Value]:
    """What a loop's carry is in every iteration, from what it is in the first."""
    while True:
        after = [_join(a, b) for a, b in zip(carry, outputs(carry))]
        if all(_same(a, b) for a, b in zip(carry, after)):
            return after
        carry = after


def _cond(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    tallies, outputs = [], []
    for branch in eqn.params["branches"]:
        tallies.append(_Tally())
        outputs.append(_walk(branch.jaxpr, inputs[1:], tallies[-1], times))
    tally.merge(max(tallies, key=lambda branch: sum(branch.dense.values())))
    joined = outputs[0]
    for branch in outputs[1:]:
        joined = [_join(a, b) for a, b in zip(joined, branch)]
    # Which branch is taken may depend on the activations.
    return [_ACTIVATION] * len(joined) if inputs[0] is _ACTIVATION else joined


def _shard_map(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    mesh, axes = eqn.params["mesh"].shape, eqn.params["newly_manual_axes"]
    devices = math.prod(mesh[axis] for axis in axes)
    outputs = _walk(eqn.params["jaxpr"], _anywhere(inputs), tally, times * devices)
    return _anywhere(outputs)


def _other(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    """Calls of other jaxprs, and primitives of which nothing in particular is known."""
    inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    if isinstance(inner, Jaxpr) and len(inner.invars) == len(inputs):
        outputs = _walk(inner, inputs, tally, times)
        if len(outputs) == len(eqn.outvars):
            return outputs
    return [_combine(inputs)] * len(eqn.outvars)


def _opaque(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    del times
    tally.uncounted.add(eqn.primitive.name)
    return [_combine(inputs)] * len(eqn.outvars)


def _unchanged(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    """Each output has the shape of the input at its place, and zeros where that has them."""
    del tally, times
    return inputs[: len(eqn.outvars)]


def _rearranged(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    """One array of which every entry is used, and equally often."""
    del tally, times
    (value, *_) = inputs
    if not isinstance(value, _Weight) or value.nonzero is None:
        return [value]
    before = value.nonzero
    nonzero = lambda: eqn.primitive.bind(before(), **eqn.params)  # type: ignore[no-untyped-call]  # noqa: E731
    return [_Weight(value.entries, value.parts, nonzero)]


def _slice(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    (value,) = _rearranged(eqn, inputs, tally, times)
    if not isinstance(value, _Weight) or value.nonzero is None:
        return [value]
    nonzero = np.asarray(value.nonzero())
    density = Fraction(int(nonzero.sum()), nonzero.size) if nonzero.size else Fraction(1)
    part = value.parts[0]._replace(density=density)
    return [_Weight(value.entries, (part,), lambda: nonzero)]


def _indexed(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    """Part of an array, at positions that only running the function would tell."""
    del tally, times
    value, *positions = inputs
    if any(position is _ACTIVATION for position in positions):
        return [_ACTIVATION]  # a row of an embedding
    if isinstance(value, _Weight):
        return [value.anywhere()]
    return [_combine(inputs)]


def _concatenate(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    del tally, times
    total = math.prod(_shape(eqn.outvars[0]))
    weights = [value for value in inputs if isinstance(value, _Weight)]
    if not total or len(weights) < len(inputs):
        return [_combine(inputs)]
    parts = [
        part._replace(share=part.share * Fraction(math.prod(_shape(atom)), total))
        for atom, weight in zip(eqn.invars, weights)
        for part in weight.parts
    ]
    return [_Weight(sum(weight.entries for weight in weights), tuple(parts))]


def _times(eqn: JaxprEqn, inputs: list[_Value], tally: _Tally, times: int) -> list[_Value]:
    """A product or quotient by elements: zeros of a factor, or of the numerator, stay."""
    del tally, times
    weight = _largest(inputs)
    if weight is None or _ACTIVATION in inputs:
        return [_combine(inputs)]
    place = inputs.index(weight)
    whole = _shape(eqn.invars[place]) == _shape(eqn.outvars[0])
    stay = whole and (place == 0 or eqn.primitive.name == "mul")
    return [weight if stay else weight.filled()]


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _anywhere(values: Sequence[_Value]) -> list[_Value]:
    return [value.anywhere() if isinstance(value, _Weight) else value for value in values]


_ZEROS_STAY = (
    *("abs", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "convert_element_type", "copy"),
    *("copy_p", "device_put", "erf", "expm1", "floor", "imag", "log1p", "mesh_cast", "name"),
    *("neg", "optimization_barrier", "pvary", "real", "reduce_precision", "reshard", "round"),
    *("sharding_constraint", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh"),
)
_RULES: dict[str, Callable[[JaxprEqn, list[_Value], _Tally, int], list[_Value]]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "slice": _slice,
    "concatenate": _concatenate,
    "mul": _times,
    "div": _times,
    **dict.fromkeys(("broadcast_in_dim", "reshape", "rev", "squeeze", "transpose"), _rearranged),
    **dict.fromkeys(("dynamic_slice", "gather"), _indexed),
    **dict.fromkeys(_ZEROS_STAY, _unchanged),
    **dict.fromkeys(
        (
            *("cholesky", "custom_linear_solve", "eigh", "ffi_call", "fft", "lu", "pallas_call"),
            *("ragged_dot_general", "scaled_matmul", "triangular_solve"),
        ),
        _opaque,
    ),
}
