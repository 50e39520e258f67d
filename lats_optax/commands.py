"""What the shell's commands start: `cli`, or one line that says what is not installed.

Nothing but the standard library is imported here: the optimizer installs without the trainer.
"""

import importlib
import sys

# What the trainer needs; the optimizer is content with an older one.
_PYTHON = (3, 11)


def train() -> int:
    """`lats-train`."""
    return _run("train")


def demo() -> int:
    """`lats-demo`."""
    return _run("demo")


def prepare() -> int:
    """`lats-prepare`."""
    return _run("prepare")


def inspect() -> int:
    """`lats-inspect`."""
    return _run("inspect")


def compact() -> int:
    """`lats-compact`."""
    return _run("compact")


def _run(name: str) -> int:
    if sys.version_info < _PYTHON:
        needed, this = (".".join(map(str, version[:3])) for version in (_PYTHON, sys.version_info))
        print(
            f"error: the commands need Python {needed} or newer, and this is {this}: the optimizer "
            "alone runs on it",
            file=sys.stderr,
        )
        return 1
    try:
        cli = importlib.import_module("lats_optax.cli")
    except ImportError as error:
        print(
            f"error: the commands need more than the optimizer does ({error}): "
            "pip install 'lats-optax[train]'",
            file=sys.stderr,
        )
        return 1
    code: int = getattr(cli, name)()
    return code
