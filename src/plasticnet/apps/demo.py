"""Runs the demo: both jobs, what it prints about them, and the folder with their networks and a page."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch

from plasticnet.apps.console import print_line, print_table
from plasticnet.apps.data import load_data
from plasticnet.apps.demo_jobs import WIDE, Grown, Shrunk, grown, shrunk
from plasticnet.apps.demo_page import COLUMNS, render, rows, said
from plasticnet.apps.folder import make_folder, write_text
from plasticnet.errors import PlasticError
from plasticnet.files.disk import read_bytes
from plasticnet.files.modules import save

_RECORD, _PAGE, _SMALL, _GROWN = "demo.json", "demo.html", "small.safetensors", "grown.safetensors"
_FILES = (_RECORD, _PAGE, _SMALL, _GROWN)
_START = '{\n "shrunk": {'  # of demo.json, by which the folder of a demo is known


def check_demo(folder: Path, overwrite: bool) -> None:
    """Raise `PlasticError` where a demo would replace files that are not of a demo, unless they may be replaced."""
    found = [name for name in _FILES if os.path.lexists(folder / name)]
    if found and not overwrite and not _is_demo(folder):
        raise PlasticError(
            f"{folder} holds {', '.join(found)}, and not from a demo: choose another --out, or replace "
            f"{'it' if len(found) == 1 else 'them'} by --overwrite"
        )


def demo(folder: Path, seed: int = 0) -> None:
    """Do both jobs, print what came out, and write the networks, the numbers and a page into a folder.

    Raises `PlasticError` where the folder cannot be written.
    """
    make_folder(folder)
    begun = time.monotonic()
    data = load_data("digits")
    print_line(f"{len(data.train):,} handwritten digits to train on, and {len(data.test)} for the test.")
    print_line("1 of 2: a network is trained, and made smaller ...")
    torch.manual_seed(seed)
    first = shrunk(data)
    print_line("2 of 2: another one grows from three units in each hidden layer ...")
    torch.manual_seed(seed)
    second = grown(data)
    print_table(COLUMNS, rows(first, second))
    for sentences in said(first, second):
        print_line(f"{sentences}\n")
    print_line("Epoch by epoch, the hidden units of the network that grew:")
    print_line(f"  {' '.join('-'.join(map(str, widths)) for widths in second.widths)}\n")
    code = _code(folder, data.shape, data.outputs)
    save(first.small, folder / _SMALL)
    save(second.network, folder / _GROWN)
    write_text(folder / _PAGE, render(first, second, data, code))
    write_text(folder / _RECORD, json.dumps(_record(first, second), indent=1) + "\n")
    print_line(f"Both networks, the numbers and a page with pictures are in {folder}: open {folder / _PAGE}")
    print_line(f"In Python:\n{code}")
    print_line(f"{time.monotonic() - begun:.0f} seconds")


def _is_demo(folder: Path) -> bool:
    """Return whether a folder holds the record of a demo."""
    try:
        return read_bytes(folder / _RECORD).startswith(_START.encode())
    except PlasticError:
        return False


def _code(folder: Path, shape: tuple[int, ...], outputs: int) -> str:
    """Return the lines of Python that load both networks."""
    made = f'factory("mlp:{"-".join(map(str, WIDE))}", {shape}, {outputs})'
    loads = [f'{name} = pn.load("{(folder / file).as_posix()}", make)' for name, file in
             (("small", _SMALL), ("grown", _GROWN))]  # fmt: skip
    return "\n".join(
        ["import plasticnet as pn", "from plasticnet.apps.models import factory", f"make = {made}", *loads]
    )


def _record(first: Shrunk, second: Grown) -> dict[str, object]:
    """Return all numbers as plain data."""
    return {
        "shrunk": {"accuracies": first.accuracies, **first.report.as_dict()},
        "grown": {
            "widths": second.widths, "parameters": second.parameters, "peak": second.peak, "accuracy": second.accuracy,
            "macs": second.macs,
        },
    }  # fmt: skip
