"""Checks of options by name, such as those of configs and models."""

from collections.abc import Iterable


def check(holds: bool, argument: str, value: object, allowed: str) -> None:
    """Raises ValueError, naming the argument, its value and what is allowed, unless it holds.

    >>> check(False, "num_classes", 0, "1 or more")
    Traceback (most recent call last):
    ValueError: num_classes is 0; allowed: 1 or more.
    """
    if not holds:
        raise ValueError(f"{argument} is {value!r}; allowed: {allowed}.")


def check_choice(argument: str, value: object, choices: Iterable[object]) -> None:
    """Raises ValueError, listing the choices, unless the value is one of them.

    >>> check_choice("depth", 19, (18, 34))
    Traceback (most recent call last):
    ValueError: depth is 19; allowed: 18, 34.
    """
    known = list(choices)
    check(value in known, argument, value, ", ".join(map(repr, known)))
