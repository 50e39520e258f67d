"""Jaxprs as every walker meets them: equations in their order, calls, loops, kinds of primitives.

Here belongs what does not depend on what a walker knows of values. `mac_walk.py` counts,
`interpreter.py` evaluates.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from lats_optax.compatibility import scan_counts

Value = TypeVar("Value")

SAME_VALUES = frozenset(
    (
        *("convert_element_type", "copy", "copy_p", "device_put", "mesh_cast", "name"),
        *("optimization_barrier", "pbroadcast", "pvary", "reduce_precision", "reshard"),
        "sharding_constraint",
    )
)
"""Primitives whose outputs are their inputs, but for types and places."""

REARRANGED = frozenset(("broadcast_in_dim", "reshape", "rev", "squeeze", "tile", "transpose"))
"""Primitives that use every entry of one array, and each equally often."""

PIECES = frozenset(("split", "unstack"))
"""Primitives that divide one array into several."""


def run(
    jaxpr: Jaxpr | ClosedJaxpr,
    inputs: Sequence[Value],
    constant: Callable[[Any], Value],
    equation: Callable[[int, JaxprEqn, list[Value]], Sequence[Value]],
    unknown: Value | None = None,
) -> list[Value]:
    """Goes through the equations of a jaxpr, with what is known of each value.

    Args:
      jaxpr: closed, or open.
      inputs: what is known of its inputs.
      constant: makes the same of a constant.
      equation: makes it of the outputs of an equation, given its number, itself and its inputs.
      unknown: what is known of the constants of an open jaxpr; None: it has none.

    Returns:
      What is known of its outputs.
    """
    known: dict[Any, Value] = {}
    if isinstance(jaxpr, ClosedJaxpr):
        known.update(zip(jaxpr.jaxpr.constvars, map(constant, jaxpr.consts)))
        jaxpr = jaxpr.jaxpr
    elif unknown is not None:
        known.update(dict.fromkeys(jaxpr.constvars, unknown))
    known.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        return constant(atom.val) if isinstance(atom, Literal) else known[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        outputs = equation(number, eqn, [read(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def callee(eqn: JaxprEqn) -> Jaxpr | ClosedJaxpr | None:
    """The jaxpr that a call runs on its own inputs; that of a reduction is for scalars."""
    ends = [*map(shape, eqn.invars)], [*map(shape, eqn.outvars)]
    for value in eqn.params.values():
        inner = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        if isinstance(inner, Jaxpr) and ends == (
            [*map(shape, inner.invars)],
            [*map(shape, inner.outvars)],
        ):
            return value
    return None


def scan_inputs(eqn: JaxprEqn, inputs: list[Value]) -> tuple[list[Value], list[Value], list[Value]]:
    """The inputs of a `scan`: its constants, its carry, and what it goes through row by row."""
    first, carries = scan_counts(eqn.params)
    last = first + carries
    return inputs[:first], inputs[first:last], inputs[last:]


def while_inputs(
    eqn: JaxprEqn, inputs: list[Value]
) -> tuple[list[Value], list[Value], list[Value]]:
    """The inputs of a `while`: the constants of its test, those of its body, and its carry."""
    middle = eqn.params["cond_nconsts"]
    first = middle + eqn.params["body_nconsts"]
    return inputs[:middle], inputs[middle:first], inputs[first:]


def shape(atom: Any) -> tuple[int, ...]:
    """The shape of a value; a token has none."""
    return tuple(getattr(atom.aval, "shape", ()))
