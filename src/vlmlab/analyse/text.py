"""Plain text tables of limited width."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

WIDTH = 120
NARROW = 80
LONGEST_CELL = 40
SHORTEST_KEY = 8
"""Characters that are left of a long value which names a row, however narrow the table."""


def terminal_width() -> int:
    """Columns of the terminal, from `NARROW` to `WIDTH`; `WIDTH` where there is none."""
    return max(NARROW, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def plain_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], keys: int = 1, width: int | None = None
) -> list[str]:
    """Lines of a table; when it is wider than `width`, several tables below each other. No heading is ever cut.

    Args:
        header: one text per column; may have several lines, the last is nearest to the rows.
        rows: one text per column each; cells over ``LONGEST_CELL`` characters are cut, those that name the row to less
            where several of them would leave no room for another column.
        keys: so many columns at the left name the row; they are left-aligned and repeated in every part.
        width: most characters in a line; None: those of the terminal.
    """
    width = width or terminal_width()
    for longest in range(LONGEST_CELL, SHORTEST_KEY - 1, -1):
        cells = [[_cut(cell, longest if i < keys else LONGEST_CELL) for i, cell in enumerate(row)] for row in rows]
        sizes = [
            max(len(line) for line in [*title.split("\n"), *(row[i] for row in cells)])
            for i, title in enumerate(header)
        ]
        if sum(size + 2 for size in sizes[:keys]) + max(sizes[keys:], default=0) <= width:
            break
    lines: list[str] = []
    for chosen in _parts(sizes, keys, width):
        if lines:
            lines.append("")
        height = max(header[i].count("\n") for i in chosen) + 1
        titles = {i: [""] * (height - 1 - header[i].count("\n")) + header[i].split("\n") for i in chosen}
        for level in range(height):
            lines.append(_line([titles[i][level] for i in chosen], [sizes[i] for i in chosen], keys))
        lines.append("  ".join("-" * sizes[i] for i in chosen))
        lines += [_line([row[i] for i in chosen], [sizes[i] for i in chosen], keys) for row in cells]
    return lines


def short_number(value: float) -> str:
    """A count or an amount in at most 6 characters: 123, 0.012, 12.3k, 1.25M."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * factor or (abs(value) >= factor and factor > 1e3):
            return f"{value / factor:.3g}{unit}" if abs(value) < 1000 * factor else f"{value / factor:.0f}{unit}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


def _parts(sizes: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """Columns of each part: the key columns, and as many others as fit (at least one)."""
    named = list(range(keys))
    used = sum(sizes[i] + 2 for i in named)
    parts: list[list[int]] = []
    room = 0
    for column in range(keys, len(sizes)):
        if not parts or sizes[column] + 2 > room:
            parts.append([*named])
            room = width - used + 2
        parts[-1].append(column)
        room -= sizes[column] + 2
    return parts or [named]


def _line(cells: Sequence[str], sizes: Sequence[int], keys: int) -> str:
    padded = [
        cell.ljust(size) if i < keys else cell.rjust(size)
        for i, (cell, size) in enumerate(zip(cells, sizes, strict=True))
    ]
    return "  ".join(padded).rstrip()


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    texts = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    head, *lines = ["| " + " | ".join(row) + " |" for row in texts]
    return [head, "|" + "---|" * len(header), *lines]


def _cut(cell: str, longest: int) -> str:
    line = cell.replace("\n", " ")
    return line if len(line) <= longest else line[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"
