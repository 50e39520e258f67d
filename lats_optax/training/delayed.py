"""A threshold that begins to rise late: the first epochs of a run stay dense."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lats_optax.control.controllers import Controller
from lats_optax.latent.pruned import PrunedUpdate
from lats_optax.operators.parts import TreeOperator


@dataclasses.dataclass(frozen=True)
class Delayed:
    """A controller that begins after some steps: ``d_t = 0`` for t <= delay.

    Attributes:
      controller: counts its steps, and looks at the latent weights, from there on.
      delay: the number of steps before it.

    >>> from lats_optax.control.controllers import as_controller
    >>> late = Delayed(as_controller(lambda count: 0.1 * jnp.asarray(count)), delay=2)
    >>> d, state = late.init((), None)
    >>> for count in range(4):
    ...     d, state = late.update(jnp.asarray(count), d, state, (), None)
    ...     print(round(float(d), 3))
    0.0
    0.0
    0.1
    0.2
    """

    controller: Controller
    delay: int

    @property
    def default_operator(self) -> TreeOperator:
        """That of the controller."""
        return self.controller.default_operator

    @property
    def default_pruned_update(self) -> PrunedUpdate:
        """That of the controller."""
        return self.controller.default_pruned_update

    def prepared(self, operator: TreeOperator, freeze_after: int | None) -> "Delayed":
        """The controller, for a support that is frozen when so many steps are over."""
        left = None if freeze_after is None else freeze_after - self.delay
        return dataclasses.replace(self, controller=self.controller.prepared(operator, left))

    def init(self, latent: Any, operator: TreeOperator) -> tuple[jax.Array, Any]:
        """A threshold of zero."""
        threshold, state = self.controller.init(latent, operator)
        # By the steps of the whole run `finalize` knows the default operator.
        if hasattr(state, "steps"):
            state = state._replace(steps=state.steps + self.delay)
        return jnp.zeros_like(threshold), state

    def update(
        self,
        count: jax.Array,
        threshold: jax.Array,
        state: Any,
        latent: Any,
        operator: TreeOperator,
    ) -> tuple[jax.Array, Any]:
        """Zero, and later the controller's threshold."""
        return lax.cond(
            count < self.delay,
            lambda: (threshold, state),
            lambda: self.controller.update(count - self.delay, threshold, state, latent, operator),
        )
