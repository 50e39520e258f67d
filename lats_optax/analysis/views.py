"""How an array within a function comes from a parameter: what rearranges it, and what does not.

Here belong views and the rules of the primitives that keep them. The walk over a jaxpr that uses
them is in `interpreter.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from lats_optax.analysis.jaxprs import PIECES, REARRANGED, SAME_VALUES

Restore = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True, eq=False)
class View:
    """An array whose entries are entries of one parameter, in another order or fewer of them.

    Attributes:
      parameter: its index among the leaves.
      restore: makes the array from the parameter; it is linear. Its leading axes are the scans that
        the array was sliced by, outermost first.
      steps: what ``restore`` does, comparable: two views of one parameter with the same steps are
        the same array.
      scans: identities of these scans.
      scale: a scalar that the array was multiplied with, which ``restore`` leaves out.
      grouped: whether the batch of its matrices are the groups of one convolution.
    """

    parameter: int
    restore: Restore
    steps: tuple[Any, ...] = ()
    scans: tuple[int, ...] = ()
    scale: Any = 1.0
    grouped: bool = False

    def then(self, name: Any, function: Restore) -> "View":
        """The view after a function of the array, which is applied within each slice of a scan."""
        for _ in self.scans:
            function = jax.vmap(function)
        before = self.restore
        return dataclasses.replace(
            self, restore=lambda leaf: function(before(leaf)), steps=(*self.steps, name)
        )

    def sliced(self, scan: int) -> "View":
        """What the body of a scan sees of it."""
        return dataclasses.replace(self, scans=(*self.scans, scan), steps=(*self.steps, "scan"))

    def times(self, factor: Any) -> "View":
        """The view times a scalar."""
        return dataclasses.replace(self, scale=self.scale * factor)


@dataclass(frozen=True, eq=False)
class Joined:
    """Views one behind the other along an axis, as a recurrent cell concatenates its kernels.

    Attributes:
      pieces: the views.
      axis: of the whole.
    """

    pieces: tuple[View, ...]
    axis: int


@dataclass(frozen=True)
class Lost:
    """An array made of parameters alone, in a way that no solver could go back.

    Attributes:
      parameters: indices of the parameters.
      reason: the primitive that did it.
    """

    parameters: frozenset[int]
    reason: str


# None stands for activations and constants.
Source = View | Joined | Lost | None


def parameters_of(source: Source) -> frozenset[int]:
    """The indices of the parameters that an array is made of."""
    if isinstance(source, View):
        return frozenset({source.parameter})
    if isinstance(source, Joined):
        return frozenset(view.parameter for view in source.pieces)
    return source.parameters if source is not None else frozenset()


def derived(
    eqn: JaxprEqn, sources: Sequence[Source], values: Sequence[Any], constant: Sequence[bool]
) -> list[Source]:
    """The sources of the outputs of a primitive that multiplies nothing, or that is no product.

    Args:
      eqn: the equation.
      sources: of its inputs.
      values: its inputs; those that are constants are concrete.
      constant: which inputs depend on no argument of the function.
    """
    name = eqn.primitive.name
    first = sources[0]
    found: list[Source] | None = None
    if name in _ARRANGED and isinstance(first, View) and len(sources) == 1:
        found = [first.then((name, str(eqn.params)), lambda x: _bind(eqn, x))]
    elif name in PIECES and isinstance(first, View):
        found = [
            first.then((name, str(eqn.params), at), functools.partial(_piece, eqn, at))
            for at in range(len(eqn.outvars))
        ]
    elif name == "dynamic_slice" and isinstance(first, View) and _known(values[1:]):
        starts, sizes = tuple(map(int, values[1:])), eqn.params["slice_sizes"]
        found = [first.then((name, starts, sizes), lambda x: lax.dynamic_slice(x, starts, sizes))]
    elif name in SAME_VALUES and first is not None:
        found = [*sources[: len(eqn.outvars)]]
    elif name == "transpose" and isinstance(first, Joined):
        order = eqn.params["permutation"]
        pieces = tuple(
            piece.then((name, order), lambda x: lax.transpose(x, order)) for piece in first.pieces
        )
        found = [Joined(pieces, order.index(first.axis))]
    elif name == "concatenate" and all(isinstance(source, View) for source in sources):
        pieces = tuple(source for source in sources if isinstance(source, View))
        found = [Joined(pieces, eqn.params["dimension"])]
    elif name in ("mul", "div", "neg"):
        found = _scaled(name, sources, values)
    return found if found is not None else lose(eqn, sources, constant)


def lose(eqn: JaxprEqn, sources: Sequence[Source], constant: Sequence[bool]) -> list[Source]:
    """What is left of sources after a primitive that no view survives."""
    known = all(source is not None or fixed for source, fixed in zip(sources, constant))
    parameters = frozenset[int]().union(*map(parameters_of, sources))
    if not known or not parameters:
        return [None] * len(eqn.outvars)
    reasons = [source.reason for source in sources if isinstance(source, Lost)]
    return [Lost(parameters, (*reasons, eqn.primitive.name)[0])] * len(eqn.outvars)


def _scaled(name: str, sources: Sequence[Source], values: Sequence[Any]) -> list[Source] | None:
    """A view times a scalar; of anything else None."""
    if name == "neg":
        return [sources[0].times(-1.0)] if isinstance(sources[0], View) else None
    left, right = sources
    if isinstance(left, View) and jnp.ndim(values[1]) == 0:
        factor = jnp.asarray(values[1], jnp.float32)
        return [left.times(factor if name == "mul" else 1.0 / factor)]
    if name == "mul" and isinstance(right, View) and jnp.ndim(values[0]) == 0:
        return [right.times(jnp.asarray(values[0], jnp.float32))]
    return None


def _known(values: Sequence[Any]) -> bool:
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def _bind(eqn: JaxprEqn, x: jax.Array) -> Any:
    return eqn.primitive.bind(x, **eqn.params)  # type: ignore[no-untyped-call]


def _piece(eqn: JaxprEqn, at: int, x: jax.Array) -> Any:
    return _bind(eqn, x)[at]


def matrix(view: View, batch: Sequence[int], inputs: Sequence[int], columns: Sequence[int]) -> View:
    """The view as matrices: [batch, inputs, outputs] within each slice of the scans."""
    order = (*batch, *inputs, *columns)

    def arrange(x: jax.Array) -> jax.Array:
        sides = [math.prod(x.shape[a] for a in axes) for axes in (batch, inputs, columns)]
        return jnp.transpose(x, order).reshape(sides)

    return view.then(("matrix", tuple(batch), tuple(inputs), tuple(columns)), arrange)


_ARRANGED = REARRANGED | {"slice", "expand_dims"}
