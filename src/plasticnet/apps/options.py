"""Holds options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from plasticnet.apps.data import Task as DataTask
from plasticnet.apps.own_data import KNOWN, Reading
from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError

MODELS = "mlp, mlp:300-100, lenet5, torchvision:resnet18, timm:resnet18, transformers:bert or PACKAGE:FACTORY"
OVERWRITE = "Replace the run that --out holds. Only files of a run are removed, when everything else was accepted."
DATA = f"The data: {KNOWN}."

HeadDims = Annotated[
    list[str] | None,
    typer.Option(help="A name pattern of attention modules whose heads become smaller instead of fewer."),
]
Experts = Annotated[
    list[str] | None, typer.Option(help="A name pattern of lists or stacks of experts, of which some may be removed.")
]
Target = Annotated[str | None, typer.Option(help="The column of a table that is to be predicted.")]
Task = Annotated[
    str | None, typer.Option(help="What it is: classification or regression. By default its values say it.")
]
Ignore = Annotated[list[str] | None, typer.Option(help="A column of a table to leave out, such as a name or a key.")]
ImageSize = Annotated[int | None, typer.Option(help="The height and width that images are brought to.")]
Channels = Annotated[int | None, typer.Option(help="1 makes all images grey, and 3 makes all of them coloured.")]
Mean = Annotated[float, typer.Option(help="What is subtracted from pixels between 0 and 1.")]
Std = Annotated[float, typer.Option(help="What they are then divided by.")]
DataDir = Annotated[Path | None, typer.Option(help="The folder that holds MNIST/raw or FashionMNIST/raw.")]


def reading_of(
    target: str | None,
    task: str | None,
    ignore: list[str] | None,
    image_size: int | None,
    channels: int | None,
    mean: float,
    std: float,
    data_dir: Path | None,
) -> Reading:
    """Return how data are read, as the options say. Raises `PlasticError` as `Reading` does, which checks them."""
    folder = None if data_dir is None else str(data_dir)
    return Reading(target, cast("DataTask | None", task), tuple(ignore or ()), image_size, channels, mean, std, folder)


def budget_of(text: str | None, *, latency: bool = False) -> Budget | None:
    """Return the budget that the text of --budget describes; with a time among its targets only where that is said."""
    if text is None:
        return None
    try:
        targets = {name.strip(): float(value) for name, _, value in (part.partition("=") for part in text.split(","))}
        budget = Budget(**targets)
    except (ValueError, TypeError):
        raise PlasticError(f"--budget {text}: write targets as in macs=0.3,params=5000; or loss=0.02") from None
    if budget.latency_ms is not None and not latency:
        raise PlasticError("--budget latency_ms: latency is measured in Python, by net.measure_latency(...)")
    return budget


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """Return the shape that the text of --input gives."""
    if text is None:
        return None
    try:
        shape = tuple(int(n) for n in text.split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise PlasticError(f"--input {text}: write the shape as 1,3,224,224")
    return shape
