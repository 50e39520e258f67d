"""One-shot pruning with Gram matrices, and the report of what it cost.

Here belong `prune_with`, how a sparsity becomes a budget for each matrix, and the report.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lats_optax import masks
from lats_optax.analysis.tables import table
from lats_optax.calibration.budgets import Budget, Pattern, PerLayer, PerOutput, as_pattern
from lats_optax.calibration.gram import Gram, Grams
from lats_optax.calibration.solvers import METHODS, Solver
from lats_optax.calibration.solvers.metric import diagonal, error, times
from lats_optax.distributions import Distribution, check_sparsity
from lats_optax.quantile import kth_smallest

BUDGETS = ("global", "layer", "output")
# Matrices of fewer weights are solved several at a time.
_TOGETHER = 1 << 20


@dataclass(frozen=True)
class PrunedLayer:
    """One product after pruning.

    Attributes:
      path: of the parameter.
      size: number of weights.
      zeros: how many are zero.
      error: ``||X (W - W0)||^2 / ||X W0||^2`` over its matrices together; 0 where all is silent.
      remark: a problem, if any: a singular Gram matrix, or one that is not full.
    """

    path: str
    size: int
    zeros: int
    error: float
    remark: str = ""


@dataclass(frozen=True)
class PruneReport:
    """What pruning did to each product; ``str()`` is the table."""

    layers: tuple[PrunedLayer, ...]

    @property
    def size(self) -> int:
        """Number of weights of all products."""
        return sum(each.size for each in self.layers)

    @property
    def zeros(self) -> int:
        """How many of them are zero."""
        return sum(each.zeros for each in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among all pruned weights."""
        return self.zeros / self.size

    @property
    def error(self) -> float:
        """The mean of the relative errors."""
        return sum(each.error for each in self.layers) / len(self.layers)

    def __str__(self) -> str:
        """The table: a line for each product, then all of them."""
        whole = PrunedLayer("all, and their mean error", self.size, self.zeros, self.error)
        *body, last = [
            (
                row.path,
                f"{row.size:,}",
                f"{row.zeros / row.size:.2%}",
                f"{row.error:.3e}",
                row.remark,
            )
            for row in (*self.layers, whole)
        ]
        head = ("parameter", "weights", "sparsity", "relative error", "")
        return "\n".join(table(head, body, [last], least=(0, 13, 8, 14)))


class Pruned(NamedTuple):
    """Pruned parameters, and the report."""

    params: Any
    report: PruneReport


def prune_with(
    grams: Grams,
    params: Any,
    sparsity: float | Distribution | None = None,
    *,
    pattern: Any = None,
    method: str | Solver = "lats",
    budget: str | None = None,
) -> Pruned:
    """Prune the parameters that :func:`calibrate` has met, each by its Gram matrix.

    Each matrix W of a parameter becomes sparse so that ``||X (W - W0)||^2`` stays small, X what it
    was multiplied with. Each is solved on one device; where parameters are on several, the matrices
    go round them.

    Args:
      grams: of the same parameters.
      params: the pytree of arrays that was calibrated.
      sparsity: fraction of zeros in [0, 1), or a function from parameters to one for each of them,
        such as :func:`lats_optax.erdos_renyi` gives it. It is given a dict by path of those that
        are pruned.
      pattern: in the place of a sparsity: (n, m), or an object with attributes n and m: n of every
        m weights that follow each other along the inputs stay.
      method: ``lats``, ``lasso``, ``sparsegpt``, ``wanda`` or ``magnitude``; or a function
        ``(w, gram, budget) -> w`` as those of :mod:`lats_optax.calibration.solvers`.
      budget: which weights compete: those of one ``output``, of one ``layer``, or of all
        (``global``: how many zeros each layer gets is decided by one bound on Wanda's scores, in
        units of the norm of the layer's outputs). Default (None): ``output`` for ``wanda``, as in
        its paper, and ``layer`` otherwise.

    Returns:
      :class:`Pruned`: a pytree like ``params``, and a report. The number of zeros is that which was
      named, to the weight, in each layer, output or group of m. What has no Gram matrix stays.

    Raises:
      TypeError: ``grams`` is none.
      ValueError: both or neither of a sparsity and a pattern; other parameters than those that were
        calibrated; a sparsity, pattern, method or budget that is not allowed; a pattern that does
        not divide the inputs; ``sparsegpt`` with diagonal Gram matrices.

    Example:
      >>> import jax.numpy as jnp
      >>> from lats_optax.calibration import calibrate
      >>> fn = lambda params, x: x @ params["kernel"]
      >>> params = {"kernel": jnp.array([[0.5], [1.0]])}
      >>> x = jnp.array([[1.0, 1.0], [1.0, 0.9]])
      >>> pruned = prune_with(calibrate(fn, params, [x]), params, 0.5)
      >>> pruned.params["kernel"].round(2)
      Array([[0.  ],
             [1.52]], dtype=float32)
    """
    if not isinstance(grams, Grams):
        raise TypeError(f"grams: {grams!r} is not allowed; allowed is what calibrate gives")
    leaves, structure = jax.tree.flatten(params)
    masks.check_arrays("params", params)
    found = dict(zip(jax.tree.leaves(masks.paths(params)), map(jnp.asarray, leaves)))
    _check_shapes(grams, found)
    solver, kind = _method(method, pattern, budget)
    zeros = _zeros(grams, found, sparsity, kind, budget)

    solved = []
    for number, (gram, its) in enumerate(zip(grams.products, zeros)):
        solved.append(_solve(solver, kind, gram, found[gram.path], its, number))
    layers = []
    for gram, parts in zip(grams.products, solved):
        leaf = found[gram.path]
        matrices, away, whole = (jnp.concatenate(each) for each in zip(*(p for p in parts)))
        found[gram.path] = pruned = jax.device_put(gram.pack(matrices, leaf), leaf.sharding)
        layers.append(_layer(gram, pruned, away, whole))
    return Pruned(jax.tree.unflatten(structure, list(found.values())), PruneReport(tuple(layers)))


