"""What a user may get wrong, as a table: each case, and what the library then does or says.

Here belongs what a row of the table is. The rows are in the modules beside this one, by what they
are about; `tests/test_misuse.py` runs them all.
"""

import re
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

Expectation = Callable[[Callable[[], Any]], None]


class Case(NamedTuple):
    """One row.

    Attributes:
      what: the mistake, or the hard case, in a few words: the test's name.
      act: does it.
      expect: what has to happen then: `raises`, `warns` or `gives`.
    """

    what: str
    act: Callable[[], Any]
    expect: Expectation


def raises(error: type[Exception], says: str) -> Expectation:
    """An exception whose message matches a regular expression."""

    def expect(act: Callable[[], Any]) -> None:
        with pytest.raises(error, match=says):
            act()

    return expect


def warns(says: str, check: Callable[[Any], Any] = lambda value: True) -> Expectation:
    """A warning whose message matches, and a value that passes the check."""

    def expect(act: Callable[[], Any]) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = act()
        messages = [str(warning.message) for warning in caught]
        assert any(re.search(says, message) for message in messages), messages
        assert check(value), value

    return expect


def gives(check: Callable[[Any], Any]) -> Expectation:
    """A value that passes the check, and no warning."""

    def expect(act: Callable[[], Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            value = act()
        assert check(value), value

    return expect
