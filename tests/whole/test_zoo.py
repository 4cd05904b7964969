"""A tenth of the zoo benchmark: other people's models stay exact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("torchvision")

import zoo
import zoo_table
from zoo_measure import CLOSED_SHARES, TOLERANCE, measure
from zoo_models import FAST, MODELS


def test_every_library_is_represented() -> None:
    assert {n.partition("/")[0] for n in FAST} == {n.partition("/")[0] for n in MODELS}
    assert set(FAST) <= set(MODELS)
    assert len(MODELS) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
def test_compact_is_exact(name: str) -> None:
    library = name.partition("/")[0]
    if library not in ("examples", "torchvision"):
        pytest.importorskip("torch_geometric" if library == "pyg" else library)
    row: dict[str, Any] = {}
    measure(name, seed=0, report=row.update, onnx=False)
    assert len(row["error"]) == len(CLOSED_SHARES)
    assert all(error <= TOLERANCE for error in row["error"].values()), row["error"]
    assert all(row["moved"].values())
    assert row["gradients"] is True
    assert row["save_load"] is True
    assert row["status"] == "ok"
    assert 0 < row["prunable"] < 1


def test_the_table_shows_what_was_measured() -> None:
    fine = {
        "name": "a/fine", "status": "ok", "sites": 2, "units": 1200, "prunable": 0.5, "seconds": 1.0,
        "frozen": {"head": "reaches the model's output", "a": "x: 1", "b": "x: 2"},
        "error": {"30 %": 1e-16, "80 %": 2e-16}, "onnx": "equal",
        "torch_pruning": {"status": "inexact (3.0%)", "seconds": 2.0},
    }  # fmt: skip
    crashed = {"name": "b/crashed", "status": "crash: RuntimeError: a | b", "torch_pruning": {"status": "exact"}}
    environment = {
        "plasticnet": "0", "torch": "2", "python": "3", "device": "CPU", "threads": 1, "load": 0.0, "date": "today",
        "command": "python zoo.py", "commit": "abc", "packages": {"torch-pruning": "1.6.0"},
    }  # fmt: skip
    content = {"environment": environment, "settings": {"seed": 0, "timeout": 300.0}, "results": [fine, crashed]}
    text = zoo_table.page(content)
    assert "| fine | 2 | 1,200 | 50 | 3: 2 x; 1 reaches the model's output | 1e-16 | 2e-16 | ok | equal |" in text
    assert "crash: RuntimeError: a / b" in text
    assert "not run again" not in text
    assert "**1 of 2 pass everything**" in text
    assert "1 inexact, 1 exact" in text


def test_what_was_skipped_is_taken_from_an_earlier_result_and_the_page_says_so() -> None:
    environment = {"commit": "new", "date": "2"}
    earlier = {
        "environment": {"commit": "old", "date": "1"},
        "results": [
            {"name": "a", "commit": "older", "onnx": "equal", "torch_pruning": {"status": "exact"}},
            {"name": "b", "onnx": "equal", "carried": {"onnx": {"commit": "first", "date": "0"}}},
        ],
    }
    rows = [{"name": "a", "onnx": "failed: x"}, {"name": "b"}, {"name": "c"}]
    found = [zoo.carried(row, earlier) for row in rows]
    assert found[0]["onnx"] == "failed: x"  # measured now
    assert found[0]["torch_pruning"] == {"status": "exact"}
    assert found[0]["carried"] == {"torch_pruning": {"commit": "older", "date": "1"}}
    assert found[1]["carried"] == {"onnx": {"commit": "first", "date": "0"}}
    assert found[2] == {"name": "c", "carried": {}}
    assert zoo_table.commits(rows, environment) == "3 at new"
    assert zoo_table.earlier(found, "onnx", "ONNX") == " ONNX was not run again in 1 rows: 1 of 0 at first."
    assert zoo_table.earlier(rows, "onnx", "ONNX") == ""
