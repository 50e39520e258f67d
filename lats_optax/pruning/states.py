"""The states of `soft_threshold` within an optimizer state, wherever they are in it.

Here belongs what finds and reads them: of their types, or in dicts and lists, as a checkpoint gives
them back that is read without its types.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax import masks
from lats_optax.operators.parts import TreeOperator
from lats_optax.prox import prox_l1
from lats_optax.target import default_operator
from lats_optax.transforms import SoftThresholdState


class State(NamedTuple):
    """One state of `soft_threshold`, read.

    Attributes:
      count: the number of steps taken.
      threshold: a scalar, or one for each latent leaf.
      latents: path -> latent weights.
      steps: those of `target_sparsity`; None under another threshold.
      zeros: how many weights are zero at its target, [1] or [layers]; None under another threshold.
      has_inner: whether there is an optimizer in it.
    """

    count: int  # type: ignore[assignment]  # tuple.count
    threshold: Any
    latents: dict[str, Any]
    steps: int | None
    zeros: list[int] | None
    has_inner: bool

    @property
    def operator(self) -> TreeOperator:
        """The one that `soft_threshold` takes by default."""
        return prox_l1 if self.steps is None else default_operator(self.steps)


class Latent(NamedTuple):
    """The latent weights of one parameter, what is applied to them, and which state has them."""

    theta: Any
    threshold: Any
    operator: TreeOperator
    step: int
    state: int


def is_state(node: Any) -> bool:
    """Whether a node of an optimizer state is one of `soft_threshold`."""
    named = isinstance(node, Mapping) and {"count", "threshold", "latent"} <= node.keys()
    return named or isinstance(node, SoftThresholdState)


def find(opt_state: Any) -> list[State]:
    """All states of `soft_threshold` in an optimizer state.

    Raises:
      ValueError: there is none.
    """
    nodes = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    if not nodes:
        raise ValueError(
            "opt_state: there is no state of soft_threshold in it; its structure is "
            f"{jax.tree.structure(opt_state)}"
        )
    return [_read(node) for node in nodes]


def latents(opt_state: Any) -> dict[str, Latent]:
    """Path of a pruned parameter -> its latent weights and threshold, of all states in a tree.

    Raises:
      ValueError: there is no state, two have latent weights for one parameter, or the devices have
        thresholds of their own.
    """
    found: dict[str, Latent] = {}
    for number, state in enumerate(find(opt_state)):
        _check_equal_on_devices(state.threshold)
        # One threshold for all, or one for each layer.
        thresholds = jnp.broadcast_to(state.threshold, (len(state.latents),))
        for (name, theta), d in zip(state.latents.items(), thresholds):
            if name in found:
                raise ValueError(
                    f"opt_state: two states have latent weights for {name}; chain one "
                    "soft_threshold"
                )
            found[name] = Latent(theta, d, state.operator, state.count, number)
    return found


def leaf_of(node: Any) -> Any:
    """The only leaf of a node; a checkpoint without types may hold it in a box."""
    (leaf,) = jax.tree.leaves(node)
    return leaf


def _check_equal_on_devices(threshold: Any) -> None:
    """Refuses a threshold that should be the same on all devices and is not.

    Within `jax.pmap`, and a `jax.shard_map` that checks nothing, no type tells while a program is
    traced that the latent weights differ; what each device has selected tells it afterwards.
    """
    if isinstance(threshold, jax.Array) and threshold.is_fully_replicated:
        each = np.stack([np.asarray(shard.data) for shard in threshold.addressable_shards])
        if not np.array_equal(each, np.broadcast_to(each[:1], each.shape), equal_nan=True):
            raise ValueError(
                f"opt_state: the threshold is {each.min():g} on one device and {each.max():g} on "
                "another: each selected a quantile of its own latent weights. Within jax.shard_map "
                "and jax.pmap they must be the same on all devices (average the gradients, by "
                "jax.lax.pmean; check_vma=True checks it); update sharded weights under jax.jit"
            )


def _read(node: Any) -> State:
    values = _fields(node)
    control = _fields(values.get("control"))
    steps, zeros = control.get("steps"), control.get("zeros")
    names = jax.tree.leaves(masks.paths(values["latent"]))
    return State(
        count=int(leaf_of(values["count"])),
        threshold=leaf_of(values["threshold"]),
        latents=dict(zip(names, jax.tree.leaves(values["latent"]))),
        steps=None if steps is None else int(leaf_of(steps)),
        zeros=None if zeros is None else jnp.atleast_1d(leaf_of(zeros)).tolist(),
        has_inner=bool(values.get("inner_state")),
    )


def _fields(node: Any) -> Mapping[str, Any]:
    """The fields of a state by name; of a node without names, none."""
    if isinstance(node, Mapping):
        return node
    fields: Mapping[str, Any] = node._asdict() if hasattr(node, "_asdict") else {}
    return fields
