"""The difference of two lists of outputs: relative to the largest entry, and infinite where they are not alike."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from plasticnet.tools.difference import relative_difference

NAN, INF = math.nan, math.inf


def tensors(*values: object) -> list[Tensor]:
    return [torch.tensor(v) for v in values]


def test_relative_to_the_largest_entry_of_each() -> None:
    assert relative_difference(tensors([1.0, -4.0]), tensors([1.0, -3.0])) == 0.25
    assert relative_difference(tensors([1.0, -4.0], [100.0]), tensors([1.0, -3.0], [50.0])) == 0.5
    assert relative_difference(tensors([1.0, -4.0], [100.0]), tensors([1.0, -3.0], [99.0])) == 0.25


def test_what_is_equal_does_not_differ() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    assert relative_difference([x, x.double(), x > 0], [x.clone(), x.double(), x > 0]) == 0.0
    assert relative_difference([], []) == 0.0
    assert relative_difference([torch.zeros(0, 3)], [torch.zeros(0, 3)]) == 0.0
    assert relative_difference([torch.zeros(3)], [torch.zeros(3)]) == 0.0
    assert relative_difference([torch.tensor(2.0)], [torch.tensor(2.0)]) == 0.0


def test_zeros_are_expected_exactly() -> None:
    assert relative_difference([torch.zeros(3)], [torch.full((3,), 1e-6)]) > 1e200


@pytest.mark.parametrize(
    ("expected", "found"),
    [
        (tensors([1.0, 2.0]), tensors([[1.0, 2.0]])),
        (tensors([1.0, 2.0]), tensors([1.0])),
        (tensors([1.0], [2.0]), tensors([1.0])),
        (tensors([1.0]), []),
        (tensors([1.0, 2.0]), tensors([1.0, NAN])),
        (tensors([1.0, NAN]), tensors([1.0, 2.0])),
        (tensors([1.0, 2.0]), tensors([1.0, INF])),
        (tensors([1.0, INF]), tensors([1.0, 2.0])),
        (tensors([1.0, INF]), tensors([1.0, -INF])),
        (tensors([1.0, INF]), tensors([1.0, NAN])),
        (tensors([NAN, 2.0]), tensors([2.0, NAN])),
        (tensors([complex(1, INF)]), tensors([complex(1, -INF)])),
        (tensors([complex(1, NAN)]), tensors([complex(NAN, 1)])),
    ],
)
def test_infinite_where_they_are_not_alike(expected: list[Tensor], found: list[Tensor]) -> None:
    assert relative_difference(expected, found) == INF


def test_equal_nan_and_infinities_leave_the_finite_entries() -> None:
    assert relative_difference(tensors([NAN, INF, -INF, 4.0]), tensors([NAN, INF, -INF, 3.0])) == 0.25
    assert relative_difference(tensors([NAN, -INF]), tensors([NAN, -INF])) == 0.0
    assert relative_difference(tensors([complex(NAN, 4), 0j]), tensors([complex(NAN, 3), 0j])) == 0.25
    assert relative_difference(tensors([complex(-INF, 4), 8j]), tensors([complex(-INF, 4), 6j])) == 0.25


def test_complex_numbers_differ_by_their_modulus() -> None:
    expected, found = torch.tensor([3 + 4j, 0]), torch.tensor([3 + 4j, 0.3 + 0.4j])
    assert relative_difference([expected], [found]) == pytest.approx(0.1)
    assert relative_difference([expected], [expected.conj()]) == pytest.approx(8 / 5)
    assert relative_difference([expected.conj()], [expected.conj()]) == 0.0


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8, torch.bool]
)
def test_other_types_are_compared_in_double(dtype: torch.dtype) -> None:
    one = torch.ones(2, dtype=dtype)
    other = torch.tensor([1, 0]).to(dtype)
    assert relative_difference([one], [one]) == 0.0
    assert relative_difference([one], [other]) == 1.0
    assert relative_difference([one], [other.to(torch.complex128)]) == 1.0


def test_half_precision_neither_overflows_nor_rounds() -> None:
    expected, found = (torch.tensor([v], dtype=torch.float16) for v in (60000.0, -60000.0))
    assert relative_difference([expected], [found]) == 2.0
    small = torch.tensor([1.0, 2**-24], dtype=torch.float16)
    assert relative_difference([small], [small * torch.tensor([1, 0], dtype=torch.float16)]) == 2**-24


def test_single_precision_does_not_overflow() -> None:
    assert relative_difference(tensors([3e38]), tensors([-3e38])) == pytest.approx(2.0)


def test_tensors_are_left_alone() -> None:
    for values in ([NAN, INF, 2.0], [complex(INF, 2), 1j, 0j]):
        expected, found = tensors(values, values)
        assert relative_difference([expected], [found]) == 0.0
        assert repr(expected) == repr(found) == repr(torch.tensor(values))


def test_precisions_may_differ() -> None:
    x = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert 0 < relative_difference([x], [x.float()]) < 1e-7
    assert relative_difference([x.float()], [x.float().to(torch.complex128)]) == 0.0
