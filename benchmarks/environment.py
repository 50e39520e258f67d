"""Environment variables of the processes that a benchmark starts."""

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables that processes have which are started in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
