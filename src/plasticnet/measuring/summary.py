"""Lists what the sites and units of a network cost, in a table that is nested like its modules."""

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
    """What one site of a network has and costs: a part of `Summary`.

    Attributes:
        name: The name of the site.
        units: How many units the site has.
        open: How many of them are open.
        unit_parameters: How many parameters the network loses with one unit while all other units are present. For a
            site of blocks, which differ, this is the mean over its blocks.
        unit_macs: How many multiply-adds per sample it loses with one unit, in the same sense.
        consumers: The names of the modules that read the units, or of parameters that the model itself holds.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = pn.PlasticNet(model, (torch.randn(3, 4),))
        >>> site = net.summary().sites[0]
        >>> site.name, site.units, site.consumers
        ('0', 8, ('2',))
        >>> site.unit_parameters  # four weights and a bias in front of the unit, and two weights that read it
        7.0
    """

    name: str
    units: int
    open: int
    unit_parameters: float
    unit_macs: float
    consumers: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """What `PlasticNet.summary` returns: the size of a network, site by site and in total. It prints as a table.

    Attributes:
        sites: The sites, in the order of execution.
        parameters: How many parameters the model has.
        prunable_parameters: How many of them belong to units.
        macs: The multiply-adds of all units for one sample.
        open_parameters: How many parameters are left when closed units and closed single weights are left out.
        open_macs: The multiply-adds for one sample that are left then.
        k: How plastic the gates are.
        frozen: The name of everything that cannot be gated, with the reason.
        excluded: The names of the sites that were left alone because of ``exclude``.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = pn.PlasticNet(model, (torch.randn(3, 4),))
        >>> with torch.no_grad():
        ...     net.sites["0"].phi[:3] = -1.0  # closes three of the eight units
        >>> summary = net.summary()
        >>> summary.parameters, summary.open_parameters
        (58, 37)
        >>> print(summary.rows()[0])
        ('0', '5/8', '7', '6', '2')
    """

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
        """Return the summary as plain data, ready for JSON; an infinite k becomes the string "inf"."""
        data = asdict(Summary(**{**self.__dict__, "frozen": dict(self.frozen)}))
        return {**data, "k": "inf" if self.k == float("inf") else self.k}

    def rows(self) -> list[Row]:
        """Return the rows of the table, without its head.

        Sites are indented as the modules are nested, and equal siblings (layers.0, layers.1, ...) share their rows.

        Returns:
            Tuples of five cells: the site; its units (open/all where some are closed); the parameters and the
            multiply-adds of one unit; and the first few modules that read it. The names of the latter are relative to
            the module around the site.
        """
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
        """Return a line for each reason for which something is frozen, beginning with the names.

        Args:
            every: Whether a line has all names, and not just the first ones.
        """
        grouped: dict[str, list[str]] = {}
        for name, reason in self.frozen.items():
            grouped.setdefault(reason, []).append(name)
        return [f"{listed_names(names, len(names) if every else SHOWN)}: {reason}" for reason, names in grouped.items()]

    def prunable(self) -> str:
        """Return a line that says how many of the parameters belong to units."""
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
    """Summarise what the sites and units of a network cost, and what is frozen in it.

    On the meta device, where gates have no values, all units count as open.
    """
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
    """Return the names of the modules that read a site's units, or of parameters that the model itself holds."""
    return tuple(dict.fromkeys(c.module or c.tensor for c in site.units.consumers))
