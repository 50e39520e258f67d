"""The sdist and the wheel: built, installed into an empty environment, and used there.

Slow, and with a network: jax and optax are installed as a user's pip does it.
"""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parent.parent

SMOKE = """
import jax, jax.numpy as jnp, optax, lats_optax

tx = optax.chain(optax.sgd(0.1), lats_optax.soft_threshold(lats_optax.target_sparsity(0.5, 0.1, 4)))
params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8)), "bias": jnp.zeros(8)}
state = tx.init(params)
for _ in range(4):
    updates, state = jax.jit(tx.update)(params, state, params)
    params = optax.apply_updates(params, updates)
params = lats_optax.finalize(params, state)
assert lats_optax.sparsity(params).zeros == 32
print(lats_optax.__version__, lats_optax.__file__)
"""


def run(*command, check=True, cwd=None):
    # Nothing of this environment and of the directory that the tests run in.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=1200,
        check=check,
        cwd=cwd,
        env=env | {"JAX_PLATFORMS": "cpu"},
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Paths of the sdist and of the wheel that is made from it."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, REPOSITORY)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """The directory of the programs of an environment with the wheel and what it needs."""
    directory = tmp_path_factory.mktemp("empty")
    run(sys.executable, "-m", "venv", directory)
    run(directory / "bin" / "pip", "install", "-q", built[1])
    return directory / "bin"


def test_what_is_in_them(built):
    sdist, wheel = built
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    own = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "lats_optax").rglob("*.py")}
    assert files >= own | {"lats_optax/py.typed"}
    # Neither tests nor benchmarks are installed.
    assert {file.split("/")[0].split("-")[0] for file in files} == {"lats_optax"}
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert files >= own | {"README.md", "LICENSE", "pyproject.toml", "lats_optax/py.typed"}


def test_the_wheel_alone_prunes(environment, tmp_path):
    done = run(environment / "python", "-W", "error", "-c", SMOKE, cwd=tmp_path)
    version, file = done.stdout.split()
    assert version == "0.1.0"
    assert str(environment.parent) in file


@pytest.mark.parametrize("command", ["train", "demo", "prepare", "inspect", "compact"])
def test_a_command_without_the_trainer_is_one_line(environment, tmp_path, command):
    done = run(environment / f"lats-{command}", check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("pip install 'lats-optax[train]'")


def test_the_zoo_without_flax_says_what_to_install(environment, tmp_path):
    done = run(environment / "python", "-c", "import lats_optax.models", check=False, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].endswith("pip install 'lats-optax[models]'")


def test_the_sdist_installs_too(built, environment, tmp_path):
    pip = environment / "pip"
    run(pip, "install", "-q", "--force-reinstall", "--no-deps", built[0])
    assert run(environment / "python", "-c", SMOKE, cwd=tmp_path).stdout.startswith("0.1.0")
