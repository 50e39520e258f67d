"""What an operator is applied to: the leaves of a tree, or arrays that it makes of them.

Here belongs the seam between trees of weights and operators of one array. Most operators take each
leaf by itself. One that has a method ``parts`` says what it takes: it may have an operator of its
own for each leaf, by its path, or join several leaves.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax import masks
from lats_optax.array_types import Array, Count, Num
from lats_optax.compatibility import explicit_sharding
from lats_optax.operators.protocol import Operator, Values

Shape = tuple[int, ...]


@runtime_checkable
class Divides(Protocol):
    """An operator of trees: it says which arrays it makes of the leaves, and what prunes these."""

    def __call__(self, x: Any, strength: Any, /) -> Any:
        """The operator's value at a tree."""

    def parts(self, shapes: Mapping[str, Shape], /) -> "tuple[Part, ...]":
        """What it is applied to, in the order of the first leaf of each.

        Args:
          shapes: those of the pruned leaves, by path.

        Raises:
          ValueError: it has no use for one of the leaves.
        """

    def at(self, count: Count, /) -> "Divides":
        """The operator of a step: see `Operator.at`."""


TreeOperator = Operator | Divides
"""What the library takes for an operator: one of arrays, or one of trees."""


class Part(NamedTuple):
    """An array that is pruned at once: a leaf, or several of them joined.

    Attributes:
      names: paths of the leaves.
      operator: what the array is pruned by.
      shape: of the array.
      most: the most of its weights that can be zero.
      join: leaves, in the order of their names -> the array.
      split: the array, or one of its shape -> leaves.
    """

    names: tuple[str, ...]
    operator: Operator
    shape: Shape
    most: int
    join: Callable[[Sequence[Array]], Array]
    split: Callable[[Array], Sequence[Array]]

    @classmethod
    def leaf(cls, name: str, shape: Shape, operator: Operator, most: int | None = None) -> "Part":
        """One leaf as it is.

        Args:
          name: its path.
          shape: its shape.
          operator: what it is pruned by.
          most: as the attribute; None: all of it.
        """
        size = int(np.prod(shape, dtype=np.int64))
        return cls((name,), operator, shape, size if most is None else most, _only, _alone)

    @property
    def size(self) -> int:
        """The number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def largest_group(self) -> int:
        """The size of the largest set of weights that become zero together."""
        return int(self.operator.group_sizes(self.shape).max(initial=1))

    def gather(self, leaves: Mapping[str, Any]) -> Num[Array, "..."]:
        """The array, from leaves by path."""
        return self.join([leaves[name] for name in self.names])


def parts_of(operator: TreeOperator, leaves: Mapping[str, Any]) -> tuple[Part, ...]:
    """What an operator is applied to, in the order of the first leaf of each.

    Args:
      operator: of arrays, which takes each leaf by itself; or of trees, which decides.
      leaves: arrays by path; only their shapes are used.

    Raises:
      ValueError: the operator has no use for one of the leaves.

    Example:
      >>> from lats_optax.prox import prox_l1
      >>> [part.size for part in parts_of(prox_l1, {"a": jnp.ones((2, 3)), "b": jnp.ones(4)})]
      [6, 4]
    """
    shapes = {name: tuple(jnp.shape(leaf)) for name, leaf in leaves.items()}
    if isinstance(operator, Divides):
        return operator.parts(shapes)
    return tuple(Part.leaf(name, shape, operator) for name, shape in shapes.items())


def as_operator(operator: TreeOperator | Callable[[Any, Any], Any]) -> TreeOperator:
    """An operator as it is, and a plain function as one that has values alone.

    Raises:
      ValueError: it is neither.

    Example:
      >>> as_operator(lambda x, d: x).preimage(jnp.array([1.0, -2.0]), 0.5)
      Array([ 1., -2.], dtype=float32)
    """
    if not callable(operator):
        raise ValueError(
            f"operator: {operator!r} is not allowed; allowed are operators such as "
            "lats_optax.prox.prox_l1 and functions (x, strength) -> z"
        )
    if isinstance(operator, Divides | Operator):
        return operator
    return Values(operator)


def by_path(tree: Any) -> OrderedDict[str, Any]:
    """The leaves of a tree by path; what is not pruned has none in a tree of latent weights."""
    # JAX sorts the keys of a dict, and the order of the leaves is that of thresholds.
    return OrderedDict(zip(jax.tree.leaves(masks.paths(tree)), jax.tree.leaves(tree)))


def map_parts(function: Callable[..., Array], operator: TreeOperator, tree: Any, *rest: Any) -> Any:
    """A function of each part, ``function(operator, array, ...) -> array``, as a tree of leaves.

    Args:
      function: its value has the shape of the array.
      operator: divides the tree.
      tree: of arrays.
      *rest: trees of scalars of the same structure. A part takes that of its first leaf.

    Example:
      >>> from lats_optax.prox import prox_l1
      >>> map_parts(lambda p, x, d: p(x, d), prox_l1, {"a": jnp.array([3.0])}, {"a": 1.0})
      {'a': Array([2.], dtype=float32)}
    """
    leaves, *others = (by_path(each) for each in (tree, *rest))
    found: dict[str, Array] = {}
    for part in parts_of(operator, leaves):
        scalars = [other[part.names[0]] for other in others]
        value = function(part.operator, part.gather(leaves), *scalars)
        for name, piece in zip(part.names, part.split(value)):
            found[name] = _laid_out_as(piece, leaves[name])
    return jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name in leaves])


def check_fits(argument: str, operator: TreeOperator, leaves: Mapping[str, Any]) -> None:
    """Refuses arrays that an operator has no value for, such as ones that lack an axis of its.

    Args:
      argument: what errors call the operator.
      operator: it is asked for shapes alone.
      leaves: arrays by path.

    Raises:
      ValueError: names the paths and shapes, and how to leave them out.
    """
    reasons: dict[Any, ValueError | None] = {}
    unfit: dict[str, ValueError] = {}
    for part in parts_of(operator, leaves):
        array = jax.eval_shape(part.gather, leaves)
        kind = (array.shape, array.dtype, id(part.operator))
        if kind not in reasons:
            reasons[kind] = _reason(argument, part, array)
        if (reason := reasons[kind]) is not None:
            unfit |= dict.fromkeys(part.names, reason)
    if unfit:
        shapes = [f"{path} of shape {jnp.shape(leaves[path])}" for path in unfit]
        exclude = [f"^{re.escape(path)}$" for path in unfit]
        first = next(iter(unfit.values()))
        raise ValueError(
            f"{argument}: it does not fit {', '.join(shapes)}: {first}. Leave what it does not fit "
            f"out of the mask, as mask=lats_optax.select(exclude={exclude}) does"
        ) from first


def _reason(argument: str, part: Part, array: jax.ShapeDtypeStruct) -> ValueError | None:
    """Why an operator has no value for an array; None: it has one."""
    path = ", ".join(part.names)
    what = f"{argument}: {part.operator!r} is not a function (x, strength) -> z"
    try:
        value = jax.eval_shape(part.operator, array, 0.0)
    except ValueError as error:
        return error
    except TypeError as error:
        raise ValueError(f"{what}: for {path} there is a TypeError: {error}") from error
    if getattr(value, "shape", None) != array.shape:
        raise ValueError(
            f"{what}: for {path}, of shape {array.shape}, its value is {value!r}; allowed are "
            "values of the shape of x"
        )
    return None


def _laid_out_as(piece: Num[Array, "*shape"], leaf: Any) -> Num[Array, "*shape"]:
    """What was joined goes back to where its leaf is; the compiler knows, explicit types do not."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return piece
    wanted = explicit_sharding(leaf)
    if wanted is not None and jax.typeof(piece).sharding != wanted:
        return jax.sharding.reshard(piece, wanted)  # type: ignore[no-untyped-call]
    return piece


def _only(leaves: Sequence[Array]) -> Array:
    (leaf,) = leaves
    return leaf


def _alone(array: Array) -> Sequence[Array]:
    return (array,)
