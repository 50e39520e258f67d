"""A smaller dense model: channels that are zero, constant or not read are cut.

Here belongs `compact`: its arguments, and the order in which the other files do their part.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from lats_optax.checks.arrays import misfits
from lats_optax.compaction.fold import fold
from lats_optax.compaction.graph import Layer
from lats_optax.compaction.plan import Plan
from lats_optax.compaction.report import CompactReport, report_of
from lats_optax.compaction.sequential import wire_sequential
from lats_optax.compaction.wiring import WIRED, wire


class Compacted(NamedTuple):
    """What `compact` returns.

    Attributes:
      model: of the class of the one that was given, with fewer channels.
      variables: ``{"params": …, "batch_stats": …}``, NumPy arrays of the dtypes that were given.
      report: what was cut.
    """

    model: Any
    variables: dict[str, Any]
    report: CompactReport


def compact(
    model: nn.Module, variables: Mapping[str, Any], *, sample: Any = None, multiple_of: int = 1
) -> Compacted:
    """A physically smaller model with the same outputs in evaluation, to float tolerance.

    A channel is cut where, in every layer that shares it (a residual stream, a depth-wise
    convolution, a normalization), its value does not depend on the input, or nothing reads it.
    Behind a normalization that number is rarely zero: it goes into the bias, or the mean of the
    normalization, of what read it. What cannot take it up (a convolution that is padded with zeros,
    a classifier without a bias) keeps one constant channel that stands for all of them.

    The model that comes back can be trained on, saved and, if it is of the zoo, built again:
    ``models.create(**models.describe(model))``. In training it is not the same as before: there,
    constant channels are normalized by the batch.

    Args:
      model: a convolutional one of the zoo, or a ``flax.linen.Sequential`` of convolutions, dense
        layers, batch normalization in evaluation and functions. Other modules keep their channels.
      variables: ``{"params": …, "batch_stats": …}``, with zeros for what has been pruned.
      sample: an input of a ``Sequential``, or a ``jax.ShapeDtypeStruct`` of one; a batch of one is
        enough. The zoo needs none.
      multiple_of: what the channels of each layer are rounded up to, but not beyond what it had,
        by keeping some that compute nothing. Hardware multiplies whole tiles, so that a layer of 38
        channels may take longer than one of 48: `benchmarks/compaction.py` measures it.

    Returns:
      A `Compacted`.

    Raises:
      ValueError: the wiring of ``model``'s class is not known; ``variables`` are not
        those of the model, or not finite; a ``Sequential`` has no sample, or cannot be run on it;
        layers would be left without a channel; ``multiple_of`` < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> model = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
      >>> x = jnp.array([[1.0, -2.0, 3.0]])
      >>> variables = model.init(jax.random.key(0, impl="rbg"), x)
      >>> kernel = variables["params"]["layers_0"]["kernel"]
      >>> variables["params"]["layers_0"]["kernel"] = kernel.at[:, 1:3].set(0)
      >>> small = compact(model, variables, sample=x)
      >>> print(small.report)
      layer             channels   parameters  stay, computing nothing
      ...
      >>> bool(jnp.allclose(small.model.apply(small.variables, x), model.apply(variables, x)))
      True
    """
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of!r}; allowed: a whole number of 1 or more.")
    arrays = _checked(model, variables, sample)
    # Variances below zero, or numbers that overflow, become NaN: channels that vary.
    with np.errstate(all="ignore"):
        if isinstance(model, nn.Sequential):
            wiring = wire_sequential(model, arrays, sample)
        else:
            wiring = wire(model, arrays)  # type: ignore[arg-type]
        graph = wiring.graph
        while True:
            plan = Plan(graph, arrays)
            _refuse_empty(plan)
            plan.round_up(multiple_of)
            broken = plan.broken()
            if not broken:
                break
            graph = graph.fix(broken)
        folded = fold(plan, arrays)
    small, keep = dict(folded), plan.keep
    for node in graph.nodes.values():
        small |= node.cut(folded, keep)
    report = report_of(plan, arrays, small)
    tree = traverse_util.unflatten_dict(small, sep="/")  # type: ignore[no-untyped-call]
    return Compacted(wiring.rebuild(keep), tree, report)


def _checked(model: nn.Module, variables: Mapping[str, Any], sample: Any) -> dict[str, np.ndarray]:
    """The variables by path, after comparing them with those that the model would make."""
    known = type(model) in WIRED
    if not known and type(model) is not nn.Sequential:
        names = ", ".join(kind.__name__ for kind in [*WIRED, nn.Sequential])
        raise ValueError(f"model is {type(model).__name__}; allowed: {names}.")
    if not isinstance(variables, Mapping):
        raise ValueError(f"variables is {variables!r}; allowed: a dict with params in it.")
    unboxed = nn.meta.unbox(variables)
    flat = traverse_util.flatten_dict(unboxed, sep="/")  # type: ignore[no-untyped-call]
    arrays = {path: np.array(leaf) for path, leaf in flat.items()}
    if known:
        first = arrays.get(f"params/{next(iter(model.plan()))}/kernel", np.zeros((3, 0)))
        channels = first.shape[-2] if first.ndim > 1 else 3
        init = partial(model.init, train=False)
        sample = np.zeros((1, 32, 32, channels), np.float32) if sample is None else sample
    elif sample is None:
        raise ValueError("sample is None; allowed with a Sequential: an input, or its shape.")
    else:
        init = partial(model.init)
    try:
        shapes = jax.eval_shape(init, jax.random.key(0), sample)
    except Exception as error:
        raise ValueError(f"sample: the model cannot be called with it: {error}") from error
    wanted = traverse_util.flatten_dict(shapes, sep="/")  # type: ignore[no-untyped-call]
    problems = misfits(arrays, {path: {leaf.shape} for path, leaf in wanted.items()})
    problems = problems or [
        f"{path} is not finite"
        for path, array in sorted(arrays.items())
        if not np.isfinite(np.asarray(array, np.float64)).all()
    ]
    if problems:
        raise ValueError("\n  ".join(["variables do not fit the model:", *problems]))
    return arrays


def _refuse_empty(plan: Plan) -> None:
    nodes = plan.graph.nodes.items()
    keep = plan.keep
    empty = [name for name, node in nodes if isinstance(node, Layer) and not keep[name].any()]
    if empty:
        raise ValueError(
            f"variables leave no channel in {', '.join(empty)}: what the model computes does not "
            "depend on these layers. Allowed: at least one channel in each that is not zero and is "
            "read; prune these layers less, or leave them out."
        )
