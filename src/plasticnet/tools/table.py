"""Text for people: tables of columns, and numbers of bytes."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Return the lines of a table, whose columns are as wide as their widest cell and two spaces apart.

    Args:
        rows: The cells, the same number in every row. The heads are a row like the others.
        right: Whether all columns but the first are aligned to the right, which suits numbers.

    Example:
        >>> format_table([("site", "units"), ("conv1", "6")], right=True)
        ['site   units', 'conv1      6']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def cell(place: int, text: str) -> str:
        return text.rjust(widths[place]) if right and place else text.ljust(widths[place])

    return ["  ".join(cell(place, text) for place, text in enumerate(row)).rstrip() for row in rows]


def readable_bytes(count: int) -> str:
    """Return a number of bytes in a readable unit, such as ``1.5 KiB``."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"
