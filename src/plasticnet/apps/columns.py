"""Reads files with tables, column by column."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

from plasticnet.apps.tables import Columns
from plasticnet.errors import PlasticError

_SEPARATORS = ",;\t"


def read_csv(path: Path) -> Columns:
    """Read a table of text with a head. Its columns are separated by commas, semicolons or tabs.

    Raises:
        PlasticError: It is no such table, or has no rows; or two of its columns have one name.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            separator = max(_SEPARATORS, key=first.count)
            file.seek(0)
            rows = [row for row in csv.reader(file, delimiter=separator, skipinitialspace=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlasticError(f"--data {path}: it is no table of text: {error}") from error
    if len(rows) < 2:
        raise PlasticError(f"--data {path}: the table has no rows; a head with names and rows below it are needed")
    head = [name.strip() for name in rows[0]]
    if all("." in name and _is_number(name) for name in head):
        raise PlasticError(f"--data {path}: the first line holds numbers; write a head with the names of the columns")
    if twice := [name for name, count in Counter(head).items() if count > 1]:
        raise PlasticError(
            f"--data {path}: the name {twice[0]!r} stands over {head.count(twice[0])} columns: the first line gives "
            "each column a name of its own"
        )
    if uneven := next((i for i, row in enumerate(rows, 1) if len(row) != len(head)), None):
        raise PlasticError(f"--data {path}: line {uneven} has not {len(head)} columns")
    return {name: [row[i].strip() for row in rows[1:]] for i, name in enumerate(head)}


def read_parquet(path: Path) -> dict[str, list[Any]]:
    """Read the columns of a parquet file.

    Raises:
        PlasticError: It cannot be read, or has no rows; or pyarrow is missing.
    """
    try:
        from pyarrow import parquet
    except ImportError:
        raise PlasticError(f"--data {path}: reading it needs pyarrow: pip install pyarrow") from None
    try:
        table = parquet.read_table(path)
        names, columns = table.column_names, table.to_pydict()  # names and text are decoded only here
    except Exception as error:  # pyarrow has many kinds of error
        raise PlasticError(f"--data {path}: {error}") from error
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise PlasticError(f"--data {path}: the name {twice[0]!r} stands over several columns; rename them")
    if not table.num_rows:
        raise PlasticError(f"--data {path}: the table has no rows")
    return columns


def _is_number(text: str) -> bool:
    """Return whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
