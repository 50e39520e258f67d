"""Nothing fails in silence: every row of the tables in `tests/misuse/`."""

import importlib
import pkgutil

import pytest

from tests import misuse

CASES = [
    pytest.param(case, id=f"{module.name}: {case.what}")
    for module in pkgutil.iter_modules(misuse.__path__)
    for case in importlib.import_module(f"tests.misuse.{module.name}").CASES
]


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    case.expect(case.act)
