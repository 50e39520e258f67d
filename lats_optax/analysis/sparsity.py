"""Measuring sparsity: per layer and in total, and the table that prints it."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp

from lats_optax import masks
from lats_optax.analysis.tables import table
from lats_optax.masks import MaskOrFunction
from lats_optax.operators.parts import check_fits, parts_of
from lats_optax.operators.protocol import Groups
from lats_optax.pruning.progress import summary


@dataclass(frozen=True)
class LayerSparsity:
    """One parameter array: its path and shape, how many entries it has and how many are zero.

    And, where groups are counted, how many of them it has and how many are zero as a whole; of N:M
    patterns, how many have n weights left at most.
    Where it is not prunable, ``reason`` says why in a word or two. Random keys have no entries.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    zeros: int
    prunable: bool
    groups: int | None = None
    zero_groups: int | None = None
    reason: str = ""

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, in [0, 1]."""
        return _fraction(self.zeros, self.size)


@dataclass(frozen=True)
class SparsityReport:
    """The sparsity of a model: plain names count prunable weights, ``total_`` all parameters.

    Attributes:
      layers: one entry for each parameter array, in the order of the tree.
      progress: sentences on how the run went, where its state was given.
      counted: which groups are counted, in two words.
    """

    layers: tuple[LayerSparsity, ...]
    progress: tuple[str, ...] = ()
    counted: str = ""

    @property
    def size(self) -> int:
        """Number of prunable weights."""
        return sum(layer.size for layer in self.layers if layer.prunable)

    @property
    def zeros(self) -> int:
        """Number of prunable weights that are zero."""
        return sum(layer.zeros for layer in self.layers if layer.prunable)

    @property
    def nonzeros(self) -> int:
        """Number of prunable weights that are not zero."""
        return self.size - self.zeros

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights, in [0, 1]."""
        return _fraction(self.zeros, self.size)

    @property
    def total_size(self) -> int:
        """Number of parameters, prunable or not."""
        return sum(layer.size for layer in self.layers)

    @property
    def total_zeros(self) -> int:
        """Number of parameters that are zero, prunable or not."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def total_sparsity(self) -> float:
        """Fraction of zeros among all parameters, in [0, 1]."""
        return _fraction(self.total_zeros, self.total_size)

    @property
    def groups(self) -> int | None:
        """Number of groups of prunable weights; None where they were not counted."""
        return _sum(layer.groups for layer in self.layers if layer.prunable)

    @property
    def zero_groups(self) -> int | None:
        """Number of those that are wholly zero, or have the pattern; None: not counted."""
        return _sum(layer.zero_groups for layer in self.layers if layer.prunable)

    @property
    def wholly_zero(self) -> tuple[str, ...]:
        """Paths of the prunable layers without a nonzero weight."""
        return tuple(
            layer.path
            for layer in self.layers
            if layer.prunable and layer.size and layer.zeros == layer.size
        )

    def __str__(self) -> str:
        """The table: prunable layers one by one, then the two totals and remarks.

        Of what is not prunable it names the arrays of two or more dimensions, a line a reason.
        """
        body = [
            _row(layer.path, _shape(layer.shape), layer.size, layer.zeros, _groups(layer))
            for layer in self.layers
            if layer.prunable
        ]
        foot = [
            _row("prunable weights", "", self.size, self.zeros, _groups(self)),
            _row("all parameters", "", self.total_size, self.total_zeros, ""),
        ]
        title = "" if self.groups is None else self.counted
        head = ("layer", "shape", "weights", "non-zero", "sparsity", title)
        lines = table(head, body, foot, least=(0, 0, 13, 13, 8))
        if self.wholly_zero:
            lines.append(f"wholly zero: {', '.join(self.wholly_zero)}")
        lines += _left_out(self.layers)
        if not self.size:
            lines.append("nothing was prunable")
        lines += self.progress
        return "\n".join(lines)


def sparsity(
    params: Any,
    mask: MaskOrFunction = masks.prunable,
    *,
    groups: Groups | None = None,
    opt_state: Any = None,
) -> SparsityReport:
    """Count the zeros of a model.

    Sparsity is the fraction of exact zeros, ``#{i: w_i = 0} / N``, over the prunable weights.

    Args:
      params: a pytree of arrays on any devices.
      mask: which leaves are prunable: a pytree of bools that matches the parameters, or a function
        that makes one from them.
      groups: the operator of a structured run, one of :mod:`lats_optax.groups`: the table then has
        a column with how many of its groups of each prunable layer are wholly zero, or have the
        pattern of ``n_of_m``.
      opt_state: the state that came with the parameters: the table then says whether the target of
        :func:`lats_optax.target_sparsity` is met, at which of its steps, and if not, why.

    Returns:
      A :class:`SparsityReport`; ``str()`` of it is a table. It warns where nothing was prunable.

    Raises:
      ValueError: a leaf is no array; the mask is of another structure than the parameters, or
        selects one that lacks the axes of a group; ``groups`` does not operate on groups; or
        ``opt_state`` has no state of ``soft_threshold``.

    Example:
      >>> import jax.numpy as jnp, lats_optax
      >>> report = sparsity({"kernel": jnp.array([[0.0, 2.0], [0.0, 0.0]]), "bias": jnp.zeros(2)})
      >>> report.sparsity, round(report.total_sparsity, 3)
      (0.75, 0.833)
      >>> print(report)
      layer             shape        weights       non-zero  sparsity
      ---------------------------------------------------------------
      kernel              2×2              4              1    75.00%
      ---------------------------------------------------------------
      prunable weights                     4              1    75.00%
      all parameters                       6              1    83.33%
      >>> columns = lats_optax.groups.output_channels()
      >>> sparsity(jnp.array([[0.0, 1.0], [0.0, 0.0]]), groups=columns).zero_groups
      1
      >>> tx = lats_optax.soft_threshold(lats_optax.target_sparsity(0.5, 0.1, steps=4))
      >>> weights = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> report = sparsity(weights, opt_state=tx.init(weights))
      >>> print(report.progress[0])
      opt_state: the run stopped at step 0 of 4: 0.00% zeros, of the 50.00% named. ...
    """
    masks.check_arrays("params", params)
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
    names = jax.tree.leaves(masks.paths(params))
    chosen = jax.tree.leaves(masks.resolve(mask, params))
    default = mask is masks.prunable
    reasons = jax.tree.leaves(masks.reasons(params)) if default else ["mask"] * len(names)
    sizes = [0 if masks.is_key(leaf) else leaf.size for leaf in leaves]
    counts = jax.device_get(
        [size - jnp.count_nonzero(leaf) if size else 0 for size, leaf in zip(sizes, leaves)]
    )
    counts_of_groups: dict[str, tuple[int, int]] = {}
    if groups is not None:
        if not hasattr(groups, "counted"):
            raise ValueError(
                f"groups: {groups!r} is not allowed; allowed are operators of lats_optax.groups"
            )
        prunable = {name: leaf for name, leaf, masked in zip(names, leaves, chosen) if masked}
        check_fits("groups", groups, prunable)
        counts_of_groups = jax.device_get(
            {
                part.names[0]: cast(Groups, part.operator).count(part.gather(prunable))
                for part in parts_of(groups, prunable)
            }
        )
    report = SparsityReport(
        tuple(
            LayerSparsity(
                name,
                leaf.shape,
                size,
                int(zeros),
                masked,
                groups=total,
                zero_groups=None if dead is None else int(dead),
                reason="" if masked else reason,
            )
            for name, leaf, size, zeros, masked, reason in zip(
                names, leaves, sizes, counts, chosen, reasons
            )
            for total, dead in [counts_of_groups.get(name, (None, None))]
        ),
        () if opt_state is None else summary(params, opt_state),
        "" if groups is None else groups.counted,
    )
    if not report.size:
        warnings.warn(
            f"nothing is prunable: the mask selects none of {', '.join(names) or 'no parameters'}",
            stacklevel=2,
        )
    return report


def _sum(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _left_out(layers: Iterable[LayerSparsity]) -> list[str]:
    """A line for each reason, with the first arrays that it leaves out."""
    found: dict[str, list[str]] = {}
    for layer in layers:
        if not layer.prunable and len(layer.shape) >= 2:
            found.setdefault(layer.reason, []).append(f"{layer.path} {_shape(layer.shape)}")
    return [f"not pruned ({reason}): {masks.some(names)}" for reason, names in found.items()]


def _row(name: str, shape: str, size: int, zeros: int, groups: str) -> tuple[str, ...]:
    return name, shape, f"{size:,}", f"{size - zeros:,}", f"{_fraction(zeros, size):.2%}", groups


def _groups(counted: LayerSparsity | SparsityReport) -> str:
    if counted.groups is None:
        return ""
    return f"{counted.zero_groups:,} of {counted.groups:,}"


def _fraction(zeros: int, size: int) -> float:
    return zeros / size if size else 0.0


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
