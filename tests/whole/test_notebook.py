"""The notebook of the examples: its code runs, prints what it says that it prints, and names no place of a machine."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "release" / "notebook.py"))
TEXT = (ROOT / "examples" / "shrink_and_grow.ipynb").read_text()
CONTENT = json.loads(TEXT)


def test_a_figure_that_was_open_before_is_no_output() -> None:
    pyplot.figure()
    assert SCRIPT["outputs"]({"cells": [{"cell_type": "code", "source": ["print(1)"]}]}) == [
        [{"name": "stdout", "output_type": "stream", "text": ["1\n"]}]
    ]


@pytest.mark.slow
def test_the_notebook_prints_what_it_says() -> None:
    torch.set_num_threads(1)
    found, said = SCRIPT["outputs"](CONTENT), SCRIPT["committed"](CONTENT)
    assert SCRIPT["wordless"](found) == SCRIPT["wordless"](said)


def test_every_cell_with_code_was_run() -> None:
    cells = [cell for cell in CONTENT["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    printed = [output for own in SCRIPT["committed"](CONTENT) for output in own]
    assert sum(output["output_type"] == "display_data" for output in printed) == 1
    assert len(printed) >= 5
    assert not any(output["output_type"] == "error" for output in printed)


@pytest.mark.parametrize("place", ["/home/", "/tmp/", "/root/", "/work/", "/Users/", "site-packages"])
def test_no_place_of_a_machine_is_named(place: str) -> None:
    assert place not in TEXT


def test_another_word_is_noticed_and_another_number_is_not() -> None:
    said = SCRIPT["committed"](CONTENT)
    other = copy.deepcopy(said)
    other[0][0]["text"] = [line.replace("1,347", "99") for line in other[0][0]["text"]]
    assert SCRIPT["wordless"](other) == SCRIPT["wordless"](said)
    other[0][0]["text"] = ["something else\n"]
    assert SCRIPT["wordless"](other) != SCRIPT["wordless"](said)
