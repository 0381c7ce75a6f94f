"""Text for terminals: aligned columns, shortened names."""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"-?\d[\d.]*|-")


def as_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned with spaces: those of numbers to the right, those of words to the left."""
    cells = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    right = [all(_NUMBER.fullmatch(row[column]) for row in cells[1:]) for column in range(len(header))]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join(line(values) for values in cells)


def within_80(header: Sequence[str], rows: Sequence[list[str]], *shorten: int) -> str:
    """A table at most 80 characters wide.

    Where it would be wider, the columns whose indices are in `shorten` are cut, one after the other, until it fits.
    """
    for column in shorten:
        excess = max(map(len, as_table(header, rows).splitlines())) - 80
        if excess > 0:
            width = max(len(header[column]), max(len(row[column]) for row in rows) - excess)
            rows = [[*row[:column], cut(row[column], width), *row[column + 1 :]] for row in rows]
    return as_table(header, rows)


def cut(text: str, limit: int) -> str:
    """The beginning of the text, at most `limit` characters with the ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def aligned(facts: Sequence[Sequence[str]]) -> str:
    """A line for each (name, value), with the values below one another."""
    return "\n".join(f"{name:<11}{value}" for name, value in facts)


def shortened(text: str, limit: int = 66) -> str:
    """The end of the text, by which folders differ, at most `limit` characters with the ellipsis."""
    return text if len(text) <= limit else "…" + text[1 - limit :]
