"""Schedules on the host: the table of a threshold, and anyone's schedule as float64 numbers.

Here belong what every schedule shares: its type, the class of those that are tabulated, evaluation
and the checks of values. The laws that fill the tables are in `thresholds.py`.
"""

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lats_optax.array_types import AnyArray, Float, Integer, Scalar
from lats_optax.checks.numbers import check_steps, is_number
from lats_optax.compatibility import enable_x64

# What a table can hold (0.8 GB in float64).
MOST_TABULATED = 10**8

Schedule: TypeAlias = optax.Schedule
ScalarOrSchedule: TypeAlias = Scalar | Schedule


class ThresholdSchedule:
    """A threshold d_t for t = 0 … steps, held at its last value afterwards.

    Attributes:
      table: float64, shape (steps + 1,): the thresholds d_0 … d_steps, in the units of the weights.
      increments: float64, shape (steps,): d_{t+1} - d_t. Kept beside the table because late in a
        long run an increment is smaller than what float64 resolves next to its prefix sum.
    """

    def __init__(
        self, table: Float[np.ndarray, " n"], increments: Float[np.ndarray, " n"] | None = None
    ) -> None:
        """Keep the table; each law of `thresholds.py` makes a different one."""
        self.table = table
        self.increments = np.diff(table) if increments is None else increments

    @property
    def steps(self) -> int:
        """Number of optimizer steps T over which the threshold moves."""
        return len(self.table) - 1

    def __call__(
        self, count: int | Integer[AnyArray, "*counts"]
    ) -> float | Float[AnyArray, "*counts"]:
        """The threshold after ``count`` optimizer steps: float64 on the host."""
        return look_up(self.table, count)

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


def look_up(table: Float[np.ndarray, " n"], count: int | Integer[AnyArray, "*counts"]) -> Any:
    """The entry at a count, the last one beyond: on the host, or on the device of the count."""
    last = len(table) - 1
    if isinstance(count, jax.Array):
        # The type is named: JAX remembers a constant in the type that it was first traced in, also
        # when x64 is enabled later.
        return jnp.asarray(table, jnp.result_type(float))[jnp.clip(count, 0, last)]
    return table[np.clip(count, 0, last)]


def learning_rates(learning_rate: ScalarOrSchedule, steps: int) -> Float[np.ndarray, " steps"]:
    """The learning rates eta_0 … eta_{steps-1}, float64, checked: finite, >= 0, not all zero."""
    steps = check_tabulated(steps)
    rates = check_each("learning_rate", tabulate("learning_rate", learning_rate, steps))
    check_sum("learning_rate: it", rates)
    if not rates.any():
        raise ValueError(
            f"learning_rate: it is zero at all of the {steps} steps, so no threshold can rise"
        )
    return rates


def tabulate(name: str, schedule: ScalarOrSchedule, steps: int) -> Float[np.ndarray, " steps"]:
    """A schedule at the counts 0 … steps-1, float64, shape (steps,)."""
    return evaluate(name, schedule, np.arange(steps))


def evaluate(
    name: str, schedule: ScalarOrSchedule, counts: Integer[np.ndarray, "*counts"]
) -> Float[np.ndarray, "*counts"]:
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
        return look_up(schedule.table, counts)
    with jax.ensure_compile_time_eval(), enable_x64(True), _on_host():
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


def check_tabulated(steps: Any, name: str = "steps") -> int:
    """``steps`` as an int >= 1 that a table can hold, or a ValueError that names the argument."""
    return check_steps(steps, name, MOST_TABULATED)


def check_sum(what: str, values: Float[np.ndarray, " n"]) -> None:
    """Refuses values whose sum is not finite."""
    with np.errstate(over="ignore"):
        total = values.sum()
    if not np.isfinite(total):
        raise ValueError(
            f"{what} sums to {total} over {len(values)} steps; allowed are finite sums"
        )


def check_each(
    name: str, values: Float[np.ndarray, " n"], prefix: str = ""
) -> Float[np.ndarray, " n"]:
    """Values that are finite and >= 0, or a ValueError that names the first step where not."""
    wrong = ~(np.isfinite(values) & (values >= 0))
    if wrong.any():
        step = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: {prefix}{values[step]} at step {step}; allowed are finite numbers >= 0"
        )
    return values
