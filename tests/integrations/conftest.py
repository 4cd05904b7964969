"""Lets every test here say which row of docs/integrations.md it stands for; see experiments/integrations.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

HEAVY = "PLASTICNET_INTEGRATIONS"


@pytest.fixture(autouse=True)
def _row(request: pytest.FixtureRequest, record_property: Callable[[str, Any], None]) -> None:
    """Note what `pytest.mark.integration` says, and what is checked: the first line of the docstring."""
    marker = request.node.get_closest_marker("integration")
    assert marker is not None, "name the integration: @pytest.mark.integration('Lightning', 1)"
    name, processes = marker.args
    record_property("integration", name)
    record_property("processes", processes)
    record_property("check", (request.function.__doc__ or "").split("\n")[0])
    if request.node.get_closest_marker("slow") and not os.environ.get(HEAVY):
        pytest.skip(f"it is heavy, and `make integrations` runs it; {HEAVY}=1 does so here")
