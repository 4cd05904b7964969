"""Writes the folder of the command train: a run for each mode, their records, and a report on all of them.

The folder holds ``run.json`` (the settings), ``prepared.json`` (what was found out about the data), ``metrics.jsonl``
(a line per epoch), ``summary.json`` (how each run ended), ``report.html``, and for each mode a folder with
``checkpoint.safetensors`` and ``compact.safetensors``.
"""

from __future__ import annotations

import json
import platform
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.live import Live
from torch import Tensor, nn

from plasticnet.apps.comparing import Entry, compare
from plasticnet.apps.console import console, print_line
from plasticnet.apps.data import Data
from plasticnet.apps.folder import (
    COMPACT,
    CONFIG,
    METRICS,
    PREPARED,
    REPORT,
    SUMMARY,
    check_free,
    checkpoints_in,
    clean,
    clear,
    locked,
    make_folder,
    read_config,
    read_settings,
    write_text,
)
from plasticnet.apps.identity import describe_model, differences, hashes, identity, settings
from plasticnet.apps.loop import train_run
from plasticnet.apps.models import factory
from plasticnet.apps.page import START
from plasticnet.apps.parsing import is_unicode
from plasticnet.apps.prepared import Prepared
from plasticnet.apps.preparing import prepare_run
from plasticnet.apps.printing import print_results, print_start, progress
from plasticnet.apps.records import read_records
from plasticnet.apps.report import render
from plasticnet.apps.saving import SECONDS, restore_run
from plasticnet.apps.settings import Mode, Run
from plasticnet.apps.stopping import Stop, stopped_by_signals
from plasticnet.errors import PlasticError, first_line
from plasticnet.files.disk import append_file, read_bytes
from plasticnet.files.modules import save
from plasticnet.version import __version__

_ANEW = "train --resume, with the options of the run, writes it anew"


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise `PlasticError` where a folder holds nothing to resume, or what must not be replaced."""
    if resume and overwrite:
        raise PlasticError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if not is_unicode(str(folder)):
        raise PlasticError(f"--out {folder}: the name is not UTF-8, so that no network could be read there: rename it")
    if resume:
        read_config(folder)  # so that a folder without a run is refused before a lock is made in it
    else:
        check_free(folder, overwrite)


def train_modes(
    run: Run,
    data: Data,
    folder: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    seconds: float = SECONDS,
) -> None:
    """Train one network for each mode, show the progress, and write everything into a folder.

    Args:
        run: The settings.
        data: The data, on the device of the run.
        folder: The folder, which is made if it does not exist.
        resume: Whether to go on with the runs in the folder. They must have begun with the same settings and data.
        overwrite: Whether a run that the folder holds may be replaced. Files that are not of a run always stay.
        seconds: After so many seconds the state is saved within an epoch, too.

    Raises:
        PlasticError: The settings cannot be used for training; the folder holds a run and neither ``resume`` nor
            ``overwrite`` is given; there is no run to resume, or it differs, and the message says in what; or another
            process is at work in the folder. Nothing was written then. Or the training itself fails: what it has
            written so far is then still there.
        SystemExit: A signal has stopped the training, after a step. Its state was saved, and a line says how to go on.
    """
    check_folder(folder, resume, overwrite)
    make = factory(run.built, data.shape, data.outputs)
    structure = describe_model(make())
    if not resume:
        _check_outputs(make().to(data.train.x.device), run.model, data)
        for mode in run.modes:  # so that settings are refused before anything is written
            prepare_run(make(), data, run.config, mode, limited=run.limited)
    with locked(folder), stopped_by_signals() as stop:
        clean(folder)
        if resume:
            described = _check_same(folder, settings(run, data, structure))
            over = sum(_check_checkpoint(make(), data, run, mode, folder) for mode in run.modes)
        else:
            check_free(folder, overwrite)  # again, because another process may have been here in the meantime
            clear(folder)
            record, over = {"command": "train", **hashes(data, structure), **environment()}, 0
            _write_json(folder / CONFIG, {**run.as_dict(), "record": record})
            described = read_settings(folder, str(folder / CONFIG))
        _write_json(folder / PREPARED, Prepared.of(data).as_dict())  # a run may have been killed before it was there
        print_start(run, data)
        metrics = Metrics(folder / METRICS, over)
        try:
            results = {
                mode: _train_mode(make, data, run, mode, folder, metrics, resume, seconds, stop) for mode in run.modes
            }
        except KeyboardInterrupt as error:
            again = f"plasticnet train --resume --out {shlex.quote(str(folder))}"
            print_line(f"interrupted, and saved in {folder}: {again} goes on")
            raise SystemExit(128 + getattr(error, "signal", signal.SIGINT)) from error
        _write_json(folder / SUMMARY, results)
        _write_page(folder, described, results, metrics.records)
    print_results(results, run, data, folder)


@torch.no_grad()
def _check_outputs(model: nn.Module, name: str, data: Data) -> None:
    """Raise `PlasticError` where a model does not take the inputs of the data, or return what they ask for."""
    try:
        found = model.eval()(data.train.x[:2])
    except Exception as error:  # the model can raise anything
        grey = ": --channels 3 makes grey images coloured" if len(data.shape) == 3 and data.shape[0] == 1 else ""
        raise PlasticError(
            f"model {name!r} does not take inputs of the shape {data.shape}{grey} ({first_line(error)})"
        ) from error
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if data.task == "regression":
        fits = shape in ((2, 1), (2,))
    else:
        fits = isinstance(shape, tuple) and len(shape) == 2 and shape[1] >= data.outputs
    if not fits:
        raise PlasticError(
            f"model {name!r} returns {shape} for two inputs, and (2, {data.outputs}) is needed for a {data.task}: a "
            "factory of your own may take num_classes="
        )


class Metrics:
    """The records of all runs of a folder, and the file that holds them.

    Runs that are resumed give the records of their epochs once more. When all of these are there, the file is replaced
    by what the checkpoints know: it never holds less than that, and no epoch twice. Records after them are appended.

    Args:
        path: The file.
        over: The number of epochs, of all runs together, that were over when this process began.
    """

    def __init__(self, path: Path, over: int) -> None:
        self.path, self.over = path, over
        self.records: list[dict[str, Any]] = []
        if not over and path.exists():
            write_text(path, "")  # the epochs in it are trained anew

    def add(self, run: str, record: Mapping[str, Any]) -> None:
        """Take in the record of an epoch of a run, and write it into the file."""
        self.records.append({"run": run, **record})
        if len(self.records) > self.over:
            append_file(self.path, _line(self.records[-1]).encode())
        elif len(self.records) == self.over:
            write_text(self.path, "".join(map(_line, self.records)))


def _line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of the file."""
    return json.dumps(record) + "\n"


