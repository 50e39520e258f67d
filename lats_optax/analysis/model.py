"""What is left of a sparse model, layer by layer, as a table.

Pure functions of a model's parameters and of the MACs that were counted for them.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lats_optax.analysis.macs import MacsReport
from lats_optax.analysis.sparsity import sparsity
from lats_optax.analysis.tables import table

_BINS = 201


@dataclass(frozen=True)
class Layer:
    """One array of parameters.

    Attributes:
      path: such as ``stem/kernel``.
      shape: of the array.
      zeros: how many of its entries are zero.
      prunable: whether :func:`lats_optax.prunable` selects it.
      outputs, inputs: channels, as Flax has them: the last axis and the one before; 0 for arrays of
        fewer than two dimensions or no entries.
      zero_outputs, zero_inputs: channels whose weights are all zero.
      magnitudes: the 5, 50 and 95 % quantiles of the absolute values of the weights that are
        finite and not zero; None where there are none.
      dense: MACs, zeros included; None where they were not counted.
      effective: those with a weight that is not zero.
    """

    path: str
    shape: tuple[int, ...]
    zeros: int
    prunable: bool
    outputs: int
    inputs: int
    zero_outputs: int
    zero_inputs: int
    magnitudes: tuple[float, float, float] | None
    dense: int | None
    effective: int | None

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class ModelReport:
    """A model; ``str()`` is the table.

    Attributes:
      layers: one entry for each array of parameters, in the order of the tree.
      macs: the MACs of one call; None where they were not counted.
      histogram: how many prunable weights that are finite and not zero lie between the edges.
      edges: one more than there are counts, in the units of the weights.
      not_finite: paths of the arrays that hold an infinity or a NaN.
    """

    layers: tuple[Layer, ...]
    macs: MacsReport | None
    histogram: np.ndarray
    edges: np.ndarray
    not_finite: tuple[str, ...]

    @property
    def shown(self) -> tuple[Layer, ...]:
        """The layers that have a line: prunable ones and those that multiply, or else all."""
        return tuple(la for la in self.layers if la.prunable or la.dense) or self.layers

    def __str__(self) -> str:
        """The table: layers one by one, the totals, and remarks."""
        head = ("layer", "shape", "weights", "non-zero", "sparsity", "MACs", "effective")
        body = [_row(layer.path, layer.shape, [layer]) for layer in self.shown]
        foot = [
            _row("prunable weights", (), [layer for layer in self.layers if layer.prunable]),
            _row("all parameters", (), self.layers),
        ]
        if self.macs is not None and (other := self.macs.other):
            total, effective = self.macs.dense, self.macs.effective or 0
            foot.append(("no parameter", "", "", "", "", f"{other:,}", f"{other:,}"))
            foot.append(("MACs", "", "", "", "", f"{total:,}", f"{effective:,}"))
        columns = len(head) if self.macs is not None else 5
        body, foot = ([row[:columns] for row in rows] for rows in (body, foot))
        return "\n".join([*table(head[:columns], body, foot), *self._remarks()])

    def _remarks(self) -> list[str]:
        layers = [layer for layer in self.layers if layer.prunable]
        remarks = []
        for kind in ("outputs", "inputs"):
            zero = sum(getattr(layer, f"zero_{kind}") for layer in layers)
            total = sum(getattr(layer, kind) for layer in layers)
            remarks.append(f"{zero:,} of {total:,} {kind[:-1]} channels")
        remarks = [f"wholly zero: {', '.join(remarks)}"] if layers else ["nothing is prunable"]
        if empty := [layer.path for layer in layers if layer.size == layer.zeros and layer.size]:
            remarks.append(f"nothing is left of: {', '.join(empty)}")
        if self.not_finite:
            remarks.append(f"not finite: {', '.join(self.not_finite)}")
        if self.macs is not None and self.macs.uncounted:
            remarks.append(f"not counted: {', '.join(self.macs.uncounted)}")
        return remarks


def inspect_model(params: Any, macs: MacsReport | None = None) -> ModelReport:
    """Measure what is left of each layer.

    Args:
      params: a pytree of arrays.
      macs: what :func:`lats_optax.count_macs` says of the same parameters.

    Returns:
      The report; ``str()`` of it is a table.

    Raises:
      ValueError: there are no arrays; ``macs`` is of other parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import lats_optax
      >>> params = {"kernel": jnp.array([[0.5, 0.0, -2.0], [0.0, 0.0, 0.0]]), "bias": jnp.ones(3)}
      >>> call = lambda params, x: x @ params["kernel"] + params["bias"]
      >>> print(inspect_model(params, lats_optax.count_macs(call, params, jnp.ones((1, 2)))))
      layer             shape  weights  non-zero  sparsity  MACs  effective
      ---------------------------------------------------------------------
      kernel              2×3        6         2    66.67%     6          2
      ---------------------------------------------------------------------
      prunable weights               6         2    66.67%     6          2
      all parameters                 9         5    44.44%     6          2
      wholly zero: 1 of 3 output channels, 1 of 2 input channels
    """
    with warnings.catch_warnings():
        # The table says it where no parameter is prunable.
        warnings.simplefilter("ignore")
        measured = sparsity(params).layers
    if not measured:
        raise ValueError("there are no arrays in it")
    counted: Sequence[Any] = [None] * len(measured)
    if macs is not None:
        counted = macs.parameters
        if [c.path for c in counted] != [m.path for m in measured]:
            raise ValueError("macs: its parameters are not those of params")
    layers, weights, not_finite = [], [], []
    for found, count, leaf in zip(measured, counted, jax.tree.leaves(params)):
        array = np.asarray(leaf)
        values = _values(array)
        if not np.all(np.isfinite(array)):
            not_finite.append(found.path)
        if found.prunable:
            weights.append(values)
        quantiles = np.quantile(np.abs(values), (0.05, 0.5, 0.95)) if values.size else None
        layers.append(
            Layer(
                found.path,
                found.shape,
                found.zeros,
                found.prunable,
                *_channels(array),
                None if quantiles is None else tuple(map(float, quantiles)),  # type: ignore[arg-type]
                None if count is None else count.dense,
                None if count is None else count.effective,
            )
        )
    every = np.concatenate([np.zeros(0, np.float32), *weights])
    limit = float(np.abs(every).max()) if every.size else 1.0
    histogram, edges = np.histogram(every, _BINS, (-limit, limit))
    return ModelReport(tuple(layers), macs, histogram, edges, tuple(not_finite))


def in_short(number: float) -> tuple[float, str]:
    """A number between 1 and 1000, and the prefix of its unit.

    >>> in_short(4_089_184_256), in_short(640)
    ((4.089184256, 'G'), (640.0, ''))
    """
    for scale, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return number / scale, prefix
    return float(number), ""


def _row(name: str, shape: tuple[int, ...], layers: Sequence[Layer]) -> tuple[str, ...]:
    size, zeros = sum(layer.size for layer in layers), sum(layer.zeros for layer in layers)
    dense, effective = (sum(getattr(la, f) or 0 for la in layers) for f in ("dense", "effective"))
    share = f"{zeros / size if size else 0:.2%}"
    numbers = (f"{size:,}", f"{size - zeros:,}", share, f"{dense:,}", f"{effective:,}")
    return (name, "×".join(map(str, shape)), *numbers)


def _values(array: np.ndarray) -> np.ndarray:
    """The weights of an array that are real, finite and not zero."""
    if array.dtype.kind in "cb":
        return np.zeros(0, np.float32)
    flat = array.reshape(-1).astype(np.float32)
    return flat[np.isfinite(flat) & (flat != 0)]


def _channels(array: np.ndarray) -> tuple[int, int, int, int]:
    """Output and input channels, and how many of each are wholly zero."""
    if array.ndim < 2 or not array.size:
        return 0, 0, 0, 0
    used = array != 0
    outputs = used.any(axis=tuple(range(array.ndim - 1)))
    inputs = used.any(axis=(*range(array.ndim - 2), array.ndim - 1))
    return outputs.size, inputs.size, int((~outputs).sum()), int((~inputs).sum())
