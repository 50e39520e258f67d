"""The cover of a cross product: every value of every axis, and nothing is lost."""

import itertools
import types

import pytest

from tests import matrix


@pytest.mark.parametrize("sizes", [(1,), (5,), (3, 3), (7, 2), (2, 7), (4, 3, 5)], ids=str)
def test_every_value_is_covered_by_as_few_as_the_longest_axis(sizes):
    product = list(itertools.product(*map(range, sizes)))
    rows = [list(enumerate(case)) for case in product]
    taken = matrix.cover(rows)
    assert {value for number in taken for value in rows[number]} == set().union(*rows)
    assert len(taken) == max(sizes)
    assert matrix.cover(rows) == taken


def test_the_first_value_is_taken_again():
    rows = [{("row", row), ("column", column)} for row in "abcd" for column in "xy"]
    assert sorted(matrix.cover(rows)) == [0, 3, 4, 6]  # ax by cx dx


class Item:
    """As much of a collected test as is looked at."""

    def __init__(self, name, marks, **parameters):
        self.originalname, self.nodeid = name, f"test_x.py::{name}{list(parameters.values())}"
        self.marks = list(marks)
        self.callspec = types.SimpleNamespace(params=parameters)

    def get_closest_marker(self, name):
        return next((mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, mark):
        self.marks.append(mark.mark)


def test_tests_and_parameters_are_axes_and_nothing_is_lost():
    mark, slow = pytest.mark.cover.mark, pytest.mark.slow.mark
    other = pytest.mark.cover("other").mark
    items = [Item(test, [mark], row=row) for test in ("a", "b") for row in range(3)]
    items += [Item("c", [], row=row) for row in range(3)]
    items += [Item("d", [mark, slow], row=3), Item("e", [other], row=0), Item("e", [other], row=1)]
    before = list(items)
    matrix.mark_slow(items)
    assert items == before
    fast = [item.nodeid.partition("::")[2] for item in items if slow not in item.marks]
    assert fast == ["a[0]", "a[2]", "b[1]", "c[0]", "c[1]", "c[2]", "e[0]", "e[1]"]


@pytest.mark.parametrize("keep", [["b", ("c", 1)], 2])
def test_all_but_those_to_keep_are_slow(keep):
    table = ["b", ("c", 1), "a"]
    cases = matrix.fast(table, keep)
    assert [case.values for case in cases] == [("b",), ("c", 1), ("a",)]
    assert [bool(case.marks) for case in cases] == [False, False, True]


def test_what_is_kept_is_in_the_table():
    with pytest.raises(ValueError, match=r"^keep: 'c' is not allowed; allowed: \['a', 'b'\]$"):
        matrix.fast({"a": 1, "b": 2}, ["c"])