def _method(
    method: str | Solver, pattern: Any, budget: str | None
) -> tuple[Solver, Callable[[Any], Budget]]:
    """The solver, and what makes a budget of a number of zeros."""
    if not callable(method) and method not in METHODS:
        raise ValueError(f"method: {method!r} is not allowed; allowed are {', '.join(METHODS)}")
    solver = method if callable(method) else METHODS[method]
    if budget is not None and budget not in BUDGETS:
        raise ValueError(f"budget: {budget!r} is not allowed; allowed are {', '.join(BUDGETS)}")
    if pattern is not None:
        if budget is not None:
            raise ValueError(f"budget: {budget!r} has no meaning under a pattern; leave it out")
        return solver, as_pattern(pattern).always
    name = budget or ("output" if method == "wanda" else "layer")
    return solver, PerOutput if name == "output" else PerLayer


def _zeros(
    grams: Grams,
    found: Mapping[str, jax.Array],
    sparsity: Any,
    kind: Callable[[Any], Budget],
    budget: str | None,
) -> list[np.ndarray]:
    """How many zeros each matrix of each product gets: of all of it, or of each output."""
    one = kind(0)
    if isinstance(one, Pattern):
        if sparsity is not None:
            raise ValueError(f"sparsity: {sparsity!r} beside a pattern; allowed is one of the two")
        for gram in grams.products:
            if gram.inputs % one.m:
                raise ValueError(
                    f"pattern: {one.m} does not divide the {gram.inputs} inputs of {gram.path}; "
                    "leave it out of the mask that calibrate takes"
                )
        return [np.zeros(len(gram.matrices), np.int32) for gram in grams.products]
    if sparsity is None:
        raise ValueError("sparsity: it is None, and so is pattern; allowed is one of the two")
    paths = dict.fromkeys(gram.path for gram in grams.products)
    if not masks.is_function(sparsity):
        named = dict.fromkeys(paths, check_sparsity("sparsity", sparsity))
        if budget == "global":
            return _global(grams, found, named.popitem()[1])
    else:
        if budget == "global":
            raise ValueError("budget: 'global' takes one number for all; allowed is 'layer'")
        given = sparsity({path: found[path] for path in paths})
        named = {path: check_sparsity(f"sparsity of {path}", given[path]) for path in paths}
    counted = []
    for gram in grams.products:
        matrices, size = len(gram.matrices), gram.inputs
        if isinstance(one, PerLayer):
            size = _weights(gram, found[gram.path])
        zeros = min(round(named[gram.path] * size), size - 1)
        counted.append(np.full(matrices, zeros, np.int32))
    return counted


def _weights(gram: Gram, leaf: jax.Array) -> int:
    """Number of weights of one matrix, its groups together."""
    shape = jax.eval_shape(gram.unpack, leaf).shape
    return int(np.prod(shape[1:]))


