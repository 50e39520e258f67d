"""Counting multiply-accumulates (MACs): a function's cost by parameter, dense and sparse.

Here belong the counts of a call and the table that prints them; what finds them is in
`mac_walk`.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from lats_optax import masks
from lats_optax.analysis.mac_walk import Tally, walk
from lats_optax.analysis.provenance import ACTIVATION, Value, Weight, has_values
from lats_optax.analysis.tables import table


@dataclass(frozen=True)
class ParameterMacs:
    """One parameter array: its path, shape and zeros, and the MACs that it takes part in.

    Attributes:
      path: such as ``Dense_0/kernel``.
      shape: of the array.
      zeros: how many of its entries are zero; None where only its shape was given.
      dense: MACs, zeros included.
      effective: those with an entry that is not zero; None where ``zeros`` is.
    """

    path: str
    shape: tuple[int, ...]
    zeros: int | None
    dense: int
    effective: int | None

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float | None:
        """Fraction of zeros, in [0, 1]; None where only the shape is known."""
        return None if self.zeros is None else self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True)
class MacsReport:
    """The MACs of one call; ``str()`` is the table.

    Attributes:
      parameters: one entry for each parameter array, in the order of the tree.
      other: MACs where neither operand is a parameter, such as attention scores.
      unknown_loops: how many ``while`` loops were counted as one iteration, because nothing says
        how many they take.
      uncounted: primitives that may multiply arrays and cannot be traced.
    """

    parameters: tuple[ParameterMacs, ...]
    other: int
    unknown_loops: int
    uncounted: tuple[str, ...]

    @property
    def dense(self) -> int:
        """All MACs, zeros included."""
        return self.other + sum(parameter.dense for parameter in self.parameters)

    @property
    def effective(self) -> int | None:
        """All but those with a parameter that is zero; None where only shapes were given."""
        total = self.other
        for parameter in self.parameters:
            if parameter.effective is None:
                return None
            total += parameter.effective
        return total

    def __str__(self) -> str:
        """The table: the parameters that multiply anything, the total, and remarks."""
        rows = [
            (
                parameter.path,
                "×".join(map(str, parameter.shape)) or "scalar",
                "" if parameter.sparsity is None else f"{parameter.sparsity:.2%}",
                *_counts(parameter.dense, parameter.effective),
            )
            for parameter in self.parameters
            if parameter.dense
        ]
        if self.other:
            rows.append(("no parameter", "", "", *_counts(self.other, self.other)))
        total = ("MACs", "", "", *_counts(self.dense, self.effective))
        head = ("parameter", "shape", "sparsity", "dense", "effective")
        lines = table(head, rows, [total], least=(0, 0, 8, 17, 17))
        if self.unknown_loops:
            lines.append(
                f"while loops of unknown length, counted as one iteration: {self.unknown_loops}"
            )
        if self.uncounted:
            lines.append(f"not counted: {', '.join(self.uncounted)}")
        return "\n".join(lines)


def _counts(dense: int, effective: int | None) -> tuple[str, str]:
    return f"{dense:,}", "" if effective is None else f"{effective:,}"


def count_macs(fn: Callable[..., Any], *args: Any, params: int = 0) -> MacsReport:
    """Count the multiply-accumulates (MACs) of a function, dense and with sparse parameters.

    1 MAC is 2 FLOPs. A product of arrays takes ``M N K`` MACs. A convolution takes one for each
    output entry, input channel of its group and position of its kernel. Positions on the padding
    count, as they do in published counts. A transposed convolution is counted without the zeros
    between its inputs. Every entry of a parameter takes part in equally many, so a parameter of
    sparsity s has ``(1 - s) * dense`` effective ones. Elementwise arithmetic, biases,
    normalization and pooling are not counted, nor are zeros among activations.

    Nothing is computed: the function is traced to a jaxpr, and through ``jit``, ``checkpoint``,
    custom derivatives, ``custom_vmap``, ``scan`` (times its length), ``cond`` (the dearest branch),
    ``pmap`` and ``shard_map`` (all devices together). A parameter is followed through casts,
    reshapes, transposes, slices, splits, tiling, concatenation and arithmetic with constants and
    other parameters. The zeros that masks (``jnp.where``, or a product) and padding bring count as
    its own, where these are constants or parameters. Where a parameter is indexed with what a loop
    counts, as a stack of layers is, its mean sparsity stands for that of each slice. A BCOO or BCSR
    array takes part with the entries that it stores. A warning names what cannot be counted, such
    as callbacks and factorizations.

    Args:
      fn: any function that JAX can trace; anything static in it is bound beforehand, with
        ``functools.partial`` or a lambda.
      *args: its arguments: pytrees of arrays, or of ``jax.ShapeDtypeStruct``. A batch of one gives
        the counts of one example.
      params: which argument holds the parameters. Arrays there give their sparsity; from shapes
        alone come the dense counts.

    Returns:
      A :class:`MacsReport`.

    Raises:
      TypeError: ``fn`` is not callable.
      ValueError: ``params`` is not the number of an argument, or that has no arrays.

    Warns:
      UserWarning: primitives that may multiply arrays are not counted.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jnp.array([[0.0, 2.0], [0.0, 1.0], [3.0, 0.0]]), "bias": jnp.ones(2)}
      >>> fn = lambda params, x: jax.nn.relu(x @ params["kernel"] + params["bias"])
      >>> print(count_macs(fn, params, jax.ShapeDtypeStruct((1, 3), jnp.float32)))
      parameter  shape  sparsity              dense          effective
      ----------------------------------------------------------------
      kernel       3×2    50.00%                  6                  3
      ----------------------------------------------------------------
      MACs                                        6                  3
    """
    if not callable(fn):
        raise TypeError(f"fn: {fn!r} is not allowed; allowed are functions of the arguments")
    if isinstance(params, bool) or not isinstance(params, int) or not 0 <= params < len(args):
        raise ValueError(
            f"params: {params!r} is not the number of an argument; allowed are 0 to {len(args) - 1}"
            if args
            else "params: there are no arguments; pass those of the function behind it"
        )
    leaves = jax.tree.leaves(args[params])
    if not leaves or not all(hasattr(leaf, "shape") for leaf in leaves):
        raise ValueError(
            f"params: argument {params} is not a pytree of arrays; which one has the parameters?"
        )
    masks.check_arrays("params", args[params])
    weights = [Weight.whole(index, leaf) for index, leaf in enumerate(leaves)]
    inputs: list[Value] = []
    for number, argument in enumerate(args):
        found = len(jax.tree.leaves(argument))
        inputs += weights if number == params else [ACTIVATION] * found
    tally = Tally()
    walk(jax.make_jaxpr(fn)(*args), inputs, tally, 1)

    if tally.uncounted:
        warnings.warn(
            f"fn: not counted are {', '.join(sorted(tally.uncounted))}, which may multiply arrays; "
            "the counts are of everything else",
            UserWarning,
            stacklevel=2,
        )

    names = jax.tree.leaves(masks.paths(args[params]))
    parameters = []
    for index, (name, leaf, weight) in enumerate(zip(names, leaves, weights)):
        shape, known = tuple(leaf.shape), has_values(leaf)
        zeros = int((1 - weight.parts[0].density) * math.prod(shape)) if known else None
        effective = round(tally.effective[index]) if known else None
        parameters.append(ParameterMacs(name, shape, zeros, round(tally.dense[index]), effective))
    return MacsReport(
        tuple(parameters),
        round(tally.dense[None]),
        tally.unknown_loops,
        tuple(sorted(tally.uncounted)),
    )
