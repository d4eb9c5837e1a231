"""Tables as plain text. They are not fitted to the terminal: a wrapped line is better than a cut number."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], *, left: int = 0) -> list[str]:
    """Return the lines of a table whose columns are aligned.

    Args:
        rows: equally many cells each, the head first.
        left: columns, from the first one on, that are aligned at their left; the others at their right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells))
    return lines
