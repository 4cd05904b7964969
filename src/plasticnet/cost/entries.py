"""Relates the entries of a weight with gates of its own to the units that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plasticnet.tools.shapes import along
from plasticnet.units import BlockUnits, InputUnits, Units, gate_offsets, gate_positions


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of one gated weight. ``gates`` has, for each dimension along which units lie, for every position the
    index of its unit's gate in those of all sites (the last one, which is always 1, where there is none), and of
    the gate of its feature. ``diagonal`` are the places of a matrix whose row and column are of the same unit."""

    name: str
    shape: torch.Size
    gates: Mapping[int, list[Tensor]]
    diagonal: tuple[Tensor, Tensor] | None
    block: int | None

    def lengthwise(self, dim: int, z: Tensor) -> Tensor:
        """What the units do to each position of a dimension; z has shape (units + 1,)."""
        first, *more = (z.index_select(0, index) for index in self.gates[dim])
        return first * more[0] if more else first

    def expected(self, pi: Tensor, z: Tensor) -> Tensor:
        """How many entries are expected to be open, a scalar, for their probabilities, shape (entries,), and those of
        all units and a 1 behind them."""
        other = [d for d in range(len(self.shape)) if d not in self.gates]
        left = pi.view(self.shape).sum(other) if other else pi.view(self.shape)
        total = left
        for dim in sorted(self.gates, reverse=True):
            total = total @ self.lengthwise(dim, z)
        if self.diagonal is not None:  # a gate times itself is that gate
            one = z.index_select(0, self.gates[min(self.gates)][0].index_select(0, self.diagonal[0]))
            total = total + (left[self.diagonal] * one * (1 - one)).sum()
        return total if self.block is None else total * z[self.block]

    def reached(self, z: Tensor, but: int | None = None) -> Tensor:
        """The entries whose units are open in z, boolean, (units + 1,): a mask of the weight's shape, or one that
        broadcasts to it; whatever the dimension ``but`` says."""
        mask = torch.ones([1] * len(self.shape), dtype=torch.bool, device=z.device)
        for dim in self.gates:
            if dim != but:
                mask = mask & along(self.lengthwise(dim, z), dim, len(self.shape))
        return mask if self.block is None else mask & z[self.block]


def entries(sites: Mapping[str, Units], model: nn.Module, names: Iterable[str]) -> list[Entries]:
    """What `Entries` says, for the weights of these names."""
    parameters = dict(model.named_parameters())
    starts, one = gate_offsets(sites)
    found: list[Entries] = []
    for name in names:
        weight = parameters[name]
        device = torch.device("cpu") if weight.is_meta else weight.device
        gates: dict[int, list[Tensor]] = {}
        for dim, length in enumerate(weight.shape):
            features = next((u for u in sites.values() if isinstance(u, InputUnits) and _lies(u, name, dim)), None)
            if features is not None:
                own = starts[features.name] + torch.arange(features.size)
                producers = gate_positions(sites, (features.name, 0), features.full)[features.features]
                gates[dim] = [torch.from_numpy(producers).to(device), own.to(device)]
            elif any(_lies(u, name, dim) for u in sites.values()):
                gates[dim] = [torch.from_numpy(gate_positions(sites, (name, dim), length)).to(device)]
        block = None
        for site, u in sites.items():
            if isinstance(u, BlockUnits) and (i := u.inside(name)) is not None:
                block = starts[site] + i
        found.append(Entries(name, weight.shape, gates, _diagonal(gates, one), block))
    return found


def _lies(u: Units, tensor: str, dim: int) -> bool:
    return any((s.tensor, s.dim) == (tensor, dim) for s in u.slices)


def _diagonal(gates: Mapping[int, list[Tensor]], one: int) -> tuple[Tensor, Tensor] | None:
    plain = [index[0] for _, index in sorted(gates.items()) if len(index) == 1]
    if len(plain) < 2 or len(gates) != 2:
        return None
    rows, columns = ((plain[0][:, None] == plain[1]) & (plain[0][:, None] != one)).nonzero(as_tuple=True)
    return (rows, columns) if len(rows) else None
