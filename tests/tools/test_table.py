"""Tables of text."""

from __future__ import annotations

import pytest

from plasticnet.tools.table import format_table, readable_bytes

ROWS = [("site", "units", "read by"), ("conv1", "6", ""), ("", "12,000", "fc")]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert format_table(ROWS) == ["site   units   read by", "conv1  6", "       12,000  fc"]


def test_numbers_end_at_the_same_place() -> None:
    assert format_table(ROWS, right=True) == ["site    units  read by", "conv1       6", "       12,000       fc"]


def test_a_row_with_another_number_of_cells_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        format_table([("a", "b"), ("a",)])


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5120.0 GiB")]
)
def test_readable_bytes(count: int, text: str) -> None:
    assert readable_bytes(count) == text
