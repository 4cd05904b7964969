"""Where the commands print: one console, and the tables that they have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = (0,)) -> None:
    """Print a table of words and numbers: the columns at the places ``words`` may be folded, the others are numbers."""
    table = Table(box=SIMPLE)
    for place, column in enumerate(columns):
        if place in words:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def print_line(text: str) -> None:
    """Print a line as it is, without colours, and on one line however long it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
