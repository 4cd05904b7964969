"""Holds what the runs of a traced model have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from plasticnet.tracing.labels import Ledger
from plasticnet.units import Consumer, Norm


@dataclass
class Facts:
    """What the runs of a model have in common: the ledger and who produces and consumes what."""

    ledger: Ledger = field(default_factory=Ledger)
    producers: dict[tuple[str, int], None] = field(default_factory=dict)
    consumers: dict[tuple[str, int], list[Consumer]] = field(default_factory=dict)
    inputs: dict[str, Consumer] = field(default_factory=dict)  # virtual axis name -> its consumer
    uses: dict[str, float] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    grouped: dict[str, int] = field(default_factory=dict)  # weights of grouped layers: rows of one group
    steered: bool = False  # whether a value was read while the model ran, as `if x.sum() > 0` does
    unskippable: set[str] = field(default_factory=set)  # blocks that return something else in training
    means: set[tuple[str, int]] = field(default_factory=set)  # modules and axes of means over something without units
    embeddings: set[str] = field(default_factory=set)  # tables whose own units are left alone
    norms: dict[tuple[str, int], Norm] = field(default_factory=dict)  # statistics over gated units
