"""What sets the threshold of `soft_threshold`: the protocol, and the open loop of a schedule.

The closed loop, which follows the latent weights to a named sparsity, is in `target.py`.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from lats_optax.array_types import Array, Count, Float, Integer
from lats_optax.checks.numbers import check_threshold
from lats_optax.control.schedules import ScalarOrSchedule, is_distribution
from lats_optax.latent.pruned import STRAIGHT_THROUGH, PrunedUpdate
from lats_optax.operators.parts import TreeOperator, by_path, parts_of
from lats_optax.prox import prox_l1

# A count beyond all runs, and the part of the first threshold below which the last has fallen.
_LATE = 2**30
_FALL = 0.1


@runtime_checkable
class Controller(Protocol):
    """A rule for the threshold: a pure function of the step count and the latent weights.

    ``soft_threshold`` takes one wherever it takes a threshold schedule. The latent weights are a
    tree like the parameters in which `optax.MaskedNode` stands for the leaves that are not pruned.
    A threshold is a scalar, or a vector with an entry for each pruned leaf.
    """

    @property
    def default_operator(self) -> TreeOperator:
        """The operator where ``soft_threshold`` is given none."""

    @property
    def default_pruned_update(self) -> PrunedUpdate:
        """How pruned weights move where ``soft_threshold`` is given no ``pruned_scale``."""

    def prepared(self, operator: TreeOperator, freeze_after: int | None) -> "Controller":
        """The controller for an operator, and for a support that is frozen after some steps.

        Raises:
          ValueError: it does not go with one of the two.
        """

    def init(self, latent: Any, operator: TreeOperator) -> tuple[Float[Array, "*layers"], Any]:
        """The threshold before the first step, and the state of the controller."""

    def update(
        self,
        count: Integer[Array, ""],
        threshold: Float[Array, "*layers"],
        state: Any,
        latent: Any,
        operator: TreeOperator,
    ) -> tuple[Float[Array, "*layers"], Any]:
        """The threshold after ``count + 1`` steps, and the new state.

        Args:
          count: int32 scalar, the number of steps before this one.
          threshold: the one after ``count`` steps.
          state: of the controller.
          latent: the latent weights after the step.
          operator: the operator that the threshold is for.
        """


@dataclasses.dataclass(frozen=True)
class OpenLoop:
    """A threshold that depends on the count alone.

    Attributes:
      schedule: ``count -> d``, a float array.
      steps: the number of steps over which it moves; None: not known.
      constant: the threshold, where it is the same at all steps; None: it is not.
    """

    schedule: Callable[[Count], Float[Array, ""]]
    steps: int | None = None
    constant: Any = None
    default_operator: TreeOperator = prox_l1
    default_pruned_update: PrunedUpdate = STRAIGHT_THROUGH

    def prepared(self, operator: TreeOperator, freeze_after: int | None) -> "OpenLoop":
        """Itself: any operator goes with it. It may be cut short, and not drawn out."""
        del operator
        if freeze_after is not None and self.steps is not None and freeze_after > self.steps:
            raise ValueError(
                f"freeze_after: {freeze_after} is not allowed; allowed are whole numbers up to "
                f"{self.steps}, the steps of the threshold"
            )
        if self.constant is None:
            _warn_of_a_fall(self.schedule, _LATE if freeze_after is None else freeze_after)
        return self

    def init(self, latent: Any, operator: TreeOperator) -> tuple[Float[Array, "*layers"], Any]:
        """The schedule at 0, after a look at what a threshold of that size leaves alive."""
        first = self.schedule(0)
        _warn_of_nothing_left(self.constant, latent, operator)
        return first, ()

    def update(
        self,
        count: Integer[Array, ""],
        threshold: Float[Array, "*layers"],
        state: Any,
        latent: Any,
        operator: TreeOperator,
    ) -> tuple[Float[Array, "*layers"], Any]:
        """The schedule at ``count + 1``."""
        del threshold, latent, operator
        return self.schedule(optax.safe_increment(count)), state


def as_controller(threshold: ScalarOrSchedule | Controller) -> Controller:
    """A controller as it is; a number or a schedule as an open loop.

    Raises:
      ValueError: a threshold that is negative or not finite (a schedule is asked for count 0).
    """
    if isinstance(threshold, Controller):
        return threshold
    if callable(threshold) and is_distribution(threshold):
        raise ValueError(
            "threshold: it is a function that gives each layer a sparsity; wrap it, as in "
            "soft_threshold(target_sparsity(erdos_renyi(0.95), learning_rate, steps))"
        )
    schedule = as_schedule("threshold", threshold)
    constant = None if callable(threshold) else threshold
    return OpenLoop(schedule, getattr(threshold, "steps", None), constant)


def as_schedule(name: str, value: Any) -> Callable[[Count], Float[Array, ""]]:
    """A number or a schedule as ``count -> float array``, checked as far as it is known."""
    first = value(0) if callable(value) else value
    if not isinstance(first, jax.core.Tracer):
        check_threshold(name, first)
    # The default float type is asked for at each call: x64 may be enabled after construction.
    if callable(value):
        # Below zero an operator would move weights away from zero.
        return lambda count: jnp.maximum(jnp.asarray(value(count), jnp.result_type(float)), 0.0)
    return lambda count: jnp.asarray(value, jnp.result_type(float))


def _warn_of_a_fall(schedule: Callable[[Count], Float[Array, ""]], late: int) -> None:
    """Warns of a schedule that is far lower late in a run than at its start."""
    try:
        first, last = schedule(0), schedule(late)
    except Exception:  # a schedule of anyone's, which may end in an error
        return
    if isinstance(first, jax.core.Tracer) or isinstance(last, jax.core.Tracer):
        return
    if float(last) <= _FALL * float(first):
        warnings.warn(
            f"threshold: it begins at {float(first):g} and ends at {float(last):g}, so zeros do "
            "not stay; a threshold rises. If it is a learning-rate schedule, give it to "
            "target_sparsity(0.95, learning_rate, steps) or lats_threshold(learning_rate, steps, "
            "final)",
            stacklevel=4,
        )


def _warn_of_nothing_left(constant: Any, latent: Any, operator: TreeOperator) -> None:
    """Warns of a constant threshold that no weight reaches: it may be meant as a sparsity."""
    weights = {name: leaf for name, leaf in by_path(latent).items() if leaf.size}
    leaves = weights.values()
    known = not any(isinstance(node, jax.core.Tracer) for node in [constant, *leaves])
    if constant is None or not known or not all(isinstance(leaf, jax.Array) for leaf in leaves):
        return
    try:
        magnitudes = [
            float(jnp.max(part.operator.magnitude(part.gather(weights))))
            for part in parts_of(operator, weights)
        ]
    except ValueError:  # that of a plain function is not known
        return
    largest = max(magnitudes, default=0.0)
    if 0 < largest <= float(constant):
        warnings.warn(
            f"threshold: {float(constant):g} is a magnitude of weights, and that of no pruned "
            f"weight is above {largest:g}; if a sparsity is meant, write "
            "target_sparsity(0.95, learning_rate, steps)",
            stacklevel=4,
        )
