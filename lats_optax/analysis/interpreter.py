"""The interpreter that evaluates a function and meets each product of a parameter on the way.

Here belongs how values, and what is known of them, go through equations, calls, loops and
branches. What a product is, is in `products.py`; what is made of its activations, in
`calibration/accumulation.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from lats_optax.analysis import products
from lats_optax.analysis.jaxprs import callee, run, scan_inputs, shape, while_inputs
from lats_optax.analysis.mac_walk import may_multiply
from lats_optax.analysis.views import Lost, Source, View, derived, lose, parameters_of

# Constants of more entries are left to the compiler.
_LARGEST_FOLDED = 64


class Traced(NamedTuple):
    """A value, where it comes from, and whether it depends on the batch."""

    value: Any
    source: Source
    active: bool


@dataclass
class Found:
    """What an interpretation meets.

    Attributes:
      measure: from a view as matrices and activations [batch, samples, inputs] to a pytree of
        arrays; those of equal products are added.
      moments: what it gave, by product; the key of a product is its parameter and its view.
      views: the matrices of each product.
      uses: the places in the program that have it.
      notes: why a parameter is in no product, by its index.
      place: the equation that is interpreted, and the calls around it.
    """

    measure: Callable[[View, jax.Array], Any]
    moments: dict[str, Any] = field(default_factory=dict)
    views: dict[str, View] = field(default_factory=dict)
    uses: dict[str, set[Any]] = field(default_factory=dict)
    notes: dict[int, str] = field(default_factory=dict)
    place: tuple[int, ...] = ()

    def child(self) -> "Found":
        """For a loop's body or a branch, whose values are not those outside of it."""
        return dataclasses.replace(self, moments={})

    def add(self, view: View, activations: jax.Array) -> None:
        """Takes a product of matrices with activations."""
        key = f"{view.parameter}:{view.steps!r}"
        moments = self.measure(view, activations)
        self.views[key] = dataclasses.replace(view, scale=1.0)
        self.uses.setdefault(key, set()).add(self.place)
        self.merge({key: moments})

    def merge(self, moments: dict[str, Any]) -> None:
        """Adds what was measured elsewhere."""
        for key, more in moments.items():
            before = self.moments.get(key)
            self.moments[key] = more if before is None else _sum(before, more)

    def note(self, source: Source, reason: str) -> None:
        """Says why the parameters of an array are not followed; the first reason stands."""
        for parameter in parameters_of(source):
            self.notes.setdefault(parameter, reason)


def interpret(jaxpr: Jaxpr | ClosedJaxpr, inputs: Sequence[Traced], found: Found) -> list[Traced]:
    """Evaluates a jaxpr, and tells of each output where it comes from."""
    above = found.place

    def equation(number: int, eqn: JaxprEqn, inputs: list[Traced]) -> list[Traced]:
        found.place = (*above, number)
        return _equation(eqn, inputs, found)

    outputs = run(jaxpr, inputs, lambda value: Traced(value, None, False), equation)
    found.place = above
    return outputs


def _equation(eqn: JaxprEqn, inputs: list[Traced], found: Found) -> list[Traced]:
    followed = any(each.source is not None for each in inputs)
    if followed and eqn.primitive.name in _LOOPS:
        return _LOOPS[eqn.primitive.name](eqn, inputs, found)
    inner = callee(eqn)
    if inner is not None:
        return interpret(inner, inputs, found)
    sources = [each.source for each in inputs]
    # Constants of the program; small ones are folded, so that positions stay known.
    constant = [not each.active and each.source is None for each in inputs]
    values = _evaluate(eqn, [each.value for each in inputs], all(constant))
    active = any(each.active for each in inputs)
    if not followed:
        return [Traced(value, None, active) for value in values]
    if eqn.primitive.name in products.PRODUCTS:
        after = _product(eqn, inputs, constant, found)
    else:
        if active and may_multiply(eqn):
            for source in sources:
                found.note(source, f"goes into {eqn.primitive.name}, which is not looked into")
        if eqn.primitive.name == "gather" and inputs[1].active:
            found.note(sources[0], "looked up by index, which is no product")
        after = derived(eqn, sources, [each.value for each in inputs], constant)
    return [Traced(value, source, active) for value, source in zip(values, after)]


