"""Which weights are pruned, as masks over a parameter tree; and supports, which are still alive."""

import collections
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lats_optax import compatibility
from lats_optax.array_types import Array

Mask = Any  # a pytree of bools that matches the parameters (or is a prefix of them)
MaskOrFunction = Mask | Callable[[Any], Mask]

_VALUE = jax.tree_util.GetAttrKey("value")
_EXPRESSIONS = "a regular expression, a str, or several in a list"
# What leaves do by a word of their names, the first that matches; "" is for weights.
_WEIGHTS = "kernels?|w|linear|dense|conv|proj(ection)?|patch(es)?"
_TABLES = {
    "norm": r".*norm(ali[sz]ation)?s?|ln|bn",
    "position": r"pos(itions?|itional|enc|emb(ed)?)?|wpe",
    "embedding": r".*emb(ed(d(ing|er))?)?s?|wte",
}
_LEAVES = {
    "bias": ".*bias(es)?|offsets?",
    "scale": "scales?|gammas?|betas?|gains?",
    "": _WEIGHTS,
    **_TABLES,
    "token": "cls|tokens?",
}
_HOLDERS = {"": _WEIGHTS, **_TABLES}
_BESIDE = str.maketrans("bB", "wW")


def prunable(params: Any) -> Mask:
    """The default mask: weights with two or more dimensions.

    Kernels of dense and convolutional layers are pruned. Biases, scales, the parameters of
    normalization layers, and embeddings are not. Their shape does not tell: the biases of
    attention heads have two dimensions, and so have those of layers stacked for ``lax.scan``.

    Names decide, as Flax, Equinox and Haiku give them. The name of the leaf comes first: ``bias``,
    ``scale``, ``offset``, ``gamma``, ``beta``, ``embedding``, ``pos_embedding``, ``cls``, ``b``
    beside ``w``. Where it says little, as ``weight`` does, what holds the leaf decides, by class or
    name: ``LayerNorm``, ``Embedding``. All other names are those of weights.

    Embeddings of tokens are left out because a row belongs to one token: with a threshold common
    to all layers, those of rare tokens may vanish first. To prune them, name them in
    :func:`select`.
    :func:`lats_optax.sparsity` prints what is left out, and why.

    Args:
      params: a pytree of arrays.

    Returns:
      A pytree of bools with the structure of ``params``.

    Raises:
      ValueError: two leaves have the same path.

    Example:
      >>> import jax.numpy as jnp
      >>> prunable({"kernel": jnp.ones((3, 4)), "bias": jnp.ones((3, 4))})
      {'bias': False, 'kernel': True}
    """
    return jax.tree.map(lambda reason: not reason, reasons(params))


def reasons(params: Any) -> Any:
    """Why :func:`prunable` leaves out a leaf, in a word or two; "" where it does not.

    Args:
      params: a pytree of arrays.

    Returns:
      A pytree of strings with the structure of ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> reasons({"kernel": jnp.ones((3, 4)), "bias": jnp.ones((3, 4)), "a": 1.0})
      {'a': 'fewer than two dimensions', 'bias': 'bias', 'kernel': ''}
    """
    classes: dict[Any, str] = {}

    def note(path: Any, node: Any) -> bool:
        classes[path] = type(node).__name__
        return False

    flat, structure = compatibility.flatten_with_path(params, note)
    names = jax.tree.leaves(paths(params))
    known = set(names)
    return jax.tree.unflatten(
        structure,
        [
            _reason(name, leaf, classes[path[:-1]] if path else "", known)
            for name, (path, leaf) in zip(names, flat)
        ],
    )


def _reason(name: str, leaf: Any, holder: str, known: set[str]) -> str:
    if is_key(leaf):
        return "random key"
    if jnp.ndim(leaf) < 2:
        return "fewer than two dimensions"
    *above, own = re.split("[/.]", name)
    role = _role(_words(own), _LEAVES)
    # A `b` alone may be any array.
    if re.fullmatch(r"[bB]\d*", own) and name[: -len(own)] + own.translate(_BESIDE) in known:
        role = "bias"
    if role is not None:
        return role
    role = _role(_words(holder), _HOLDERS)
    if role is None:
        # The members of a list have numbers for names.
        named = [part for part in above if not part.isdigit()]
        role = _role(_words(named[-1] if named else ""), _HOLDERS)
    return role or ""


