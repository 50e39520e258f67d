"""Checks of what transforms are given: other transforms, states, and trees beside the parameters.

Here belong checks that name the argument and the path. Checks of numbers are in `numbers.py`.
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from lats_optax import compatibility, masks
from lats_optax.masks import MaskOrFunction, is_dense
from lats_optax.operators.parts import TreeOperator, check_fits
from lats_optax.operators.stacked import warn_of_stacked_layers


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


def check_params(name: str, params: Any) -> None:
    """Refuses an update without the current parameters."""
    if params is None:
        raise ValueError(
            f"{name}: params is None; call update(updates, state, params) with the current "
            "parameters"
        )


def check_float_type(name: str, dtype: Any) -> None:
    """Refuses what is not a float type of 16 bits or more.

    >>> check_float_type("latent_dtype", jnp.int32)
    Traceback (most recent call last):
    ValueError: latent_dtype: int32 is not allowed; allowed are float types of 16 bits or more
    """
    try:
        known = jnp.dtype(dtype)
        allowed = jnp.issubdtype(known, jnp.floating) and known.itemsize >= 2
    except TypeError:
        known, allowed = dtype, False
    if not allowed:
        raise ValueError(
            f"{name}: {known} is not allowed; allowed are float types of 16 bits or more"
        )


def checked_mask(params: Any, mask: MaskOrFunction, operator: TreeOperator) -> Any:
    """A mask as a tree of bools like the parameters; what is pruned must fit the operator.

    Raises:
      ValueError: names the path.
    """
    masks.check_arrays("params", params)
    pruned = masks.resolve(mask, params)
    names = jax.tree.leaves(masks.paths(params))
    selected: dict[str, Any] = {}
    for name, leaf, chosen in zip(names, jax.tree.leaves(params), jax.tree.leaves(pruned)):
        dtype = jnp.result_type(leaf)
        if chosen and not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"mask: it selects {name}, which is {dtype}; only float parameters can be pruned"
            )
        if chosen and dtype.itemsize < 2:
            # In eight bits a large weight becomes NaN, and w + (w' - w) is not w'.
            raise ValueError(
                f"mask: it selects {name}, which is {dtype}; allowed are float types of 16 bits or "
                "more: keep the parameters in bfloat16, and cast the pruned ones afterwards"
            )
        if chosen:
            selected[name] = leaf
    check_fits("operator", operator, selected)
    warn_of_stacked_layers(operator, params, selected, stacklevel=3)
    if names and not any(jax.tree.leaves(pruned)):
        warnings.warn(
            f"nothing is pruned: the mask selects none of {', '.join(names)}", stacklevel=3
        )
    # Parameters without leaves may also be optax's stand-ins (tree.map_params).
    if not names and jax.tree.leaves(params, is_leaf=is_dense):
        warnings.warn(
            "nothing is pruned: a transform around this one, such as optax.masked or "
            "optax.partition, masks every parameter",
            stacklevel=3,
        )
    return pruned


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
            where = compatibility.joined(key)
            raise ValueError(f"{name}: at {where} it has an array, and the parameters have none")


def _stands_for_none(node: Any) -> bool:
    return node is None or is_dense(node)
