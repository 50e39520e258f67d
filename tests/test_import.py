"""What may import what."""

import ast
import pathlib
import subprocess
import sys

import pytest

import lats_optax
from tests import matrix

PACKAGE = pathlib.Path(lats_optax.__file__).parent
# Which parts of the package each part may import, itself apart: one line a package, lowest first.
# The core is all files at the top but those named here, and `CORE_PACKAGES`.
CORE_PACKAGES = {"checks", "control", "latent", "operators", "pruning"}
ALLOWED = {
    "core": set(),
    "files": set(),
    "analysis": {"core"},
    "api": {"core", "files", "analysis"},  # lats_optax/__init__.py
    "plots": {"core", "files", "analysis"},
    "models": {"core"},  # and of it checks alone: tests/test_zoo.py
    "torch": {"core", "files", "models"},
    "compaction": {"core", "models"},
    "data": {"core", "files"},
    "calibration": {"core", "analysis"},
    "training": {"api", "core", "files", "analysis", "plots", "models", "compaction", "data"},
    "inspection": {"api", "core", "files", "analysis", "plots", "models", "training"},
    "cli": {"files", "data", "training", "inspection"},
    "commands": {"cli"},
    "examples": {"api", "core", "plots", "models", "torch", "calibration"},
}
# What needs jax, numpy and optax alone; what a file of it may import besides, within its functions
# or where it is installed.
LIGHT = {"api", "core", "files", "analysis"}
BESIDES = {
    "array_types.py": {"jaxtyping"},
    "files/sparse.py": {"safetensors"},
    "files/storage.py": {"fsspec"},
}
OPTIONAL = (
    *("chex", "equinox", "flax", "fsspec", "gguf", "grain", "matplotlib", "orbax", "PIL"),
    *("safetensors", "sklearn", "tensorboardX", "tensorflow", "tensorflow_datasets"),
    *("tokenizers", "torch", "tqdm", "tyro"),
)
# The one file or folder that may name each of these.
KEPT_IN = {
    "orbax": "training/checkpoint.py",
    "matplotlib": "plots/",
    "pmap": "training/parallel.py",
    "shard_map": "training/parallel.py",
    "make_mesh": "training/parallel.py",
    "Mesh": "training/parallel.py",
    "pmean": "training/parallel.py",
    "psum": "training/parallel.py",
    "all_gather": "training/parallel.py",
}


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts)


def dotted(path):
    """What Python calls a file: `lats_optax.models.resnet`, and `lats_optax.models.__init__`."""
    return ".".join(["lats_optax", *path.relative_to(PACKAGE).with_suffix("").parts])


def part_of(name):
    """The part of the package that a dotted name such as `lats_optax.models.resnet` lies in."""
    first = name.split(".")[1] if "." in name else "__init__"
    if first in CORE_PACKAGES:
        return "core"
    if (PACKAGE / first).is_dir() or first in ALLOWED:
        return first
    is_file = first != "__init__" and (PACKAGE / f"{first}.py").exists()
    return "core" if is_file else "api"


def imported(path):
    """The dotted names that a file imports, at its top or within functions."""
    here = ["lats_optax", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            if (PACKAGE.parent / module.replace(".", "/")).is_dir():
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def named(path):
    """Every name, attribute and keyword in the code of a file, and the roots of its imports."""
    yield from (name.split(".")[0] for name in imported(path))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword | ast.arg):
            yield node.arg


each_module = pytest.mark.parametrize(
    "path", modules(), ids=lambda path: str(path.relative_to(PACKAGE))
)


@each_module
def test_imports_run_one_way(path):
    own = part_of(dotted(path))
    assert own in ALLOWED, f"{path} belongs to no part of the package"
    for name in imported(path):
        if name.split(".")[0] == "lats_optax":
            assert part_of(name) in {own, *ALLOWED[own]}, f"{path.name} imports {name}"


@each_module
def test_what_one_place_alone_may_name(path):
    relative = str(path.relative_to(PACKAGE))
    assert not [name for name in named(path) if not relative.startswith(KEPT_IN.get(name, ""))]


@each_module
def test_what_needs_jax_and_optax_alone(path):
    if part_of(dotted(path)) in LIGHT:
        allowed = {*sys.stdlib_module_names, "jax", "numpy", "optax", "lats_optax"}
        allowed |= BESIDES.get(str(path.relative_to(PACKAGE)), set())
        assert {name.split(".")[0] for name in imported(path)} <= allowed


def test_importing_the_package_loads_nothing_optional():
    program = (
        # What these two import is up to them: optax before 0.2.7 imports chex.
        "import sys, jax, optax\n"
        "theirs = set(sys.modules)\n"
        "import lats_optax\n"
        f"print([name for name in {OPTIONAL!r} if name in sys.modules.keys() - theirs])\n"
        "print(sorted(name for name in sys.modules if name.startswith('lats_optax.')))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    optional, own = done.stdout.splitlines()
    assert optional == "[]"
    assert {part_of(name) for name in ast.literal_eval(own)} <= LIGHT


def without(package, program):
    """A program where a package is not installed."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules[{package!r}] = None; {program}"],
        capture_output=True,
        text=True,
        cwd=PACKAGE.parent,
        timeout=120,
        check=False,
    )


COMMANDS = ["train", "demo", "prepare", "inspect", "compact"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the commands need Python 3.11")
@pytest.mark.parametrize("command", matrix.fast(COMMANDS, ["train"]))
def test_a_command_without_the_trainer_is_one_line(command):
    done = without("tyro", f"from lats_optax import commands; sys.exit(commands.{command}())")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("pip install 'lats-optax[train]'")


@pytest.mark.parametrize("command", matrix.fast(COMMANDS, ["compact"]))
def test_a_command_on_an_older_python_is_one_line(command):
    # What is imported before sees its own version.
    program = "from lats_optax import commands; sys.version_info = (3, 10, 13)"
    done = without("tyro", f"{program}; commands.{command}()")
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the commands need Python 3.11 or newer, and this is 3.10.13")


@pytest.mark.slow
def test_the_zoo_without_flax_says_what_to_install():
    done = without("flax", "import lats_optax.models")
    assert done.stderr.splitlines()[-1].endswith("pip install 'lats-optax[models]'")


@pytest.mark.slow
def test_the_throughput_benchmark_runs_where_flax_is_and_no_other():
    pytest.importorskip("flax")
    missing = [name for name in OPTIONAL if name not in ("chex", "flax")]  # optax may need chex
    program = (
        f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
        "from benchmarks import train_throughput\ntrain_throughput.parse(['--tiny'])"
    )
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    assert sorted(lats_optax.__all__) == lats_optax.__all__
    for name in lats_optax.__all__:
        assert getattr(lats_optax, name) is not None


def test_no_test_imports_another():
    for path in pathlib.Path(__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                assert not [name for name in names if name.startswith("tests.test_")], path