def _words(name: str) -> list[str]:
    """The words of snake_case and CamelCase, in lower case.

    >>> _words("pos_embedding"), _words("LayerNorm_0"), _words("MLP")
    (['pos', 'embedding'], ['layer', 'norm'], ['mlp'])
    """
    return [word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def _role(words: list[str], roles: dict[str, str]) -> str | None:
    """The first role with an expression that matches any of the words."""
    return next(
        (
            role
            for role, pattern in roles.items()
            if any(re.fullmatch(pattern, word) for word in words)
        ),
        None,
    )


def select(
    include: str | Iterable[str] | None = None, exclude: str | Iterable[str] = ()
) -> Callable[[Any], Mask]:
    """A mask by regular expressions on parameter paths.

    A path is the keys of a leaf joined by slashes, such as ``Dense_0/kernel``; an expression
    matches where ``re.search`` finds it.

    Args:
      include: leaves to prune: those that match any of these expressions. Default: the leaves
        that :func:`prunable` selects. Expressions given here select exactly what they match,
        with any number of dimensions.
      exclude: leaves to leave out of these.

    Returns:
      A function from parameters to a mask, for the ``mask`` arguments of this library and of optax.

    Raises:
      ValueError: an expression is not a regular expression; and, when the mask meets parameters,
        an expression that matches none of them (the message lists the paths).

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"stem": {"kernel": jnp.ones((3, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
      >>> select(exclude="^head/")(params)
      {'head': {'kernel': False}, 'stem': {'kernel': True}}
    """
    included = None if include is None else compile_expressions("include", include)
    excluded = compile_expressions("exclude", exclude)

    def mask(params: Any) -> Mask:
        names = paths(params)
        found = jax.tree.leaves(names)
        for argument, patterns in (("include", included or []), ("exclude", excluded)):
            check_matches(argument, patterns, found, "parameter")

        base = (
            prunable(params)
            if included is None
            else jax.tree.map(lambda name: _matches(included, name), names)
        )
        return jax.tree.map(lambda name, keep: keep and not _matches(excluded, name), names, base)

    return mask


def support(params: Any, mask: MaskOrFunction = prunable) -> Any:
    """Where the pruned weights are non-zero.

    Args:
      params: a pytree of arrays, sparse by exact zeros.
      mask: the weights that are subject to pruning: a pytree of bools, or a function that makes
        one from the parameters.

    Returns:
      A pytree with the structure of ``params``: for a leaf in the mask a bool array of its shape,
      True where a weight is not zero; for any other leaf a scalar True, which stands for all of it.

    Raises:
      ValueError: the mask is of another structure than the parameters, or a leaf is no array.

    Example:
      >>> import jax.numpy as jnp
      >>> support({"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.zeros(2)})
      {'bias': Array(True, dtype=bool), 'kernel': Array([[False,  True]], dtype=bool)}
    """
    check_arrays("params", params)
    return jax.tree.map(
        lambda masked, leaf: jnp.asarray(leaf != 0 if masked else True),
        resolve(mask, params),
        params,
    )


def apply_support(params: Any, support: Any) -> Any:
    """Zero what a support excludes: ``support * w``.

    What it keeps is not touched; what it excludes is +0.0 in the leaf's own type, even
    NaN. An average of sparse parameters (EMA) is dense, because each entry was alive at one step
    or another. Applied to it, the support of the last parameters gives it exactly their zeros.

    Args:
      params: a pytree of arrays.
      support: bools in a tree like ``params`` (or a prefix of it), as :func:`support` makes it: an
        array of the shape of its leaf, or a scalar for the whole leaf.

    Returns:
      A pytree with the structure, shapes and dtypes of ``params``.

    Raises:
      ValueError: a support of another structure or shape, or not of bools.

    Example:
      >>> import jax.numpy as jnp, lats_optax
      >>> params = {"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.zeros(1)}
      >>> average = {"kernel": jnp.array([[0.1, 1.9]]), "bias": jnp.array([0.3])}
      >>> apply_support(average, lats_optax.support(params))
      {'bias': Array([0.3], dtype=float32), 'kernel': Array([[0. , 1.9]], dtype=float32)}
    """
    return jax.tree.map(
        lambda alive, leaf: jnp.where(alive, leaf, jnp.zeros_like(leaf)),
        expand_support(support, params),
        params,
    )


def expand_support(support: Any, params: Any) -> Any:
    """A support in exactly the structure of the parameters, as new arrays.

    Args:
      support: what :func:`apply_support` takes.
      params: a pytree of arrays.

    Returns:
      A pytree of bool arrays, of the shape of their leaf or scalar.

    Raises:
      ValueError: as :func:`apply_support`.

    Example:
      >>> import jax.numpy as jnp
      >>> expand_support(True, {"kernel": jnp.ones((1, 2))})
      {'kernel': Array(True, dtype=bool)}
    """

    def copy(path: str, kept: Any, leaf: Array) -> Array:
        allowed = f"allowed is bool{list(jnp.shape(leaf))} or a bool scalar"
        try:
            kept = jnp.array(kept)
        except TypeError as error:
            raise ValueError(f"support: at {path} it is {kept!r}; {allowed}") from error
        if kept.dtype != bool or kept.shape not in ((), jnp.shape(leaf)):
            raise ValueError(f"support: at {path} it is {kept.dtype}{list(kept.shape)}; {allowed}")
        return kept

    check_arrays("params", params)
    return jax.tree.map(copy, paths(params), broadcast_prefix("support", support, params), params)


def paths(params: Any) -> Any:
    """The path of every leaf, such as ``Dense_0/kernel``, in a tree of the same structure.

    Boxes around an array, such as ``flax.nnx.Param``, leave no trace in it; the path of an array
    that is a tree by itself is ``params``. What cannot be encoded (lone surrogates) is escaped.

    Args:
      params: a pytree.

    Returns:
      A pytree of strings, no two alike.

    Raises:
      ValueError: two leaves have the same path, such as ``{"a/b": …}`` and ``{"a": {"b": …}}``.

    Example:
      >>> paths({"Dense_0": {"kernel": 1.0}})
      {'Dense_0': {'kernel': 'Dense_0/kernel'}}
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    below = collections.Counter(path[:end] for path, _ in flat for end in range(len(path)))
    found: dict[str, Any] = {}
    for path, _ in flat:
        # A box is a node whose only leaf is its attribute `value`.
        boxed = len(path) > 1 and path[-1] == _VALUE and below[path[:-1]] == 1
        shown = path[:-1] if boxed else path
        name = compatibility.joined(shown) or "params"
        # A name is printed, and a lone surrogate cannot be.
        name = name.encode("utf-8", "backslashreplace").decode("utf-8")
        if name in found:
            pair = " and ".join(ascii(jax.tree_util.keystr(p)) for p in (found[name], path))
            raise ValueError(
                f"params: {name} is the path of two leaves, {pair}; allowed are keys that, joined "
                "by slashes, make a path of its own for each"
            )
        found[name] = path
    return jax.tree.unflatten(structure, list(found))


def resolve(mask: MaskOrFunction, params: Any) -> Mask:
    """The mask as a tree of Python bools with exactly the structure of ``params``.

    Args:
      mask: a pytree of bools, a prefix of one, or a function from parameters to one.
      params: a pytree of arrays.

    Returns:
      A pytree of bools.

    Raises:
      ValueError: the mask is of another structure than the parameters, or holds something else.

    Example:
      >>> import jax.numpy as jnp
      >>> resolve({"encoder": True, "head": False}, {"encoder": [1.0, 2.0], "head": [3.0]})
      {'encoder': [True, True], 'head': [False]}
    """
    if not jax.tree.leaves(params):
        return jax.tree.map(lambda _: False, params)
    tree = mask(params) if is_function(mask) else mask
    full = broadcast_prefix("mask", tree, params)
    for leaf in jax.tree.leaves(full):
        if np.ndim(leaf) or np.asarray(leaf).dtype != bool:
            raise ValueError(f"mask: it holds {leaf!r}; allowed are True and False for each leaf")
    return jax.tree.map(bool, full)


def is_function(tree: Any) -> bool:
    """Whether it is a function that makes a tree from parameters, and not such a tree.

    >>> is_function(prunable), is_function({"kernel": True})
    (True, False)
    """
    if not callable(tree) or isinstance(tree, jax.tree_util.Partial):
        return callable(tree)
    # A tree of bools may be callable too, such as an Equinox module.
    return all(map(callable, jax.tree.leaves(tree)))


def is_key(leaf: Any) -> bool:
    """Whether it is an array of typed random keys, as dropout layers hold among their state."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def broadcast_prefix(argument: str, tree: Any, params: Any) -> Any:
    """A tree, or a prefix of one, in exactly the structure of the parameters.

    Args:
      argument: what errors call it.
      tree: a pytree.
      params: a pytree in which `optax.MaskedNode` may stand for a subtree, as it does for what
        `optax.masked` and `optax.partition` keep from a transform; what ``tree`` has there is
        left out.

    Returns:
      A pytree of the leaves of ``tree``.

    Raises:
      ValueError: the structures do not match.

    Example:
      >>> params = {"a": optax.MaskedNode(), "b": [1, 2]}
      >>> broadcast_prefix("mask", {"a": [True, False], "b": True}, params)
      {'a': MaskedNode(), 'b': [True, True]}
    """
    nodes = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_dense)[0]
    absent = {path for path, node in nodes if is_dense(node)}
    flat, structure = compatibility.flatten_with_path(tree, lambda path, _: path in absent)
    present = jax.tree.unflatten(
        structure, [optax.MaskedNode() if path in absent else leaf for path, leaf in flat]
    )
    try:
        return compatibility.broadcast(present, params)
    except ValueError as error:
        its, theirs = _unlike(tree, params)
        raise ValueError(
            f"{argument}: its structure, with {its}, is not that of the parameters, with {theirs}, "
            "nor a prefix of it"
        ) from error


