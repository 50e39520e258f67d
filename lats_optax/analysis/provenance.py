"""What is known of a value in a jaxpr: whose entries it has, and which of them are zero.

Here belong weights, constants and what comes of several of them; the walk is in `mac_walk.py`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from lats_optax.compatibility import jaxprs_in_params


class Part(NamedTuple):
    """A parameter's share of the entries of a weight, and how much of that is not zero."""

    parameter: int
    share: Fraction
    density: Fraction


@dataclass(frozen=True, eq=False)
class Weight:
    """A value that depends on parameters and constants alone.

    Attributes:
      entries: how many entries of parameters went into it.
      parts: which parameters its entries are from; the shares add up to 1.
      nonzero: makes the bools that tell which entries are not zero; None where that is not known
        entry by entry, or there are several parts. It is called for slices, masks and padding
        alone: models may be large.
    """

    entries: int
    parts: tuple[Part, ...]
    nonzero: Callable[[], Any] | None = None

    @staticmethod
    def whole(index: int, leaf: Any) -> "Weight":
        size, full = math.prod(leaf.shape), Fraction(1)
        # Random keys, which some libraries keep among the parameters, have no zeros.
        if not size or not has_values(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return Weight(size, (Part(index, full, full),))
        part = Part(index, full, Fraction(int(jnp.count_nonzero(leaf)), size))
        return Weight(size, (part,), lambda: jnp.asarray(leaf) != 0)

    def anywhere(self) -> "Weight":
        """The weight, with its mean sparsity for that of each of its entries."""
        return Weight(self.entries, self.parts)

    def filled(self) -> "Weight":
        """The weight after something that need not leave zeros zero."""
        parts = tuple(part._replace(density=Fraction(1)) for part in self.parts)
        return Weight(self.entries, parts)

    def with_zeros(self, nonzero: Any) -> "Weight":
        """Entries of the weight, and perhaps of constants, with these nonzeros."""
        nonzero = np.asarray(nonzero)
        part = self.parts[0]._replace(share=Fraction(1), density=fraction(nonzero))
        return Weight(self.entries, (part,), lambda: nonzero)


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that depends on no argument.

    Attributes:
      compute: makes it; None where it cannot be known.
    """

    compute: Callable[[], Any] | None = None

    def known(self) -> Any:
        """The value, or None."""
        try:
            return None if self.compute is None else jnp.asarray(self.compute())
        except Exception:  # a primitive of a mesh or an axis, which are there in its program alone
            return None


UNKNOWN, ACTIVATION = Constant(), "activation"
Value = Weight | Constant | str  # of strings this one


def given(value: Any) -> Constant:
    """A constant that is in a jaxpr; within another trace it may have no values."""
    return UNKNOWN if isinstance(value, jax.core.Tracer) else Constant(lambda: value)


def computed(eqn: JaxprEqn, inputs: Sequence[Value]) -> list[Value] | None:
    """What a primitive makes of constants, once it is asked for; None of anything else."""
    thunks = [value.compute for value in inputs if isinstance(value, Constant)]
    inner = jaxprs_in_params(eqn.params)
    if len(thunks) < len(inputs) or None in thunks or eqn.effects or inner:
        return None

    @functools.cache
    def results() -> Any:
        found = eqn.primitive.bind(*(thunk() for thunk in thunks if thunk), **eqn.params)  # type: ignore[no-untyped-call]
        return found if eqn.primitive.multiple_results else [found]

    return [Constant(functools.partial(_at, results, at)) for at in range(len(eqn.outvars))]


def _at(results: Callable[[], Any], at: int) -> Any:
    return results()[at]


def nonzero(value: Value) -> np.ndarray | None:
    """Which entries are not zero; None where that is not known entry by entry."""
    if isinstance(value, Weight) and value.nonzero is not None:
        return np.asarray(value.nonzero())
    if isinstance(value, Constant) and (known := value.known()) is not None:
        return np.asarray(known) != 0
    return None


def has_values(leaf: Any) -> bool:
    return not isinstance(leaf, jax.ShapeDtypeStruct)


def join(a: Value, b: Value) -> Value:
    """What a value is that may be either: of two iterations, or of two branches."""
    if a is b or ACTIVATION in (a, b):
        return a if a is b else ACTIVATION
    if isinstance(a, Weight):
        return a if isinstance(b, Weight) and a.parts == b.parts else a.filled()
    return b.filled() if isinstance(b, Weight) else UNKNOWN


def same(a: Value, b: Value) -> bool:
    if isinstance(a, Weight) and isinstance(b, Weight):
        return a.parts == b.parts
    return a is b


def largest(inputs: Sequence[Value]) -> Weight | None:
    """Which weight an operation on several is put down to."""
    weights = [value for value in inputs if isinstance(value, Weight)]
    return max(weights, key=lambda weight: weight.entries, default=None)


def combine(inputs: Sequence[Value]) -> Value:
    """What comes of several values by any operation."""
    if ACTIVATION in inputs:
        return ACTIVATION
    weight = largest(inputs)
    return UNKNOWN if weight is None else weight.filled()


def anywhere(value: Value) -> Value:
    """An unknown part of a value."""
    if isinstance(value, Weight):
        return value.anywhere()
    return UNKNOWN if isinstance(value, Constant) else value


def concatenated(inputs: Sequence[Value], sizes: Sequence[int]) -> Value:
    """Weights and constants one behind the other; constants are put down to the largest weight."""
    main, total = largest(inputs), sum(sizes)
    if main is None or ACTIVATION in inputs or not total:
        return combine(inputs)
    parts: list[Part] = []
    for value, size in zip(inputs, sizes):
        own: tuple[Part, ...] = (
            main.parts[0]._replace(share=Fraction(1), density=_density(value)),
        )
        if isinstance(value, Weight):
            own = value.parts
        parts += [part._replace(share=part.share * Fraction(size, total)) for part in own]
    return Weight(sum(v.entries for v in inputs if isinstance(v, Weight)), tuple(parts))


def _density(value: Value) -> Fraction:
    found = nonzero(value)
    return Fraction(1) if found is None else fraction(found)


def fraction(nonzero: np.ndarray) -> Fraction:
    """The part that is True; of nothing, all."""
    return Fraction(int(nonzero.sum()), nonzero.size) if nonzero.size else Fraction(1)
