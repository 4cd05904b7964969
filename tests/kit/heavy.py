"""What takes so long that only `make heavy` runs it."""

from __future__ import annotations

import os

import pytest

RUNS = "PLASTICNET_HEAVY" in os.environ
heavy = pytest.mark.skipif(not RUNS, reason="it takes long: make heavy")