def _evaluate(eqn: JaxprEqn, values: list[Any], constant: bool) -> list[Any]:
    def bind() -> Any:
        return eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))  # type: ignore[no-untyped-call]

    sizes = [math.prod(shape(atom)) for atom in eqn.outvars]
    tracers = any(isinstance(value, jax.core.Tracer) for value in values)
    if constant and not tracers and not eqn.effects and sum(sizes) <= _LARGEST_FOLDED:
        with jax.ensure_compile_time_eval():
            outputs = bind()
    else:
        outputs = bind()
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _product(
    eqn: JaxprEqn, inputs: list[Traced], constant: list[bool], found: Found
) -> list[Source]:
    """A product: with activations it is measured, with parameters it makes another of them."""
    left, right = inputs[:2]
    if (left.source is None) == (right.source is None):
        return lose(eqn, [left.source, right.source], constant)
    place = 0 if left.source is not None else 1
    weight, other = inputs[place], inputs[1 - place]
    matched = products.PRODUCTS[eqn.primitive.name](eqn, place, weight.source, other.value)
    if isinstance(matched, str):
        found.note(weight.source, matched)
    else:
        for view, activations in matched:
            found.add(view, activations)
    # The other operand is no parameter: it is an activation, even where it is a constant.
    return [None] * len(eqn.outvars)


# --- loops and branches ---------------------------------------------------------------------------

Origin = tuple[Source, bool]


def _scan(eqn: JaxprEqn, inputs: list[Traced], found: Found) -> list[Traced]:
    body, scan = eqn.params["jaxpr"], id(eqn)
    consts, carry, rows = scan_inputs(eqn, inputs)
    sliced = [(_slice(each.source, scan), each.active) for each in rows]

    def step(carry: list[Traced], row: Sequence[Any], inner: Found) -> list[Traced]:
        return interpret(body, [*consts, *carry, *_with(sliced, row)], inner)

    row = [
        jax.ShapeDtypeStruct(each.value.shape[1:], each.value.dtype)  # type: ignore[no-untyped-call]
        for each in rows
    ]
    origins, outputs, moments = _settled(carry, step, row, found)
    stacked = {key for key in moments if scan in found.views[key].scans}
    sums = {key: _zeros(each) for key, each in moments.items() if key not in stacked}

    def one(state: Any, row: Any) -> Any:
        values, sums = state
        inner = found.child()
        made = _values(step(_with(origins, values), row, inner))
        sums = {key: _sum(sums[key], inner.moments[key]) for key in sums}
        each = {key: inner.moments[key] for key in stacked}
        return (made[: len(carry)], sums), (made[len(carry) :], each)

    (values, sums), (made, each) = lax.scan(
        one,
        (_values(carry), sums),
        _values(rows),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
    )
    found.merge(sums | each)
    # What is stacked is no longer the array that it was in the body.
    after = [(_lost([source], "scan"), active) for source, active in outputs[len(carry) :]]
    return [*_with(origins, values), *_with(after, made)]


def _while(eqn: JaxprEqn, inputs: list[Traced], found: Found) -> list[Traced]:
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    tested, consts, carry = while_inputs(eqn, inputs)

    def step(carry: list[Traced], row: Sequence[Any], inner: Found) -> list[Traced]:
        del row
        return interpret(body, [*consts, *carry], inner)

    origins, _, moments = _settled(carry, step, [], found)

    def going(state: Any) -> Any:
        return interpret(test, [*tested, *_with(origins, state[0])], found.child())[0].value

    def one(state: Any) -> Any:
        values, sums = state
        inner = found.child()
        made = _values(step(_with(origins, values), [], inner))
        return made, {key: _sum(sums[key], inner.moments[key]) for key in sums}

    zeros = {key: _zeros(each) for key, each in moments.items()}
    values, sums = lax.while_loop(going, one, (_values(carry), zeros))
    found.merge(sums)
    return _with(origins, values)


