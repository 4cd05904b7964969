"""Lets attributes follow the units that they count: the channels of norms without tensors, and timm's feature_info."""

from __future__ import annotations

import numpy as np

from plasticnet.tracing.facts import Facts
from plasticnet.units import InputUnits, Trace, Width


def attach_counts(facts: Facts, trace: Trace) -> None:
    """Give each site the attributes that count its units.

    Args:
        facts: What the runs of the model have found.
        trace: The trace, whose sites are complete otherwise.
    """
    length = {(tensor, dim): len(labels) for tensor, dim, labels in facts.ledger.origins()}
    for u in trace.sites.values():
        if isinstance(u, InputUnits) or not facts.counted:
            continue
        slices = [facts.ledger.fresh(s.tensor, s.dim, length[s.tensor, s.dim])[s.index] for s in u.slices]
        labels = np.concatenate(slices, 1)
        for (module, attribute, place), counted in facts.counted.items():
            per_unit = np.isin(labels, counted).sum(1)
            if per_unit[0] and (per_unit == per_unit[0]).all():
                u.widths += (Width(module, attribute, int(per_unit[0]), place),)
