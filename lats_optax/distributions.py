"""How a sparsity is spread over layers: pure functions from shapes to a sparsity for each layer."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lats_optax import masks
from lats_optax.array_types import Float, Integer
from lats_optax.checks.numbers import is_number
from lats_optax.masks import MaskOrFunction

Distribution = Callable[[Any], Any]


def uniform(sparsity: float, *, mask: MaskOrFunction | None = None) -> Distribution:
    """The same sparsity for every layer.

    Args:
      sparsity: fraction of zeros among all the weights of these layers, in [0, 1).
      mask: as for :func:`erdos_renyi`.

    Returns:
      A function from parameters to sparsities, as :func:`erdos_renyi` gives it.

    Raises:
      ValueError: as :func:`erdos_renyi`.

    Example:
      >>> import jax.numpy as jnp
      >>> uniform(0.75)({"a": jnp.ones((4, 4)), "b": jnp.ones((2, 10))})
      {'a': 0.75, 'b': 0.75}
    """
    return _distribution(sparsity, lambda shape: 1.0, mask)


def erdos_renyi(
    sparsity: float, *, kernel: bool = True, mask: MaskOrFunction | None = None
) -> Distribution:
    """Layers with few weights for the units that they join stay denser (ERK; ER).

    The density of a layer of shape n_1 × … × n_k is proportional to ``sum(n_i) / prod(n_i)``, up
    to 1: a layer that would need more becomes dense, and the others share what that leaves.

    Args:
      sparsity: fraction of zeros among all the weights of these layers, in [0, 1).
      kernel: whether the sides of a convolution's kernel count in the sum (Erdős–Rényi-kernel), or
        only its last two dimensions, inputs and outputs (Erdős–Rényi).
      mask: which leaves are layers to prune: a pytree of bools, or a function that makes one from
        parameters. Default (None): all that are given; :func:`lats_optax.target_sparsity` gives
        those that are pruned.

    Returns:
      A function from a pytree of arrays, or of anything that has a shape, to a tree of the same
      structure with a sparsity in [0, 1) for each leaf, and ``optax.MaskedNode`` for one that is
      left out. Each is a whole number of zeros, at least one weight in every layer survives, and
      the zeros of all together are ``round(sparsity * N)`` of the N weights. For the ``target`` of
      :func:`lats_optax.target_sparsity`, or for any other way to prune.

    Raises:
      ValueError: ``sparsity`` outside [0, 1); from the function, one so high that a layer would
        have no weight left.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> shapes = {"stem": (3, 3, 3, 16), "conv": (3, 3, 64, 128), "head": (128, 99)}
      >>> arrays = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
      >>> {name: round(s, 3) for name, s in erdos_renyi(0.9)(arrays).items()}
      {'conv': 0.948, 'head': 0.652, 'stem': 0.0}

    Source: Evci et al., "Rigging the Lottery" (ICML 2020), section 3; Mocanu et al., "Scalable
    training of artificial neural networks" (2018).
    """

    def density(shape: tuple[int, ...]) -> float:
        counted = shape if kernel else shape[-2:]
        return max(sum(counted), 1) / math.prod(counted)

    return _distribution(sparsity, density, mask)


def per_layer(sparsities: Mapping[str, float]) -> Distribution:
    """A sparsity for each layer, by regular expressions on parameter paths.

    Args:
      sparsities: from an expression to a sparsity in [0, 1). The first expression that
        ``re.search`` finds in a layer's path, such as ``Dense_0/kernel``, decides; ``""`` matches
        every path, so that as the last key it speaks for the rest.

    Returns:
      A function from parameters to sparsities, as :func:`erdos_renyi` gives it, for the ``target``
      of :func:`lats_optax.target_sparsity`.

    Raises:
      ValueError: no dict, or an empty one; a sparsity outside [0, 1), or what is not a regular
        expression; from the function, an expression that matches no layer, or a layer that no
        expression matches.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"stem": jnp.ones((4, 4)), "body": jnp.ones((8, 4)), "head": jnp.ones((4, 2))}
      >>> per_layer({"^stem": 0.5, "": 0.9})(params)
      {'body': 0.9, 'head': 0.9, 'stem': 0.5}
    """
    if not (isinstance(sparsities, Mapping) and sparsities):
        raise ValueError(
            f"sparsities: {sparsities!r} is not allowed; allowed are dicts from an expression to a "
            "sparsity, with one entry or more"
        )
    patterns = masks.compile_expressions("sparsities", list(sparsities))
    values = [check_sparsity("sparsities", value) for value in sparsities.values()]

    def distribute(params: Any) -> Any:
        names = masks.paths(params)
        masks.check_matches("sparsities", patterns, jax.tree.leaves(names), "pruned weights")

        def value_of(name: str) -> float:
            for pattern, value in zip(patterns, values):
                if pattern.search(name):
                    return value
            raise ValueError(
                f"sparsities: none of {', '.join(map(repr, sparsities))} matches {name}; a last "
                "expression '' stands for the rest"
            )

        return jax.tree.map(value_of, names)

    return distribute


def check_sparsity(argument: str, value: Any) -> float:
    """``value`` as a float in [0, 1), or a ValueError that names the argument."""
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"{argument}: {value!r} is not allowed; allowed are numbers in [0, 1)")
    return float(value)


def _distribution(
    sparsity: float, density: Callable[[tuple[int, ...]], float], mask: MaskOrFunction | None
) -> Distribution:
    sparsity = check_sparsity("sparsity", sparsity)

    def distribute(params: Any) -> Any:
        chosen = masks.resolve(True if mask is None else mask, params)
        layers = jax.tree.map(
            lambda keep, leaf: leaf if keep else optax.MaskedNode(), chosen, params
        )
        shapes = [tuple(jnp.shape(leaf)) for leaf in jax.tree.leaves(layers)]
        sizes = np.array([math.prod(shape) for shape in shapes], np.int64)
        weights = np.array([density(s) if math.prod(s) else 0.0 for s in shapes])
        kept = _kept(sparsity, sizes, weights)
        zeros = (sizes - kept) / np.maximum(sizes, 1)
        return jax.tree.unflatten(jax.tree.structure(layers), zeros.tolist())

    return distribute


def _kept(
    sparsity: float, sizes: Integer[np.ndarray, " layers"], weights: Float[np.ndarray, " layers"]
) -> Integer[np.ndarray, " layers"]:
    """How many weights each layer keeps, its density in proportion to `weights` where below 1."""
    total = int(sizes.sum())
    budget = total - round(sparsity * total)
    layers = int(np.count_nonzero(sizes))
    if budget < layers:
        raise ValueError(
            f"sparsity: {sparsity} leaves {budget} of {total} weights for {layers} layers; allowed "
            "is what leaves one in each"
        )
    dense = sizes == 0
    while True:
        # A layer over its size here is so in all later rounds: what it gives back goes to others.
        free = weights * sizes * ~dense
        shares = np.where(dense, sizes, free * ((budget - sizes[dense].sum()) / (free.sum() or 1)))
        over = ~dense & (shares > sizes)
        if not over.any():
            return _rounded_to(budget, shares, np.minimum(sizes, 1), sizes)
        dense |= over


def _rounded_to(
    total: int,
    shares: Float[np.ndarray, " layers"],
    low: Integer[np.ndarray, " layers"],
    high: Integer[np.ndarray, " layers"],
) -> Integer[np.ndarray, " layers"]:
    """Whole numbers next to the shares, within bounds, that sum to `total` (largest remainder)."""
    counts = np.clip(np.floor(shares).astype(np.int64), low, high)
    while missing := total - int(counts.sum()):
        step = 1 if missing > 0 else -1
        movable = np.flatnonzero(counts < high if step > 0 else counts > low)
        order = np.argsort(step * (counts - shares)[movable], kind="stable")
        counts[movable[order[: abs(missing)]]] += step
    return counts
