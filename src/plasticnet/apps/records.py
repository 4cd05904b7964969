"""Says what a finished run has left in summary.json and metrics.jsonl, and reads both, strictly.

A folder may come from somebody else. So what a report shows has the type that it must have: numbers are numbers, and a
network is one of those that train makes. What a report does not show is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from plasticnet.apps.data import Task
from plasticnet.apps.folder import METRICS, SUMMARY, read_json
from plasticnet.apps.parsing import parse
from plasticnet.apps.settings import Mode
from plasticnet.errors import PlasticError


class ModuleCost(TypedDict):
    """What a module costs, as a `ModuleProfile` says it."""

    name: str
    macs: int
    parameters: int
    peak_bytes: int
    milliseconds: float


class Cost(TypedDict):
    """What a network costs, as a `Profile` says it."""

    macs: int
    parameters: int
    peak_bytes: int
    milliseconds: float
    kept_bytes: int | None
    training_milliseconds: float | None
    batch: int
    device: str
    rows: list[ModuleCost]


class Ends(TypedDict):
    """What a network cost before and after its training."""

    before: Cost
    after: Cost


class Summary(TypedDict):
    """How a run ended: its part of summary.json."""

    task: Task
    score: Literal["accuracy", "R²"]
    test_score: float
    units: dict[str, int]
    parameters: int
    macs: int
    ms_per_1000: float
    train_cpu_seconds: float
    profile: NotRequired[Ends]


class Record(TypedDict):
    """How an epoch of a run ended: a line of metrics.jsonl."""

    run: Mode
    epoch: int
    k: Literal["inf"] | float
    val_loss: float
    val_score: float
    units: dict[str, int]
    parameters: int
    macs: int
    histogram: list[int]
    transition: float
    profile: NotRequired[Cost]


def read_records(folder: Path, way_out: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary of each run of a folder, and the records of all epochs.

    Args:
        folder: The folder.
        way_out: What the user can do where a file is damaged.

    Raises:
        PlasticError: A file cannot be read, or something in it is missing or of another type.
    """
    (content,) = _read(folder / SUMMARY, way_out)
    results = _parsed(dict[Mode, Summary], content, folder / SUMMARY, "", way_out)
    if not results:
        raise PlasticError(f"{folder / SUMMARY} is damaged: there is no network in it: {way_out}")
    lines = enumerate(_read(folder / METRICS, way_out), start=1)
    return results, [_parsed(Record, line, folder / METRICS, f"line {i}: ", way_out) for i, line in lines]


def _read(path: Path, way_out: str) -> list[Any]:
    """Return the JSON values in a file."""
    return read_json(path, str(path), way_out)


def _parsed(kind: Any, content: Any, path: Path, place: str, way_out: str) -> Any:
    """Return a value of JSON as one of a type. Raises `PlasticError` where it is not."""
    try:
        return parse(kind, content)
    except PlasticError as error:
        raise PlasticError(f"{path} is damaged: {place}{error}: {way_out}") from error