def _unlike(tree: Any, params: Any) -> tuple[str, str]:
    """What a tree has and the parameters have not, and what they have that it says nothing of."""
    its, theirs = (jax.tree.leaves(paths(node)) for node in (tree, params))
    alone = [name for name in its if not any(f"{path}/".startswith(f"{name}/") for path in theirs)]
    more = [path for path in theirs if not any(f"{path}/".startswith(f"{name}/") for name in its)]
    if not alone and not more:  # lists where the others are dicts, and the like
        return str(jax.tree.structure(tree)), str(jax.tree.structure(params))
    return some(alone), some(more)


def some(names: list[str]) -> str:
    """The first four names, and how many more there are."""
    others = f" and {len(names) - 4} others" if len(names) > 4 else ""
    return ", ".join(names[:4]) + others if names else "nothing more"


def is_dense(node: Any) -> bool:
    """Whether a node of a latent tree stands for a leaf that is not pruned."""
    return isinstance(node, optax.MaskedNode)


def check_arrays(argument: str, tree: Any) -> None:
    """Refuses a tree with a leaf that is no array, shape of one or number, and names its path.

    >>> check_arrays("params", {"a": 1.0, "b": "x"})
    Traceback (most recent call last):
    ValueError: params: at b it is 'x', a str; allowed are arrays and numbers
    """
    for name, leaf in zip(jax.tree.leaves(paths(tree)), jax.tree.leaves(tree)):
        if not _is_array(leaf):
            raise ValueError(
                f"{argument}: at {name} it is {leaf!r}, a {type(leaf).__name__}; allowed are "
                "arrays and numbers"
            )


