"""The README and the pages of docs/: their code runs, and what they name is there."""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import re
import sys
import types
from pathlib import Path

import pytest

import lats_optax
from lats_optax import compaction, data, groups, models, prox
from lats_optax.training.config import TrainConfig
from lats_optax.training.presets import PRESETS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *(p for p in sorted(DOCS.rglob("*.md")) if "_build" not in p.parts)]
# Of pages whose code takes long. Cells of notebooks are run by `make docs`.
SLOW = {
    "docs/architecture.md",
    "docs/loop.md",
    "docs/method.md",
    "docs/pretrained.md",
    "docs/structured.md",
    "docs/trainer.md",
}
FENCE = re.compile(r"^(```+)(.*?)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


def fences(page):
    """The kind and the content of each block of code."""
    return [(kind, content) for _, kind, content in FENCE.findall(page.read_text())]


def each_page(pages, slow=frozenset()):
    marks = {True: [pytest.mark.slow], False: []}
    cases = [pytest.param(p, id=name_of(p), marks=marks[name_of(p) in slow]) for p in pages]
    return pytest.mark.parametrize("page", cases)


@each_page([page for page in PAGES if any(kind == "python" for kind, _ in fences(page))], SLOW)
def test_python_runs_in_the_order_of_the_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": page.stem}
    for kind, block in fences(page):
        if kind == "python":
            exec(compile(block, str(page), "exec"), namespace)


def test_commands_at_the_top():
    text = README.read_text()
    commands = re.findall(r"^    make ([a-z0-9-]+)", text, re.MULTILINE)
    assert commands[:2] == ["demo", "test"]
    assert text.index("    make demo") < 1500


@each_page(PAGES)
def test_targets_of_make_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z0-9-]+)", page.read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def slugs(page):
    """The anchors that the headings of a page have."""
    outside = FENCE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page(PAGES)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    plots = re.findall(r"^```+\{figure\} (\S+)", page.read_text(), re.MULTILINE)
    for link in [*re.findall(r"\]\(([^)\s]+)\)", text), *plots]:
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


@each_page(PAGES)
def test_files_that_are_named_exist(page):
    text = page.read_text()
    for path in re.findall(r"(?:lats_optax|tests|benchmarks|docs)/[\w./-]*[\w/]", text):
        assert path.startswith("docs/_build/") or (ROOT / path).exists(), path
    for module, function in re.findall(r"python -m (benchmarks[\w.]*)|(lats_optax[.\w]+)\(", text):
        if module:
            assert importlib.util.find_spec(module), module
        else:
            owner, _, name = function.rpartition(".")
            assert hasattr(importlib.import_module(owner), name), function


def test_the_map_of_the_package_is_of_files_that_exist():
    text = (DOCS / "architecture.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", text[: text.index("## How one option")], re.MULTILINE)
    names = [name for row in rows for name in re.findall("`(.*?)`", row)]
    assert len(names) > 25
    assert [name for name in names if not (ROOT / "lats_optax" / name).exists()] == []


def options(config, prefix="--"):
    """The options of the command line that the fields of a config make."""
    for field in dataclasses.fields(config):
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(field.default):
            yield from options(field.default, f"{prefix}{name}.")
        else:
            yield from (prefix + name, f"{prefix}no-{name}")


@each_page(PAGES)
def test_presets_and_options_that_are_named_exist(page):
    text = page.read_text()
    known = set(options(TrainConfig))
    for option in re.findall(r"--(?:prune|optimizer|model|data|parallel)\.[\w-]+", text):
        assert option in known, option
    for preset in re.findall(r"lats-train ([a-z][\w-]+)", text):
        assert preset in PRESETS, preset


def printed(page):
    """What the directives `printed` of a page put into it."""
    for target, arguments in re.findall(r"^```\{printed\} (\S+)(.*)$", page.read_text(), re.M):
        module, _, function = target.partition(":")
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            getattr(importlib.import_module(module), function)(arguments.split())
        yield output.getvalue()


@pytest.fixture
def extensions(monkeypatch):
    """What Sphinx does before it builds: docs/extensions can be imported, in the repository."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(DOCS / "extensions"))
    yield
    sys.modules.pop("tables", None)


@pytest.mark.usefixtures("extensions")
def test_every_preset_is_on_the_page_of_the_trainer():
    rows = "".join(printed(DOCS / "trainer.md")).splitlines()
    listed = [row.split("`")[1] for row in rows if row.startswith("| `")]
    assert sorted(listed) == sorted(f"lats-train {name}" for name in PRESETS)


@pytest.mark.usefixtures("extensions")
def test_the_measured_page_has_what_the_benchmark_prints():
    text, quick, _ = printed(DOCS / "measured.md")
    assert {"### lenet", "### resnet", "### char", "### spiking"} <= set(text.splitlines())
    assert {"### lenet", "### resnet"} <= set(quick.splitlines())
    (one,) = printed(DOCS / "method.md")
    assert one.strip() in text


def documented():
    """The modules of the API pages, and the full names that they document."""
    pages = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    modules, names = set(), set()
    for directive, name in re.findall(r"^\.\. (currentmodule|auto\w+):: ([\w.]+)", pages, re.M):
        if directive == "currentmodule":
            current = name
            modules.add(name)
        else:
            names.add(name if name.startswith("lats_optax.") else f"{current}.{name}")
    return modules, names


@pytest.mark.parametrize(
    "module", [lats_optax, prox, groups, models, compaction, data], ids=lambda m: m.__name__
)
def test_every_public_name_is_documented(module):
    modules, names = documented()
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.ismodule(value):
            assert value.__name__ in modules, name
        elif isinstance(value, types.GenericAlias):  # another name of a type
            continue
        elif getattr(lats_optax, name, None) is not value:
            assert f"{module.__name__}.{name}" in names, name
        else:
            assert f"lats_optax.{name}" in names, name


def test_what_is_documented_exists():
    for name in documented()[1]:
        owner, _, own = name.rpartition(".")
        assert hasattr(importlib.import_module(owner), own), name
