"""What pruning needs to know of a proximal operator: the protocol, and the two bases that meet it.

Here belong the `Operator` protocol, the base of operators of single weights, and the base of
operators of groups. The operators themselves are in `prox.py` and `groups.py`.
"""

import abc
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from lats_optax.array_types import AnyArray, Array, Count, Float, Integer, Num, Real, Scalar, Shaped
from lats_optax.operators import leaves


@runtime_checkable
class Operator(Protocol):
    """A proximal operator, ``operator(x, d) = argmin_z 1/2 ||z - x||^2 + penalty_d(z)``.

    A class with these five methods can be given wherever the library takes an operator. Most
    operators act on each weight by itself and derive from :class:`Elementwise`, which leaves two
    methods to write.
    """

    def __call__(self, x: Any, strength: Any, /) -> Any:
        """The operator's value.

        Args:
          x: a real array, or a pytree of them.
          strength: d >= 0, in the units of the magnitude: a scalar, an array that broadcasts
            against :meth:`magnitude` of each leaf, or a pytree of these.

        Returns:
          What ``x`` is, with its shapes and dtypes.
        """

    def magnitude(self, x: Real[AnyArray, "..."], /) -> Float[Array, "..."]:
        """The least strength that sends a weight, or a group of weights, to zero.

        Args:
          x: a real array.

        Returns:
          A non-negative array in at least float32, in as many dimensions as ``x``: an entry for
          each weight, or for each group.
        """

    def group_sizes(self, shape: tuple[int, ...], /) -> Integer[np.ndarray, "..."]:
        """The number of weights that an entry of the magnitude stands for.

        Args:
          shape: that of an array of weights.

        Returns:
          int32, broadcasts against the magnitude.
        """

    def preimage(self, w: Float[Array, "*shape"], d: Scalar, /) -> Float[Array, "*shape"]:
        """An x with ``operator(x, d) == w``, where there is one.

        Args:
          w: a real array.
          d: a scalar >= 0.

        Returns:
          An array of the shape of ``w``. It is the first latent weight under a threshold that does
          not begin at zero.
        """

    def at(self, count: Count, /) -> "Operator":
        """The operator after so many steps: itself, unless it changes with time.

        Args:
          count: the number of steps taken, an int32 scalar, perhaps traced. What the other methods
            say of magnitudes and sizes holds at every count.
        """


@runtime_checkable
class Groups(Operator, Protocol):
    """An operator of groups, or of a pattern within groups, which a report counts."""

    @property
    def counted(self) -> str:
        """Which groups are counted, for the title of a column."""

    def count(self, w: Real[Array, "..."], /) -> tuple[int, Integer[Array, ""]]:
        """The number of groups of an array, and how many of them are as the title says, int32."""


