"""A few of the random networks of the benchmark: exact, or frozen with a reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import random_networks
import random_table
from random_checks import check
from random_kinds import KINDS
from random_recipes import draw, kinds_of, smaller

SEEDS = range(8)  # `make random` has the others


def test_there_are_many_kinds() -> None:
    assert len(KINDS) >= 50
    assert len({k for seed in range(300) for k in kinds_of(draw(seed)["nodes"])}) >= 50


def test_recipes_are_data_and_reproduce() -> None:
    recipe = draw(3)
    assert json.loads(json.dumps(recipe)) == recipe == draw(3)
    assert all(r != recipe for r in smaller(recipe))


def test_reasons_are_counted_without_names_and_numbers() -> None:
    assert random_networks.reason("Network has nothing to gate (stem: no)") == "nothing to gate"
    assert random_networks.reason("chain.2.layer takes 3 of 'a'") == "... takes # of ..."


def test_the_page_shows_what_was_found() -> None:
    row = {"seed": 7, "status": "crash", "step": "load", "what": "a | b"}
    again = {"status": "ok", "step": "", "what": "", "seconds": 60.0, "commit": "def", "date": "today"}
    environment = {
        "plasticnet": "0", "torch": "2", "python": "3", "device": "CPU", "threads": 1, "date": "today",
        "command": "python random_networks.py", "commit": "def",
    }  # fmt: skip
    content = {
        "environment": environment,
        "settings": {"seconds": 10.0, "tolerance": 1e-9},
        "done": [
            {"seeds": [50, 99], "commit": "abc"}, {"seeds": [0, 49], "commit": "abc"},
            {"seeds": [150, 199], "commit": "def"},
        ],
        "totals": {**dict.fromkeys(random_networks.TOTALS, 0), "sites": 1234},
        "counts": {**{key: {} for key in random_networks.COUNTED}, "status": {"ok": 140, "refused": 9, "crash": 1}},
        "failures": [{**row, "again": again}],
    }  # fmt: skip
    content["counts"]["frozen"] = {"a lot": 9, "x": 1, "y": 2}
    text = random_table.page(content)
    assert "**140 are exact, 9 refused with a reason; 1 crash.** Run again later, of those that failed: 1 ok." in text
    assert "| 7 | crash | load | a / b | ok at def, within 60 s |" in text
    assert "seeds 0 to 99 and 150 to 199" in text
    assert "100 at abc, 50 at def" in text
    assert "1,234 sites" in text
    assert "| a lot | 9 |\n| 2 other reasons | 3 |" in text
    content["failures"], content["counts"]["status"] = [], {"ok": 150}
    assert "none is wrong, and none crashes" in random_table.page(content)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_exact_or_frozen(seed: int) -> None:
    row = check(draw(seed), seconds=60)
    assert row["status"] in ("ok", "refused"), (row["step"], row["what"])
