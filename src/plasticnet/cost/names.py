"""Names the costs and the scales of a penalty."""

from __future__ import annotations

from plasticnet.errors import PlasticError

COSTS = ("units", "parameters", "macs", "latency")
SCALES = ("linear", "log")


def check_names(cost: str, scale: str) -> None:
    """Raise `PlasticError` unless these are a cost and a scale."""
    if cost not in COSTS or scale not in SCALES:
        raise PlasticError(f"cost={cost!r}, scale={scale!r}: choose from {', '.join(COSTS)} and {', '.join(SCALES)}")
