"""Holds what several runs of one traced model have found."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from plasticnet.tracing.labels import Ledger
from plasticnet.units import Consumer, Norm


@dataclass
class Facts:
    """What the runs of a model have found.

    Attributes:
        ledger: The labels that were joined or frozen.
        producers: The dimensions of tensors in which units are born, as keys (tensor, dimension).
        merging: Those of them that were only multiplied with other weights. Where they are consumers, no unit is born.
        consumers: For each dimension of a parameter that reads units, who reads them.
        contracted: The consumers through which units are read as they are. Through the others, they are multiplied
            where they are born.
        inputs: For each virtual input axis, such as ``fc1.input``, its consumer.
        uses: How often each entry of a parameter is multiplied for one sample.
        seen: The parameters and buffers that a run has used.
        lengths: For each direction of a weight_norm, the name of its length, and the dimension that it takes no norm
            over.
        grouped: For each weight of a grouped layer, the number of rows of one group.
        steered: Whether the model has read a value while it ran, as ``if x.sum() > 0`` does, or has made a tensor whose
            shape depends on values.
        sorting: Whether the model sorts values, of which some may be equal but for rounding.
        routed: Whether which modules run depends on values, as in a mixture of experts.
        stateful: Whether the model keeps something from one call to the next.
        random: Whether the model draws random numbers in evaluation mode.
        unskippable: The blocks that return something else in training than a tensor like their first input.
        means: The modules, each with an axis and the name of an operation, that take such statistics over an axis
            without units.
        embeddings: The tables of embeddings whose own units get no gates.
        capped: The dimensions of parameters that may become shorter, but not longer.
        tables: The tables of embeddings whose own units get gates.
        norms: The statistics over gated units.
        counted: The labels of the units that an attribute counts, by the name of a module, the name of the attribute,
            and the place in it, as in `Width`.
    """

    ledger: Ledger = field(default_factory=Ledger)
    producers: dict[tuple[str, int], None] = field(default_factory=dict)
    merging: set[tuple[str, int]] = field(default_factory=set)
    consumers: dict[tuple[str, int], list[Consumer]] = field(default_factory=dict)
    contracted: set[tuple[str, int]] = field(default_factory=set)
    inputs: dict[str, Consumer] = field(default_factory=dict)
    uses: dict[str, float] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    lengths: dict[str, tuple[str, int]] = field(default_factory=dict)
    grouped: dict[str, int] = field(default_factory=dict)
    steered: bool = False
    sorting: bool = False
    routed: bool = False
    stateful: bool = False
    random: bool = False
    unskippable: set[str] = field(default_factory=set)
    means: set[tuple[str, int, str]] = field(default_factory=set)
    embeddings: set[str] = field(default_factory=set)
    capped: set[tuple[str, int]] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    norms: dict[Norm, None] = field(default_factory=dict)
    counted: dict[tuple[str, str, int | None], np.ndarray] = field(default_factory=dict)
