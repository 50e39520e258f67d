"""Checks of what transforms are given: other transforms, states, and trees beside the parameters.

Here belong checks that name the argument and the path. Checks of numbers are in `thresholds.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lats_optax import masks


def check_transform(name: str, value: Any) -> None:
    """Refuses what is not a gradient transformation.

    >>> check_transform("inner", "sgd")
    Traceback (most recent call last):
    ValueError: inner: 'sgd' is not allowed; allowed are transforms such as optax.sgd(0.1)
    """
    methods = (getattr(value, method, None) for method in ("init", "update"))
    # A controller has these two as well, with other arguments.
    if not all(map(callable, methods)) or hasattr(value, "prepared"):
        raise ValueError(
            f"{name}: {value!r} is not allowed; allowed are transforms such as optax.sgd(0.1)"
        )


def check_state(state: Any, kind: type) -> None:
    """Refuses a state that is not of a transform's own type."""
    if not isinstance(state, kind):
        raise ValueError(
            f"state: {type(state).__name__} is not allowed; allowed is the {kind.__name__} that "
            "init of the same transform gives"
        )


def check_beside(name: str, tree: Any, params: Any, *, needed: Any = None) -> None:
    """Refuses a tree that does not go with the parameters, leaf by leaf.

    Args:
      name: what errors call the tree.
      tree: an array of the parameter's shape for each of them. None, or `optax.MaskedNode`, may
        stand for a leaf, or for all below a node, where no array is needed.
      params: the parameters.
      needed: a tree of bools like the parameters: where an array is needed; None: nowhere.

    Raises:
      ValueError: names the path.
    """
    found = dict(jax.tree_util.tree_flatten_with_path(tree, is_leaf=_stands_for_none)[0])
    names = jax.tree.leaves(masks.paths(params))
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    wanted = jax.tree.leaves(needed) if needed is not None else [False] * len(leaves)
    used = set()
    for path, (at, leaf), array in zip(names, leaves, wanted):
        key = next((at[:end] for end in range(len(at), -1, -1) if at[:end] in found), None)
        value: Any = None if key is None else found[key]
        empty = _stands_for_none(value)
        used.add(key)
        if key is None or (empty and array):
            raise ValueError(
                f"{name}: there is no array at {path}, where the parameter is one of shape "
                f"{jnp.shape(leaf)}"
            )
        if not empty and (key != at or jnp.shape(value) != jnp.shape(leaf)):
            raise ValueError(
                f"{name}: at {path} its shape is {jnp.shape(value)}, and that of the parameter is "
                f"{jnp.shape(leaf)}"
            )
    for key, value in found.items():
        if key not in used and not _stands_for_none(value):
            where = jax.tree_util.keystr(key, simple=True, separator="/")
            raise ValueError(f"{name}: at {where} it has an array, and the parameters have none")


def _stands_for_none(node: Any) -> bool:
    return node is None or masks.is_dense(node)
