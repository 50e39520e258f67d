"""The closed loop: the user names the sparsity, the threshold follows the latent weights to it.

Here belongs the controller. Laws are in `control/laws.py`, what a target asks for is in
`control/targets.py`, the selection of the quantile is in `control/selection.py`. With N weights,
the target s, the law's increments eta_t and fraction f, and the step K at which the target is
reached, the controller does after step t = 0, 1, …

    (1)  q_t = the quantile of the latent magnitudes at sparsity s f((t + 1) / K)

and where the law has no increments (a sparsity curve)

    (2)  d_{t+1} = q_t

Where it has, the living weights rise with the threshold, and the quantile with them. So it
forecasts the quantile at K from the speed at which it rises over the budget of increments, of which
S_t = sum_{1<=r<=t} eta_r is spent and R_t = sum_{t<r<K} eta_r remains:

    (3)  v_t = the moving average of dq / dS over a window of half of what remains
    (4)  a_t = q_t + R_t min(v_t, (q_t - q_0) / S_t)                      the setpoint
    (5)  d_{t+1} = d_t + rho_t (a_t - d_t),   rho_t = eta_t / (eta_t + R_t)

At t = K - 1 nothing remains: the setpoint is the quantile, rho is 1, and the target is met exactly.
From then on it is held:

    (6)  d_{t+1} = q_t    for t >= K
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lats_optax.array_types import Array, Bool, Float, Integer
from lats_optax.checks.numbers import check_fraction, check_steps
from lats_optax.control.laws import Law, constant_l1
from lats_optax.control.schedules import ScalarOrSchedule, learning_rates
from lats_optax.control.selection import quantiles
from lats_optax.control.targets import check_target, targets_of
from lats_optax.latent.pruned import PrunedUpdate, bounded
from lats_optax.operators.parts import TreeOperator, by_path
from lats_optax.operators.power import Rescaled, prox_annealed
from lats_optax.operators.protocol import Elementwise, Values

# The window of the moving average, as a part of the budget that remains. The mean speed alone is
# too fast at the end: the threshold overshoots by 1 to 3 % (digits, 95 and 80 %), and falls back
# when little is left to train what revives. The late speed alone runs away where the threshold
# itself drives the quantile up (channels before normalization).
_WINDOW = 0.5


class TargetSparsityState(NamedTuple):
    """The state of the controller, in the shape and the units of the threshold.

    Attributes:
      quantile: q, as of the latest selection.
      first: q_0.
      speed: v, the rise of the quantile per unit of the budget, which is 1 for all K steps.
      steps: the number of steps of the whole run, int32 scalar.
      zeros: how many weights are zero at the target, uint32: of all together, or of each layer.
    """

    quantile: Float[Array, "*layers"]
    first: Float[Array, "*layers"]
    speed: Float[Array, "*layers"]
    steps: Integer[Array, ""]
    zeros: Integer[Array, "*layers"]


def target_sparsity(
    target: float | Any,
    learning_rate: ScalarOrSchedule,
    steps: int,
    *,
    law: Law | None = None,
    reach: float = 0.5,
    update_every: int | None = None,
) -> "TargetSparsity":
    """A threshold that reaches a named sparsity and holds it, without a search for its final value.

    The threshold rises by ``law`` until ``reach * steps``, where the target is met. From there on
    it is the ``target`` quantile of the latent magnitudes: weights may still swap, and the sparsity
    stays. At the last step it is met exactly: ``round(target * N)`` of the N pruned weights are
    zero, more only where magnitudes tie; with a target for each layer, that many of each. Where all
    magnitudes from the quantile up tie, they stay, and fewer are zero: a threshold is finite and
    below the largest magnitude. The equations stand at the top of ``lats_optax/target.py``.

    Copies under ``jax.vmap`` select when one of them is due, and not at every step. Within
    ``jax.pmap`` and ``jax.shard_map`` the latent weights must be the same on all devices. Where
    ``check_vma`` of the latter checks it, others are an error; elsewhere each device selects a
    quantile of its own, which :func:`lats_optax.finalize` refuses. A derivative through the
    threshold is that of the weight that it is taken from.

    Under an operator of groups, such as those of :mod:`lats_optax.groups`, the weights of a group
    tie, and the one that the quantile lies in goes as a whole: ``round(target * N)`` weights are
    zero or more, by less than the size of that group. One group survives however high the target
    is, of all together or, with a target for each layer, of each.

    Args:
      target: the sparsity to reach, the fraction of zeros among the pruned weights, in [0, 1). Or
        one for each layer, each of which then has a threshold of its own: a tree like the
        parameters (or a prefix of it), or a function that makes one from the pruned weights, such
        as ``lats_optax.erdos_renyi(0.9)`` or ``lats_optax.per_layer({"^stem": 0.5, "": 0.9})``.
      learning_rate: the optimizer's own, a number or an optax schedule ``count -> eta``. Only its
        proportions count.
      steps: number of optimizer steps of the whole run.
      law: the way to the target. Default (None): :func:`lats_optax.constant_l1`, in proportion to
        the learning rate. Also :func:`lats_optax.threshold_curve` and
        :func:`lats_optax.sparsity_curve`. With ``reach=1`` and ``operator=prox.prox_l1`` the
        default law is that of LATS, with a final threshold that is found on the way.
      reach: the part of the steps after which the target is met, in (0, 1].
      update_every: the quantile is selected every so many steps, and always where the target is met
        and at the last step. After ``steps`` it is selected at every step. Default: a two-hundredth
        of the run, between 1 and 1000 steps. Each selection reads the latent weights nine times in
        float32, and does not sort them; under an operator of groups it reads them once, and nine
        times the magnitudes of the groups.

    Returns:
      A controller for ``soft_threshold``. Its default operator is
      ``prox.Rescaled(prox.prox_annealed(steps))``: soft at first, between soft and hard at
      the end, and half of the shrinkage given back. Its default ``pruned_scale`` is
      :func:`lats_optax.bounded`.

    Raises:
      ValueError: ``target`` outside [0, 1); ``steps`` or ``update_every`` < 1; ``reach`` outside
        (0, 1]; a learning rate that is negative or not finite somewhere, or zero throughout; a law
        with a value that is not allowed. From ``init`` of the transform, a tree of targets of
        another structure, or with one outside [0, 1). From ``update``, latent weights that vary
        over an axis of ``jax.shard_map``.

    Example:
      >>> import jax.numpy as jnp, optax, lats_optax
      >>> tx = optax.chain(
      ...     optax.sgd(0.1), lats_optax.soft_threshold(target_sparsity(0.75, 0.1, steps=4)))
      >>> params = {"kernel": jnp.array([[0.1, -0.4], [0.3, 0.2]])}
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     updates, state = tx.update({"kernel": jnp.zeros((2, 2))}, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> (params["kernel"] != 0).tolist()
      [[False, True], [False, False]]
    """
    steps = check_steps(steps)
    reach = check_fraction("reach", reach)
    if update_every is None:
        update_every = default_update_every(steps)
    rates = learning_rates(learning_rate, steps)
    return TargetSparsity(
        target=check_target(target),
        law=constant_l1() if law is None else law,
        rates=rates,
        horizon=max(round(reach * steps), 1),
        update_every=check_steps(update_every, "update_every"),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TargetSparsity:
    """The controller that :func:`target_sparsity` makes.

    Attributes:
      target: a sparsity, a tree of them, or a function from latent weights to such a tree.
      law: the way there.
      rates: the learning rates, float64 [steps].
      horizon: K, the number of steps after which the target is met.
      update_every: steps between two selections.
      freeze_after: the number of steps after which the support is frozen; None: it is not.
    """

    target: Any
    law: Law
    rates: Float[np.ndarray, " steps"]
    horizon: int
    update_every: int
    freeze_after: int | None = None
    plan: "Plan" = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Tabulate the law."""
        ends = [self.horizon - 1, self.steps - 1, (self.freeze_after or self.steps) - 1]
        due = np.unique([*range(0, self.steps, self.update_every), *ends])
        object.__setattr__(self, "plan", Plan.of(self.law, self.rates[: self.horizon], due))

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return len(self.rates)

    @property
    def default_operator(self) -> TreeOperator:
        """That of the number of steps."""
        return default_operator(self.steps)

    @property
    def default_pruned_update(self) -> PrunedUpdate:
        """At most a tenth of what is alive in their output."""
        return bounded()

    def prepared(self, operator: TreeOperator, freeze_after: int | None) -> "TargetSparsity":
        """The controller that has met its target where the support is frozen."""
        if isinstance(operator, Values):
            raise operator.unknown_magnitude()
        if freeze_after is None:
            return self
        if not self.horizon <= freeze_after <= self.steps:
            raise ValueError(
                f"freeze_after: {freeze_after} is not allowed; allowed are whole numbers from "
                f"{self.horizon}, where the target is reached, to {self.steps}, the steps of the "
                "threshold"
            )
        return dataclasses.replace(self, freeze_after=freeze_after)

    def init(
        self, latent: Any, operator: TreeOperator | None = None
    ) -> tuple[Float[Array, "*layers"], TargetSparsityState]:
        """A threshold of zero, after a look at the tree of targets."""
        if operator is None:  # as optax.chain would call it
            raise TypeError(
                "target_sparsity: it is a threshold and not a transform; wrap it, as in "
                "optax.chain(optimizer, soft_threshold(target_sparsity(...)))"
            )
        targets = targets_of(self.target, latent, operator)
        zero = jnp.zeros(np.shape(targets.sizes), jnp.result_type(float))
        # Copies: the state is donated, and a buffer can be given away once.
        steps = jnp.asarray(self.steps, jnp.int32)
        zeros = jnp.asarray(targets.ranks(np.ones(1))[0])
        return zero, TargetSparsityState(zero.copy(), zero.copy(), zero.copy(), steps, zeros)

    def update(
        self,
        count: Integer[Array, ""],
        threshold: Float[Array, "*layers"],
        state: TargetSparsityState,
        latent: Any,
        operator: TreeOperator,
    ) -> tuple[Float[Array, "*layers"], TargetSparsityState]:
        """Select the quantile where it is due (1), and control the threshold by it."""
        weights = by_path(latent)
        if not sum(leaf.size for leaf in weights.values()):
            return threshold, state
        targets = targets_of(self.target, latent, operator)
        index, due = self.plan.selection(count)
        ranks = jnp.asarray(targets.ranks(self.plan.fraction))[index]
        previous, ranks = jnp.reshape(state.quantile, -1), jnp.reshape(ranks, -1)
        quantile = quantiles(due, previous, weights, ranks, operator).reshape(threshold.shape)
        return control(self.plan, count, threshold, state, quantile)


class Plan(NamedTuple):
    """What the controller knows before the run, as float64 tables.

    Attributes:
      due: the steps after which the quantile is selected, int32 [n].
      fraction: the part of the target that it is taken at, [n], or [1] for one part throughout.
      gain: rho of each of the K steps, [K].
      spent: S after each selection, as a part of the whole budget, [n].
      remaining: R after each selection, likewise, [n].
      weight: 1 / (the window of the moving average), [n]; 0 where nothing was spent.
      keep: 1 - (what was spent since the last selection) / window, [n].
    """

    due: Integer[np.ndarray, " n"]
    fraction: Float[np.ndarray, " _"]
    gain: Float[np.ndarray, " K"]
    spent: Float[np.ndarray, " n"]
    remaining: Float[np.ndarray, " n"]
    weight: Float[np.ndarray, " n"]
    keep: Float[np.ndarray, " n"]

    @classmethod
    def of(cls, law: Law, rates: Float[np.ndarray, " K"], due: Integer[np.ndarray, " n"]) -> "Plan":
        """The tables of a law.

        Args:
          law: the way to the target.
          rates: learning rates of the K steps until it is reached, float64 [K].
          due: the steps after which the quantile is selected, K - 1 among them.

        Raises:
          ValueError: increments that are negative or not finite somewhere, or zero throughout.
        """
        horizon = len(rates)
        reached = np.minimum(due, horizon - 1)
        fraction = np.asarray(law.fraction((reached + 1) / horizon), np.float64)
        if np.all(fraction == fraction[-1]):
            fraction = fraction[-1:]
        due = due.astype(np.int32)
        if law.increments is None:  # equation (2): no forecast, and all the way to the quantile
            none = np.zeros(len(due))
            return cls(due, fraction, np.ones(horizon), none, none, none, none)
        increments = _increments(law, rates)
        spent = np.cumsum(increments)[reached] - increments[0]
        left = np.append(np.cumsum(increments[::-1])[::-1][1:], 0.0)
        total = increments + left
        gain = np.divide(increments, total, out=np.zeros(horizon), where=total > 0)
        gain[-1] = 1.0  # even where the law ends on an increment of zero
        between, remaining = np.diff(spent, prepend=0.0), left[reached]
        # Never longer than what there is to look back on, nor shorter than between selections.
        window = np.maximum(between, np.minimum(spent, _WINDOW * remaining))
        weight = np.divide(1.0, window, out=np.zeros_like(window), where=between > 0)
        return cls(due, fraction, gain, spent, remaining, weight, 1 - weight * between)

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        return int(self.due[-1]) + 1

    def selection(self, count: Integer[Array, ""]) -> tuple[Integer[Array, ""], Bool[Array, ""]]:
        """The number of the latest selection at a step, and whether it is due at this step.

        After the last step every step is due, so that who trains on stays at the target.
        """
        due = jnp.asarray(self.due)
        index = jnp.searchsorted(due, count, side="right") - 1
        return index, (due[index] == count) | (count >= self.steps)


def control(
    plan: Plan,
    count: Integer[Array, ""],
    threshold: Float[Array, "*layers"],
    state: TargetSparsityState,
    quantile: Float[Array, "*layers"],
) -> tuple[Float[Array, "*layers"], TargetSparsityState]:
    """The threshold after a step, by equations (2) to (6): a pure function, without weights.

    Args:
      plan: the tables of the law.
      count: int32 scalar, t.
      threshold: d_t.
      state: after the step before.
      quantile: q_t where a selection is due, else ``state.quantile``. As the threshold a scalar, or
        a vector with an entry for each layer.

    Returns:
      d_{t+1} and the new state.

    Example:
      >>> from lats_optax import threshold_curve
      >>> plan = Plan.of(threshold_curve(), np.ones(2), due=np.arange(3))
      >>> d = jnp.zeros(())
      >>> state = TargetSparsityState(d, d, d, steps=jnp.asarray(3), zeros=jnp.asarray(1))
      >>> for t in range(3):
      ...     d, state = control(plan, jnp.asarray(t), d, state, jnp.asarray(0.5 + t))
      ...     print(d)
      0.4375
      1.5
      2.5
    """

    def at(table: Float[np.ndarray, " _"], entry: Integer[Array, ""]) -> Float[Array, ""]:
        return jnp.asarray(table, threshold.dtype)[entry]

    index, due = plan.selection(count)
    first = jnp.where(count == 0, quantile, state.first)
    change = jnp.where(count == 0, 0.0, quantile - state.quantile)
    average = at(plan.keep, index) * state.speed + at(plan.weight, index) * change
    speed = jnp.where(due, average, state.speed)  # (3)
    spent = at(plan.spent, index)
    mean = jnp.where(spent > 0, (quantile - first) / jnp.where(spent > 0, spent, 1.0), 0.0)
    setpoint = quantile + at(plan.remaining, index) * jnp.minimum(speed, mean)  # (4)
    horizon = len(plan.gain)
    gain = at(plan.gain, jnp.minimum(count, horizon - 1))
    # Written so that a gain of 1 gives the setpoint itself, which is then the quantile.
    moved = jnp.maximum((1 - gain) * threshold + gain * setpoint, 0.0)  # (5)
    after = jnp.where(count < horizon, moved, quantile)  # (6)
    return after, state._replace(quantile=quantile, first=first, speed=speed)


def default_operator(steps: int) -> Elementwise:
    """What a named sparsity is reached with in a run of ``steps``, unless another is given."""
    return Rescaled(prox_annealed(steps))


def default_update_every(steps: int) -> int:
    """Steps between two selections in a run of ``steps``: a two-hundredth of it, in 1 … 1000.

    >>> default_update_every(50), default_update_every(10_000), default_update_every(500_400)
    (1, 50, 1000)
    """
    return min(max(steps // 200, 1), 1000)


def _increments(law: Law, rates: Float[np.ndarray, " K"]) -> Float[np.ndarray, " K"]:
    """The proportions in which the threshold rises, float64 [K], that sum to 1."""
    assert law.increments is not None
    increments = np.asarray(law.increments(rates), np.float64)
    wrong = ~(np.isfinite(increments) & (increments >= 0))
    if wrong.any():
        step = int(np.argmax(wrong))
        raise ValueError(
            f"law: the threshold would change by {increments[step]} at step {step}; allowed are "
            "finite numbers >= 0"
        )
    if not increments.any():
        raise ValueError(f"law: the threshold would not rise in any of the {len(rates)} steps")
    return increments / increments.sum()
