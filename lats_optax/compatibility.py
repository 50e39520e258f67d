"""What older versions of jax and optax call otherwise, or lack: one name for each.

Here belongs every fallback of the core. Each says the version from which on it can go: once
`pyproject.toml` asks for that one, callers use the newer name themselves.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.experimental
import jax.extend.core
import optax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike


def enable_x64(enabled: bool) -> AbstractContextManager[Any]:
    """`jax.enable_x64`: jax 0.8."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    return jax.experimental.enable_x64(enabled)  # type: ignore[attr-defined]


def broadcast(prefix: Any, tree: Any) -> Any:
    """`jax.tree.broadcast`, a prefix of a tree in its whole structure: jax 0.7."""
    if hasattr(jax.tree, "broadcast"):
        return jax.tree.broadcast(prefix, tree)
    return jax.tree.map(lambda leaf, below: jax.tree.map(lambda _: leaf, below), prefix, tree)


def joined(path: Iterable[Any]) -> str:
    """The keys of a path joined by slashes, as `keystr` has options for: jax 0.6.

    >>> [(path, _)] = jax.tree_util.tree_flatten_with_path({"a": [1]})[0]
    >>> joined(path)
    'a/0'
    """
    if jax.__version_info__ >= (0, 6):
        return jax.tree_util.keystr(tuple(path), simple=True, separator="/")
    kinds = ("key", "idx", "name")  # of dicts, sequences and attributes
    names = (next((getattr(k, kind) for kind in kinds if hasattr(k, kind)), k) for k in path)
    return "/".join(map(str, names))


def flatten_with_path(tree: Any, is_leaf: Callable[[Any, Any], bool]) -> Any:
    """`tree_flatten_with_path` with `is_leaf` of a path and a node: jax 0.7.

    >>> flatten_with_path({"a": (1, 2)}, lambda path, node: len(path) == 1)[0]
    [((DictKey(key='a'),), (1, 2))]
    """
    if jax.__version_info__ >= (0, 7):
        return jax.tree_util.tree_flatten_with_path(tree, is_leaf, is_leaf_takes_path=True)
    found: list[tuple[Any, Any]] = []
    return found, jax.tree.structure(_walk(tree, (), is_leaf, found))


def _walk(node: Any, path: Any, is_leaf: Callable[[Any, Any], bool], found: list[Any]) -> Any:
    """Collects the leaves below a node; a tree of its structure."""
    below, structure = jax.tree_util.tree_flatten_with_path(node, lambda child: child is not node)
    if is_leaf(path, node) or jax.tree_util.all_leaves([node]):
        found.append((path, node))
        return 0
    children = [_walk(child, (*path, *keys), is_leaf, found) for keys, child in below]
    return jax.tree.unflatten(structure, children)


def with_dtype(shape: jax.ShapeDtypeStruct, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """`shape.update(dtype=dtype)`: jax 0.7."""
    if hasattr(shape, "update"):
        return shape.update(dtype=dtype)  # type: ignore[no-untyped-call]
    return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=shape.sharding)  # type: ignore[no-untyped-call]


def explicit_sharding(array: Any) -> NamedSharding | None:
    """How a type divides its array over devices, None where the compiler does: jax 0.8.

    Versions before it lack what arrays of such types need, and are not asked.
    """
    if not hasattr(jax.sharding, "use_abstract_mesh"):
        return None
    sharding = jax.typeof(array).sharding
    return sharding if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types else None


def varying_axes(array: Any) -> frozenset[str]:
    """`jax.typeof(array).manual_axis_type.varying`, the axes of a `shard_map`: jax 0.10.

    Types of jax 0.7 to 0.9 have them as `vma`; those of earlier versions do not tell.
    """
    kind = jax.typeof(array) if hasattr(jax, "typeof") else None
    manual = getattr(kind, "manual_axis_type", None)
    return manual.varying if manual is not None else getattr(kind, "vma", frozenset())


def manual_axes(params: Mapping[str, Any]) -> frozenset[str]:
    """``params["newly_manual_axes"]`` of a `shard_map` in a jaxpr: jax 0.10.1.

    Before, it was `manual_axes`; and before jax 0.7 the other axes were given.
    """
    for name in ("newly_manual_axes", "manual_axes"):
        if name in params:
            return frozenset(params[name])
    return frozenset(params["mesh"].axis_names) - params["auto"]


def jaxprs_in_params(params: Mapping[str, Any]) -> list[jax.extend.core.Jaxpr]:
    """`jax.extend.core.jaxprs_in_params`: jax 0.10."""
    if hasattr(jax.extend.core, "jaxprs_in_params"):
        return list(jax.extend.core.jaxprs_in_params(params))
    found = []
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else [value]:
            if isinstance(each, jax.extend.core.ClosedJaxpr):
                found.append(each.jaxpr)
            elif isinstance(each, jax.extend.core.Jaxpr):
                found.append(each)
    return found


def get(tree: Any, key: str) -> Any:
    """`optax.tree.get`: optax 0.2.5."""
    return (optax.tree.get if hasattr(optax, "tree") else optax.tree_utils.tree_get)(tree, key)


def get_all_with_path(tree: Any, key: str) -> list[tuple[Any, Any]]:
    """`optax.tree.get_all_with_path`: optax 0.2.5."""
    if hasattr(optax, "tree"):
        return optax.tree.get_all_with_path(tree, key)
    return optax.tree_utils.tree_get_all_with_path(tree, key)


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many constants a `scan` in a jaxpr has, and how many carries: ``ft_in``, jax 0.12."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]