def _cond(eqn: JaxprEqn, inputs: list[Traced], found: Found) -> list[Traced]:
    index, *operands = inputs
    origins = [(each.source, each.active) for each in operands]
    shapes: dict[str, Any] = {}
    told: list[list[Origin]] = []
    for branch in eqn.params["branches"]:

        def one(values: Any, inner: Found, branch: ClosedJaxpr = branch) -> list[Traced]:
            return interpret(branch, _with(origins, values), inner)

        outputs, moments = _shapes(one, _values(operands), found)
        told.append(outputs)
        shapes |= moments

    def taken(branch: ClosedJaxpr) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            inner = found.child()
            made = _values(interpret(branch, _with(origins, values), inner))
            return made, {key: inner.moments.get(key, _zeros(shapes[key])) for key in shapes}

        return run

    branches = [taken(branch) for branch in eqn.params["branches"]]
    values, moments = lax.switch(jnp.asarray(index.value, jnp.int32), branches, *_values(operands))
    found.merge(moments)
    after = told[0]
    for outputs in told[1:]:
        after = [_join(a, b, "cond") for a, b in zip(after, outputs)]
    return _with([(source, active or index.active) for source, active in after], values)


def _whole(eqn: JaxprEqn, inputs: list[Traced], found: Found) -> list[Traced]:
    """A program for each device: it is run as it is."""
    for each in inputs:
        found.note(each.source, f"goes into {eqn.primitive.name}, which is not looked into")
    return _with([(None, True)] * len(eqn.outvars), _evaluate(eqn, _values(inputs), constant=False))


_LOOPS = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _whole}


def _settled(
    carry: list[Traced],
    step: Callable[[list[Traced], Sequence[Any], Found], list[Traced]],
    row: Sequence[Any],
    found: Found,
) -> tuple[list[Origin], list[Origin], dict[str, Any]]:
    """Where a loop's carry comes from in every iteration, what one gives, and what it measures."""
    origins = [(each.source, each.active) for each in carry]

    def once(values: Any, inner: Found) -> list[Traced]:
        return step(_with(origins, values[0]), values[1], inner)

    while True:
        outputs, moments = _shapes(once, (_values(carry), row), found)
        after = [_join(a, b, "a loop") for a, b in zip(origins, outputs)]
        if after == origins:
            return origins, outputs, moments
        origins = after


def _shapes(
    function: Callable[[Any, Found], list[Traced]], values: Any, found: Found
) -> tuple[list[Origin], dict[str, Any]]:
    """Where the outputs come from and the shapes of what is measured; nothing is computed."""
    told: list[list[Origin]] = []

    def run(values: Any) -> Any:
        inner = found.child()
        outputs = function(values, inner)
        told.append([(each.source, each.active) for each in outputs])
        return _values(outputs), inner.moments

    _, moments = jax.eval_shape(run, values)
    return told[-1], moments


def _join(a: Origin, b: Origin, reason: str) -> Origin:
    """Where a value comes from that may be either."""
    active = a[1] or b[1]
    if a[0] == b[0]:
        return a[0], active
    known = all(source is not None or not active for source, active in (a, b))
    return _lost([a[0], b[0]], reason) if known else None, active


def _lost(sources: Sequence[Source], reason: str) -> Source:
    parameters = frozenset[int]().union(*map(parameters_of, sources))
    reasons = [source.reason for source in sources if isinstance(source, Lost)]
    return Lost(parameters, (*reasons, reason)[0]) if parameters else None


def _slice(source: Source, scan: int) -> Source:
    return source.sliced(scan) if isinstance(source, View) else _lost([source], "scan")


def _with(origins: Sequence[Origin], values: Sequence[Any]) -> list[Traced]:
    return [Traced(value, *origin) for value, origin in zip(values, origins, strict=True)]


def _values(traced: Sequence[Traced]) -> list[Any]:
    return [each.value for each in traced]


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda each: jnp.zeros(each.shape, each.dtype), shapes)


def _sum(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)
