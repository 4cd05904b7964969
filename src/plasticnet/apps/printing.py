"""Prints what a training reads, how it goes, and what came of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from plasticnet.apps.console import console, print_line
from plasticnet.apps.data import Data
from plasticnet.apps.folder import COMPACT, CONFIG, METRICS, REPORT, SUMMARY
from plasticnet.apps.models import takes_classes
from plasticnet.apps.report import COLUMNS, rows
from plasticnet.apps.scores import shown
from plasticnet.apps.settings import Mode, Run


def print_start(run: Run, data: Data) -> None:
    """Print what is to be predicted from what, by which model, and for how long."""
    target, parts = data.target, (data.train, data.val, data.test)
    sizes = ", ".join(f"{len(part):,}" for part in parts)
    print_line(f"{run.data}: {sizes} rows for training, validation and test; inputs of the shape {data.shape}")
    if target.name is not None:
        guessed = "" if run.reading.task else f"; --task says it where {target.task} is wrong"
        if target.task == "classification":
            names = ", ".join(target.labels[:6]) + (", ..." if len(target.labels) > 6 else "")
            print_line(f"classification of {target.name!r} into {len(target.labels)} classes ({names}){guessed}")
        else:
            print_line(
                f"regression of {target.name!r}, which is {target.mean:.6g} ± {target.deviation:.6g} in the training "
                f"rows{guessed}"
            )
    if takes_classes(run.model):
        print_line(f"{run.model} is built with num_classes={data.outputs}")
    steps = -(-len(data.train) // run.config.batch)
    print_line(f"{run.config.epochs} epochs of {steps:,} steps, batches of {run.config.batch}, on {run.device}")


def progress(mode: Mode, record: Mapping[str, Any], epochs: int, task: str) -> Table:
    """Return a table with one row, about the last epoch."""
    table = Table("run", "epoch", "loss", "validation", "k", "open units", "parameters", "MACs")
    units = "-".join(str(n) for n in list(record["units"].values())[:8])
    table.add_row(
        mode, f"{record['epoch']}/{epochs}", f"{record['loss']:.4f}", shown(record["val_score"], task),
        "∞" if record["k"] == "inf" else f"{record['k']:g}", units, f"{record['parameters']:,}", f"{record['macs']:,}",
    )  # fmt: skip
    return table


def print_results(results: Mapping[str, Mapping[str, Any]], run: Run, data: Data, folder: Path) -> None:
    """Print how the runs ended, where their files are, and how the networks are loaded and used."""
    table = Table(*COLUMNS)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    for mode, result in results.items():
        lead = "accuracy " if data.task == "classification" else ""
        scores = f"{lead}{shown(result['val_score'], data.task)} on validation, {lead}"
        scores += f"{shown(result['test_score'], data.task)} on test"
        if data.task == "regression":
            scores += (
                f"; root mean squared error of {data.target.name}: {result['val_rmse']:.6g} on validation, "
                f"{result['test_rmse']:.6g} on test"
            )
        widths = "-".join(str(n) for n in result["units"].values())
        print_line(f"{mode}: widths {widths}, {result['parameters']:,} parameters, {result['macs']:,} multiply-adds")
        print_line(f"  {scores}")
        if not result.get("growth_stopped", True):
            print_line("  growth had not stopped by itself when the plastic stage ended; more --epochs would help")
        single = [name for name, units in result["units"].items() if units == 1]
        if single and mode != "dense" and run.config.budget is None:
            print_line(
                f"  the price of {run.config.price:g} has left a single unit in {', '.join(single)}; a smaller --price "
                "makes a larger network"
            )
    print_line(f"written to {folder}: {REPORT}, {METRICS}, {SUMMARY}, {CONFIG}, */{COMPACT}")
    print_line("In Python, for inputs that are prepared as in training:")
    print_line("  import plasticnet as pn")
    print_line("  from plasticnet.apps.models import factory")
    for mode in results:
        built = f'factory("{run.built}", {data.shape}, {data.outputs})'
        print_line(f'  {mode} = pn.load("{(folder / mode / COMPACT).as_posix()}", {built})')
    if data.target.name is not None:
        suffix = ".npz" if ":" in run.data else Path(run.data).suffix  # a folder has none
        where = shlex.quote(str(folder))
        print_line(f"For new rows: plasticnet predict {where} --data new{suffix} --out predictions.csv")
