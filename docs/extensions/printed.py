"""The directive `printed`: what a function of the repository prints, as part of a page.

    ```{printed} benchmarks.quality.table:main benchmarks/results/quality.jsonl
    ```

The function is called with the list of the words behind it, in the root of the repository, and its
output is read as Markdown. Its headings, if any, begin with ### and are of one level.
"""

import contextlib
import importlib
import io
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[2]


class Printed(SphinxDirective):
    """Calls `module:function` with the arguments behind it, and takes what it prints."""

    required_arguments = 1
    optional_arguments = 9

    def run(self) -> list[nodes.Node]:
        """The nodes of the Markdown: what is before its headings, then a section for each."""
        target, *arguments = self.arguments
        before, *parts = re.split(r"^### ", printed(target, arguments), flags=re.MULTILINE)
        found = self.parse_text_to_nodes(before)
        for part in parts:
            title, _, text = part.partition("\n")
            section = nodes.section(names=[nodes.fully_normalize_name(title)])
            section += [nodes.title(title, title), *self.parse_text_to_nodes(text)]
            self.state.document.note_implicit_target(section, section)
            found.append(section)
        return found


def printed(target: str, arguments: list[str]) -> str:
    """What a function prints.

    Args:
      target: `module:function`.
      arguments: the list that it is called with.
    """
    module, _, function = target.partition(":")
    output = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(output):
        getattr(importlib.import_module(module), function)(arguments)
    return output.getvalue()


def setup(app: Any) -> dict[str, bool]:
    """Make the directive known to Sphinx."""
    app.add_directive("printed", Printed)
    return {"parallel_read_safe": True}
