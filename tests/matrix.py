"""Which cases of a table, or of a cross product of tables, the fast suite runs.

A test marked ``cover`` is one axis of a matrix with all others of its module that have the mark
(or its name, ``cover("stores")``): the test itself is a value of that axis, and so is each of its
parameters. The fast suite runs a cover, in which each value of each axis occurs at least once.
The rest of the product is marked ``slow``. Put what is cheap first: it is taken again where the
other axis is longer.
"""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest


def fast(table: Iterable[Any], keep: int | Iterable[Any]) -> list[Any]:
    """The values of a table for ``parametrize``: all but those to keep are marked ``slow``.

    Args:
      table: the values; tuples where several arguments are parametrized together.
      keep: which values stay fast, or how many of the first.

    Raises:
      ValueError: A value to keep is not in the table.
    """
    values = list(table)
    # By place where only the first stay: values may be arrays.
    kept = set(range(keep)) if isinstance(keep, int) else {_place(value, values) for value in keep}
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=() if place in kept else pytest.mark.slow,
        )
        for place, value in enumerate(values)
    ]


def _place(value: Any, values: list[Any]) -> int:
    if value not in values:
        raise ValueError(f"keep: {value!r} is not allowed; allowed: {values}")
    return values.index(value)


def cover(rows: Sequence[Iterable[Hashable]]) -> set[int]:
    """The numbers of the rows that are taken so that each value occurs in one of them.

    The next row is the one that adds most values, and the first of those that tie.

    Args:
      rows: for each case, its values.
    """
    values = [set(row) for row in rows]
    left = set().union(*values)
    taken = set()
    while left:
        best = max(range(len(values)), key=lambda n: (len(values[n] & left), -n))
        taken.add(best)
        left -= values[best]
    return taken


def mark_slow(items: Iterable[pytest.Item]) -> None:
    """Mark ``slow`` what the covers leave out. What is slow already is in no matrix."""

    def group(item: pytest.Item) -> tuple[str, str]:
        mark = item.get_closest_marker("cover")
        return (item.nodeid.partition("::")[0], mark.args[0] if mark.args else "")

    marked = [
        item
        for item in items
        if item.get_closest_marker("cover") and not item.get_closest_marker("slow")
    ]
    for _, matrix in itertools.groupby(sorted(marked, key=group), key=group):
        cases = list(matrix)
        taken = cover([_values(case) for case in cases])
        for number, case in enumerate(cases):
            if number not in taken:
                case.add_marker(pytest.mark.slow)


def _values(item: pytest.Item) -> set[Hashable]:
    """The test and its parameters, each with its name."""
    parameters = item.callspec.params.items() if hasattr(item, "callspec") else ()
    return {("test", item.originalname)} | {
        (name, value if isinstance(value, (str, int, float)) else id(value))
        for name, value in parameters
    }
