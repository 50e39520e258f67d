"""What calibration returns: the Gram matrices of each parameter, and their table.

Here belongs what is made of the sums when all batches were seen. One batch is in `accumulation.py`,
the loop over batches in `batches.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax.analysis.interpreter import Found
from lats_optax.analysis.tables import table
from lats_optax.analysis.views import View
from lats_optax.calibration.accumulation import Moments


@dataclass(frozen=True)
class Gram:
    """The Gram matrices ``X^T X`` of one product of a parameter.

    Attributes:
      path: of the parameter, such as ``Dense_0/kernel``.
      matrices: float32 [matrices, groups, blocks, size, size]. Matrices are the layers of a stack,
        experts, or other batch axes; groups are those of a convolution. The ``blocks * size``
        inputs are one block unless they are more than ``largest``.
      view: how the parameter's entries make matrices [..., groups, inputs, outputs].
      samples: rows of X, the fewest of any matrix.
      silent: how many inputs were zero in every sample, over all matrices.
    """

    path: str
    matrices: jax.Array
    view: View
    samples: int
    silent: int

    @property
    def inputs(self) -> int:
        """Number of inputs of one matrix."""
        return self.matrices.shape[2] * self.matrices.shape[3]

    @property
    def kind(self) -> str:
        """``full``, ``block-diagonal`` or ``diagonal``."""
        blocks, size = self.matrices.shape[2:4]
        if blocks == 1:
            return "full"
        return "diagonal" if size == 1 else "block-diagonal"

    @property
    def singular(self) -> str:
        """Why it cannot be inverted without damping; "" where nothing says so."""
        if self.silent:
            return f"singular: {self.silent:,} inputs are always zero"
        if self.samples < self.matrices.shape[3]:
            return f"singular: {self.samples:,} samples"
        return ""

    def unpack(self, leaf: jax.Array) -> jax.Array:
        """The parameter as matrices [matrices, groups, inputs, outputs], float32."""
        found = self.view.restore(leaf.astype(jnp.float32))
        return found.reshape(*self.matrices.shape[:2], self.inputs, -1)

    def pack(self, matrices: jax.Array, leaf: jax.Array) -> jax.Array:
        """The parameter with these matrices in it; what did not change stays bit for bit."""
        wide = leaf.astype(jnp.float32)
        before, transpose = jax.vjp(self.view.restore, wide)
        (covered,) = transpose(jnp.ones_like(before))
        (values,) = transpose(matrices.reshape(before.shape))
        changed = (covered > 0) & (values != wide)
        return jnp.where(changed, values.astype(leaf.dtype), leaf)


@dataclass(frozen=True)
class Grams:
    """The Gram matrices of a function; ``str()`` is the table.

    Attributes:
      products: one entry for each parameter in a product, or for each part of it that has one of
        its own.
      repeated: parameters in several products, and what was made of that, by path.
      missing: parameters in the mask that are in no product, and why, by path.
      batches: how many were seen.
      shapes: of the parameters, by path.
    """

    products: tuple[Gram, ...]
    repeated: Mapping[str, str]
    missing: Mapping[str, str]
    batches: int
    shapes: Mapping[str, tuple[int, ...]]

    def __str__(self) -> str:
        """The table: a line for each product, then remarks."""
        rows = [
            (
                gram.path,
                "×".join(map(str, (*gram.matrices.shape[:2], gram.inputs))),
                f"{gram.samples:,}",
                gram.kind,
                gram.singular,
            )
            for gram in self.products
        ]
        head = ("parameter", "inputs", "samples", "Gram", "")
        lines = table(head, rows, left=(0, 3))
        lines += [f"{path}: {what}" for path, what in self.repeated.items()]
        lines += [f"not calibrated: {path}: {why}" for path, why in self.missing.items()]
        return "\n".join(lines)


def collect(
    sums: Mapping[str, Moments],
    told: Found,
    leaves: Sequence[jax.Array],
    names: Sequence[str],
    chosen: Sequence[bool],
    count: int,
) -> Grams:
    """The products by parameter: equal ones are one already; others must not overlap."""
    kept: list[Gram] = []
    repeated: dict[str, str] = {}
    missing: dict[str, str] = {}
    for at, (name, leaf) in enumerate(zip(names, leaves)):
        keys = [key for key in sums if told.views[key].parameter == at]
        places = sum(len(told.uses[key]) for key in keys)
        found, taken = [], jnp.zeros(leaf.shape, bool)
        for key in sorted(keys, key=lambda key: -_size(sums[key])):
            covered = _covered(told.views[key], leaf)
            if jnp.max(covered) > 1:
                told.notes[at] = "an entry stands in several places of one product"
            elif jnp.any(taken & (covered > 0)):
                repeated[name] = (
                    f"in {places} products, along different axes; its Gram matrix is that of the "
                    "largest"
                )
            else:
                found.append(_gram(name, sums[key], told.views[key]))
                taken |= covered > 0
        kept += found
        if found and places > len(found) and name not in repeated:
            repeated[name] = f"in {places} products; their Gram matrices are added"
        if chosen[at] and not found:
            missing[name] = told.notes.get(at, "in no product with activations")
        elif found and not jnp.all(taken):
            missing[name] = "a part of it is in no product, and stays as it is"
    shapes = {name: leaf.shape for name, leaf in zip(names, leaves)}
    return Grams(tuple(kept), repeated, missing, count, shapes)


def _covered(view: View, leaf: jax.Array) -> jax.Array:
    """How many entries of the matrices each entry of a parameter is."""
    like = jnp.zeros(leaf.shape, jnp.float32)
    made, transpose = jax.vjp(view.restore, like)
    return transpose(jnp.ones_like(made))[0]


def _size(moments: Moments) -> float:
    return float(jnp.sum(moments.samples)) * moments.gram[..., 0].size


def _gram(name: str, moments: Moments, view: View) -> Gram:
    *stack, batch, blocks, size, _ = moments.gram.shape
    matrices = int(np.prod(stack, dtype=int))
    sides = (matrices, batch) if view.grouped else (matrices * batch, 1)
    gram = moments.gram.reshape(*sides, blocks, size, size)
    diagonal = jnp.diagonal(gram, axis1=-2, axis2=-1)
    silent = int(jnp.sum(diagonal == 0))
    return Gram(name, gram, view, int(jnp.min(moments.samples)), silent)
