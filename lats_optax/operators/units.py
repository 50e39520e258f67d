"""Units of a network that several leaves hold together: attention heads, hidden units.

Here belong operators of groups that span leaves. Groups within one leaf are in `groups.py`.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lats_optax.array_types import Array, Count, Num
from lats_optax.checks.numbers import check_steps, is_number
from lats_optax.operators.leaves import by_the_compiler
from lats_optax.operators.parts import Part, Shape, map_parts
from lats_optax.operators.protocol import Elementwise
from lats_optax.prox import Axes, prox_l1

_LAST = r"(/(kernel|w|weight))?$"
_HEADS = {
    rf"\b(query|key|value|q_proj|k_proj|v_proj){_LAST}": "outputs",
    rf"\b(qkv|c_attn|in_proj){_LAST}": "fused",
    rf"\b(out|o_proj|out_proj|c_proj|proj){_LAST}": "inputs",
}
_HIDDEN = {
    rf"\b(gate_proj|up_proj|gate|up|wi_\d|w1|w3|fc1){_LAST}": "outputs",
    rf"\b(down_proj|down|wo|w2|fc2){_LAST}": "inputs",
}


class _Side(NamedTuple):
    """Where a leaf has its units.

    Attributes:
      axis: from the last one, negative.
      fused: how many projections lie along it, one after the other.
    """

    axis: int
    fused: int = 1


@dataclass(frozen=True)
class Units:
    """The operator that :func:`units`, :func:`heads` and :func:`hidden_units` make.

    Attributes:
      sides: expressions on paths, each with an axis or a role by which it is found.
      number: of units in a module; None: the smallest of its axes.
      shrinkage: what is applied to the root mean square of a unit.
      name: of the function that made it.
    """

    sides: tuple[tuple[str, Any], ...]
    number: int | None
    shrinkage: Elementwise
    name: str

    @property
    def flat(self) -> bool:
        """Whether an axis alone does not tell how many units it has."""
        return self.name == "heads" and self.number is None

    def __repr__(self) -> str:
        """What it is called."""
        return f"lats_optax.groups.{self.name}(…)"

    @property
    def counted(self) -> str:
        """Those that are wholly zero."""
        return "zero units"

    def __call__(self, x: Any, strength: Any = 1.0) -> Any:
        """Apply the operator to a tree of weights that are named as it asks for.

        Args:
          x: a pytree of real arrays, each of which has units.
          strength: d >= 0, a scalar, in the units of the root mean square of a unit's weights.
        """
        strengths = jax.tree.map(lambda _: strength, x)
        return map_parts(lambda part, array, d: part(array, d), self, x, strengths)

    def at(self, count: Count) -> "Units":
        """The same units, with the shrinkage after so many steps."""
        return dataclasses.replace(self, shrinkage=self.shrinkage.at(count))

    def parts(self, shapes: Mapping[str, Shape]) -> tuple[Part, ...]:
        """The leaves of each module, joined: a row is a unit."""
        modules: defaultdict[str, dict[str, _Side]] = defaultdict(dict)
        unknown = []
        for name, shape in shapes.items():
            found = next(filter(None, (self._side(each, name, shape) for each in self.sides)), None)
            if found is None:
                unknown.append(name)
                continue
            module, side = found
            modules[module][name] = side
        if unknown:
            raise ValueError(
                f"operator: {self!r} knows no units of {', '.join(unknown)}; allowed are paths "
                f"that match one of {', '.join(repr(each) for each, _ in self.sides)}. Leave the "
                "others out of the mask, as mask=lats_optax.select(include=…) does"
            )
        return tuple(self._part(sides, shapes) for sides in modules.values())

    def _side(self, named: tuple[str, Any], name: str, shape: Shape) -> tuple[str, _Side] | None:
        expression, where = named
        match = re.search(expression, name)
        if match is None:
            return None
        return name[: match.start()], _side(where, len(shape))

    def _part(self, sides: Mapping[str, _Side], shapes: Mapping[str, Shape]) -> Part:
        sizes = {}
        for name, side in sides.items():
            shape = shapes[name]
            if len(shape) < -side.axis:
                raise ValueError(
                    f"operator: {self!r} looks for units along axis {side.axis} of {name}, of "
                    f"shape {shape}"
                )
            sizes[name] = shape[side.axis] // side.fused
        if flat := [name for name in sides if self.flat and len(shapes[name]) < 3]:
            raise ValueError(
                f"number: None is not allowed where heads and features lie along one axis, as "
                f"in {flat[0]} of shape {shapes[flat[0]]}; allowed is the number of heads"
            )
        number = self.number or min(sizes.values())
        for name, side in sides.items():
            if shapes[name][side.axis] % (side.fused * number):
                raise ValueError(
                    f"operator: {self!r} finds {number} units in {', '.join(sides)}, which do not "
                    f"divide axis {side.axis} of {name}, of shape {shapes[name]}; allowed is a "
                    "number= that divides all of them"
                )
        rows = [_Rows(shapes[name], side, number) for name, side in sides.items()]
        widths = [row.width for row in rows]

        def join(leaves: Sequence[Array]) -> Num[Array, "units width"]:
            return jnp.concatenate([row.join(leaf) for row, leaf in zip(rows, leaves)], axis=1)

        def split(array: Num[Array, "units width"]) -> Sequence[Array]:
            ends = [sum(widths[: at + 1]) for at in range(len(widths))]
            pieces = jnp.split(array, ends[:-1], axis=1)
            return [row.split(piece) for row, piece in zip(rows, pieces)]

        shape = (number, sum(widths))
        size = shape[0] * shape[1]
        return Part(tuple(sides), Axes(self.shrinkage, axes=1), shape, size, join, split)


@dataclass(frozen=True)
class _Rows:
    """A leaf as a matrix whose rows are units."""

    shape: Shape
    side: _Side
    number: int

    @property
    def width(self) -> int:
        return math.prod(self.shape) // self.number

    def join(self, leaf: Num[Array, "..."]) -> Num[Array, "units width"]:
        def rows(leaf: Array) -> Array:
            units = leaf.reshape(self._divided)
            return jnp.moveaxis(units, self._at + 1, 0).reshape(self.number, -1)

        joined: Array = by_the_compiler(rows, leaf)
        return joined

    def split(self, rows: Num[Array, "units width"]) -> Num[Array, "..."]:
        at, divided = self._at, self._divided
        others = divided[: at + 1] + divided[at + 2 :]
        units = rows.reshape(self.number, *others)
        return jnp.moveaxis(units, 0, at + 1).reshape(self.shape)

    @property
    def _at(self) -> int:
        return len(self.shape) + self.side.axis

    @property
    def _divided(self) -> Shape:
        """The axis as three: projections, units, and what each has of it."""
        at, fused = self._at, self.side.fused
        each = self.shape[at] // fused // self.number
        return (*self.shape[:at], fused, self.number, each, *self.shape[at + 1 :])


def _side(where: Any, dimensions: int) -> _Side:
    match where:
        case "outputs":  # (…, heads, features), or both in one
            return _Side(-2 if dimensions > 2 else -1)
        case "inputs":  # (heads, features, …)
            return _Side(-3 if dimensions > 2 else -2)
        case "fused":
            return _Side(-2) if dimensions > 2 else _Side(-1, fused=3)
        case _:
            return _Side(where)


def units(
    axes: Mapping[str, int], *, number: int | None = None, shrinkage: Elementwise = prox_l1
) -> Units:
    """Units that several leaves hold together live and die together.

    A group is all that belongs to one unit of a module: a slice along the named axis of each of its
    leaves. With the shrinkage P and r the root mean square of a group, it is the operator of
    :class:`lats_optax.GroupOperator`, ``x_g P_d(r) / r``.

    Args:
      axes: regular expressions on paths, each with the axis along which the leaf has the units,
        counted from the last, negative. What stands before the match names the module.
      number: of units in a module. Default (None): the smallest of its axes. An axis that is a
        multiple has so many consecutive entries in each unit.
      shrinkage: what is applied to the root mean square of a unit.

    Returns:
      An operator for ``soft_threshold``, whose mask selects leaves that match alone. One target
      holds for all layers: a group has no layer of its own.

    Raises:
      ValueError: ``axes`` is not such a mapping, or ``number`` < 1. From ``init`` of the transform,
        a leaf that matches nothing, or axes that the number does not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = {"first": jnp.array([[3.0, 0.1]]), "second": jnp.array([[4.0], [0.2]])}
      >>> units({"first$": -1, "second$": -2})(layer, 0.5)["second"]
      Array([[3.4343145],
             [0.       ]], dtype=float32)
    """
    if not isinstance(axes, Mapping) or not axes:
        raise ValueError(f"axes: {axes!r} is not allowed; allowed are expressions with axes")
    for expression, axis in axes.items():
        try:
            re.compile(expression)
        except (re.error, TypeError) as error:
            raise ValueError(f"axes: {expression!r} is not a regular expression") from error
        if not (is_number(axis) and float(axis).is_integer() and axis < 0):
            raise ValueError(
                f"axes: {axis!r} of {expression!r} is not allowed; allowed are negative whole "
                "numbers, from the last axis"
            )
    return _make("units", axes, number, shrinkage)


def heads(number: int | None = None, *, shrinkage: Elementwise = prox_l1) -> Units:
    """Whole attention heads: their queries, keys, values, and rows of the output projection.

    Leaves are found by their names: ``query``, ``key``, ``value`` and ``out`` as Flax has them,
    ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` as Llama has; ``qkv`` and ``proj`` as vision
    transformers have, ``c_attn`` and ``c_proj`` as GPT-2, where one leaf has all three. Where
    several query heads share keys and values (grouped-query attention) they are one group with
    these.

    Args:
      number: of heads in a layer; of those of keys and values, where these are fewer. Default
        (None): the size of the axis of heads, where leaves have one, as in Flax. Where heads and
        features lie along one axis it has to be given.
      shrinkage: what is applied to the root mean square of a head.

    Returns:
      An operator for ``soft_threshold``; select the leaves by
      ``mask=lats_optax.select("attention")`` or the like.

    Raises:
      ValueError: as :func:`units`.

    Example:
      >>> import jax.numpy as jnp
      >>> scale = jnp.array([1.0, 0.1])[:, None]
      >>> attention = {
      ...     "query": {"kernel": jnp.ones((8, 2, 4)) * scale},
      ...     "out": {"kernel": jnp.ones((2, 4, 8)) * scale[..., None]},
      ... }
      >>> (heads()(attention, 0.5)["out"]["kernel"][:, 0, 0] > 0).tolist()
      [True, False]

    Source: Michel, Levy and Neubig, "Are sixteen heads really better than one?" (NeurIPS 2019), for
    the structure.
    """
    return _make("heads", _HEADS, number, shrinkage)


def hidden_units(*, shrinkage: Elementwise = prox_l1) -> Units:
    """Hidden units of feed-forward networks: columns of what enters them, rows of what leaves.

    Leaves are found by their names: ``gate_proj``, ``up_proj`` and ``down_proj`` as Llama has them,
    ``fc1`` and ``fc2`` as vision transformers, and ``wi_0``, ``wi_1``, ``wo``, ``w1``, ``w2``,
    ``w3``. For others, :func:`units`.

    Args:
      shrinkage: what is applied to the root mean square of a unit.

    Returns:
      An operator for ``soft_threshold``.

    Raises:
      ValueError: as :func:`units`.

    Example:
      >>> import jax.numpy as jnp
      >>> scale = jnp.array([1.0, 0.1, 2.0])
      >>> mlp = {
      ...     "gate_proj": {"kernel": jnp.ones((4, 3)) * scale},
      ...     "up_proj": {"kernel": jnp.ones((4, 3)) * scale},
      ...     "down_proj": {"kernel": jnp.ones((3, 4)) * scale[:, None]},
      ... }
      >>> (hidden_units()(mlp, 0.5)["up_proj"]["kernel"][0] > 0).tolist()
      [True, False, True]
    """
    return _make("hidden_units", _HIDDEN, None, shrinkage)


def _make(name: str, sides: Mapping[str, Any], number: Any, shrinkage: Elementwise) -> Units:
    number = None if number is None else check_steps(number, "number")
    return Units(tuple(sides.items()), number, shrinkage, name)
