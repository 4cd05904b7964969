"""A few of the random networks of the benchmark: exact, or frozen with a reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import random_networks
from random_checks import check
from random_kinds import KINDS
from random_recipes import draw, kinds_of, smaller

SEEDS = range(20)


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


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_exact_or_frozen(seed: int) -> None:
    row = check(draw(seed), seconds=60)
    assert row["status"] in ("ok", "refused"), (row["step"], row["what"])
