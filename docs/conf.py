"""How Sphinx builds the documents; `make docs` runs it."""

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]

from jax.typing import DTypeLike  # noqa: E402
from sphinx.util.typing import stringify_annotation  # noqa: E402

import lats_optax  # noqa: E402  # found by the line above
from lats_optax import array_types, thresholds  # noqa: E402

project = "lats_optax"
author = "the authors of lats_optax"
copyright = "the authors of lats_optax"
version = release = lats_optax.__version__

extensions = [
    "mathml",
    "myst_nb",
    "printed",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "extensions"]

html_theme = "furo"
html_title = f"lats_optax {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False

# Formulas are MathML, which browsers draw by themselves: no script is loaded from anywhere.
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Every notebook is run whenever the documents are built; one that fails is an error.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 900
nb_merge_streams = True

# Docstrings are reStructuredText in which `name` is code.
default_role = "code"
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Source"]
napoleon_use_rtype = False
napoleon_attr_annotations = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
add_module_names = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88


def _docstring_of_an_instance(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Give operators such as `prox.prox_l1`, which are instances, the docstring of their class."""
    del app, name, options
    if what == "data" and not any(lines) and type(obj).__module__.startswith("lats_optax"):
        lines[:] = (type(obj).__doc__ or "").splitlines()


# What signatures write out in full, because Python forgets the name of an alias.
_ALIASES = {
    stringify_annotation(alias, "smart"): name
    for name, alias in {
        "Schedule": thresholds.Schedule,
        "Scalar": array_types.Scalar,
        "Count": array_types.Count,
        "AnyArray": array_types.AnyArray,
        "Array": array_types.Array,
        "DTypeLike": DTypeLike,
    }.items()
} | {"jaxlib._jax.Array": "Array"}


def _signature_with_aliases(
    app: Any,
    what: str,
    name: str,
    obj: Any,
    options: Any,
    arguments: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    """Write the names of the aliases again."""
    del app, what, name, obj, options
    for written, alias in _ALIASES.items():
        arguments = arguments and arguments.replace(written, alias)
        returns = returns and returns.replace(written, alias)
    return arguments, returns


def setup(app: Any) -> None:
    """Connect what is particular to this package."""
    app.connect("autodoc-process-signature", _signature_with_aliases)
    app.connect("autodoc-process-docstring", _docstring_of_an_instance, priority=100)
