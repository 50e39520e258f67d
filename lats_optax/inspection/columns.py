"""A column of numbers from a file that somebody's program has written: .csv or .npy."""

import csv
import io
from pathlib import Path

import numpy as np

from lats_optax.files.storage import URL

_STEP = "step"


def read_column(
    path: Path | URL, column: str | None = None
) -> tuple[np.ndarray | None, np.ndarray]:
    r"""One column, and where it has them the steps that its rows are of.

    Args:
      path: a .csv, with or without a line of names; or a .npy of one or two dimensions.
      column: its name, or its number from 0; None: the only one, or that named ``threshold``.

    Returns:
      What the column named ``step`` has, or None where no column is named so; and the values. Both
      float64, of shape (rows,).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it cannot be read as numbers; there is no such column, or more than one to choose
        from; a value is not finite.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = Path(directory, "log.csv")
      ...     _ = path.write_text("step,threshold,loss\n0,0.0,2.3\n100,0.01,1.9\n")
      ...     read_column(path)
      (array([  0., 100.]), array([0.  , 0.01]))
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    names, table = _read_npy(path) if path.suffix == ".npy" else _read_csv(path)
    steps = table[:, names.index(_STEP)] if _STEP in names else None
    values = table[:, _choose(path, names, column)]
    for shown in (values, steps):
        if shown is not None and not np.all(np.isfinite(shown)):
            raise ValueError(f"{path}: row {int(np.argmin(np.isfinite(shown)))} is not finite")
    return steps, values


def _choose(path: Path | URL, names: list[str], column: str | None) -> int:
    if column is None:
        choices = [name for name in names if name != _STEP]
        column = choices[0] if len(choices) == 1 else "threshold"
    if column in names:
        return names.index(column)
    if column.isdecimal() and int(column) < len(names):
        return int(column)
    raise ValueError(
        f"{path} has no column {column!r}; it has {', '.join(names)}: {path}:{names[-1]} is the "
        "last of them"
    )


def _read_npy(path: Path | URL) -> tuple[list[str], np.ndarray]:
    try:
        array = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as a .npy file: {error}") from error
    if array.dtype.kind not in "iuf" or array.ndim not in (1, 2) or not array.size:
        raise ValueError(
            f"{path} holds {array.dtype} of shape {array.shape}; allowed are real numbers, a row "
            "or a table of them"
        )
    table = array.astype(np.float64).reshape(len(array), -1)
    return [str(index) for index in range(table.shape[1])], table


def _read_csv(path: Path | URL) -> tuple[list[str], np.ndarray]:
    try:
        # With a byte order mark or without: spreadsheets write one.
        text = io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")
        rows = [[cell.strip() for cell in row] for row in csv.reader(text) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a .csv file: {error}") from error
    if not rows:
        raise ValueError(f"{path} is empty")
    named = any(_number(cell) is None for cell in rows[0])
    names = rows[0] if named else [str(index) for index in range(len(rows[0]))]
    table = [[_number(cell) for cell in row] for row in rows[named:]]
    for number, row in enumerate(table, start=1 + named):
        if len(row) != len(names):
            raise ValueError(f"{path}: line {number} has {len(row)} cells, not {len(names)}")
    # Columns that nobody asks for may hold anything.
    values = [[np.nan if cell is None else cell for cell in row] for row in table]
    return names, np.array(values, np.float64).reshape(len(values), len(names))


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
