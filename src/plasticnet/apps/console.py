"""Holds the one console on which the commands print, and the tables that they have in common."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> None:
    """Print a table of words and numbers.

    Args:
        columns: The heads.
        rows: The cells of each row.
        words: The places of the columns that hold words, which are folded where the console is narrow. The others hold
            numbers, which are aligned on the right.
    """
    table = Table(box=SIMPLE)
    for place, column in enumerate(columns):
        if place in words:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def accept_any_letter() -> None:
    r"""Let the standard streams write letters that their encoding does not have as ``\u221e`` and the like.

    Otherwise such a letter would end a training where its output goes to a file of another encoding than UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_line(text: str) -> None:
    """Print a text without colours, and without breaking it into lines however long it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
