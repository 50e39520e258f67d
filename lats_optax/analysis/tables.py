"""Tables of plain text: aligned columns, a rule under the head and another above the totals."""

from collections.abc import Collection, Sequence

Row = Sequence[str]


def table(
    head: Row,
    body: Sequence[Row],
    foot: Sequence[Row] = (),
    *,
    left: Collection[int] = (0,),
    least: Sequence[int] = (),
) -> list[str]:
    """The lines of a table.

    Args:
      head: titles. A last column without a title holds remarks, which no rule is drawn along.
      body: rows of as many cells.
      foot: rows below a second rule; none: there is no second rule.
      left: the columns that are aligned at the left.
      least: the least width of each column; none: 0.

    Returns:
      Lines without spaces at their ends.

    Example:
      >>> body = [("stem", "9", "all of it"), ("classifier", "10", "")]
      >>> for line in table(("layer", "size", ""), body, [("both", "19", "")]):
      ...     print(line)
      layer       size
      ----------------
      stem           9  all of it
      classifier    10
      ----------------
      both          19
    """
    remarks = () if head[-1] else (len(head) - 1,)
    minima = [*least, *[0] * (len(head) - len(least))]
    widths = [max(wide, *map(len, cells)) for wide, cells in zip(minima, zip(head, *body, *foot))]
    ruled = widths[: len(head) - len(remarks)]
    rule = "-" * (sum(ruled) + 2 * (len(ruled) - 1))

    def line(row: Row) -> str:
        cells = [
            cell.ljust(width) if at in (*left, *remarks) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths))
        ]
        return "  ".join(cells).rstrip()

    below = [rule, *map(line, foot)] if foot else []
    return [line(head), rule, *map(line, body), *below]