def _global(grams: Grams, found: Mapping[str, jax.Array], sparsity: float) -> list[np.ndarray]:
    """One bound for all layers, on Wanda's scores in units of the norm of a layer's outputs."""
    scores = []
    for gram in grams.products:
        w = gram.unpack(found[gram.path])
        whole = jnp.sqrt(jnp.sum(w * jax.vmap(times)(gram.matrices, w), axis=(1, 2, 3)))
        sizes = jnp.abs(w) * jnp.sqrt(jax.vmap(diagonal)(gram.matrices))
        scores.append(sizes / jnp.where(whole > 0, whole, 1.0)[:, None, None, None])
    left = round(sparsity * sum(each.size for each in scores))
    bound = kth_smallest(scores, left)
    below = [np.array(jnp.sum(each < bound, axis=(1, 2, 3))) for each in scores]
    ties = [np.array(jnp.sum(each == bound, axis=(1, 2, 3))) for each in scores]
    left -= sum(int(each.sum()) for each in below)
    for each, tied, own in zip(below, ties, scores):
        for at, more in enumerate(tied):
            added = min(int(more), left)
            left -= added
            each[at] = min(each[at] + added, own[0].size - 1)
    return [each.astype(np.int32) for each in below]


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve_matrices(
    solver: Solver, kind: Callable[[Any], Budget], w: jax.Array, gram: jax.Array, zeros: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Matrices [matrices, groups, inputs, outputs] after pruning, and the squares of the errors."""

    def one(w: jax.Array, gram: jax.Array, zeros: jax.Array) -> Any:
        after = solver(w, gram, kind(zeros))
        return after, error(gram, after, w), error(gram, w, jnp.zeros_like(w))

    return jax.vmap(one)(w, gram, zeros)


def _solve(
    solver: Solver,
    kind: Callable[[Any], Budget],
    gram: Gram,
    leaf: jax.Array,
    zeros: np.ndarray,
    number: int,
) -> list[Any]:
    """The matrices of a product, some at a time, each on one device."""
    if solver is METHODS["sparsegpt"] and gram.kind == "diagonal":
        raise ValueError(
            f"method: 'sparsegpt' needs more than the diagonal of the Gram matrix of {gram.path}; "
            "allowed are wanda, magnitude and lats, or a higher largest in calibrate"
        )
    whole = gram.unpack(leaf)
    devices = sorted(leaf.sharding.device_set, key=str)
    together = max(_TOGETHER // whole[0].size, 1)
    parts = []
    for turn, start in enumerate(range(0, len(whole), together)):
        some = slice(start, start + together)
        # A device alone would leave arrays of explicit types their mesh.
        one = SingleDeviceSharding(devices[(number + turn) % len(devices)])
        arrays = (whole[some], gram.matrices[some], zeros[some])
        found = solve_matrices(solver, kind, *(jax.device_put(each, one) for each in arrays))
        parts.append([jax.device_put(each, _home(leaf)) for each in found])
    return parts


def _home(leaf: jax.Array) -> Any:
    """Every device of a leaf."""
    if isinstance(leaf.sharding, NamedSharding):
        return NamedSharding(leaf.sharding.mesh, PartitionSpec())  # type: ignore[no-untyped-call]
    return leaf.sharding


def _layer(gram: Gram, pruned: jax.Array, away: jax.Array, whole: jax.Array) -> PrunedLayer:
    after = gram.unpack(pruned)
    total = float(jnp.sum(whole))
    remarks = [gram.singular and f"{gram.singular}, so it is damped"]
    if gram.kind != "full":
        remarks.append(f"its Gram matrix is {gram.kind}")
    return PrunedLayer(
        gram.path,
        after.size,
        int(after.size - jnp.count_nonzero(after)),
        float(jnp.sum(away)) / total if total else 0.0,
        "; ".join(filter(None, remarks)),
    )


def _check_shapes(grams: Grams, found: Mapping[str, jax.Array]) -> None:
    shapes = {path: tuple(leaf.shape) for path, leaf in found.items()}
    if shapes != dict(grams.shapes):
        unlike = [
            f"{path}: {shapes.get(path, 'absent')}, "
            f"calibrated as {grams.shapes.get(path, 'absent')}"
            for path in {**grams.shapes, **shapes}
            if shapes.get(path) != grams.shapes.get(path)
        ]
        raise ValueError(f"params: they are not those that were calibrated: {masks.some(unlike)}")
