"""What a network's sites and units cost, as a table nested like its modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plasticnet.gates import Site
from plasticnet.units import BlockUnits

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet

Row = tuple[str, str, str, str, str]
_SHOWN = 3  # names of one kind: of what reads a site, or is frozen for one reason


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
        root = _Node()
        for site in self.sites:
            node = root
            for part in site.name.split("."):
                node = node.children.setdefault(part, _Node())
            units = f"{site.units:,}" if site.open == site.units else f"{site.open:,}/{site.units:,}"
            readers = _listed([_relative(c, site.name) for c in site.consumers], _SHOWN)
            node.cells = (units, f"{site.unit_parameters:,.0f}", f"{site.unit_macs:,.0f}", readers)
        return list(_walk(root, 0))

    def reasons(self, every: bool = False) -> list[str]:
        """One line for each reason for which something is frozen, with the first names or with every one."""
        grouped: dict[str, list[str]] = {}
        for name, reason in self.frozen.items():
            grouped.setdefault(reason, []).append(name)
        return [f"{_listed(names, len(names) if every else _SHOWN)}: {reason}" for reason, names in grouped.items()]

    def prunable(self) -> str:
        """A line on how many of the parameters belong to units."""
        share = self.prunable_parameters / max(self.parameters, 1)
        return f"{self.prunable_parameters:,} of {self.parameters:,} parameters belong to units ({share:.1%})"

    def __str__(self) -> str:
        rows = [("site", "units", "parameters/unit", "MACs/unit", "read by"), *self.rows()]
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
        lines.append(
            f"parameters {self.open_parameters:,} of {self.parameters:,}, "
            f"MACs {self.open_macs:,} of {self.macs:,}, k = {self.k:g}"
        )
        lines.append(self.prunable())
        lines += [f"frozen   {line}" for line in self.reasons()]
        lines += [f"excluded {name}" for name in self.excluded]
        return "\n".join(lines)


@dataclass
class _Node:
    """A module in the table: what lies in it, and its cells if it is a site. Equal where both are."""

    children: dict[str, _Node] = field(default_factory=dict)
    cells: tuple[str, str, str, str] | None = None


def _walk(node: _Node, depth: int) -> Iterator[Row]:
    for name, child in _folded(node.children):
        while child.cells is None and len(below := _folded(child.children)) == 1:
            name, child = f"{name}.{below[0][0]}", below[0][1]
        units, parameters, macs, readers = child.cells or ("", "", "", "")
        yield ("  " * depth + name, units, parameters, macs, readers)
        yield from _walk(child, depth + 1)


def _folded(children: Mapping[str, _Node]) -> list[tuple[str, _Node]]:
    """The children, with numbered ones that are equal as one: ``[0-11]``, ``layer[1-3]``."""
    groups: list[tuple[str, list[str], _Node]] = []  # a stem, the numbers behind it, what they have in common
    for name, child in children.items():
        stem = name.rstrip("0123456789")
        twins = next((numbers for s, numbers, first in groups if s == stem != name and first == child), [])
        if not twins:
            groups.append((stem, twins, child))
        twins.append(name[len(stem) :])
    return [(stem + (n[0] if len(n) == 1 else f"[{_ranges([int(i) for i in n])}]"), child) for stem, n, child in groups]


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3,5``"""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][-1] + 1:
            spans[-1][1:] = [n]
        else:
            spans.append([n])
    return ",".join("-".join(map(str, span)) for span in spans)


def _relative(name: str, site: str) -> str:
    """A module's name without the modules that a site lies in too."""
    parts, around = name.split("."), site.split(".")[:-1]
    while len(parts) > 1 and around and parts[0] == around[0]:
        parts, around = parts[1:], around[1:]
    return ".".join(parts)


def _listed(names: Sequence[str], shown: int) -> str:
    if len(names) <= shown:
        return ", ".join(names)
    return f"{', '.join(names[:shown])} and {len(names) - shown:,} more"


def summarise(net: PlasticNet) -> Summary:
    """See `Summary`."""
    sites, cost, k = net._sites(), net._cost, net.k
    full = {s.name: torch.ones(len(s), dtype=torch.float64) for s in sites}
    opened = {s.name: full[s.name] if s.phi.is_meta else (s.mean_gate(k) > 0).double().cpu() for s in sites}

    nothing = torch.zeros(0, dtype=torch.float64)
    masks = [nothing if w.phi.is_meta else w.open.flatten().double().cpu() for w in net._weights()]

    def total(pi: Mapping[str, Tensor], kind: str, weights: Sequence[Tensor] = ()) -> float:
        return float(cost.expected(torch.cat([nothing, *pi.values(), *weights]).to(cost.device), kind))

    present = {kind: total(full, kind) for kind in ("parameters", "macs")}
    rows = []
    for s in sites:
        fewer, units = _without(full, s)
        saved = {kind: (all_units - total(fewer, kind)) / units for kind, all_units in present.items()}
        readers = tuple(dict.fromkeys(c.module or c.tensor for c in s.units.consumers))
        rows.append(
            SiteSummary(s.name, len(s), int((opened[s.name] > 0).sum()), saved["parameters"], saved["macs"], readers)
        )
    none = {name: torch.zeros_like(ones) for name, ones in full.items()}
    return Summary(
        tuple(rows),
        sum(p.numel() for p in net.model.parameters()),
        round(present["parameters"] - total(none, "parameters")),
        round(present["macs"]),
        round(total(opened, "parameters", masks)),
        round(total(opened, "macs", masks)),
        k,
        dict(net.frozen),
        tuple(net.excluded),
    )


def _without(full: Mapping[str, Tensor], site: Site) -> tuple[dict[str, Tensor], int]:
    """The gates with one unit of a site closed, and that number; with all if they are blocks, which differ."""
    fewer = full[site.name].clone()
    units = len(site) if isinstance(site.units, BlockUnits) else 1
    fewer[:units] = 0.0
    return {**full, site.name: fewer}, units
