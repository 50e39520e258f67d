"""What an operator is applied to: the leaves of a tree, or arrays that it makes of them.

Here belongs the seam between trees of weights and operators of one array. Most operators take each
leaf by itself. One that has a method ``parts`` says what it takes: it may have an operator of its
own for each leaf, by its path, or join several leaves.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax import masks
from lats_optax.operators import Operator

Shape = tuple[int, ...]


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
    join: Callable[[Sequence[jax.Array]], jax.Array]
    split: Callable[[jax.Array], Sequence[jax.Array]]

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
        """The most weights of which one cannot become zero alone."""
        return int(self.operator.group_sizes(self.shape).max(initial=1))

    def gather(self, leaves: Mapping[str, Any]) -> jax.Array:
        """The array, from leaves by path."""
        return self.join([leaves[name] for name in self.names])


def parts_of(operator: Operator, leaves: Mapping[str, Any]) -> tuple[Part, ...]:
    """What an operator is applied to, in the order of the first leaf of each.

    Args:
      operator: of one array; where it has a method ``parts``, that decides.
      leaves: arrays by path, of which the shapes are looked at.

    Raises:
      ValueError: the operator has no use for one of the leaves.

    Example:
      >>> from lats_optax.prox import prox_l1
      >>> [part.size for part in parts_of(prox_l1, {"a": jnp.ones((2, 3)), "b": jnp.ones(4)})]
      [6, 4]
    """
    shapes = {name: tuple(jnp.shape(leaf)) for name, leaf in leaves.items()}
    divide: Callable[[Mapping[str, Shape]], tuple[Part, ...]] | None
    divide = getattr(operator, "parts", None)
    if divide is not None:
        return divide(shapes)
    return tuple(Part.leaf(name, shape, operator) for name, shape in shapes.items())


def by_path(tree: Any) -> OrderedDict[str, Any]:
    """The leaves of a tree by path; what is not pruned has none in a tree of latent weights."""
    # JAX sorts the keys of a dict, and the order of the leaves is that of thresholds.
    return OrderedDict(zip(jax.tree.leaves(masks.paths(tree)), jax.tree.leaves(tree)))


def map_parts(function: Callable[..., jax.Array], operator: Operator, tree: Any, *rest: Any) -> Any:
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
    found: dict[str, jax.Array] = {}
    for part in parts_of(operator, leaves):
        scalars = [other[part.names[0]] for other in others]
        value = function(part.operator, part.gather(leaves), *scalars)
        found |= zip(part.names, part.split(value))
    return jax.tree.unflatten(jax.tree.structure(tree), [found[name] for name in leaves])


def check_fits(argument: str, operator: Operator, leaves: Mapping[str, Any]) -> None:
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


def _only(leaves: Sequence[jax.Array]) -> jax.Array:
    (leaf,) = leaves
    return leaf


def _alone(array: jax.Array) -> Sequence[jax.Array]:
    return (array,)
