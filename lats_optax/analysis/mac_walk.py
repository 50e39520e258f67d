"""The walk over a jaxpr that finds every product of arrays and the parameter that each belongs to.

Here belongs a rule for each primitive that has one; what is known of a value on the way is in
`provenance.py`.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Primitive, primitives

from lats_optax.analysis.jaxprs import (
    PIECES,
    REARRANGED,
    SAME_VALUES,
    callee,
    run,
    scan_inputs,
    shape,
    while_inputs,
)
from lats_optax.analysis.provenance import (
    ACTIVATION,
    UNKNOWN,
    Constant,
    Value,
    Weight,
    anywhere,
    combine,
    computed,
    concatenated,
    given,
    join,
    largest,
    nonzero,
    same,
)
from lats_optax.compatibility import manual_axes


@dataclass
class Tally:
    """MACs by the index of a parameter; None stands for those without one."""

    dense: defaultdict[int | None, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    effective: defaultdict[int, Fraction] = field(default_factory=lambda: defaultdict(Fraction))
    unknown_loops: int = 0
    uncounted: set[str] = field(default_factory=set)

    def add(self, macs: int, weight: Weight | None) -> None:
        if weight is None:
            self.dense[None] += macs
            return
        for parameter, share, density in weight.parts:
            self.dense[parameter] += macs * share
            self.effective[parameter] += macs * share * density

    def merge(self, other: "Tally") -> None:
        for index, macs in other.dense.items():
            self.dense[index] += macs
        for number, macs in other.effective.items():
            self.effective[number] += macs
        self.unknown_loops += other.unknown_loops
        self.uncounted |= other.uncounted


# --- the walk -----------------------------------------------------------------------------------


def walk(
    jaxpr: Jaxpr | ClosedJaxpr, inputs: Sequence[Value], tally: Tally, times: int
) -> list[Value]:
    """Adds what a jaxpr multiplies, when it is run so many times, and tells what comes out."""

    def equation(number: int, eqn: JaxprEqn, inputs: list[Value]) -> list[Value]:
        del number
        outputs = _RULES.get(eqn.primitive.name, _other)(eqn, inputs, tally, times)
        if eqn.primitive.name in _NO_PRODUCT:
            outputs = computed(eqn, inputs) or outputs
        return outputs

    return run(jaxpr, inputs, given, equation, UNKNOWN)


def _dot(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    left, right = map(shape, eqn.invars)
    (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
    free = [n for axis, n in enumerate(right) if axis not in {*contracted, *batch}]
    return _product(eqn, inputs, tally, times * math.prod(left) * math.prod(free))


def _convolution(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    left, right, out = map(shape, [*eqn.invars, *eqn.outvars])
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs, result = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    macs = out[result[0]] * out[result[1]] * right[rhs[1]]
    spatial = zip(lhs[2:], rhs[2:], result[2:], eqn.params["lhs_dilation"])
    for axis, kernel_axis, position, dilation in spatial:
        positions = out[position] * right[kernel_axis]
        # Between dilated inputs lie zeros, which are in no published count.
        macs *= positions if dilation == 1 else min(positions, left[axis] * right[kernel_axis])
    return _product(eqn, inputs, tally, times * macs)


def _product(eqn: JaxprEqn, inputs: list[Value], tally: Tally, macs: int) -> list[Value]:
    tally.add(macs, largest(inputs))
    return [combine(inputs)]


def _scan(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    consts, carry, rows = scan_inputs(eqn, inputs)
    rows = _anywhere(rows)
    carry = _settle(lambda carry: walk(body, [*consts, *carry, *rows], Tally(), 0), carry)
    outputs = walk(body, [*consts, *carry, *rows], tally, times * length)
    # What is stacked is no longer the array that it was in the body.
    return [*carry, *_anywhere(outputs[len(carry) :])]


def _while(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    tested, consts, carry = while_inputs(eqn, inputs)
    carry = _settle(lambda carry: walk(body, [*consts, *carry], Tally(), 0), carry)
    iteration = Tally()
    walk(test, [*tested, *carry], iteration, times)
    walk(body, [*consts, *carry], iteration, times)
    if any(iteration.dense.values()):
        iteration.unknown_loops += 1
    tally.merge(iteration)
    return carry


def _settle(outputs: Callable[[list[Value]], list[Value]], carry: list[Value]) -> list[Value]:
    """What a loop's carry is in every iteration, from what it is in the first."""
    while True:
        after = [join(a, b) for a, b in zip(carry, outputs(carry))]
        if all(same(a, b) for a, b in zip(carry, after)):
            return after
        carry = after


