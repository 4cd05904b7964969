"""Names the costs that a network has, and the scales of a penalty on them."""

from __future__ import annotations

from plasticnet.errors import PlasticError

COSTS = ("units", "parameters", "macs", "latency")
SCALES = ("linear", "log")


def check_names(cost: str, scale: str) -> None:
    """Raise `PlasticError` unless the names are those of a cost and of a scale."""
    if cost not in COSTS or scale not in SCALES:
        raise PlasticError(f"cost={cost!r}, scale={scale!r}: choose from {', '.join(COSTS)} and {', '.join(SCALES)}")
