"""What one batch adds to the Gram matrices: a compiled program that all batches of a shape share.

Here belong the program, the products' moments and where they lie on devices. The interpreter that
meets the products is in `analysis/interpreter.py`.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lats_optax import masks
from lats_optax.analysis.interpreter import Found, Traced, interpret
from lats_optax.analysis.views import View
from lats_optax.masks import MaskOrFunction


class Moments(NamedTuple):
    """What is accumulated of a product: the Gram matrices and the number of samples behind them."""

    gram: jax.Array
    samples: jax.Array


@dataclass(frozen=True)
class Program:
    """What one batch is put through: it is compiled once for all calls that are alike.

    Attributes:
      fn: the function.
      structure: of the parameters.
      chosen: which leaves are measured.
      largest: the most inputs for which a Gram matrix is full.
      places: where the Gram matrices of each leaf lie.
    """

    fn: Callable[[Any, Any], Any]
    structure: Any
    chosen: tuple[bool, ...]
    largest: int
    places: tuple["_Place", ...]

    def nothing(self) -> Found:
        """Where a batch begins."""
        return Found(self.measure)

    def measure(self, view: View, activations: jax.Array) -> Any:
        """The moments of one product; an empty tuple where its parameter is not to be pruned."""
        if not self.chosen[view.parameter]:
            return ()
        return _moments(activations, self.largest, self.places[view.parameter])

    def run(self, leaves: Sequence[jax.Array], batch: Any) -> Found:
        """Everything that one batch gives."""
        jaxpr = jax.make_jaxpr(self.fn)(jax.tree.unflatten(self.structure, leaves), batch)
        inputs = [Traced(leaf, View(at, _itself), False) for at, leaf in enumerate(leaves)]
        inputs += [Traced(leaf, None, True) for leaf in jax.tree.leaves(batch)]
        found = self.nothing()
        interpret(jaxpr, inputs, found)
        found.moments = {key: each for key, each in found.moments.items() if each}
        return found

    def traced(self, leaves: Sequence[jax.Array], batch: Any) -> Found:
        """Everything that one batch gives, in shapes."""
        found = self.nothing()

        def run(leaves: Sequence[jax.Array], batch: Any) -> dict[str, Moments]:
            nonlocal found
            found = self.run(leaves, batch)
            return found.moments

        moments = jax.eval_shape(run, leaves, batch)
        found.moments = moments
        return found

    def sums(self, told: Found, make: Callable[..., Any]) -> dict[str, Moments]:
        """Where the sums begin, each made from its shape and its place."""
        made: dict[str, Moments] = {}
        for key, (gram, samples) in told.moments.items():
            sharding = self.places[told.views[key].parameter].sharding(gram.shape)
            made[key] = Moments(make(gram, sharding), make(samples, None))
        return made


def make_program(
    fn: Any, params: Any, leaves: Sequence[Any], mask: MaskOrFunction, largest: int
) -> Program:
    """The program of a function and its parameters, arrays or their shapes."""
    chosen = tuple(jax.tree.leaves(masks.resolve(mask, params)))
    return Program(fn, jax.tree.structure(params), chosen, largest, tuple(map(_placed, leaves)))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def add_batch(
    program: Program,
    sums: dict[str, Moments],
    broken: dict[str, jax.Array],
    leaves: Sequence[jax.Array],
    batch: Any,
    number: jax.Array,
) -> Any:
    """The sums with one more batch, and in which batch each first was not finite, or -1."""
    sums = jax.tree.map(jnp.add, sums, program.run(leaves, batch).moments)
    # The first batch that is not finite is named at the end: nothing waits for each.
    broken = {
        key: jnp.where((at < 0) & ~jnp.all(jnp.isfinite(sums[key].gram)), number, at)
        for key, at in broken.items()
    }
    return sums, broken


def _moments(activations: jax.Array, largest: int, place: "_Place") -> Moments:
    """The Gram matrices of activations [batch, samples, inputs]."""
    batch, samples, inputs = activations.shape
    size = max(side for side in range(1, min(inputs, largest) + 1) if inputs % side == 0)

    x = activations.astype(jnp.float32).reshape(batch, samples, inputs // size, size)
    if size == 1:
        gram = jnp.sum(x * x, axis=1)[..., None]
    else:
        held = None
        its = jax.typeof(x).sharding
        if AxisType.Explicit in its.mesh.axis_types:
            # Samples may lie on several devices: the type of their sum has to be said.
            spec = PartitionSpec(its.spec[0], None, None, None)  # type: ignore[no-untyped-call]
            held = NamedSharding(its.mesh, spec)
        highest = lax.Precision.HIGHEST
        gram = jnp.einsum("bski,bskj->bkij", x, x, precision=highest, out_sharding=held)
    return Moments(place.constrain(gram), jnp.asarray(samples, jnp.float32))


@dataclass(frozen=True)
class _Place:
    """Where the Gram matrices of a parameter lie: rows over the devices that it is sharded over.

    Attributes:
      mesh: of the parameter; None: it is on one device. Under explicit axes the types decide.
      axes: those that the parameter is sharded over.
    """

    mesh: Any = None
    axes: tuple[str, ...] = ()

    def sharding(self, shape: Sequence[int]) -> NamedSharding | None:
        """That of Gram matrices [..., rows, columns]."""
        if self.mesh is None or AxisType.Explicit in self.mesh.axis_types:
            return None
        devices = int(np.prod([self.mesh.shape[axis] for axis in self.axes]))
        rows = self.axes if self.axes and shape[-2] % devices == 0 else None
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * (len(shape) - 2), rows))  # type: ignore[no-untyped-call]

    def constrain(self, gram: jax.Array) -> jax.Array:
        sharding = self.sharding(gram.shape)
        return gram if sharding is None else lax.with_sharding_constraint(gram, sharding)  # type: ignore[no-untyped-call]


def _placed(leaf: jax.Array) -> _Place:
    if not isinstance(leaf.sharding, NamedSharding):
        return _Place()
    names: list[str] = []
    for entry in leaf.sharding.spec:
        if entry is not None:
            names += [entry] if isinstance(entry, str) else entry
    return _Place(leaf.sharding.mesh, tuple(names))


def zeros_at(shape: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> jax.Array:
    """Zeros where the sharding has them."""
    zeros = jnp.zeros(shape.shape, shape.dtype)
    return zeros if sharding is None else jax.device_put(zeros, sharding)


def shape_at(shape: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> jax.ShapeDtypeStruct:
    """Their shape alone."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)  # type: ignore[no-untyped-call]


def _itself(leaf: jax.Array) -> jax.Array:
    return leaf
