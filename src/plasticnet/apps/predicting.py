"""Predicts the targets of new rows by a network that the command train wrote, and writes them into a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from plasticnet.apps.console import print_line
from plasticnet.apps.data import DATASETS
from plasticnet.apps.folder import COMPACT, CONFIG, read_run, write_text
from plasticnet.apps.models import factory, reads_numbers
from plasticnet.apps.own_data import read
from plasticnet.apps.prepared import Prepared, read_prepared
from plasticnet.apps.settings import Run
from plasticnet.errors import PlasticError
from plasticnet.files.modules import load


@torch.no_grad()
def predict(folder: Path, source: str, out: Path, network: str | None = None) -> int:
    """Write a table with a prediction for each row of new data, and return how many there are.

    Where the rows are images in a folder, the first column, ``file``, has the path of each one in it. A
    regression has the column ``prediction``, in the target's own unit. A classification has ``prediction``, the name of
    the most likely class, and ``probability``, which the network gives it.

    Args:
        folder: The folder of the run.
        source: Where the new rows are, in a form of the data that the run was trained on. Targets are not needed.
        out: The table to write.
        network: Which of the run's networks predicts: "dense", "prune" or "grow"; None where there is one only.

    Raises:
        PlasticError: There is no such run or network; the data cannot be read, or do not fit; or the table cannot be
            written, or would replace the data or a file of the run.
    """
    _check_out(out, Path(source), folder)
    prepared = read_prepared(folder, "predict")
    run, _ = read_run(folder / CONFIG, f"predict: {folder / CONFIG}", "train once more")
    if network not in run.modes and (network is not None or len(run.modes) > 1):
        raise PlasticError(f"--network {network}: the run has {', '.join(run.modes)}; name one of them")
    x, files = _inputs(run, prepared, source)
    if tuple(x.shape[1:]) != prepared.shape:
        raise PlasticError(f"--data {source}: inputs of the shape {tuple(x.shape[1:])}, not {prepared.shape}")
    strange = ~x.isfinite().reshape(len(x), -1).all(1)
    if strange.any():
        raise PlasticError(f"--data {source}: row {int(strange.nonzero()[0]) + 1} holds NaN, or too large a number")
    model = load(
        folder / (network or next(iter(run.modes))) / COMPACT, factory(run.built, prepared.shape, prepared.outputs)
    )
    found = torch.cat([model(part) for part in x.split(1000)])
    target = prepared.target
    if target.task == "regression":
        head, rows = ("prediction",), [(v * target.deviation + target.mean,) for v in found.flatten().double().tolist()]
    else:
        sure, best = found.softmax(1).max(1)
        labels = target.labels or tuple(map(str, range(prepared.outputs)))
        rows = [(labels[i], round(p, 6)) for i, p in zip(best.tolist(), sure.tolist(), strict=True)]
        head = ("prediction", "probability")
    if files is not None:
        head, rows = ("file", *head), [(file, *row) for file, row in zip(files, rows, strict=True)]
    table = io.StringIO(newline="")
    csv.writer(table).writerows([head, *rows])
    write_text(out, table.getvalue())
    return len(rows)


def _check_out(out: Path, source: Path, folder: Path) -> None:
    """Raise `PlasticError` where the table of predictions cannot be written, or would replace what was read."""
    if out.is_dir():
        raise PlasticError(f"--out {out} is a folder: name the .csv table to write")
    if not out.parent.is_dir():
        raise PlasticError(f"--out {out}: there is no folder {out.parent}: make it, or write the table elsewhere")
    if out.exists() and source.exists() and out.samefile(source):
        raise PlasticError(f"--out {out} is --data, and would be replaced: give another name")
    if out.exists() and out.parent.resolve() == folder.resolve() and out.suffix != ".csv":
        raise PlasticError(f"--out {out} is a file of the run, and would be replaced: give another name")


def _inputs(run: Run, prepared: Prepared, source: str) -> tuple[Tensor, Sequence[str] | None]:
    """Return new rows as inputs, and the file of each; and say which of their values were not seen in training."""
    if source in DATASETS:
        raise PlasticError(f"--data {source}: predictions are made for rows of your own")
    how = replace(run.reading, target=None, task=None, ignore=())
    if Path(source).is_dir() and prepared.shape[0] in (1, 3):  # grey or coloured, as in training
        how = replace(how, channels=prepared.shape[0])
    read_in = read(source, how)
    x = read_in.x
    if isinstance(x, Tensor):
        return x.float() if reads_numbers(run.built) else x, read_in.files
    if prepared.table is None:
        raise PlasticError(f"--data {source}: the run was not trained on a table")
    try:
        found = prepared.table.tensor(x)
    except PlasticError as error:
        raise PlasticError(f"--data {source}: {error}") from error
    for name, count in prepared.table.unknown(x).items():
        print_line(
            f"the column {name!r} has {count} values that did not occur in training; each counts as none of those that "
            "did, so these predictions may be far off"
        )
    return found, None