def _is_array(leaf: Any) -> bool:
    if not hasattr(leaf, "dtype"):
        return isinstance(leaf, bool | int | float | complex)
    try:
        jnp.result_type(leaf)
    except TypeError:  # an array of words, or of objects
        return False
    return True


def check_matches(
    argument: str, patterns: Iterable[re.Pattern[str]], found: list[str], what: str
) -> None:
    """Refuses an expression that matches none of the paths, if there are any."""
    # Parameters without leaves are optax's stand-ins (tree.map_params, partition).
    for pattern in patterns:
        if found and not any(pattern.search(name) for name in found):
            raise ValueError(
                f"{argument}: the expression {pattern.pattern!r} matches no {what}; their paths "
                f"are {', '.join(found)}"
            )


def compile_expressions(argument: str, patterns: str | Iterable[str]) -> list[re.Pattern[str]]:
    """Regular expressions, compiled, or a ValueError that names the argument."""
    given = [patterns] if isinstance(patterns, str | bytes) else patterns
    if not isinstance(given, Iterable):
        raise ValueError(f"{argument}: {given!r} is not allowed; allowed are {_EXPRESSIONS}")
    given = list(given)
    for pattern in given:
        if not isinstance(getattr(pattern, "pattern", pattern), str):
            raise ValueError(f"{argument}: {pattern!r} is not allowed; allowed are {_EXPRESSIONS}")
    try:
        return [re.compile(pattern) for pattern in given]
    except re.error as error:
        raise ValueError(
            f"{argument}: {error.pattern!r} is not a regular expression: {error}"
        ) from error


def _matches(patterns: list[re.Pattern[str]], name: str) -> bool:
    return any(pattern.search(name) for pattern in patterns)
