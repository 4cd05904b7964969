"""Writes the folder of the command train: a run for each mode, their records, and a report on all of them.

The folder holds ``config.json`` (the settings), ``metrics.jsonl`` (a line per epoch), ``summary.json`` (how each run
ended), ``report.html``, and for each mode a folder with ``checkpoint.safetensors`` and ``compact.safetensors``.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.live import Live
from rich.table import Table
from torch import nn

from plasticnet.apps.comparing import Entry, compare
from plasticnet.apps.console import console, print_line
from plasticnet.apps.data import Data, load_data
from plasticnet.apps.folder import (
    CHECKPOINT,
    COMPACT,
    CONFIG,
    METRICS,
    REPORT,
    SUMMARY,
    check_free,
    clear,
    locked,
    make_folder,
    read_config,
    read_json,
    read_settings,
    write_text,
)
from plasticnet.apps.loop import prepare_run, train_run
from plasticnet.apps.models import factory
from plasticnet.apps.page import START
from plasticnet.apps.report import COLUMNS, render, rows
from plasticnet.apps.saving import restore_run
from plasticnet.apps.settings import Config, Mode, describe_model, differences, identity, plain, settings
from plasticnet.errors import PlasticError
from plasticnet.files.modules import save
from plasticnet.version import __version__


def train_modes(
    data_name: str,
    model_name: str,
    modes: tuple[Mode, ...],
    config: Config,
    folder: Path,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "train",
) -> None:
    """Train one network for each mode, show the progress, and write everything into a folder.

    Args:
        data_name: The name of the data set, as `load_data` takes it.
        model_name: The name of the model, as `factory` takes it.
        modes: What to train, in order.
        config: The settings.
        folder: The folder, which is made if it does not exist.
        data_dir: The folder that holds MNIST.
        resume: Whether to go on with the runs in the folder. They must have begun with the same settings and data.
        overwrite: Whether a run that the folder holds may be replaced. Files that are not of a run always stay.
        command: The command that was called, for config.json.

    Raises:
        PlasticError: The settings cannot be used for training; the folder holds a run and neither ``resume`` nor
            ``overwrite`` is given; there is no run to resume, or it differs, and the message says in what; or another
            process is at work in the folder. Nothing was written then. Or the training itself fails: what it has
            written so far is then still there.
    """
    if resume and overwrite:
        raise PlasticError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if resume:
        read_config(folder)  # so that a folder without a run is refused before a lock is made in it
    else:
        check_free(folder, overwrite)
    data = load_data(data_name, data_dir, config.seed)
    make = factory(model_name, data.shape, data.classes)
    now = settings(data_name, data, model_name, describe_model(make()), modes, config)
    if not resume:
        for mode in modes:  # so that settings are refused before anything is written
            prepare_run(make(), data, config, mode)
    with locked(folder):
        if resume:
            described = _check_same(folder, now)
            over = sum(_check_checkpoint(make(), data, config, mode, folder) for mode in modes)
        else:
            check_free(folder, overwrite)  # again, because another process may have been here in the meantime
            clear(folder)
            described, over = {**now, "command": command, **environment()}, 0
            write_text(folder / CONFIG, json.dumps(described, indent=2) + "\n")
        metrics = Metrics(folder / METRICS, over)
        results = {mode: _train_mode(make, data, config, mode, folder, metrics, resume) for mode in modes}
        write_text(folder / SUMMARY, json.dumps(results, indent=2) + "\n")
        _write_page(folder, described, results, metrics.records)
    _print_results(results, folder)


class Metrics:
    """The records of all runs of a folder, and the file that holds them.

    The runs that are resumed give the records of their epochs once more. The file is left alone until all of these are
    there, so that it never holds less than before.

    Args:
        path: The file.
        over: The number of epochs, of all runs together, that were over when this process began.
    """

    def __init__(self, path: Path, over: int) -> None:
        self.path, self.over = path, over
        self.records: list[dict[str, Any]] = []

    def add(self, run: str, record: Mapping[str, Any]) -> None:
        """Take in the record of an epoch of a run, and write all of them into the file."""
        self.records.append({"run": run, **record})
        if len(self.records) >= self.over:
            write_text(self.path, "".join(json.dumps(r) + "\n" for r in self.records))


def holds_demo(folder: Path, data_name: str, model_name: str, modes: tuple[Mode, ...], config: Config) -> bool:
    """Return whether a folder holds a run of the command demo.

    Its config.json names the command. One of an older version does not, and is then told by its settings, which are
    the other arguments.
    """
    try:
        held = read_config(folder)
    except PlasticError:
        return False
    now = {"data": data_name, "model": model_name, "modes": list(modes), **plain(config)}
    return held["command"] == "demo" if "command" in held else not differences(held, now)


def rewrite_report(folder: Path) -> None:
    """Write the report of a folder again. Raises `PlasticError` where the folder does not hold a finished run."""
    config, results, metrics = _finished(folder)
    with _complete(folder):
        _write_page(folder, config, results, metrics)


def compare_runs(folders: Sequence[Path], out: Path) -> None:
    """Write a page that compares the networks of some folders.

    Args:
        folders: The folders, each with a finished run of one or more networks.
        out: The page. A file that is there already is replaced only if it is a page of this library.

    Raises:
        PlasticError: A folder does not hold a finished run, a folder is named twice, or the page cannot be written.
    """
    paths = [folder.resolve() for folder in folders]
    if twice := [folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1]:
        raise PlasticError(f"{twice[0]} is named twice: name each run once")
    if out.exists() and not (out.is_file() and out.read_bytes().startswith(f"{START}plasticnet: ".encode())):
        raise PlasticError(f"--out {out} is not a page of plasticnet, and would be replaced: give another name")
    short = [path.name for path in paths]
    entries: list[Entry] = []
    for folder, name in zip(folders, short, strict=True):
        config, results, metrics = _finished(folder)
        title = name if short.count(name) == 1 else str(folder)
        with _complete(folder):
            for run, result in results.items():
                own = [record for record in metrics if record["run"] == run]
                label = title if len(results) == 1 else f"{title}, {run}"
                entries.append(Entry(label, str(config["data"]), str(config["model"]), result, own))
                compare(entries[-1:])  # so that what is missing is found in its folder
    write_text(out, compare(entries))


def _finished(folder: Path) -> tuple[dict[str, Any], Any, list[Any]]:
    """Return the settings, the summary and the records in a folder. Raises `PlasticError` where its run is not over."""
    for name in (CONFIG, SUMMARY, METRICS):
        if not (folder / name).exists():
            way_out = "train --resume goes on with it" if name != CONFIG else "name the --out of a train"
            raise PlasticError(f"{folder} is not a finished run, since it has no {name}: {way_out}")
    config = read_settings(folder, str(folder / CONFIG))
    way_out = "train --resume, with the options of the run, writes it anew"
    (results,) = read_json(folder / SUMMARY, str(folder / SUMMARY), way_out)
    return config, results, read_json(folder / METRICS, str(folder / METRICS), way_out)


@contextmanager
def _complete(folder: Path) -> Iterator[None]:
    """Explain errors in this context, in which the records in a folder are shown, by what these lack."""
    way_out = "train --resume, with the options of the run, writes it anew"
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise PlasticError(
            f"{SUMMARY} or {METRICS} in {folder} is damaged, as it lacks what a report shows: {way_out}"
        ) from error


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
    metrics: Metrics,
    resume: bool,
) -> dict[str, Any]:
    """Train the network of one mode, save its compact module, and return the summary of the run.

    Args:
        make: Builds the model.
        data: The data.
        config: The settings.
        mode: What the run does.
        folder: The folder of all runs.
        metrics: Takes the record of every epoch.
        resume: Whether to go on from the checkpoint of this run.
    """
    own = folder / mode
    make_folder(own)
    with Live(console=console, refresh_per_second=8) as live:

        def show(record: dict[str, Any]) -> None:
            metrics.add(mode, record)
            live.update(_progress(mode, record, config.epochs))

        torch.manual_seed(config.seed)
        result = train_run(make(), data, config, mode, on_epoch=show, checkpoint=own / CHECKPOINT, resume=resume)
    if not console.is_terminal:  # Live ends without a new line where the console is no terminal
        console.print()
    if not result.summary.get("growth_stopped", True):
        console.print("growth had not stopped by itself when the plastic stage ended; more --epochs would help")
    save(result.compact, own / COMPACT)
    return result.summary


def _check_same(folder: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the run in a folder. Raises `PlasticError` where its settings are not those of now."""
    then = read_config(folder)
    changed = differences(then, now)
    if changed:
        raise PlasticError(
            f"--resume: {folder} holds a run of {then['model']} on {then['data']} with another configuration: "
            f"{changed}; give the options with which it began, or --overwrite to replace it"
        )
    moved = differences({name: then.get(name) for name in environment()}, environment())
    if moved:
        print_line(f"this run began elsewhere, so that numbers may differ in their last digits: {moved}")
    return then


def _check_checkpoint(model: nn.Module, data: Data, config: Config, mode: Mode, folder: Path) -> int:
    """Return how many epochs of a run are over. Raises `PlasticError` where its checkpoint cannot be resumed."""
    path = folder / mode / CHECKPOINT
    own = identity(data, describe_model(model), config, mode)
    parts = prepare_run(model, data, config, mode)
    return len(restore_run(path, *parts, own)[0]) if path.exists() else 0


def _print_results(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Print how the runs ended, and where their files are."""
    table = Table(*COLUMNS)
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    console.print(f"written to {folder}: report.html, metrics.jsonl, summary.json, config.json, */compact.safetensors")


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
    write_text(folder / REPORT, render(title, results, metrics, config))
