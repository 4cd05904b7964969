"""Holds the one console on which the commands print, and the tables that they have in common."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from plasticnet.errors import PlasticError


class _Console(Console):
    """A console that leaves it to the program what happens where nobody reads its output."""

    def on_broken_pipe(self) -> None:
        """Raise the error on, which rich would turn into an exit."""
        raise


console = _Console()


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


def finish_output() -> None:
    """Write what is left of the standard output.

    Raises:
        PlasticError: It cannot be written, as where a disk is full.
        BrokenPipeError: Nobody reads it.
    """
    stream: TextIO | None = sys.stdout  # a program that was started with it closed has none
    if stream is None:
        return
    try:
        stream.flush()
    except OSError as error:
        # What is left goes nowhere, or the interpreter would complain of it at its end.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise PlasticError(f"the output cannot be written: {error.strerror or error}") from error


def print_line(text: str) -> None:
    """Print a text without colours, and without breaking it into lines however long it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
