"""Keeps what a run has found out about its data, so that new rows can be read in the same way."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plasticnet.apps.bounds import check_count
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
        found = parse(Prepared, content)
        _check(found)
    except PlasticError as error:
        raise PlasticError(f"{what}: {path} is damaged: {error}: train once more") from error
    return found


def _check(found: Prepared) -> None:
    """Raise `PlasticError` where the parts do not fit together, or a number cannot be what it is said to be."""
    for size in (*found.shape, found.outputs):
        check_count(f"the size {size}", size)
    target, table = found.target, found.table
    least = 2 if target.task == "classification" else 1
    if found.outputs < least or (target.task == "regression" and (found.outputs > 1 or target.labels)):
        raise PlasticError(f"a {target.task} does not have {found.outputs} outputs and {len(target.labels)} labels")
    if target.labels and len(target.labels) != found.outputs:
        raise PlasticError(f"{len(target.labels)} labels do not fit {found.outputs} outputs")
    if table is not None and not (table.numbers or table.categories):
        raise PlasticError("its table has no columns")
    columns = () if table is None else table.numbers
    scales = [("the target", target.mean, target.deviation), *((repr(c.name), c.mean, c.deviation) for c in columns)]
    for name, mean, deviation in scales:
        if not (math.isfinite(mean) and 0 < deviation < math.inf):
            raise PlasticError(f"the mean {mean:g} and the deviation {deviation:g} of {name} cannot be")
