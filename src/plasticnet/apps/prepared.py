"""Keeps what a run has found out about its data, so that new rows can be read in the same way."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plasticnet.apps.data import Data, Target
from plasticnet.apps.folder import PREPARED, read_json
from plasticnet.apps.parsing import parse
from plasticnet.apps.tables import Table
from plasticnet.errors import PlasticError


@dataclass(frozen=True)
class Prepared:
    """What is known of the data of a run.

    Attributes:
        shape: The shape of one input.
        outputs: The number of outputs of its networks.
        target: What is predicted.
        table: How the columns of a table become inputs, or None.
    """

    shape: tuple[int, ...]
    outputs: int
    target: Target
    table: Table | None

    @classmethod
    def of(cls, data: Data) -> Prepared:
        """Return what is known of data."""
        return cls(data.shape, data.outputs, data.target, data.table)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, as it is when it has been read from a file."""
        return json.loads(json.dumps(asdict(self)))


def read_prepared(folder: Path, what: str) -> Prepared:
    """Return what the run in a folder has found out about its data.

    Args:
        folder: The folder.
        what: What a message begins with.

    Raises:
        PlasticError: There is no such run, or the file is damaged.
    """
    path = folder / PREPARED
    if not path.is_file():
        raise PlasticError(f"{what}: {folder} holds no run of train, since it has no {PREPARED}")
    (content,) = read_json(path, f"{what}: {path}", "train once more")
    try:
        return parse(Prepared, content)
    except PlasticError as error:
        raise PlasticError(f"{what}: {path} is damaged: {error}") from error
