"""Writes the folder of the command train: a run for each mode, their records, and a report on all of them.

The folder holds ``config.json`` (the settings), ``metrics.jsonl`` (a line per epoch), ``summary.json`` (how each run
ended), ``report.html``, and for each mode a folder with ``checkpoint.safetensors`` and ``compact.safetensors``.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.live import Live
from rich.table import Table
from torch import nn

from plasticnet.apps.console import console
from plasticnet.apps.data import Data, load_data
from plasticnet.apps.loop import Config, Mode, prepare_run, train_run
from plasticnet.apps.models import factory
from plasticnet.apps.report import COLUMNS, render, rows
from plasticnet.errors import PlasticError
from plasticnet.files.modules import save
from plasticnet.version import __version__


def train_modes(
    data_name: str,
    model_name: str,
    modes: Sequence[Mode],
    config: Config,
    folder: Path,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
) -> None:
    """Train one network for each mode, show the progress, and write everything into a folder.

    Args:
        data_name: The name of the data set, as `load_data` takes it.
        model_name: The name of the model, as `factory` takes it.
        modes: What to train, in order.
        config: The settings.
        folder: The folder, which is made if it does not exist.
        data_dir: The folder that holds MNIST.
        resume: Whether to go on with the runs in the folder.

    Raises:
        PlasticError: The settings cannot be used for training, or the folder to resume holds no run of this model on
            these data. Nothing was written then.
    """
    data = load_data(data_name, data_dir, config.seed)
    make = factory(model_name, data.shape, data.classes)
    for mode in modes:  # so that settings are refused before anything is written
        prepare_run(make(), data, config, mode)
    described = {"data": data_name, "model": model_name, "modes": modes, **asdict(config), **environment()}
    settings = json.dumps(described, indent=2) + "\n"
    if resume:
        _check_same(folder, data_name, model_name)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(settings)
    metrics: list[dict[str, Any]] = []
    results = {mode: _train_mode(make, data, config, mode, folder, metrics, resume) for mode in modes}
    (folder / "summary.json").write_text(json.dumps(results, indent=2) + "\n")
    _write_page(folder, json.loads(settings), results, metrics)
    table = Table(*COLUMNS)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(f"written to {folder}: report.html, metrics.jsonl, summary.json, config.json, */compact.safetensors")


def rewrite_report(folder: Path) -> None:
    """Write the report of a folder again. Raises `PlasticError` where the folder does not hold a finished run."""
    try:
        config = json.loads((folder / "config.json").read_text())
        results = json.loads((folder / "summary.json").read_text())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise PlasticError(f"{folder} is not a finished run: {error}") from error
    try:
        _write_page(folder, config, results, metrics)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise PlasticError(f"{folder} is not a finished run: {error!r}") from error


def environment() -> dict[str, Any]:
    """Return what a result depends on beside its settings: versions, the processor and the number of threads."""
    return {
        "plasticnet": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _train_mode(
    make: Callable[[], nn.Module],
    data: Data,
    config: Config,
    mode: Mode,
    folder: Path,
    metrics: list[dict[str, Any]],
    resume: bool,
) -> dict[str, Any]:
    """Train the network of one mode, save its compact module, and return the summary of the run.

    Args:
        make: Builds the model.
        data: The data.
        config: The settings.
        mode: What the run does.
        folder: The folder of all runs.
        metrics: The records of the runs before. Those of this run are appended, and all are written after every epoch.
        resume: Whether to go on from the checkpoint of this run.
    """
    own = folder / mode
    own.mkdir(exist_ok=True)
    checkpoint = own / "checkpoint.safetensors"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    with Live(console=console, refresh_per_second=8) as live:

        def show(record: dict[str, Any]) -> None:
            metrics.append({"run": mode, **record})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
            live.update(_progress(mode, record, config.epochs))

        torch.manual_seed(config.seed)
        result = train_run(make(), data, config, mode, on_epoch=show, checkpoint=checkpoint, resume=resume)
    if not console.is_terminal:  # Live ends without a new line where the console is no terminal
        console.print()
    if not result.summary.get("growth_stopped", True):
        console.print("growth had not stopped by itself when the plastic stage ended; more --epochs would help")
    save(result.compact, own / "compact.safetensors")
    return result.summary


def _check_same(folder: Path, data_name: str, model_name: str) -> None:
    """Raise `PlasticError` unless the folder holds runs of this model on these data."""
    try:
        before = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise PlasticError(f"--resume: there is no run in {folder}: {error}") from error
    held = f"{before.get('model')} on {before.get('data')}" if isinstance(before, dict) else "something else"
    if held != f"{model_name} on {data_name}":
        raise PlasticError(f"--resume: {folder} holds a run of {held}, not of {model_name} on {data_name}")


def _progress(mode: Mode, record: Mapping[str, Any], epochs: int) -> Table:
    """Return a table with one row, about the last epoch."""
    table = Table("run", "epoch", "loss", "validation", "k", "open units", "parameters", "MACs")
    units = "-".join(str(n) for n in list(record["units"].values())[:8])
    table.add_row(
        mode, f"{record['epoch']}/{epochs}", f"{record['loss']:.4f}", f"{100 * record['val_accuracy']:.2f} %",
        "∞" if record["k"] == "inf" else f"{record['k']:g}", units, f"{record['parameters']:,}", f"{record['macs']:,}",
    )  # fmt: skip
    return table


def _write_page(folder: Path, config: Mapping[str, Any], results: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write report.html into the folder."""
    title = f"plasticnet: {config['model']} on {config['data']}"
    (folder / "report.html").write_text(render(title, results, metrics, config))
