"""Formulas as MathML, which browsers draw without a script or a font from elsewhere.

Docutils translates the LaTeX. What it does not know is an error of the build, not of a reader.
"""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml


def _translated(node: nodes.Node, *, as_block: bool) -> str:
    """The element `math` of a formula."""
    if re.search(r"\\frac[^{]|\\operatorname\{[^}]*\\", node.astext()):
        # Docutils would read \frac12 as 12 over what follows, and print a command in a name.
        raise ValueError(f"formula {node.astext()!r}: write \\frac{{1}}{{2}}, and names of letters")
    try:
        return tex2mathml(node.astext(), as_block=as_block)
    except MathError as error:
        raise ValueError(f"formula {node.astext()!r}: {error}") from error


def visit_inline(writer: Any, node: nodes.math) -> None:
    """Write a formula within a line."""
    writer.body.append(_translated(node, as_block=False))
    raise nodes.SkipNode


def visit_block(writer: Any, node: nodes.math_block) -> None:
    """Write a formula on lines of its own."""
    writer.body.append(f'<div class="math">{_translated(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Make the renderer known to Sphinx, as `html_math_renderer = "mathml"`."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