class Elementwise(abc.ABC):
    """The base of operators that act on each weight by itself.

    Example:
      >>> class Box(Elementwise):
      ...     def shrink(self, x, d):
      ...         return jnp.where(jnp.abs(x) <= d, 0.0, x)
      ...     def preimage(self, w, d):
      ...         return w
      >>> box = Box()
      >>> box({"kernel": jnp.array([3.0, -0.5])}, 1.0)
      {'kernel': Array([3., 0.], dtype=float32)}
      >>> box.magnitude(jnp.array([3.0, -0.5]))
      Array([3. , 0.5], dtype=float32)
    """

    def __call__(self, x: Any, strength: Any = 1.0) -> Any:
        """Apply the operator to an array or a pytree, computed in at least float32.

        Args:
          x: a real array, or a pytree of them.
          strength: d >= 0: a scalar, an array that broadcasts against each leaf, or a pytree of
            these that matches ``x`` (or is a prefix of it).

        Returns:
          What ``x`` is, with its shapes and dtypes. Zeros are +0.0.

        Raises:
          ValueError: a strength given as a number is negative, or its structure or shape does not
            match.
          TypeError: ``x`` is complex.
        """
        return leaves.over_leaves(self.shrink, x, strength)

    @abc.abstractmethod
    def shrink(
        self, x: Float[Array, "*shape"], d: Float[Array, "*#shape"]
    ) -> Float[Array, "*shape"]:
        """The value at one array of at least float32, with ``d`` in its dtype."""

    @abc.abstractmethod
    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """An x with ``shrink(x, d) == w``, where there is one."""

    def least(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The least strength that sends each entry to zero: ``|x|``, unless a subclass differs."""
        return jnp.abs(x)

    def magnitude(self, x: Real[AnyArray, "..."]) -> Float[Array, "..."]:
        """The least strength that sends each weight to zero, in at least float32."""
        # A magnitude rounded to sixteen bits would name a threshold that misses its weight.
        return self.least(leaves.upcast(leaves.as_real(x)))

    def group_sizes(self, shape: tuple[int, ...]) -> Integer[np.ndarray, "..."]:
        """One weight for each entry of the magnitude."""
        return np.ones((1,) * len(shape), np.int32)

    def at(self, count: Count) -> "Elementwise":
        """Itself."""
        del count
        return self


@dataclass(frozen=True)
class GroupOperator(abc.ABC):
    """The base of operators of groups: an elementwise operator on each group's root mean square.

    For each group g of ``|g|`` weights, ``r = ||x_g|| / sqrt|g|`` and the shrinkage P of a penalty
    phi_d:

    ``argmin_z 1/2 ||z - x_g||^2 + |g| phi_d(||z|| / sqrt|g|) = x_g P_d(r) / r``

    With soft thresholding this is the group lasso, whose penalty is ``d sqrt|g| ||z||``. Groups of
    different sizes compete on equal terms under one threshold.

    Attributes:
      shrinkage: what is applied to the root mean square of a group.
    """

    shrinkage: Elementwise

    @abc.abstractmethod
    def sums(self, x: Num[Array, "..."]) -> Num[Array, "..."]:
        """The sum over each group of an array, in as many dimensions as the array has."""

    @abc.abstractmethod
    def group_sizes(self, shape: tuple[int, ...]) -> Integer[np.ndarray, "..."]:
        """The number of weights of each group, int32; it broadcasts against the sums."""

    @abc.abstractmethod
    def expand(
        self, each: Shaped[Array, "*groups"], shape: tuple[int, ...]
    ) -> Shaped[Array, "..."]:
        """The values of groups at their weights: an array that broadcasts against the shape."""

    def __call__(self, x: Any, strength: Any = 1.0) -> Any:
        """Apply the operator; arguments and errors are those of ``prox.prox_group_lasso``."""
        return leaves.over_leaves(self._shrink, x, strength)

    def magnitude(self, x: Real[AnyArray, "..."]) -> Float[Array, "..."]:
        """The least strength that zeroes each group, in the shape of the sums."""
        return self.shrinkage.least(self._root_mean_squares(leaves.upcast(leaves.as_real(x))))

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """An x with ``operator(x, d) == w``; groups that are zero stay where they are."""
        rms = self._root_mean_squares(w)
        safe = jnp.where(rms == 0, 1.0, rms)
        growth = jnp.where(rms == 0, 1.0, self.shrinkage.preimage(rms, d) / safe)
        return w * self.expand(growth, w.shape)

    def at(self, count: Count) -> "GroupOperator":
        """The same groups, with the shrinkage after so many steps."""
        return dataclasses.replace(self, shrinkage=self.shrinkage.at(count))

    @property
    def counted(self) -> str:
        """Those that are wholly zero."""
        return "zero groups"

    def count(self, w: Real[Array, "..."]) -> tuple[int, Integer[Array, ""]]:
        """The number of groups of an array, and how many of them are wholly zero, int32."""
        alive = self.sums((w != 0).astype(jnp.int32))
        return alive.size, jnp.sum(alive == 0, dtype=jnp.int32)

    def _root_mean_squares(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """``||x_g|| / sqrt|g|`` of each group, in the shape of the sums."""
        squares = self.sums(jnp.square(x)) / self.group_sizes(x.shape).astype(x.dtype)
        # The square root has no derivative at zero; a zero group stays where it is.
        return jnp.where(squares == 0, 0.0, jnp.sqrt(jnp.where(squares == 0, 1.0, squares)))

    def _shrink(self, x: Float[Array, "*shape"], d: Float[Array, "..."]) -> Float[Array, "*shape"]:
        # The magnitude itself is compared with d, so that a threshold taken from the magnitudes
        # prunes the group that it was taken from.
        rms = self._root_mean_squares(x)
        leaves.check_broadcasts(d, rms.shape)
        shrunk = self.shrinkage.shrink(rms, d)
        # An infinite group that the operator leaves alone is left as it is.
        unbounded = jnp.isinf(rms) & (shrunk == rms)
        safe = jnp.where((rms == 0) | unbounded, 1.0, rms)
        factor = jnp.where(unbounded, 1.0, shrunk / safe)
        dead, factor = (self.expand(each, x.shape) for each in (shrunk == 0, factor))
        return jnp.where(dead, 0.0, leaves.positive_zero(x * factor))


@dataclass(frozen=True)
class Values:
    """A plain function as an :class:`Operator`."""

    function: Callable[[Any, Any], Any]

    def __call__(self, x: Any, strength: Any) -> Any:
        """The function's value."""
        return self.function(x, strength)

    def magnitude(self, x: Real[AnyArray, "..."]) -> Float[Array, "..."]:
        """Not known: a ValueError that says what to write."""
        raise self.unknown_magnitude()

    def unknown_magnitude(self) -> ValueError:
        """Why no sparsity can be named under it, and what to write."""
        return ValueError(
            f"operator: {self.function!r} is a plain function, so the magnitude of a weight under "
            "it is not known and no sparsity can be named; derive a class from "
            "lats_optax.Elementwise, or give it the methods of lats_optax.Operator"
        )

    def group_sizes(self, shape: tuple[int, ...]) -> Integer[np.ndarray, "..."]:
        """Not known either; it is asked for after the magnitude alone."""
        return np.ones((1,) * len(shape), np.int32)

    def at(self, count: Count) -> "Values":
        """Itself."""
        del count
        return self

    def preimage(self, w: Float[Array, "*shape"], d: Scalar) -> Float[Array, "*shape"]:
        """The weights themselves, which is exact where the threshold begins at zero."""
        del d
        return jnp.array(w)
