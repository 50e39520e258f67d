"""Nothing fails in silence: every row of the tables in `tests/misuse/`."""

import importlib
import pkgutil
import re

import pytest

from tests import misuse

CASES = [
    # Without addresses: the workers of pytest-xdist have to collect the same names.
    pytest.param(case, id=re.sub(r" at 0x\w+", "", f"{module.name}: {case.what}"))
    for module in pkgutil.iter_modules(misuse.__path__)
    for case in importlib.import_module(f"tests.misuse.{module.name}").CASES
]


@pytest.mark.parametrize("case", CASES)
def test_case(case):
    case.expect(case.act)
