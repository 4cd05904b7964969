"""Declares the commands train, demo and predict, and says what their options mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from plasticnet.apps.console import print_line
from plasticnet.apps.data import DATASETS, Data
from plasticnet.apps.demo import check_demo, demo
from plasticnet.apps.folder import CONFIG, read_run
from plasticnet.apps.loading import load_any
from plasticnet.apps.models import START, chooses, reads_numbers
from plasticnet.apps.options import (
    DATA,
    MODELS,
    OVERWRITE,
    Channels,
    DataDir,
    Ignore,
    ImageSize,
    Mean,
    Std,
    Target,
    Task,
    budget_of,
    reading_of,
)
from plasticnet.apps.predicting import predict
from plasticnet.apps.runs import check_folder, train_modes
from plasticnet.apps.saving import SECONDS
from plasticnet.apps.settings import DEVICES, Config, Run, device_of, usual_batch, usual_epochs
from plasticnet.errors import PlasticError
from plasticnet.learning.estimators import ESTIMATORS

# What --config does not say: where the results go, what becomes of those that are there, where this machine has its
# data and computes, and how often it saves.
_BESIDE = ("config", "out", "resume", "overwrite", "data_dir", "device", "checkpoint_seconds")


def train_command(
    context: typer.Context,
    data: Annotated[str, typer.Option(help=DATA)] = "digits",
    target: Target = None,
    task: Task = None,
    ignore: Ignore = None,
    image_size: ImageSize = None,
    channels: Channels = None,
    mean: Mean = 0.0,
    std: Std = 1.0,
    data_dir: DataDir = None,
    model: Annotated[
        str, typer.Option(help=f"The model: {MODELS}. An mlp without widths grows two hidden layers from three units.")
    ] = "mlp",
    growth: Annotated[
        bool, typer.Option("--growth", help="Start narrow and grow, at most to the widths of --model.")
    ] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Train the model as it is.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Train the model as it is, prune it, and grow it, side by side.")
    ] = False,
    price: Annotated[
        float | None,
        typer.Option(
            help="What a parameter costs: so many nats of the summed log-likelihood of all training rows; by default "
            "0.05. A larger price makes a smaller network."
        ),
    ] = None,
    cost: Annotated[str, typer.Option(help="What has the price: parameters, macs or units.")] = "parameters",
    budget: Annotated[
        str | None,
        typer.Option(help="The most that the network may cost, as in macs=0.3,params=5000, in the place of a price."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="The number of epochs of each run; by default 60, fewer for large data, more for small."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="The batch size; by default from 32 to 256, by the number of rows.")
    ] = None,
    k: Annotated[float, typer.Option(help="The plasticity k of the gates in the middle stage.")] = 7.0,
    k_end: Annotated[float | None, typer.Option(help="The k at the end of the middle stage, if it is to rise.")] = None,
    estimator: Annotated[
        str, typer.Option(help=f"The estimator of the gradient of the gates: {', '.join(ESTIMATORS)}.")
    ] = "bitflip-cv",
    gates: Annotated[
        str, typer.Option(help="How gates are drawn: sample (once per sample), batch (once per batch), or auto.")
    ] = "auto",
    inputs: Annotated[
        list[str] | None, typer.Option(help="A name pattern of layers whose input features get gates.")
    ] = None,
    start: Annotated[int, typer.Option(help="The number of units per site from which growth starts.")] = START,
    lr: Annotated[
        float, typer.Option(help="The learning rate of the weights (Adam), which falls to 0 in the end.")
    ] = 3e-3,
    gate_lr: Annotated[float, typer.Option(help="The learning rate of the gates (Adam).")] = 1e-1,
    seed: Annotated[int, typer.Option(help="The seed of the weights, the draws, the batches and the data split.")] = 0,
    device: Annotated[str, typer.Option(help=f"Where to compute: {', '.join(DEVICES)}.")] = "cpu",
    config: Annotated[
        Path | None,
        typer.Option(help="A run.json that says all of this; no other option of the run may be given beside it."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("runs/train"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run in --out, with the options of its start.")
    ] = False,
    checkpoint_seconds: Annotated[
        float, typer.Option(help="Save the state also within an epoch, after so many seconds.")
    ] = SECONDS,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Train a network that chooses its own size: it prunes itself, or grows."""
    where = device_of(device)
    if not checkpoint_seconds >= 0:
        raise PlasticError(f"--checkpoint-seconds {checkpoint_seconds}: it must be a number, 0 or more")
    if resume and not overwrite and config is None and not _others(context):
        check_folder(out, resume, overwrite)
        config = out / CONFIG  # all options are those of the start
    if config is not None:
        _check_alone(context)
        run, _ = read_run(config, f"--config {config}", "write it as train writes its run.json")
        if "device" in _given(context):
            run = replace(run, device=where)
        if data_dir is not None:
            run = replace(run, reading=replace(run.reading, data_dir=str(data_dir)))
        check_folder(out, resume, overwrite)
        train_modes(run, _data_again(run), out, resume=resume, overwrite=overwrite, seconds=checkpoint_seconds)
        return
    mode = _mode(model, growth=growth, dense=dense, compare=compare)
    if budget is not None and price is not None:
        raise PlasticError("--budget and --price: a budget finds its price itself; give one of them")
    if dense and (budget is not None or price is not None):
        raise PlasticError(
            f"--dense --{'price' if budget is None else 'budget'}: a model trained as it is has no price"
        )
    limit = budget_of(budget)
    choices: dict[str, Any] = {"cost": cost, "gates": gates}
    settings = Config(
        epochs=1 if epochs is None else epochs, k=k, k_end=k_end, budget=limit, price=0.05 if price is None else price,
        estimator=estimator, inputs=tuple(inputs or ()), start=start, batch=1 if batch is None else batch, lr=lr,
        gate_lr=gate_lr, seed=seed, **choices,
    )  # fmt: skip
    how = reading_of(target, task, ignore, image_size, channels, mean, std, data_dir)
    run = Run(data, how, model, mode, where, settings)
    check_folder(out, resume, overwrite)
    found = data_of(run)
    rows = len(found.train)
    settings = replace(
        settings,
        epochs=usual_epochs(rows) if epochs is None else epochs,
        batch=usual_batch(rows) if batch is None else batch,
    )
    run = replace(run, config=settings)
    train_modes(run, found, out, resume=resume, overwrite=overwrite, seconds=checkpoint_seconds)


