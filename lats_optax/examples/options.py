"""The examples' command lines: a wrong option is answered in one line."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose help begins with the first line of an example's docstring.

    Args:
      name: the example, as in `python -m lats_optax.examples.NAME`.
      doc: its docstring.
    """

    def __init__(self, name: str, doc: str | None) -> None:
        super().__init__(
            prog=f"python -m lats_optax.examples.{name}",
            description=(doc or "").partition("\n")[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, without the usage in front of it, and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def count(text: str) -> int:
    """A whole number of at least 1.

    Raises:
      argparse.ArgumentTypeError: it is something else.

    Example:
      >>> count("300")
      300
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed are 1, 2, 3 …")
    return number


def fraction(text: str) -> float:
    """A number in [0, 1).

    Raises:
      argparse.ArgumentTypeError: it is something else.

    Example:
      >>> fraction("0.9")
      0.9
    """
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed are numbers in [0, 1)")
    return number
