"""Layers that are stacked along the leading axes of one array, as `nn.scan` and `vmap` leave them.

Here belongs what finds them in a tree of parameters, and the warning of an operator that takes a
stack of layers for one.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lats_optax import masks
from lats_optax.checks.numbers import is_number
from lats_optax.operators.parts import TreeOperator, parts_of

_BESIDE = ("bias", "scale", "norm")
Shape = tuple[int, ...]


def check_stacked_axes(value: Any) -> int:
    """``stacked_axes`` as an int >= 0, or a ValueError that names the argument.

    >>> check_stacked_axes(2)
    2
    """
    if not (is_number(value) and float(value).is_integer() and value >= 0):
        raise ValueError(f"stacked_axes: {value!r} is not allowed; allowed are whole numbers >= 0")
    return int(value)


def stacked_axes(params: Any) -> dict[str, int]:
    """The number of leading axes that stack layers, where the tree shows it.

    Biases and scales show it, by their names as :func:`lats_optax.prunable` takes them. Below a
    node of which every array begins with the same axes, these stack layers if a bias or a scale has
    them too and one of its own. A kernel whose bias has the shape of its last axes is one layer.

    Args:
      params: a pytree of arrays.

    Returns:
      Path -> number. A kernel that nothing is known about is left out.

    Example:
      >>> import jax.numpy as jnp
      >>> stacked_axes({"kernel": jnp.ones((3, 8, 4)), "bias": jnp.ones((3, 4))})
      {'kernel': 1}
      >>> stacked_axes({"kernel": jnp.ones((8, 3, 4)), "bias": jnp.ones((3, 4))})
      {'kernel': 0}
    """
    leaves = {
        name: (tuple(jnp.shape(leaf)), reason)
        for name, leaf, reason in zip(
            jax.tree.leaves(masks.paths(params)),
            jax.tree.leaves(params),
            jax.tree.leaves(masks.reasons(params)),
        )
        if not masks.is_key(leaf) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    }
    nodes: dict[str, _Node] = {}
    siblings: defaultdict[str, list[Shape]] = defaultdict(list)
    for name, (shape, reason) in leaves.items():
        node = _Node.of(shape, reason)
        for above in _above(name):
            nodes[above] = node.join(nodes[above]) if above in nodes else node
        if reason in _BESIDE or len(shape) == 1:
            siblings[next(_above(name))].append(shape)
    found = {}
    for name, (shape, reason) in leaves.items():
        if reason:
            continue
        parent, *others = _above(name)
        nearest = nodes[parent].stacked
        # As heads of attention have it. Where the axes are of one size it may be either.
        single = any(shape[len(shape) - len(other) :] == other for other in siblings[parent])
        if single and not nearest:
            found[name] = 0
            continue
        known = [nodes[above].stacked for above in others]
        if number := next(filter(None, known if single else [nearest, *known]), 0):
            found[name] = number
    return found


def warn_of_stacked_layers(
    operator: TreeOperator, params: Any, selected: Mapping[str, Any], *, stacklevel: int
) -> None:
    """Warns where groups go through several layers, or where one layer is taken for a stack.

    Args:
      operator: of groups, or of single weights, which need no look.
      params: the parameters.
      selected: the pruned ones, by path.
      stacklevel: as `warnings.warn` has it, from the caller.
    """
    parts = parts_of(operator, selected)
    if all(part.largest_group == 1 for part in parts):
        return
    known = stacked_axes(params)
    across: defaultdict[int, list[str]] = defaultdict(list)
    split = []
    for (name, *others), own, shape, *_ in parts:
        if others:
            continue
        axes = known.get(name, 0)
        probe = jax.ShapeDtypeStruct(shape, jnp.float32)  # type: ignore[no-untyped-call]
        if jax.eval_shape(own.magnitude, probe).shape[:axes] != shape[:axes]:
            across[axes].append(f"{name} {list(shape)}")
        if known.get(name) == 0 and _splits(own):
            split.append(f"{name} {list(shape)}")
    for axes, names in across.items():
        first = "axis" if axes == 1 else f"{axes} axes"
        warnings.warn(
            f"operator: layers are stacked along the first {first} of {masks.some(names)}, as "
            f"biases or scales beside show, and groups of {operator!r} go through all of them. For "
            f"groups within a layer write stacked_axes={axes}, as in lats_optax.groups."
            f"output_channels(stacked_axes={axes}), or other axes of prox.Axes; and give what is "
            "not stacked a transform of its own, by optax.partition",
            stacklevel=stacklevel + 1,
        )
    if split:
        warnings.warn(
            f"operator: {operator!r} takes the first axes of {masks.some(split)} for a stack of "
            "layers, and the bias beside shows one layer. Give what is not stacked a transform of "
            "its own, by optax.partition",
            stacklevel=stacklevel + 1,
        )


def _splits(operator: TreeOperator) -> bool:
    return bool(getattr(operator, "stacked_axes", 0))


class _Node(NamedTuple):
    """What the arrays below a node have in common.

    Attributes:
      common: the sizes of the axes with which they all begin.
      beside: the fewest dimensions of a bias or a scale; None: there is none.
    """

    common: Shape
    beside: int | None

    @classmethod
    def of(cls, shape: Shape, reason: str) -> "_Node":
        if reason not in _BESIDE:
            return cls(shape if len(shape) > 1 else (), None)
        while shape and shape[-1] == 1:  # as the biases of Equinox's convolutions
            shape = shape[:-1]
        return cls(shape, len(shape)) if len(shape) > 1 else cls((), None)

    def join(self, other: "_Node") -> "_Node":
        pairs = list(zip(self.common, other.common))
        length = next((at for at, (a, b) in enumerate(pairs) if a != b), len(pairs))
        known = [node.beside for node in (self, other) if node.beside is not None]
        return _Node(self.common[:length], min(known, default=None))

    @property
    def stacked(self) -> int:
        """How many axes stack layers below the node, as far as it shows."""
        return 0 if self.beside is None else min(len(self.common), self.beside - 1)


def _above(name: str) -> Iterator[str]:
    """The nodes above a leaf, from the nearest to the root.

    >>> list(_above("Scan/Dense_0/kernel"))
    ['Scan/Dense_0', 'Scan', '']
    """
    while name:
        name = name.rpartition("/")[0]
        yield name
