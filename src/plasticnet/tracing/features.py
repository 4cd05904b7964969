"""Lets the numbers of channels in timm's ``feature_info`` follow the units that they count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from plasticnet.tools.feature_info import ATTRIBUTE
from plasticnet.tracing.facts import Facts
from plasticnet.units import Trace, Width


def attach_features(facts: Facts, trace: Trace) -> None:
    """Give each site the numbers that count its units.

    Args:
        facts: What the runs of the model have found.
        trace: The trace, whose sites are complete otherwise.
    """
    length = {(tensor, dim): len(labels) for tensor, dim, labels in facts.ledger.origins()}
    for name, u in trace.sites.items():
        slices = [facts.ledger.fresh(s.tensor, s.dim, length[s.tensor, s.dim])[s.index] for s in u.slices]
        if not slices:
            continue
        labels = np.concatenate(slices, 1)
        found: list[Width] = []
        for (module, place), counted in facts.features.items():
            per_unit = np.isin(labels, counted).sum(1)
            if per_unit[0] and (per_unit == per_unit[0]).all():
                found.append(Width(module, ATTRIBUTE, int(per_unit[0]), place))
        trace.sites[name] = replace(u, widths=(*u.widths, *found))
