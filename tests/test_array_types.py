"""The shapes and dtypes in annotations are those of the arrays: tests of the core, run with checks.

jaxtyping's import hook puts a check around every function of the core, so each file of tests runs
in a process of its own.
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Float

from tests import array_checker, matrix

CHECKED = (
    *("checks", "control", "distributions", "groups", "latent", "masks", "operators", "prox"),
    *("pruning", "quantile", "target", "thresholds", "transforms"),
)
# Tests of bad input hand over arrays of other types than annotations allow: none of them is here.
FILES = (
    *("distributions", "finalize", "groups", "masks", "n_of_m", "phases", "power", "prox"),
    *("pruned", "reference", "sixteen_bits", "sparsity", "target", "thresholds", "transforms"),
    *("transforms_jax", "transforms_optax", "units"),
)


@pytest.mark.parametrize("name", matrix.fast(FILES, ["pruned"]))
def test_the_core_keeps_to_its_annotations(name):
    packages = ",".join([*(f"lats_optax.{part}" for part in CHECKED), "tests.array_checker.check"])
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider"),
            *("-p", "tests.array_checker", f"--jaxtyping-packages={packages}"),
            f"tests/test_{name}.py",
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


@pytest.mark.parametrize(
    ("value", "result"),
    [
        (jnp.ones((2, 3)), jnp.ones(2)),
        (jnp.ones((2, 3), jnp.int32), None),
        (jnp.ones(3), None),
        (None, None),
        (jnp.ones((2, 3)), jnp.ones(3)),
    ],
    ids=["fits", "dtype", "dimensions", "no array", "result"],
)
def test_a_wrong_array_is_noticed(request, value, result):
    def sums(x: Float[jax.Array, "rows columns"]) -> Float[jax.Array, " rows"]:
        return result

    from jaxtyping import jaxtyped

    checked = jaxtyped(sums, typechecker=array_checker.check)
    if request.node.callspec.id == "fits":
        assert checked(value) is result
    else:
        with pytest.raises(TypeError):
            checked(value)


def test_annotations_are_plain_arrays_where_jaxtyping_is_not_installed():
    code = (
        "import sys; sys.modules['jaxtyping'] = None; import jax, lats_optax; "
        "from lats_optax.array_types import Float; "
        "assert Float[jax.Array, 'rows columns'] is jax.Array"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
