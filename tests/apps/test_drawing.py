"""The pictures of a page: bars are as long as their values, and lines lie within the picture."""

from __future__ import annotations

import re

from plasticnet.apps.drawing import Line, bars, curves, key, short


def test_bars_are_as_long_as_their_values() -> None:
    drawn = bars("right answers", [("whole", 1.0, "100%"), ("cut", 0.25, "25%"), ("none", 0.0, "0%")], 1, [2, 0, 1])
    assert [float(n) for n in re.findall(r'd="M0 \d+h([\d.]+)v12H0z"', drawn)] == [360, 90, 0]
    assert re.findall(r'fill="var\(--c(\d)\)"', drawn) == ["2", "0", "1"]
    assert 'aria-label="right answers: whole 100%, cut 25%, none 0%"' in drawn
    assert 'viewBox="0 0 360 126"' in drawn


def test_a_level_lies_where_the_line_ends() -> None:
    drawn = curves("units", [Line("a", [(0, 3), (1, 10), (2, 8)])], level=8)
    (line,) = re.findall(r'd="M([^"]*)" fill="none" stroke="var\(--c0\)', drawn)
    ((_, level),) = re.findall(r'd="M(\d+) ([\d.]+)H\d+" fill="none"', drawn)
    assert line.split("L")[-1].split()[1] == level
    assert ">epoch 0<" in drawn
    assert ">6<" in drawn  # between whole numbers there is a whole number


def test_what_is_written_in_a_picture_is_escaped() -> None:
    evil = '<script>"'
    for drawn in (bars(evil, [(evil, 1, evil)], 1, [0]), curves(evil, [Line(evil, [(1, 1.0)])]), key([evil])):
        assert "<script" not in drawn


def test_numbers_in_a_few_characters() -> None:
    assert [short(n) for n in (0.12345, 12, 2935, 1.5e6, 2e9)] == ["0.123", "12", "2.94k", "1.5M", "2G"]
