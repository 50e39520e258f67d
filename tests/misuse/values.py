"""Arguments of the wrong kind."""

import lats_optax
from tests.misuse import Case, raises

CASES = [
    Case(
        "a word for a threshold",
        lambda: lats_optax.soft_threshold("0.1"),
        raises(ValueError, r"^threshold: '0.1' is not allowed"),
    ),
]
