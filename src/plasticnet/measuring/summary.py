"""What a network's sites and units cost, as a table nested like its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import Site
from plasticnet.measuring.tree import SHOWN, Node, Row, listed_names, relative_name, walk_rows
from plasticnet.tools.table import format_table


@dataclass(frozen=True)
class SiteSummary:
    """One site: units present and open, and what one of its units (of blocks: one on average) costs while
    all are present."""

    name: str
    units: int
    open: int
    unit_parameters: float
    unit_macs: float
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """A network: its sites, its parameters and multiply-adds per sample (all, and of the open units),
    how many of the parameters belong to units, and what is frozen, with the reason."""

    sites: tuple[SiteSummary, ...]
    parameters: int
    prunable_parameters: int
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

    def rows(self) -> list[Row]:
        """The table: site, units (open/present where some are closed), parameters and multiply-adds of
        one unit, and who reads it (the first few), relative to the modules that both lie in. Sites are
        indented as the modules are nested; equal siblings (layers.0, layers.1, ...) share their rows."""
        root = Node()
        for site in self.sites:
            node = root
            for part in site.name.split("."):
                node = node.children.setdefault(part, Node())
            units = f"{site.units:,}" if site.open == site.units else f"{site.open:,}/{site.units:,}"
            readers = listed_names([relative_name(c, site.name) for c in site.consumers], SHOWN)
            node.cells = (units, f"{site.unit_parameters:,.0f}", f"{site.unit_macs:,.0f}", readers)
        return list(walk_rows(root, 0))

    def reasons(self, every: bool = False) -> list[str]:
        """One line for each reason for which something is frozen, with the first names or with every one."""
        grouped: dict[str, list[str]] = {}
        for name, reason in self.frozen.items():
            grouped.setdefault(reason, []).append(name)
        return [f"{listed_names(names, len(names) if every else SHOWN)}: {reason}" for reason, names in grouped.items()]

    def prunable(self) -> str:
        """A line on how many of the parameters belong to units."""
        share = self.prunable_parameters / max(self.parameters, 1)
        return f"{self.prunable_parameters:,} of {self.parameters:,} parameters belong to units ({share:.1%})"

    def __str__(self) -> str:
        lines = format_table([("site", "units", "parameters/unit", "MACs/unit", "read by"), *self.rows()])
        lines.append(
            f"parameters {self.open_parameters:,} of {self.parameters:,}, "
            f"MACs {self.open_macs:,} of {self.macs:,}, k = {self.k:g}"
        )
        lines.append(self.prunable())
        lines += [f"frozen   {line}" for line in self.reasons()]
        lines += [f"excluded {name}" for name in self.excluded]
        return "\n".join(lines)


def summarise(net: GatedModel) -> Summary:
    """What the sites and units of a network cost, and what of it is frozen."""
    sites, cost, k = net.sites, net.cost, net.k
    ones = {name: torch.ones(len(s), dtype=torch.float64) for name, s in sites.items()}
    opened = {n: ones[n] if s.phi.is_meta else (s.mean_gate(k) > 0).double().cpu() for n, s in sites.items()}
    nothing = torch.zeros(0, dtype=torch.float64)
    masks = [nothing if w.phi.is_meta else w.open.flatten().double().cpu() for w in net.weights.values()]

    def total(pi: Mapping[str, Tensor], kind: str, weights: Sequence[Tensor] = ()) -> float:
        return float(cost.expected(torch.cat([nothing, *pi.values(), *weights]).to(cost.device), kind))

    units = zip(sites.items(), cost.unit_costs("parameters"), cost.unit_costs("macs"), strict=True)
    rows = [
        SiteSummary(name, len(s), int((opened[name] > 0).sum()), parameters, macs, _readers(s))
        for (name, s), parameters, macs in units
    ]
    none = {name: torch.zeros_like(full) for name, full in ones.items()}
    return Summary(
        tuple(rows),
        sum(p.numel() for p in net.model.parameters()),
        round(total(ones, "parameters") - total(none, "parameters")),
        round(total(ones, "macs")),
        round(total(opened, "parameters", masks)),
        round(total(opened, "macs", masks)),
        k,
        dict(net.frozen),
        tuple(net.excluded),
    )


def _readers(site: Site) -> tuple[str, ...]:
    return tuple(dict.fromkeys(c.module or c.tensor for c in site.units.consumers))
