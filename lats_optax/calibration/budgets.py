"""How many weights become zero, and among which: what a solver selects by its own scores.

Here belong budgets: a number for a layer, a number for each output, or n of every m inputs. Arrays
are [groups, inputs, outputs].
"""

from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax.checks.numbers import check_steps
from lats_optax.quantile import kth_smallest


class Budget(Protocol):
    """Which weights survive, by scores.

    Attributes:
      zeros: how many weights are to be zero in each set of weights that compete.
    """

    @property
    def zeros(self) -> Any:
        """A number, or an array with one for each set."""

    def bound(self, scores: jax.Array, zeros: Any = None) -> jax.Array:
        """The largest of the scores that are to become zero; 0 where none are.

        Args:
          scores: float32 [groups, inputs, outputs], non-negative.
          zeros: in the place of the budget's own, perhaps traced.

        Returns:
          Float32, broadcasts against ``scores``.
        """

    def keep(self, scores: jax.Array, zeros: Any = None) -> jax.Array:
        """Where the scores are not among the smallest; ties are broken by position.

        Args:
          scores: float32 [groups, inputs, outputs], non-negative.
          zeros: in the place of the budget's own, perhaps traced.

        Returns:
          bool, the shape of ``scores``.
        """

    def divided(self, stops: np.ndarray) -> jax.Array:
        """The zeros of each block of inputs, where blocks end at these inputs; all end at the last.

        Returns:
          int32 [blocks, ...], in all the budget's zeros.
        """


@dataclass(frozen=True)
class PerLayer:
    """So many zeros in all outputs together."""

    zeros: Any

    def bound(self, scores: jax.Array, zeros: Any = None) -> jax.Array:
        return _kth(scores.reshape(-1), self.zeros if zeros is None else zeros)

    def keep(self, scores: jax.Array, zeros: Any = None) -> jax.Array:
        zeros = self.zeros if zeros is None else zeros
        return ~_smallest(scores.reshape(-1), zeros).reshape(scores.shape)

    def divided(self, stops: np.ndarray) -> jax.Array:
        return _divided(self.zeros, stops, int(stops[-1]))


@dataclass(frozen=True)
class PerOutput:
    """So many zeros in each output, or an array [groups, outputs] of such numbers."""

    zeros: Any

    def bound(self, scores: jax.Array, zeros: Any = None) -> jax.Array:
        each = jax.vmap(jax.vmap(_kth, (1, 0)))
        return each(scores, self._spread(scores, zeros))[:, None]

    def keep(self, scores: jax.Array, zeros: Any = None) -> jax.Array:
        each = jax.vmap(jax.vmap(_smallest, (1, 0), 1))
        return ~each(scores, self._spread(scores, zeros))

    def _spread(self, scores: jax.Array, zeros: Any) -> jax.Array:
        return jnp.broadcast_to(self.zeros if zeros is None else zeros, scores[:, 0].shape)

    def divided(self, stops: np.ndarray) -> jax.Array:
        return _divided(self.zeros, stops, int(stops[-1]))


@dataclass(frozen=True)
class Pattern:
    """n weights of every m that follow each other along the inputs stay.

    Raises:
      ValueError: not 1 <= n <= m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        """Refuse what is no pattern."""
        if check_steps(self.n, "pattern: n") > check_steps(self.m, "pattern: m"):
            raise ValueError(f"pattern: {self.n} of {self.m} is not allowed; allowed is n <= m")

    def always(self, zeros: Any) -> "Pattern":
        """Itself, for any number of zeros."""
        del zeros
        return self

    @property
    def zeros(self) -> int:
        """Of each m."""
        return self.m - self.n

    def bound(self, scores: jax.Array, zeros: Any = None) -> jax.Array:
        sets = self._sets(jnp.where(self.keep(scores, zeros), 0.0, scores))
        return jnp.repeat(jnp.max(sets, axis=2), self.m, axis=1)

    def keep(self, scores: jax.Array, zeros: Any = None) -> jax.Array:
        sets = self._sets(scores)
        position = jnp.arange(self.m)[:, None]
        # m is small: how many of its m weights come before each one, without a sort.
        others = [sets[:, :, at, None] for at in range(self.m)]
        before = jnp.zeros(sets.shape, jnp.int32)
        for at, other in enumerate(others):
            before += (other < sets) | ((other == sets) & (at < position))
        return (before >= (self.zeros if zeros is None else zeros)).reshape(scores.shape)

    def _sets(self, scores: jax.Array) -> jax.Array:
        groups, inputs, outputs = scores.shape
        return scores.reshape(groups, inputs // self.m, self.m, outputs)

    def divided(self, stops: np.ndarray) -> jax.Array:
        return jnp.full(len(stops), self.zeros)


def as_pattern(pattern: Any) -> Pattern:
    """A pair (n, m), or an object with attributes n and m, as a :class:`Pattern`.

    >>> as_pattern((2, 4))
    Pattern(n=2, m=4)
    """
    pair = (pattern.n, pattern.m) if hasattr(pattern, "n") and hasattr(pattern, "m") else pattern
    if not (isinstance(pair, tuple | list) and len(pair) == 2):
        raise ValueError(
            f"pattern: {pattern!r} is not allowed; allowed are pairs (n, m), such as (2, 4)"
        )
    return Pattern(*pair)


def _kth(scores: jax.Array, zeros: Any) -> jax.Array:
    return kth_smallest([scores], jnp.asarray(zeros, jnp.uint32))


def _smallest(scores: jax.Array, zeros: Any) -> jax.Array:
    """Which of a vector of scores are the smallest, so many of them."""
    bound = _kth(scores, zeros)
    below, ties = scores < bound, scores == bound
    needed = jnp.asarray(zeros, jnp.int32) - jnp.sum(below, dtype=jnp.int32)
    return below | (ties & (jnp.cumsum(ties, dtype=jnp.int32) <= needed))


def _divided(zeros: Any, stops: np.ndarray, inputs: int) -> jax.Array:
    # In whole numbers that stay below 2**31 for layers of fewer weights.
    whole, rest = jnp.divmod(jnp.asarray(zeros, jnp.int32), inputs)
    until = whole[..., None] * stops + rest[..., None] * stops // inputs
    return jnp.moveaxis(jnp.diff(until, prepend=0), -1, 0)