def _cond(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    tallies, outputs = [], []
    for branch in eqn.params["branches"]:
        tallies.append(Tally())
        outputs.append(walk(branch, inputs[1:], tallies[-1], times))
    tally.merge(max(tallies, key=lambda branch: sum(branch.dense.values())))
    joined = outputs[0]
    for branch in outputs[1:]:
        joined = [join(a, b) for a, b in zip(joined, branch)]
    # Which branch is taken may depend on the activations.
    return [ACTIVATION] * len(joined) if inputs[0] is ACTIVATION else joined


def _shard_map(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    mesh, axes = eqn.params["mesh"].shape, manual_axes(eqn.params)
    devices = math.prod(mesh[axis] for axis in axes)
    outputs = walk(eqn.params["jaxpr"], _anywhere(inputs), tally, times * devices)
    return _anywhere(outputs)


def _pmap(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    devices = eqn.params["global_axis_size"]
    outputs = walk(eqn.params["call_jaxpr"], _anywhere(inputs), tally, times * devices)
    return _anywhere(outputs)


def _sparse_dot(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    """A product with a BCOO or BCSR array: of its stored entries, zeros among them included."""
    data, indices, *_, right = map(shape, eqn.invars)
    batch_axes = len(indices) - (2 if eqn.primitive.name == "bcoo_dot_general" else 1)
    stored = [*eqn.params["lhs_spinfo"].shape[:batch_axes], *data[batch_axes:]]
    (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
    free = [n for axis, n in enumerate(right) if axis not in {*contracted, *batch}]
    # The positions are no factor, and may be parameters by their place in the tree.
    factors = [inputs[0], inputs[-1]]
    return _product(eqn, factors, tally, times * math.prod(stored) * math.prod(free))


def _other(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    """Calls of other jaxprs, and primitives without a rule of their own."""
    if (inner := callee(eqn)) is not None:
        return walk(inner, inputs, tally, times)
    if may_multiply(eqn):
        return _opaque(eqn, inputs, tally, times)
    return [combine(inputs)] * len(eqn.outvars)


def may_multiply(eqn: JaxprEqn) -> bool:
    """Whether a primitive may multiply arrays and cannot be traced."""
    rule = _RULES.get(eqn.primitive.name)
    if rule is None:
        return eqn.primitive.name not in _NO_PRODUCT and any(map(shape, eqn.invars))
    return rule is _opaque


def _opaque(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    del times
    tally.uncounted.add(eqn.primitive.name)
    return [combine(inputs)] * len(eqn.outvars)


def _unchanged(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    """Each output has the shape of the input at its place, and zeros where that has them."""
    del tally, times
    return [_without_value(value) for value in inputs[: len(eqn.outvars)]]


def _rearranged(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    """One array whose entries are all used, and equally often."""
    del tally, times
    (value, *_) = inputs
    if not isinstance(value, Weight) or value.nonzero is None:
        return [_without_value(value)]
    before = value.nonzero
    nonzero = lambda: eqn.primitive.bind(before(), **eqn.params)  # type: ignore[no-untyped-call]  # noqa: E731
    return [Weight(value.entries, value.parts, nonzero)]


def _pieces(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    """Parts of an array, at positions that are known."""
    del tally, times
    (value,) = inputs
    if not isinstance(value, Weight) or value.nonzero is None:
        return [_without_value(value)] * len(eqn.outvars)
    found = eqn.primitive.bind(value.nonzero(), **eqn.params)  # type: ignore[no-untyped-call]
    pieces = found if eqn.primitive.multiple_results else [found]
    return [value.with_zeros(piece) for piece in pieces]


def _without_value(value: Value) -> Value:
    """Another value of the same zeros: of a constant, nothing is known of it."""
    return UNKNOWN if isinstance(value, Constant) else value


def _indexed(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    """Part of an array, at positions that only running the function would tell."""
    del tally, times
    value, *positions = inputs
    if any(position is ACTIVATION for position in positions):
        return [ACTIVATION]  # a row of an embedding
    if isinstance(value, Weight):
        return [value.anywhere()]
    return [combine(inputs)]


def _concatenate(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    del tally, times
    return [concatenated(inputs, [math.prod(shape(atom)) for atom in eqn.invars])]


def _pad(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    del tally, times
    weight, filling = inputs
    if not isinstance(weight, Weight) or weight.nonzero is None or filling is ACTIVATION:
        return [combine(inputs)]
    between = nonzero(filling)
    fill = jnp.asarray(True if between is None else between)
    return [weight.with_zeros(eqn.primitive.bind(weight.nonzero(), fill, **eqn.params))]  # type: ignore[no-untyped-call]


def _select(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    """One of several values, entry by entry: by a mask that is known, or by any."""
    del tally, times
    which, *cases = inputs
    weight = largest(cases)
    if weight is None or ACTIVATION in inputs:
        return [combine(inputs)]
    found = [nonzero(case) for case in cases]
    if weight.nonzero is None:
        zero = all(f is not None and not f.any() for c, f in zip(cases, found) if c is not weight)
        return [weight if zero else weight.filled()]
    alive = [np.ones(shape(eqn.outvars[0]), bool) if each is None else each for each in found]
    mask = _mask(which, eqn.invars[0])
    if mask is None:
        return [weight.with_zeros(np.any(alive, axis=0))]
    return [weight.with_zeros(eqn.primitive.bind(mask, *map(jnp.asarray, alive), **eqn.params))]  # type: ignore[no-untyped-call]


def _mask(which: Value, atom: Any) -> Any:
    """What selects, if that is known: a constant, or a parameter of bools."""
    if isinstance(which, Constant):
        return which.known()
    found = nonzero(which) if jnp.issubdtype(atom.aval.dtype, jnp.bool_) else None
    return None if found is None else jnp.asarray(found)


def _times(eqn: JaxprEqn, inputs: list[Value], tally: Tally, times: int) -> list[Value]:
    """A product or quotient by elements: zeros of a factor, or of the numerator, stay."""
    del tally, times
    weight = largest(inputs)
    if weight is None or ACTIVATION in inputs:
        return [combine(inputs)]
    place = inputs.index(weight)
    whole = shape(eqn.invars[place]) == shape(eqn.outvars[0])
    if not whole or (place == 1 and eqn.primitive.name == "div"):
        return [weight.filled()]
    if eqn.primitive.name == "div" or weight.nonzero is None:
        return [weight]
    other = nonzero(inputs[1 - place])
    if other is None or other.all():
        return [weight]
    return [weight.with_zeros(np.asarray(weight.nonzero()) & other)]


def _anywhere(values: Sequence[Value]) -> list[Value]:
    return [anywhere(value) for value in values]


_ZEROS_STAY = (
    *SAME_VALUES,
    *("abs", "asin", "asinh", "atan", "atanh", "cbrt", "ceil", "erf", "expm1", "floor", "imag"),
    *("log1p", "neg", "real", "round", "sign", "sin", "sinh", "sqrt", "square", "tan", "tanh"),
)
_RULES: dict[str, Callable[[JaxprEqn, list[Value], Tally, int], list[Value]]] = {
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "xla_pmap": _pmap,  # what jax.pmap is before jax 0.8
    "bcoo_dot_general": _sparse_dot,
    "bcsr_dot_general": _sparse_dot,
    **dict.fromkeys(("slice", *PIECES), _pieces),
    **dict.fromkeys(("concatenate", "stack"), _concatenate),
    "mul": _times,
    "div": _times,
    "pad": _pad,
    "select_n": _select,
    **dict.fromkeys(REARRANGED, _rearranged),
    **dict.fromkeys(("dynamic_slice", "gather"), _indexed),
    **dict.fromkeys(_ZEROS_STAY, _unchanged),
    **dict.fromkeys(
        (
            *("cholesky", "custom_linear_solve", "eig", "eigh", "fft", "hessenberg"),
            *("householder_product", "lu", "pallas_call", "qr", "schur", "svd"),
            *("triangular_solve", "tridiagonal", "tridiagonal_solve"),
        ),
        _opaque,
    ),
}
# Other primitives of JAX, and these that its public modules leave out. What is not here, such as a
# callback or a kernel of somebody else, may multiply arrays.
_NO_PRODUCT = {
    *(p.name for m in (primitives, jax.lax) for p in vars(m).values() if isinstance(p, Primitive)),
    *("accum_grad_in_ref", "addupdate", "debug_callback", "debug_print", "empty_ref", "free_ref"),
    *("freeze", "from_edtype", "new_ref", "random_unwrap", "random_wrap", "to_edtype"),
    *("all_gather_invariant", "all_gather_reduced", "pgather", "preduced"),
    *("psum_invariant", "reduce_scatter", "unreduced_psum", "unreduced_reduce_scatter"),
    *("bcoo_extract", "bcoo_fromdense", "bcoo_sort_indices", "bcoo_sum_duplicates"),
    *("bcoo_todense", "bcoo_transpose", "bcsr_extract", "bcsr_fromdense", "bcsr_todense"),
}
