"""Threshold laws (count -> d), and the two maps between a threshold and its L1 coefficient.

Here belong laws that name a final threshold. The table that each makes is in
`control/schedules.py`; laws that name a sparsity are in `control/laws.py`.

Every schedule is tabulated in float64 on the host when it is made, so what a jitted program reads
is rounded once, and the implied L1 coefficient, a small difference of large numbers, is exact. A
schedule called with a Python or NumPy count answers in NumPy float64; called with a JAX array,
traced or not, it answers on the device in JAX's default float type.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lats_optax.array_types import Float, Integer
from lats_optax.checks.numbers import check_above, check_steps, check_threshold
from lats_optax.control.schedules import (
    ScalarOrSchedule,
    Schedule,
    ThresholdSchedule,
    check_each,
    check_sum,
    check_tabulated,
    evaluate,
    learning_rates,
    look_up,
    tabulate,
)


def lats_threshold(
    learning_rate: ScalarOrSchedule,
    steps: int,
    final: float,
    *,
    l1: Callable[[Any], Any] | None = None,
) -> ThresholdSchedule:
    """The learning-rate adapted threshold: the implied L1 coefficient keeps a given profile.

    ``d_t = final * sum_{s<t} eta_s mu(s/T) / sum_{s<T} eta_s mu(s/T)``, with mu = 1 unless given.

    Args:
      learning_rate: a number, or any optax schedule ``count -> eta``; it may be zero at some steps.
      steps: number T of optimizer steps (not of epochs).
      final: the threshold after the last step, >= 0, in the units of the weights.
      l1: profile of the L1 coefficient over x = t / T in [0, 1), up to a factor: a function of an
        array. ``lambda x: beta**x`` is proximal gradient homotopy (PGH).

    Returns:
      A schedule ``count -> d`` for :func:`lats_optax.soft_threshold`.

    Raises:
      ValueError: ``steps`` < 1; ``final`` negative or not finite; the learning rate or the
        profile is negative or not finite somewhere, or their product sums to zero.

    Example:
      >>> import optax
      >>> learning_rate = optax.cosine_decay_schedule(0.1, 1000)
      >>> threshold = lats_threshold(learning_rate, 1000, final=0.02)
      >>> round(float(threshold(500)), 4), float(threshold(1000))
      (0.0164, 0.02)

    Source: Chen et al., "A Unified Framework for Soft Threshold Pruning" (ICLR 2023), section 4.
    """
    steps, final = check_tabulated(steps), check_threshold("final", final)
    rates = learning_rates(learning_rate, steps)
    if l1 is not None:
        with np.errstate(over="ignore"):
            rates = rates * _profile(l1, steps)
        if not rates.any():
            raise ValueError("l1: the profile is zero wherever the learning rate is not")
        check_sum("l1: the product with the learning rate", rates)
    sums = _prefix_sums(rates)
    return ThresholdSchedule(final * (sums / sums[-1]), final * (rates / sums[-1]))


def s_lats_threshold(steps: int, final: float) -> ThresholdSchedule:
    """LATS for a cosine learning rate that moves every step (S-LATS), in closed form.

    ``d = final * (x + sin(pi x) / pi)``, x = t / steps.

    Args:
      steps: number of optimizer steps, >= 1.
      final: the threshold after the last step, >= 0, in the units of the weights.

    Returns:
      A schedule ``count -> d``.

    Raises:
      ValueError: ``steps`` < 1; ``final`` negative or not finite.

    Example:
      >>> round(float(s_lats_threshold(1000, final=0.02)(500)), 4)
      0.0164

    Source: Chen et al. (ICLR 2023), S-LATS.
    """
    x = _fractions(steps)
    return _closed_form(final, x + np.sin(np.pi * x) / np.pi)


def epoch_lats_threshold(epochs: int, steps_per_epoch: int, final: float) -> ThresholdSchedule:
    """LATS for a cosine learning rate that moves once an epoch, in closed form.

    After b <= B steps of epoch e (of E), ``d = final / (E + 1) * ((1 + 2 e + sin(pi (e - 1/2) / E)
    / sin(pi / 2 E)) / 2 + b / B * (1 + cos(pi e / E)))``.

    Args:
      epochs: number E of epochs, >= 1.
      steps_per_epoch: number B of optimizer steps in each, >= 1.
      final: the threshold after the last step, >= 0, in the units of the weights.

    Returns:
      A schedule ``count -> d`` over ``epochs * steps_per_epoch`` steps.

    Raises:
      ValueError: ``epochs`` or ``steps_per_epoch`` < 1; ``final`` negative or not finite.

    Example:
      >>> threshold = epoch_lats_threshold(10, 100, final=0.02)
      >>> threshold.steps, round(float(threshold(1000)), 6)
      (1000, 0.02)

    Source: Chen et al. (ICLR 2023), LATS.
    """
    epochs = check_steps(epochs, "epochs")
    steps_per_epoch = check_steps(steps_per_epoch, "steps_per_epoch")
    step = np.arange(check_tabulated(epochs * steps_per_epoch, "epochs * steps_per_epoch") + 1)
    epoch = np.minimum(step // steps_per_epoch, epochs - 1)
    within = (step - epoch * steps_per_epoch) / steps_per_epoch
    before = 1 + 2 * epoch + np.sin(np.pi * (epoch - 0.5) / epochs) / np.sin(np.pi / (2 * epochs))
    return _closed_form(
        final, (before / 2 + within * (1 + np.cos(np.pi * epoch / epochs))) / (epochs + 1)
    )


def pgh_threshold(steps: int, final: float, beta: float) -> ThresholdSchedule:
    """Proximal gradient homotopy under a cosine learning rate: mu ∝ beta^x, in closed form.

    With L = ln(beta), x = t / steps, ``d = final *
    (pi^2 (beta^x - 1) + (beta^x - 2) L^2 + beta^x L (L cos(pi x) + pi sin(pi x)))
    / (pi^2 (beta - 1) - 2 L^2)``.

    Args:
      steps: number of optimizer steps, >= 1.
      final: the threshold after the last step, >= 0, in the units of the weights.
      beta: ratio of the last L1 coefficient to the first, > 0. Below 1 the penalty begins strong
        and relaxes; at 1 this is S-LATS.

    Returns:
      A schedule ``count -> d``.

    Raises:
      ValueError: ``steps`` < 1; ``final`` negative or not finite; ``beta`` <= 0 or not finite.

    Example:
      >>> round(float(pgh_threshold(1000, final=0.02, beta=0.01)(500)), 4)
      0.0194

    Source: Chen et al. (ICLR 2023), PGH.
    """
    x = _fractions(steps)
    log = math.log(check_above("beta", beta, 0))
    # The textbook form divides 0 by 0 at beta = 1 and cancels near it. With E = beta^x - 1 from
    # expm1, and one factor of L divided out of both sides, every term is accurate for all beta.
    growth = np.expm1(log * x)

    def over_log(value: Any, limit: Any) -> Any:
        return value / log if log else limit

    with np.errstate(over="ignore", invalid="ignore"):
        top = np.pi**2 * over_log(growth, x) + (1 + growth) * np.pi * np.sin(np.pi * x)
        top += log * (growth * (1 + np.cos(np.pi * x)) - 2 * np.sin(np.pi * x / 2) ** 2)
        shape = top / (np.pi**2 * over_log(np.expm1(log), 1.0) - 2 * log)
    if not np.all(np.isfinite(shape)):
        raise ValueError(f"beta: {beta} is not allowed; it is too large for float64")
    return _closed_form(final, shape)


def threshold_from_l1(
    l1: ScalarOrSchedule, learning_rate: ScalarOrSchedule, steps: int, *, initial: float = 0.0
) -> ThresholdSchedule:
    """The threshold that an L1 coefficient implies.

    ``d_t = initial + sum_{s<t} mu_s eta_s``

    Args:
      l1: the coefficient mu, a number or a schedule ``count -> mu``; it may be negative where the
        threshold stays >= 0.
      learning_rate: a number or a schedule ``count -> eta``.
      steps: number of optimizer steps, >= 1.
      initial: the threshold d_0 before the first step, >= 0, in the units of the weights.

    Returns:
      A schedule ``count -> d``.

    Raises:
      ValueError: ``steps`` < 1; ``initial`` negative or not finite; the learning rate negative or
        not finite somewhere, or zero throughout; ``l1`` not finite somewhere, or such that the
        threshold would become negative.

    Example:
      >>> threshold = threshold_from_l1(0.01, learning_rate=0.1, steps=100)
      >>> round(float(threshold(100)), 6)
      0.1

    Source: Chen et al. (ICLR 2023), the unified view: a threshold is a prefix sum of L1 steps.
    """
    steps, initial = check_tabulated(steps), check_threshold("initial", initial)
    rates = learning_rates(learning_rate, steps)
    coefficients = tabulate("l1", l1, steps)
    if not np.all(np.isfinite(coefficients)):
        step = int(np.argmin(np.isfinite(coefficients)))
        raise ValueError(f"l1: {coefficients[step]} at step {step} is not finite")
    with np.errstate(over="ignore", invalid="ignore"):
        increments = rates * coefficients
        table = initial + _prefix_sums(increments)
    # A threshold that falls back to zero may miss it by what rounding makes of so many terms.
    rounding = steps * np.finfo(float).eps * np.abs(increments).sum()
    table = np.where((table < 0) & (table >= -rounding), 0.0, table)
    check_each("l1", table, "the threshold becomes ")
    return ThresholdSchedule(table, increments)


def l1_from_threshold(threshold: ScalarOrSchedule, learning_rate: ScalarOrSchedule) -> Schedule:
    """The L1 coefficient that a threshold schedule implies: the inverse of `threshold_from_l1`.

    ``mu_t = (d_{t+1} - d_t) / eta_t``; zero where neither moves.

    Args:
      threshold: a number or a schedule ``count -> d``.
      learning_rate: a number or a schedule ``count -> eta``.

    Returns:
      A schedule ``count -> mu``. With a count on the host (Python or NumPy, scalar or array), or
      under x64, it is evaluated in float64. With a count on the device and no x64, a schedule of
      this library is still differenced in float64; of any other the float32 difference is taken.

    Raises:
      ValueError: a threshold or learning rate given as a number is negative or not finite.

    Example:
      >>> import optax
      >>> learning_rate = optax.cosine_decay_schedule(0.1, 1000)
      >>> l1 = l1_from_threshold(lats_threshold(learning_rate, 1000, final=0.02), learning_rate)
      >>> [round(float(l1(t)), 6) for t in (0, 500, 999)]
      [0.0004, 0.0004, 0.0004]

    Source: Chen et al. (ICLR 2023), the unified view.
    """
    if not callable(threshold):
        check_threshold("threshold", threshold)
    if not callable(learning_rate):
        check_threshold("learning_rate", learning_rate)

    def on_host(counts: Integer[np.ndarray, "*counts"]) -> Float[np.ndarray, "*counts"]:
        rise = _rise(threshold, counts)
        rate = evaluate("learning_rate", learning_rate, counts)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where((rise == 0) & (rate == 0), 0.0, rise / rate)

    @functools.cache
    def table(steps: int) -> np.ndarray:
        # One entry more than there are steps: afterwards the threshold stands still.
        return on_host(np.arange(steps + 1))

    def l1(count: Any) -> Any:
        if not isinstance(count, jax.Array):
            return on_host(np.asarray(count))[()]
        if isinstance(threshold, ThresholdSchedule):
            return jnp.where(count < 0, 0.0, look_up(table(threshold.steps), count))
        rise = jnp.asarray(_call(threshold, count + 1)) - _call(threshold, count)
        rate = jnp.asarray(_call(learning_rate, count))
        still = (rise == 0) & (rate == 0)
        return jnp.where(still, 0.0, rise / jnp.where(still, 1.0, rate))

    return l1


def _call(schedule: ScalarOrSchedule, count: Any) -> Any:
    return schedule(count) if callable(schedule) else schedule


def _fractions(steps: Any) -> np.ndarray:
    steps = check_tabulated(steps)
    return np.arange(steps + 1) / steps


def _closed_form(final: float, shape: Float[np.ndarray, " n"]) -> ThresholdSchedule:
    # The shapes rise from 0 to 1 up to rounding, which must not make a threshold negative.
    return ThresholdSchedule(check_threshold("final", final) * np.maximum(shape, 0.0))


def _prefix_sums(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n+1"]:
    return np.concatenate([[0.0], np.cumsum(values)])


def _rise(
    threshold: ScalarOrSchedule, counts: Integer[np.ndarray, "*counts"]
) -> Float[np.ndarray, "*counts"]:
    if isinstance(threshold, ThresholdSchedule):
        # Before the first step, as after the last, the threshold stands still.
        return np.where(counts < 0, 0.0, look_up(np.append(threshold.increments, 0.0), counts))
    before, after = (evaluate("threshold", threshold, at) for at in (counts, counts + 1))
    return after - before


def _profile(l1: Callable[[Any], Any], steps: int) -> np.ndarray:
    if not callable(l1):
        raise ValueError(f"l1: {l1!r} is not allowed; allowed are functions of x in [0, 1)")
    values = l1(np.arange(steps) / steps)
    try:
        profile = np.broadcast_to(np.asarray(values, float), (steps,))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"l1: it does not give a number for each x in an array of {steps}: {error}"
        ) from error
    return check_each("l1", profile)
