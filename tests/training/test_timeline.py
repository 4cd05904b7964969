"""Timeline: stages, epochs and rounds, without a network."""

from __future__ import annotations

import math
from typing import Any

import pytest

from plasticnet import PlasticError, Stage
from plasticnet.training.timeline import Timeline

STAGES = [Stage(1), Stage(0, 3.0), Stage(2, 5.0), Stage(2, 7.0, 28.0), Stage(1)]


def test_places_and_k_of_every_epoch() -> None:
    timeline = Timeline(STAGES)
    seen = []
    while not timeline.over:
        seen.append((timeline.place, timeline.k, timeline.ends_stage))
        assert timeline.stage is timeline.stages[timeline.place]
        timeline.epoch += 1
    inf = math.inf
    assert seen == [
        (0, inf, True), (1, 5.0, False), (1, 5.0, True), (2, 7.0, False), (2, 28.0, True), (3, inf, True),
    ]  # fmt: skip
    assert (timeline.epoch, timeline.epochs) == (6, 6)
    assert (timeline.place, timeline.k) == (3, inf)  # the last one, at the end


@pytest.mark.parametrize("wrong", [(2, 7.0), 5, {"epochs": 2}])
def test_what_is_no_stage_is_refused(wrong: Any) -> None:
    with pytest.raises(PlasticError, match=r"a stage is a pn\.Stage, such as pn\.Stage\(20, k=7\.0\)"):
        Timeline([Stage(1), wrong])


def test_plastic_epochs_are_those_around_the_stage_that_runs() -> None:
    timeline = Timeline(STAGES)
    seen = []
    while not timeline.over:
        seen.append(timeline.plastic_epochs())
        timeline.epoch += 1
    assert seen[1:5] == [(1, 5)] * 4
    timeline = Timeline([Stage(2, 7.0)])
    timeline.epoch = 2
    timeline.add_round()
    assert timeline.plastic_epochs() == (2, 4)  # of this round, though the one before was plastic, too


def test_a_round_repeats_the_first_from_its_plastic_stage_on() -> None:
    timeline = Timeline(STAGES)
    with pytest.raises(PlasticError, match="epoch 0 of 6"):
        timeline.add_round()
    timeline.epoch = 6
    timeline.add_round([Stage(0), Stage(1, 3.0)])
    assert (timeline.rounds, timeline.epochs, timeline.k) == ([0, 4], 7, 3.0)
    timeline.epoch = 7
    timeline.add_round()
    assert (timeline.rounds, timeline.epochs) == ([0, 4, 5], 12)
    assert timeline.stages[5:] == [s for s in STAGES[1:] if s.epochs]


def test_a_restored_timeline_stands_where_the_saved_one_did() -> None:
    timeline = Timeline(STAGES)
    timeline.epoch = 6
    timeline.add_round()
    timeline.epoch = 9
    before = Timeline(STAGES)
    found = before.restored(timeline.state_dict())
    assert found.state_dict() == timeline.state_dict()
    assert (found.stages, found.k) == (timeline.stages, timeline.k)
    assert (before.epoch, before.epochs) == (0, 6)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"epoch": 7},
        {"epoch": 1.0},
        {"epoch": 1, "woken": [[1, 2, 3, 4]]},
        {"epoch": 1, "woken": 3},
        {"epoch": 1, "rounds": []},
        {"epoch": 1, "rounds": ["0"]},
    ],
)
def test_bad_states(state: dict[str, Any]) -> None:
    with pytest.raises(PlasticError, match="the state"):
        Timeline(STAGES).restored(state)
