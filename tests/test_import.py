"""What may import what."""

import ast
import pathlib
import subprocess
import sys

import pytest

import lats_optax

PACKAGE = pathlib.Path(lats_optax.__file__).parent
CORE = {
    *(
        "__init__",
        "arguments",
        "arithmetic",
        "atomic",
        "compatibility",
        "controllers",
        "distributions",
        "files",
        "finalize",
        "groups",
        "latents",
        "laws",
    ),
    *(
        "leaves",
        "masks",
        "multiply_adds",
        "n_of_m",
        "numbers",
        "operations",
        "operators",
        "parts",
        "phases",
        "power",
        "progress",
        "pruned",
    ),
    *("provenance", "prox", "quantile", "schedules", "selection", "sparsity", "stacked"),
    *("states", "storage", "target", "thresholds", "transforms", "units"),
}
# What a core module may import besides, within its functions.
BESIDES = {"files": {"safetensors"}, "storage": {"fsspec"}}
# Which parts of the package each part may import, itself apart.
ALLOWED = {
    "core": set(),
    "models": {"core"},
    "compaction": {"models"},
    "data": {"core"},
    "drawing": {"core"},
    "calibration": {"core"},
    "training": {"core", "models", "compaction", "data", "drawing"},
    "inspection": {"core", "models", "drawing", "training"},
    "cli": {"core", "models", "data", "training", "inspection"},
    "commands": {"cli"},
    "examples": {"core", "models", "calibration", "drawing"},
}
OPTIONAL = (
    *("chex", "equinox", "flax", "fsspec", "gguf", "grain", "matplotlib", "orbax", "PIL"),
    *("safetensors", "sklearn", "tensorboardX", "tensorflow", "tensorflow_datasets"),
    *("tokenizers", "torch", "tqdm", "tyro"),
)
# The one module that may name each of these.
KEPT_IN = {
    "orbax": "training/checkpoint.py",
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


def part_of(name):
    """The part of the package that a dotted name such as `lats_optax.models.resnet` lies in."""
    first = name.split(".")[1] if "." in name else "__init__"
    return "core" if first in CORE else first


def imported(path):
    """The dotted names that a file imports, at its top or within functions."""
    here = ["lats_optax", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            yield module
            if (PACKAGE.parent / module.replace(".", "/")).is_dir():
                yield from (f"{module}.{alias.name}" for alias in node.names)


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
    own = part_of(".".join(["lats_optax", *path.relative_to(PACKAGE).with_suffix("").parts]))
    assert own in ALLOWED, f"{path} belongs to no part of the package"
    for name in imported(path):
        if name.split(".")[0] == "lats_optax":
            assert part_of(name) in {own, *ALLOWED[own]}, f"{path.name} imports {name}"


@each_module
def test_what_one_module_alone_may_name(path):
    relative = str(path.relative_to(PACKAGE))
    assert not [name for name in named(path) if KEPT_IN.get(name, relative) != relative]


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_imports_jax_and_optax_alone(name):
    allowed = {*sys.stdlib_module_names, "jax", "numpy", "optax", "lats_optax"}
    allowed |= BESIDES.get(name, set())
    assert {name.split(".")[0] for name in imported(PACKAGE / f"{name}.py")} <= allowed


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
    own = sorted(f"lats_optax.{name}" for name in CORE - {"__init__"})
    assert done.stdout.split("\n")[:2] == ["[]", str(own)]


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
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_the_trainer_is_one_line(command):
    done = without("tyro", f"from lats_optax import commands; sys.exit(commands.{command}())")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("pip install 'lats-optax[train]'")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_an_older_python_is_one_line(command):
    # What is imported before sees its own version.
    program = "from lats_optax import commands; sys.version_info = (3, 10, 13)"
    done = without("tyro", f"{program}; commands.{command}()")
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the commands need Python 3.11 or newer, and this is 3.10.13")


def test_the_zoo_without_flax_says_what_to_install():
    done = without("flax", "import lats_optax.models")
    assert done.stderr.splitlines()[-1].endswith("pip install 'lats-optax[models]'")


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