def rewrite_report(folder: Path) -> None:
    """Write the report of a folder again. Raises `PlasticError` where the folder does not hold a finished run."""
    config, results, metrics = _finished(folder)
    with _complete(str(folder)):
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
    if out.exists() and not (out.is_file() and read_bytes(out).startswith(f"{START}plasticnet: ".encode())):
        raise PlasticError(f"--out {out} is not a page of plasticnet, and would be replaced: give another name")
    short = [path.name for path in paths]
    entries: list[Entry] = []
    for folder, name in zip(folders, short, strict=True):
        config, results, metrics = _finished(folder)
        title = name if short.count(name) == 1 else str(folder)
        with _complete(str(folder)):
            for run, result in results.items():
                own = [record for record in metrics if record["run"] == run]
                label = title if len(results) == 1 else f"{title}, {run}"
                entries.append(Entry(label, str(config["data"]), str(config["model"]), result, own))
                compare(entries[-1:])  # so that what is missing is found in its folder
    with _complete(", ".join(map(str, folders))):
        write_text(out, compare(entries))


def _finished(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Return the settings, the summary and the records in a folder. Raises `PlasticError` where its run is not over."""
    for name in (CONFIG, SUMMARY, METRICS):
        if not (folder / name).exists():
            way_out = "train --resume goes on with it" if name != CONFIG else "name the --out of a train"
            raise PlasticError(f"{folder} is not a finished run, since it has no {name}: {way_out}")
    config = read_settings(folder, str(folder / CONFIG))
    return config, *read_records(folder, _ANEW)


@contextmanager
def _complete(where: str) -> Iterator[None]:
    """Explain errors in this context, in which records are shown, by what these lack: their parts do not fit together.

    Args:
        where: The folder that holds them, or several.
    """
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise PlasticError(
            f"{SUMMARY} or {METRICS} in {where} is damaged, as it lacks what a report shows: {_ANEW}"
        ) from error


def environment() -> dict[str, Any]:
    """Return what a result depends on beside its settings: versions, the processor and the number of threads."""
    return {
        "plasticnet": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }


def _train_mode(
    make: Callable[[], nn.Module],
    data: Data,
    run: Run,
    mode: Mode,
    folder: Path,
    metrics: Metrics,
    resume: bool,
    seconds: float,
    stop: Stop,
) -> dict[str, Any]:
    """Train the network of one mode, save its compact module, and return the summary of the run.

    Args:
        make: Builds the model.
        data: The data.
        run: The settings.
        mode: What the run does.
        folder: The folder of all runs.
        metrics: Takes the record of every epoch.
        resume: Whether to go on from the checkpoints of this run.
        seconds: After so many seconds the state is saved within an epoch, too.
        stop: Whether to stop.
    """
    own = folder / mode
    make_folder(own)
    with _live() as live:

        def show(record: dict[str, Any]) -> None:
            metrics.add(mode, record)
            live.update(progress(mode, record, run.config.epochs, data.task))

        torch.manual_seed(run.config.seed)
        result = train_run(
            make(), data, run.config, mode,
            limited=run.limited, on_epoch=show, checkpoint=checkpoints_in(folder, mode).newest, resume=resume,
            seconds=seconds, stop=stop,
        )  # fmt: skip
    save(result.compact, own / COMPACT)
    return result.summary


@contextmanager
def _live() -> Iterator[Live]:
    """Show the progress in this context, and end its line, however the context ends."""
    try:
        with Live(console=console, refresh_per_second=8) as live:
            yield live
    finally:
        if not console.is_terminal:  # Live ends without a new line where the console is no terminal
            console.print()


def _check_same(folder: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the run in a folder. Raises `PlasticError` where they are not those of now."""
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


def _check_checkpoint(model: nn.Module, data: Data, run: Run, mode: Mode, folder: Path) -> int:
    """Return how many epochs of a run are over. Raises `PlasticError` where its checkpoints cannot be resumed."""
    own = identity(data, describe_model(model), run.config, mode)
    training = prepare_run(model, data, run.config, mode, limited=run.limited)
    found = restore_run(checkpoints_in(folder, mode), training, own)
    return 0 if found is None else len(found.history)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain data into a file."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def _write_page(folder: Path, config: Mapping[str, Any], results: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Write report.html into the folder."""
    title = f"plasticnet: {config['model']} on {config['data']}"
    write_text(folder / REPORT, render(title, results, metrics, config))
