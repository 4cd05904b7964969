"""A table of a network's sites and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.cost import CostModel
from plasticnet.gates import Site


@dataclass(frozen=True)
class SiteSummary:
    """One site: units present and open, and what one of its units costs while all are present."""

    name: str
    units: int
    open: int
    unit_parameters: float
    unit_macs: float
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """A network: its sites, its parameters and multiply-adds per sample (all, and of the open units),
    and what is frozen, with the reason."""

    sites: tuple[SiteSummary, ...]
    parameters: int
    macs: int
    open_parameters: int
    open_macs: int
    k: float
    frozen: Mapping[str, str]
    excluded: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON (k as a string when it is infinite)."""
        data = asdict(Summary(**{**self.__dict__, "frozen": dict(self.frozen)}))
        return {**data, "k": "inf" if self.k == float("inf") else self.k}

    def __str__(self) -> str:
        rows = [("site", "open/units", "parameters/unit", "MACs/unit", "read by")]
        for s in self.sites:
            rows.append(
                (
                    s.name,
                    f"{s.open}/{s.units}",
                    f"{s.unit_parameters:,.0f}",
                    f"{s.unit_macs:,.0f}",
                    ", ".join(s.consumers),
                )
            )
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines.append(
            f"parameters {self.open_parameters:,} of {self.parameters:,}, "
            f"MACs {self.open_macs:,} of {self.macs:,}, k = {self.k:g}"
        )
        lines += [f"frozen   {name}: {reason}" for name, reason in self.frozen.items()]
        lines += [f"excluded {name}" for name in self.excluded]
        return "\n".join(lines)


def summarise(
    sites: Sequence[Site],
    cost: CostModel,
    k: float,
    model: nn.Module,
    frozen: Mapping[str, str],
    excluded: Sequence[str],
) -> Summary:
    """See `Summary`."""
    full = {s.name: torch.ones(len(s), dtype=torch.float64) for s in sites}
    opened = {s.name: full[s.name] if s.phi.is_meta else (s.mean_gate(k) > 0).double().cpu() for s in sites}

    def total(pi: Mapping[str, Tensor], kind: str) -> float:
        return float(cost.expected(pi, kind))

    rows = []
    for s in sites:
        saved = {kind: total(full, kind) - total(_without_one(full, s.name), kind) for kind in ("parameters", "macs")}
        readers = tuple(dict.fromkeys(c.module or c.tensor for c in s.units.consumers))
        rows.append(
            SiteSummary(s.name, len(s), int((opened[s.name] > 0).sum()), saved["parameters"], saved["macs"], readers)
        )
    return Summary(
        tuple(rows),
        sum(p.numel() for p in model.parameters()),
        round(total(full, "macs")),
        round(total(opened, "parameters")),
        round(total(opened, "macs")),
        k,
        dict(frozen),
        tuple(excluded),
    )


def _without_one(full: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    one_less = full[name].clone()
    one_less[0] = 0.0
    return {**full, name: one_less}
