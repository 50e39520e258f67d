"""Peers that are rows of the family: operator × law × scale of pruned updates × end.

Each is a value in every column of `lats_optax.soft_threshold`, written from its paper. Where they
differ from what we recommend is the whole of their code.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lats_optax
from benchmarks.quality.peers.base import Setting
from lats_optax import prox


def gradual_magnitude(
    optimizer: optax.GradientTransformation, setting: Setting
) -> optax.GradientTransformation:
    """Gradual magnitude pruning: hard, along a cubic sparsity curve, then frozen.

    What is pruned keeps its value and does not move. Source: Zhu and Gupta, "To prune, or not to
    prune" (2017), arXiv 1710.01878; that the rise ends at 75 % of the run leaves time to fine-tune.
    """
    return chained(
        optimizer,
        setting,
        _curve(setting, reach=0.75),
        operator=prox.prox_power(math.inf),
        pruned_scale=0.0,
        freeze_after=max(round(0.75 * setting.steps), 1),
    )


def ste_magnitude(
    optimizer: optax.GradientTransformation, setting: Setting
) -> optax.GradientTransformation:
    """Dynamic pruning with feedback: hard, along a cubic sparsity curve, then held.

    The gradient at the pruned model moves all latent weights. Source: Lin et al., "Dynamic model
    pruning with feedback" (ICLR 2020), arXiv 2006.07253.
    """
    threshold = _curve(setting, reach=0.75)
    return chained(
        optimizer, setting, threshold, operator=prox.prox_power(math.inf), pruned_scale=1.0
    )


def st3(optimizer: optax.GradientTransformation, setting: Setting) -> optax.GradientTransformation:
    """ST-3: soft with survivors rescaled, a cubic sparsity curve from 5 to 50 % of the run, held.

    Source: Vanderschueren and De Vleeschouwer, "Are straight-through gradients and
    soft-thresholding all you need for sparse training?" (WACV 2023), arXiv 2212.01076.
    """
    threshold = _curve(setting, reach=0.5, start=0.05)
    return chained(optimizer, setting, threshold, operator=RescaledSoft(), pruned_scale=1.0)


def feather(
    optimizer: optax.GradientTransformation, setting: Setting
) -> optax.GradientTransformation:
    """Feather: the power threshold with p = 3, a cubic sparsity curve to 50 % of the run, held.

    Above a target of 95 % the updates of pruned weights are halved. Source: Glentis Georgoulakis et
    al., "Feather: An elegant solution to effective DNN sparsification" (BMVC 2023), arXiv
    2310.02448.
    """
    return chained(
        optimizer,
        setting,
        _curve(setting, reach=0.5),
        operator=prox.prox_power(3),
        pruned_scale=0.5 if setting.target > 0.95 else 1.0,
    )


def lats(
    optimizer: optax.GradientTransformation, setting: Setting, knob: float
) -> optax.GradientTransformation:
    """LATS as published: soft, a constant L1 coefficient, and a final threshold to be searched.

    Source: Chen et al., "A Unified Framework for Soft Threshold Pruning" (ICLR 2023), arXiv
    2302.13019.

    Args:
      optimizer: the base optimizer.
      setting: its target is the goal of the search.
      knob: the final threshold.
    """
    threshold = lats_optax.lats_threshold(setting.learning_rate, setting.steps, knob)
    return chained(optimizer, setting, threshold, operator=prox.prox_l1)


@dataclass(frozen=True)
class RescaledSoft:
    """Soft thresholding, times 1.01 / (r + 0.01) for each output channel.

    r is the mean magnitude of what survives in the channel over that of the whole channel, so that
    the rescaled channel is about as large as the dense one. It is an `lats_optax.Operator`.
    """

    def __call__(self, x: Any, strength: Any) -> Any:
        """The rescaled weights."""
        return jax.tree.map(lambda leaf: self._of(leaf, strength), x)

    def _of(self, x: jax.Array, d: Any) -> jax.Array:
        z = prox.prox_l1(x, d)
        axes = tuple(range(x.ndim - 1))
        size = jnp.abs(x)
        whole = jnp.mean(size, axis=axes, keepdims=True)
        kept = jnp.mean(jnp.where(z == 0, 0.0, size), axis=axes, keepdims=True)
        r = kept / jnp.where(whole == 0, 1.0, whole)
        return z * (1.01 / (r + 0.01))

    def magnitude(self, x: jax.Array) -> jax.Array:
        """As that of soft thresholding."""
        return prox.prox_l1.magnitude(x)

    def group_sizes(self, shape: tuple[int, ...]) -> np.ndarray:
        """Weights die one by one."""
        return prox.prox_l1.group_sizes(shape)

    def preimage(self, w: jax.Array, d: Any) -> jax.Array:
        """The weights themselves: the threshold begins at zero, where nothing is rescaled."""
        del d
        return w

    def at(self, count: Any) -> "RescaledSoft":
        """Itself."""
        del count
        return self


def _curve(setting: Setting, *, reach: float, start: float = 0.0) -> lats_optax.TargetSparsity:
    """A cubic sparsity curve between two parts of the run, and the target held from there on."""
    delay = start / reach

    def curve(x: Any) -> Any:
        return lats_optax.control.laws.cubic(np.clip((x - delay) / (1 - delay), 0.0, 1.0))

    return lats_optax.target_sparsity(
        setting.target,
        setting.learning_rate,
        setting.steps,
        law=lats_optax.sparsity_curve(curve),
        reach=reach,
    )


def chained(
    optimizer: optax.GradientTransformation, setting: Setting, threshold: Any, **how: Any
) -> optax.GradientTransformation:
    """Soft threshold pruning behind an optimizer; the rest is for `lats_optax.soft_threshold`."""
    return optax.chain(optimizer, lats_optax.soft_threshold(threshold, mask=setting.mask, **how))
