"""Threshold schedules (count -> d), and the two maps between a threshold and its L1 coefficient.

Every schedule is tabulated in float64 on the host when it is made, so what a jitted program reads
is rounded once, and the implied L1 coefficient, a small difference of large numbers, is exact. A
schedule called with a Python or NumPy count answers in NumPy float64; called with a JAX array,
traced or not, it answers on the device in JAX's default float type.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

# What an optimizer can count in int32, and what a table can hold (0.8 GB in float64).
_MOST_COUNTED = 2**31 - 1
_MOST_TABULATED = 10**8

Schedule = Callable[[Any], Any]
ScalarOrSchedule = float | jax.Array | Schedule


class ThresholdSchedule:
    """A threshold d_t for t = 0 … steps, held at its last value afterwards.

    Attributes:
      table: float64, shape (steps + 1,): the thresholds d_0 … d_steps, in the units of the weights.
      increments: float64, shape (steps,): d_{t+1} - d_t. Kept beside the table because late in a
        long run an increment is smaller than what float64 resolves next to its prefix sum.
    """

    def __init__(self, table: np.ndarray, increments: np.ndarray | None = None) -> None:
        """Keep the table; each function of this module makes a different one."""
        self.table = table
        self.increments = np.diff(table) if increments is None else increments

    @property
    def steps(self) -> int:
        """Number of optimizer steps T over which the threshold moves."""
        return len(self.table) - 1

    def __call__(self, count: Any) -> Any:
        """The threshold after ``count`` optimizer steps."""
        return _look_up(self.table, count)

    def init(self, params: Any) -> NoReturn:
        """Refuse to be chained: a transform has this method, and a threshold is none."""
        del params
        raise TypeError(
            f"threshold: {self!r} is a threshold and not a transform; wrap it, as in "
            "optax.chain(optimizer, soft_threshold(lats_threshold(...)))"
        )

    def __repr__(self) -> str:
        """Name the range, not the table."""
        return f"ThresholdSchedule(steps={self.steps}, {self.table[0]:g} … {self.table[-1]:g})"


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
    steps, final = _check_tabulated(steps), check_threshold("final", final)
    rates = learning_rates(learning_rate, steps)
    if l1 is not None:
        with np.errstate(over="ignore"):
            rates = rates * _profile(l1, steps)
        if not rates.any():
            raise ValueError("l1: the profile is zero wherever the learning rate is not")
        _check_sum("l1: the product with the learning rate", rates)
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
    step = np.arange(_check_tabulated(epochs * steps_per_epoch, "epochs * steps_per_epoch") + 1)
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
    steps, initial = _check_tabulated(steps), check_threshold("initial", initial)
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
    _check_each("l1", table, "the threshold becomes ")
    return ThresholdSchedule(table, increments)


def l1_from_threshold(
    threshold: ScalarOrSchedule, learning_rate: ScalarOrSchedule
) -> Callable[[Any], Any]:
    """The L1 coefficient that a threshold schedule implies: the inverse of `threshold_from_l1`.

    ``mu_t = (d_{t+1} - d_t) / eta_t``; zero where neither moves.

    Args:
      threshold: a number or a schedule ``count -> d``.
      learning_rate: a number or a schedule ``count -> eta``.

    Returns:
      A schedule ``count -> mu``. With a count on the host (Python or NumPy, scalar or array), or
      under x64, it is evaluated in float64. With a count on the device and no x64, a schedule of
      this module is still differenced in float64; of any other the float32 difference is taken.

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

    def on_host(counts: np.ndarray) -> np.ndarray:
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
            return jnp.where(count < 0, 0.0, _look_up(table(threshold.steps), count))
        rise = jnp.asarray(_call(threshold, count + 1)) - _call(threshold, count)
        rate = jnp.asarray(_call(learning_rate, count))
        still = (rise == 0) & (rate == 0)
        return jnp.where(still, 0.0, rise / jnp.where(still, 1.0, rate))

    return l1


# --- checks that name the argument --------------------------------------------------------------


def check_steps(steps: Any, name: str = "steps", most: int = _MOST_COUNTED) -> int:
    """``steps`` as an int >= 1, or a ValueError that names the argument."""
    # An int beyond 64 bits is no number to NumPy.
    whole = type(steps) is int or (is_number(steps) and float(steps).is_integer())
    if whole and 1 <= steps <= most:
        return int(steps)
    bound = f" and <= {most}" if whole and steps > most else ""
    raise ValueError(f"{name}: {steps!r} is not allowed; allowed are whole numbers >= 1{bound}")


def check_threshold(name: str, value: Any) -> float:
    """``value`` as a finite float >= 0, or a ValueError that names the argument."""
    if not (is_number(value) and math.isfinite(value) and value >= 0):
        shown = value if is_number(value) else repr(value)
        raise ValueError(f"{name}: {shown} is not allowed; allowed are finite numbers >= 0")
    return float(value)


def check_above(
    name: str, value: Any, least: int, *, inclusive: bool = False, infinite: bool = False
) -> float:
    """A number above a bound, or a ValueError that names the argument."""
    known = is_number(value)
    if known and (infinite or math.isfinite(value)):
        number = float(value)
        if number > least or (inclusive and number == least):
            return number
    kind, more = ("numbers", ", inf among them") if infinite else ("finite numbers", "")
    allowed = f"{kind} {'>=' if inclusive else '>'} {least}{more}"
    raise ValueError(f"{name}: {value!r} is not allowed; allowed are {allowed}")


