"""What becomes of the pruned weights: how many die and revive, and how they are distributed.

Pure functions. The arrays stay on their devices; counts alone leave them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax import masks
from lats_optax.compatibility import get
from lats_optax.masks import MaskOrFunction

BINS = 64
"""Bins of a histogram, an even number: zero is an edge."""

COUNTS = ("zeros", "pruned", "revived")
"""What a record has of each layer and of all of them."""

Support = list[jax.Array]
"""Where the pruned weights are not zero, a bit a weight: uint8 [⌈size / 8⌉] for each layer."""


class Histogram(NamedTuple):
    """How many numbers lie in each of `BINS` equal intervals from −limit to limit.

    What lies outside is counted in the first or the last of them, what is not a number in the last.

    Attributes:
      counts: int32 [BINS]; their sum is how many numbers there are.
      limit: above 0.
    """

    counts: np.ndarray
    limit: float

    @property
    def edges(self) -> np.ndarray:
        """Where the intervals begin and end: float64 [BINS + 1]."""
        return self.limit * np.linspace(-1, 1, BINS + 1)


class WeightSummary(NamedTuple):
    """One layer that is pruned.

    Attributes:
      zeros: how many of its weights are zero.
      pruned: how many have become zero since the support before.
      revived: how many have become other than zero since.
      weights: those that are not zero.
      latent: the latent weights, all of them, in the same intervals; None where the run has none,
        as on a frozen support.
      threshold: the layer's d; None where the run has none.
    """

    zeros: int
    pruned: int
    revived: int
    weights: Histogram
    latent: Histogram | None
    threshold: float | None

    @property
    def size(self) -> int:
        """How many weights it has."""
        return self.zeros + int(self.weights.counts.sum())


def support_bits(params: Any, mask: MaskOrFunction) -> Support:
    """The support of the pruned weights, packed: an eighth of the bools, a 32nd of the weights.

    Args:
      params: a pytree of arrays, sparse by exact zeros.
      mask: which leaves are pruned.

    Returns:
      A `Support`, on the devices of the parameters.

    >>> support_bits({"kernel": jnp.array([[0.0, 2.0], [-1.0, 0.0]]), "bias": jnp.ones(2)},
    ...              masks.prunable)
    [Array([96], dtype=uint8)]
    """
    return [_pack(leaf) for leaf in _pruned(params, mask).values()]


def measure(
    params: Any, opt_state: Any, mask: MaskOrFunction, before: Support
) -> tuple[dict[str, WeightSummary], Support]:
    """Counts what has become of the pruned weights since an earlier support.

    ``pruned = #{before ∧ w = 0}``, ``revived = #{¬before ∧ w ≠ 0}``, so that the zeros are those of
    before + pruned − revived. It takes one layer after the other, in the memory of one; replicated
    arrays are counted on every device, without communication.

    The intervals of a layer's histograms end at ±limit, ``limit = max |θ − w| + 4 · rms(w ≠ 0)``:
    the threshold, and beyond it room for all but a few of the weights that survive it.

    Args:
      params: a pytree of real arrays of fewer than 2³¹ entries each.
      opt_state: the optimizer's state: its latent weights and threshold are looked at, if any.
      mask: which leaves are pruned.
      before: what `support_bits` gave, or this function at an earlier step.

    Returns:
      The layers by path, on the host, and the support now.

    >>> import lats_optax, optax
    >>> tx = optax.chain(optax.sgd(1.0), lats_optax.soft_threshold(0.5))
    >>> params = {"kernel": jnp.array([[0.2, 0.5, 2.0]])}
    >>> state, before = tx.init(params), support_bits(params, masks.prunable)
    >>> updates, state = tx.update({"kernel": jnp.array([[0.4, 0.6, 0.0]])}, state, params)
    >>> layers, _ = measure(optax.apply_updates(params, updates), state, masks.prunable, before)
    >>> layer = layers["kernel"]
    >>> layer.zeros, layer.pruned, layer.revived, layer.threshold
    (2, 2, 0, 0.5)
    >>> int(layer.weights.counts.sum()), int(layer.latent.counts.sum())
    (1, 3)
    """
    weights = _pruned(params, mask)
    latent = get(opt_state, "latent")
    threshold = get(opt_state, "threshold")
    latents = [None] * len(weights) if latent is None else jax.tree.leaves(latent)
    counted, support = [], []
    for w, theta, bits in zip(weights.values(), latents, before, strict=True):
        changes, limit, after = _compare(w, theta, bits)
        bins = [None if x is None else _count_bins(x, limit) for x in (w, theta)]
        counted.append((changes, limit, bins))
        support.append(after)
    counted, threshold = jax.device_get((counted, threshold))
    thresholds = np.broadcast_to(np.asarray(threshold), len(weights))
    layers = {
        path: _on_host(changes, limit, bins, d)
        for path, (changes, limit, bins), d in zip(weights, counted, thresholds)
    }
    return layers, support


def counts(layers: Mapping[str, WeightSummary]) -> dict[str, Any]:
    """The counts of all layers together and of each, in JSON types.

    Returns:
      `zeros`, `pruned` and `revived`, and `layers`: by path, a dict of the same three.
    """
    each = {path: {name: getattr(layer, name) for name in COUNTS} for path, layer in layers.items()}
    totals = {name: sum(layer[name] for layer in each.values()) for name in COUNTS}
    return {**totals, "layers": each}


def _pruned(params: Any, mask: MaskOrFunction) -> dict[str, jax.Array]:
    """The leaves that are pruned, by path, in the order of the tree."""
    chosen = jax.tree.leaves(masks.resolve(mask, params))
    named = zip(jax.tree.leaves(masks.paths(params)), jax.tree.leaves(params))
    return {path: leaf for (path, leaf), masked in zip(named, chosen) if masked}


def _on_host(changes: Any, limit: Any, bins: Any, threshold: Any) -> WeightSummary:
    zeros, pruned, revived = map(int, changes)
    of_weights, of_latent = bins
    # A weight that is zero has been counted too, right of the edge in the middle.
    of_living = of_weights - np.where(np.arange(BINS) == BINS // 2, zeros, 0)
    return WeightSummary(
        zeros=zeros,
        pruned=pruned,
        revived=revived,
        weights=Histogram(of_living, float(limit)),
        latent=None if of_latent is None else Histogram(of_latent, float(limit)),
        threshold=None if threshold is None else float(threshold),
    )


@jax.jit
def _pack(weights: jax.Array) -> jax.Array:
    return jnp.packbits(jnp.ravel(weights != 0))


@jax.jit
def _compare(
    weights: jax.Array, latent: jax.Array | None, before: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """Zeros, pruned and revived; the limit of the histograms; the support now."""
    # The bits that fill up the last byte are clear in both supports, and count as neither.
    after = _pack(weights)
    zeros = jnp.sum(weights == 0, dtype=jnp.int32)
    w = weights.astype(jnp.float32)
    limit = 4 * jnp.sqrt(jnp.sum(w * w) / jnp.maximum(w.size - zeros, 1))
    if latent is not None:
        limit += jnp.max(jnp.abs(latent.astype(jnp.float32) - w), initial=0)
    # A layer of zeros, or one that has diverged, is counted as well.
    limit = jnp.where(jnp.isfinite(limit) & (limit > 0), limit, 1.0)
    changes = (zeros, _count_bits(before & ~after), _count_bits(after & ~before))
    return changes, limit, after


def _count_bits(packed: jax.Array) -> jax.Array:
    return jnp.sum(jax.lax.population_count(packed), dtype=jnp.int32)


# A program of its own: fused with the rest, it takes a CPU twice as long.
@jax.jit
def _count_bins(values: jax.Array, limit: jax.Array) -> jax.Array:
    position = (values.astype(jnp.float32) / limit + 1) * (BINS / 2)
    # Written so that a NaN, which is not below anything, goes to the last bin.
    position = jnp.where(position < BINS, jnp.maximum(position, 0), BINS - 1)
    return jnp.zeros(BINS, jnp.int32).at[position.astype(jnp.int32)].add(1)
