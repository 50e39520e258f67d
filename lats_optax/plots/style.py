"""How plots look, and how they are written: one style, whole files, no window system.

matplotlib is imported where it draws.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lats_optax.files.atomic import replacing
from lats_optax.files.storage import as_path, has_room

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colors, which people with any color vision can tell apart; a line style each,
# for prints in gray and for curves that coincide.
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))

_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 2,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.constrained_layout.h_pad": 0.1,
}


@contextlib.contextmanager
def figure(path: str | os.PathLike[str], size: tuple[float, float]) -> Iterator["Figure"]:
    """A figure to draw on, which is written as a PNG when the block ends.

    Args:
      path: file to write or replace; it appears only when it is complete.
      size: width and height in inches, of 150 pixels.

    Yields:
      An empty figure that arranges its panels by itself.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        # A Figure of its own, not pyplot's: nothing global, and no window system.
        empty = Figure(figsize=size, dpi=150, layout="constrained")
        yield empty
        with replacing(path) as unfinished:
            empty.savefig(unfinished, format="png")


def check_path(path: str | os.PathLike[str]) -> None:
    """Checks that a plot can be written there, before anything is computed for it.

    Raises:
      FileNotFoundError: there is no directory to write to.
      ValueError: it is not the name of a PNG.
    """
    path = as_path(path, "out")
    if path.suffix != ".png":
        raise ValueError(f"the plot is to be {str(path)!r}; allowed: a name that ends in .png")
    if not has_room(path):
        raise FileNotFoundError(f"there is no directory {path.parent} to write to")


def line_style(index: int) -> dict[str, Any]:
    """Color and line style of the index-th of several curves.

    >>> line_style(2)
    {'color': '#D55E00', 'linestyle': '--'}
    """
    turn, place = divmod(index, len(_COLORS))
    # Colors come again after seven curves, with a line that is easy to tell from the one before;
    # the sixteenth curve looks like the second.
    return {"color": _COLORS[place], "linestyle": _LINES[(place + 3 * turn) % len(_LINES)]}


def shortened(name: str, length: int = 48) -> str:
    """The end of a name that is too long, such as a path.

    >>> shortened("runs/digits-lats/model.safetensors", 20)
    '…s/model.safetensors'
    """
    return name if len(name) <= length else "…" + name[1 - length :]


def annotate(axes: "Axes", what: str) -> None:
    """Writes a line in the middle of a panel in which there is nothing to draw."""
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, what, ha="center", transform=axes.transAxes)
