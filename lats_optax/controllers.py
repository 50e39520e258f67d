"""What sets the threshold of `soft_threshold`: the protocol, and the open loop of a schedule.

The closed loop, which follows the latent weights to a named sparsity, is in `target.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeGuard

import jax
import jax.numpy as jnp
import optax

from lats_optax.operators import Operator
from lats_optax.prox import prox_l1
from lats_optax.thresholds import ScalarOrSchedule, check_threshold


class Controller(Protocol):
    """A rule for the threshold: a pure function of the step count and the latent weights.

    ``soft_threshold`` takes one wherever it takes a threshold schedule. The latent weights are a
    tree like the parameters in which `optax.MaskedNode` stands for the leaves that are not pruned.
    A threshold is a scalar, or a vector with an entry for each pruned leaf.
    """

    @property
    def default_operator(self) -> Operator:
        """The operator where ``soft_threshold`` is given none."""

    def prepared(self, operator: Operator, freeze_after: int | None) -> "Controller":
        """The controller for an operator, and for a support that is frozen after some steps.

        Raises:
          ValueError: it does not go with one of the two.
        """

    def init(self, latent: Any, operator: Operator) -> tuple[jax.Array, Any]:
        """The threshold before the first step, and the state of the controller."""

    def update(
        self, count: jax.Array, threshold: jax.Array, state: Any, latent: Any, operator: Operator
    ) -> tuple[jax.Array, Any]:
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
    """

    schedule: Callable[[Any], jax.Array]
    steps: int | None = None
    default_operator: Operator = prox_l1

    def prepared(self, operator: Operator, freeze_after: int | None) -> "OpenLoop":
        """Itself: any operator goes with it. It may be cut short, and not drawn out."""
        del operator
        if freeze_after is not None and self.steps is not None and freeze_after > self.steps:
            raise ValueError(
                f"freeze_after: {freeze_after} is not allowed; allowed are whole numbers up to "
                f"{self.steps}, the steps of the threshold"
            )
        return self

    def init(self, latent: Any, operator: Operator) -> tuple[jax.Array, Any]:
        """The schedule at 0."""
        del latent, operator
        return self.schedule(0), ()

    def update(
        self, count: jax.Array, threshold: jax.Array, state: Any, latent: Any, operator: Operator
    ) -> tuple[jax.Array, Any]:
        """The schedule at ``count + 1``."""
        del threshold, latent, operator
        return self.schedule(optax.safe_increment(count)), state


def as_controller(threshold: ScalarOrSchedule | Controller) -> Controller:
    """A controller as it is; a number or a schedule as an open loop.

    Raises:
      ValueError: a threshold that is negative or not finite (a schedule is asked for count 0).
    """
    if _is_controller(threshold):
        return threshold
    return OpenLoop(as_schedule("threshold", threshold), getattr(threshold, "steps", None))


def as_schedule(name: str, value: Any) -> Callable[[Any], jax.Array]:
    """A number or a schedule as ``count -> float array``, checked as far as it is known."""
    first = value(0) if callable(value) else value
    if not isinstance(first, jax.core.Tracer):
        check_threshold(name, first)
    # The default float type is asked for at each call: x64 may be enabled after construction.
    if callable(value):
        return lambda count: jnp.asarray(value(count), jnp.result_type(float))
    return lambda count: jnp.asarray(value, jnp.result_type(float))


def _is_controller(threshold: Any) -> TypeGuard[Controller]:
    return hasattr(threshold, "prepared")