def data_of(run: Run) -> Data:
    """Return the data of a run, on its device. Raises `PlasticError` where they cannot be read."""
    data = load_any(run.data, run.reading, run.config.seed)
    return (data.floating() if reads_numbers(run.model) else data).to(device_of(run.device))


def _data_again(run: Run) -> Data:
    """Return the data of a run that a file describes; where they are gone, say from where a relative path leads."""
    try:
        return data_of(run)
    except PlasticError as error:
        path = Path(run.data)
        if ":" in run.data or path.is_absolute() or path.exists() or run.data in DATASETS:
            raise
        raise PlasticError(
            f"{error}: the path is relative to the folder in which the run began: call the command there"
        ) from error


def _mode(model: str, **asked: bool) -> Any:
    """Return what is to be trained. Raises `PlasticError` where several things are asked for."""
    names = [name for name, is_asked in asked.items() if is_asked]
    if len(names) > 1:
        raise PlasticError(f"--{names[0]} and --{names[1]}: give one of them")
    if names:
        return {"growth": "grow"}.get(names[0], names[0])
    return "grow" if chooses(model) else "prune"


def _given(context: typer.Context) -> list[str]:
    """Return the names of the options that stand on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _check_alone(context: typer.Context) -> None:
    """Raise `PlasticError` where options of the run were given beside --config."""
    if others := _others(context):
        raise PlasticError(f"--config says all of the run: leave out {', '.join(others)}, or change a copy of the file")


def _others(context: typer.Context) -> list[str]:
    """Return the options on the command line that say what the run does."""
    return [f"--{name.replace('_', '-')}" for name in _given(context) if name not in _BESIDE]


def demo_command(
    out: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("runs/demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help=OVERWRITE)] = False,
) -> None:
    """Make a trained network smaller, and let another one grow, on handwritten digits.

    The digits come with scikit-learn, so that nothing is downloaded. A page with pictures says what came out. The
    results of a demo before are replaced; other files of these names in --out are refused without --overwrite.
    """
    torch.set_num_threads(1)  # on networks of this size threads mostly wait for each other
    check_demo(out, overwrite)
    demo(out)


def predict_command(
    run: Annotated[Path, typer.Argument(help="The folder of a run that train wrote.")],
    data: Annotated[str, typer.Option(help="The new rows, in the form of the data that the run was trained on.")],
    out: Annotated[Path, typer.Option(help="The .csv table to write.")] = Path("predictions.csv"),
    network: Annotated[
        str | None, typer.Option(help="Which network of a run with --compare predicts: dense, prune or grow.")
    ] = None,
) -> None:
    """Predict the targets of new rows."""
    print_line(f"written {predict(run, data, out, network):,} predictions to {out}")