def check_fraction(name: str, value: Any) -> float:
    """``value`` as a float in (0, 1], or a ValueError that names the argument."""
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"{name}: {value!r} is not allowed; allowed are numbers in (0, 1]")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether a value is one real number: of Python, NumPy or JAX, and not a bool."""
    array = np.asarray(value)
    return array.ndim == 0 and jnp.isdtype(array.dtype, ("real floating", "integral"))


def is_schedule(function: Callable[[Any], Any]) -> bool:
    """Whether a function takes a count, and no tree of parameters as `erdos_renyi(0.9)` does.

    >>> is_schedule(lambda count: 0.9**count), is_schedule(lambda tree: jax.tree.map(len, tree))
    (True, False)
    """
    return _answers(function, 0) and not _answers(function, {})


def is_distribution(function: Callable[[Any], Any]) -> bool:
    """Whether a function makes a tree from a tree, as `erdos_renyi(0.9)` does."""
    return _answers(function, {}) and isinstance(function({}), dict)


def _answers(function: Callable[[Any], Any], argument: Any) -> bool:
    try:
        function(argument)
    except Exception:  # the function is anyone's, and so is its error
        return False
    return True


def learning_rates(learning_rate: ScalarOrSchedule, steps: int) -> np.ndarray:
    """The learning rates eta_0 … eta_{steps-1}, float64, checked: finite, >= 0, not all zero."""
    steps = _check_tabulated(steps)
    rates = _check_each("learning_rate", tabulate("learning_rate", learning_rate, steps))
    _check_sum("learning_rate: it", rates)
    if not rates.any():
        raise ValueError(
            f"learning_rate: it is zero at all of the {steps} steps, so no threshold can rise"
        )
    return rates


# --- evaluating somebody's schedule on the host -------------------------------------------------


def tabulate(name: str, schedule: ScalarOrSchedule, steps: int) -> np.ndarray:
    """A schedule at the counts 0 … steps-1, float64, shape (steps,)."""
    return evaluate(name, schedule, np.arange(steps))


def evaluate(name: str, schedule: ScalarOrSchedule, counts: np.ndarray) -> np.ndarray:
    """A number or schedule at host counts, in float64, even while a program is being traced.

    Raises:
      ValueError: it is neither; the message names the argument.
    """
    if not callable(schedule):
        if not is_number(schedule):
            raise ValueError(
                f"{name}: {schedule!r} is not allowed; allowed are numbers and schedules such as "
                "optax.cosine_decay_schedule(0.1, steps)"
            )
        return np.full(counts.shape, float(schedule))
    if isinstance(schedule, ThresholdSchedule):
        return schedule(counts)
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), _on_host():
        try:
            values = np.asarray(jax.vmap(schedule)(counts.reshape(-1)), np.float64)
            return values.reshape(counts.shape)
        except (jax.errors.ConcretizationTypeError, TypeError, ValueError):
            pass
        try:
            # A schedule of Python's own `if` and `math` takes one number at a time.
            each = [float(schedule(int(count))) for count in counts.reshape(-1)]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: it is not a schedule, which gives a number for a count: {error}"
            ) from error
        return np.asarray(each, np.float64).reshape(counts.shape)


def _on_host() -> Any:
    # float64 is slow or missing on accelerators; where no CPU backend runs they have to do.
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return jax.default_device(None)


def _call(schedule: ScalarOrSchedule, count: Any) -> Any:
    return schedule(count) if callable(schedule) else schedule


def _look_up(table: np.ndarray, count: Any) -> Any:
    last = len(table) - 1
    if isinstance(count, jax.Array):
        # The type is named: JAX remembers a constant in the type that it was first traced in, also
        # when x64 is enabled later.
        return jnp.asarray(table, jnp.result_type(float))[jnp.clip(count, 0, last)]
    return table[np.clip(count, 0, last)]


def _fractions(steps: Any) -> np.ndarray:
    steps = _check_tabulated(steps)
    return np.arange(steps + 1) / steps


def _closed_form(final: float, shape: np.ndarray) -> ThresholdSchedule:
    # The shapes rise from 0 to 1 up to rounding, which must not make a threshold negative.
    return ThresholdSchedule(check_threshold("final", final) * np.maximum(shape, 0.0))


def _prefix_sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])


def _rise(threshold: ScalarOrSchedule, counts: np.ndarray) -> np.ndarray:
    if isinstance(threshold, ThresholdSchedule):
        # Before the first step, as after the last, the threshold stands still.
        return np.where(counts < 0, 0.0, _look_up(np.append(threshold.increments, 0.0), counts))
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
    return _check_each("l1", profile)


def _check_tabulated(steps: Any, name: str = "steps") -> int:
    return check_steps(steps, name, _MOST_TABULATED)


def _check_sum(what: str, values: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        total = values.sum()
    if not np.isfinite(total):
        raise ValueError(
            f"{what} sums to {total} over {len(values)} steps; allowed are finite sums"
        )


def _check_each(name: str, values: np.ndarray, prefix: str = "") -> np.ndarray:
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        step = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: {prefix}{values[step]} at step {step}; allowed are finite numbers >= 0"
        )
    return values
