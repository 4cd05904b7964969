"""What a target asks for, and how its rows are split."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plasticnet import PlasticError
from plasticnet.apps.targets import read_target, split_rows


@pytest.mark.parametrize(
    ("values", "task", "labels"),
    [
        (["no", "yes"] * 20, "classification", ("no", "yes")),
        ([True, False] * 20, "classification", ("False", "True")),
        ([9, 10, 2] * 20, "classification", ("2", "9", "10")),
        (["0", "1.0"] * 20, "classification", ("0", "1.0")),  # the names are those of the table
        ([0.0, 1.0] * 20, "classification", ("0", "1")),  # whole numbers of a column that had gaps
        (["10", "09", "2"] * 20, "classification", ("2", "09", "10")),
        ([str(2**53 + i) for i in range(5)] * 20, "classification", tuple(str(2**53 + i) for i in range(5))),
        ([2**53 + i for i in range(5)] * 20, "classification", tuple(str(2**53 + i) for i in range(5))),
        ([2**53 + i for i in range(30)] * 20, "regression", ()),  # as floating numbers they are fewer than 20
        ([0.5, 1.5] * 20, "regression", ()),
        (list(range(21)) * 20, "regression", ()),
        ([1, 2, 3, 4] * 10, "regression", ()),  # four values are a tenth of the rows
    ],
)
def test_the_guess(values: list[Any], task: str, labels: tuple[str, ...]) -> None:
    target, y = read_target(values, "t", None, whole=True)
    assert (target.task, target.labels, target.name) == (task, labels, "t")
    if labels:
        assert [labels[i] for i in y] == [str(v if isinstance(v, str | bool) else int(v)) for v in values]
    else:
        assert y.tolist() == list(map(float, values))


def test_the_task_that_is_asked_for() -> None:
    assert read_target([1, 2, 3, 4] * 10, "t", "classification", whole=True)[0].labels == ("1", "2", "3", "4")
    assert read_target([1, 2] * 20, "t", "regression", whole=True)[1].tolist() == [1, 2] * 20


@pytest.mark.parametrize(
    "names", [("1", "01", "007", "7"), ("1", "1.0"), ("01", "02", "36"), ("inf", "2"), ("1.10", "1.1"), ("1e3", "1000")]
)
def test_classes_that_are_asked_for_have_the_names_of_the_cells(names: tuple[str, ...]) -> None:
    target, y = read_target([f" {n}" for n in names] * 20, "t", "classification", whole=True)
    assert sorted(target.labels) == sorted(names)
    assert [target.labels[i] for i in y] == [*names] * 20


@pytest.mark.parametrize(
    ("values", "asked", "message"),
    [
        (["a", "", "b", None], None, "missing in 2 of 4 rows, first in row 2: remove"),
        ([*map(str, range(30)), "?!"], None, r"numbers, and text in 1 of 31 rows, first '\?!' in row 31"),
        (["a"] * 30, None, "'t' is a in all rows"),
        ([1.5] * 30, None, r"'t' is 1\.5 in all rows"),
        (["a"] * 30 + ["b"] * 2, None, r"fewer than 3 rows: b \(2\)"),
        (["a", "b"] * 30, "regression", "holds text, such as 'a'"),
        ([1, 2, 3] * 2, None, "there are 6 rows, and a regression needs 20.*--task classification"),
        ([float("inf"), 1.5] * 30, None, "infinite in row 1"),
        ([1, float("inf")] * 30, None, "infinite in row 2"),
        (["2", "-inf"] * 30, None, "infinite in row 2"),
        (["1e400", "2"] * 30, None, "infinite in row 1"),
        (["01", "1", "007", "7"] * 60, None, "'007' and '7', which are one number: .* --task classification"),
        (["1", "1.0", "2"] * 60, None, "'1' and '1.0', which are one number: .* write them alike"),
    ],
)
def test_what_is_refused(values: list[Any], asked: Any, message: str) -> None:
    with pytest.raises(PlasticError, match=message):
        read_target(values, "t", asked, whole=True)


def test_each_part_has_its_share_of_each_class() -> None:
    classes = torch.tensor([0] * 100 + [1] * 20 + [2] * 3)
    parts = split_rows(len(classes), classes, seed=0)
    assert [classes[part].bincount().tolist() for part in parts] == [[70, 14, 1], [15, 3, 1], [15, 3, 1]]
    assert torch.cat(parts).sort().values.tolist() == list(range(len(classes)))
    assert not torch.equal(parts[0], split_rows(len(classes), classes, seed=1)[0])
    assert [len(part) for part in split_rows(200, None, seed=0)] == [140, 30, 30]
