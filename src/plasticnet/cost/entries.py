"""Relates the entries of a weight, where they have gates of their own, to the units that they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plasticnet.tools.precision import product
from plasticnet.tools.shapes import along
from plasticnet.units import BlockUnits, InputUnits, Units, gate_offsets, gate_positions


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of one gated weight, and where the gates of their units lie.

    Attributes:
        name: The name of the parameter.
        shape: Its shape.
        gates: For each dimension along which units lie, the index of the gate of every position's unit in the vector of
            all gates. Where a position has no unit, this is the index of the constant 1 at the end. A second tensor has
            the index of the gate of every position's feature, where the dimension has an input site.
        diagonal: The rows and the columns of those entries of a matrix whose row and column belong to the same unit.
            None where there are none.
        block: The index of the gate of the block that the weight lies in, or None.
    """

    name: str
    shape: torch.Size
    gates: Mapping[int, list[Tensor]]
    diagonal: tuple[Tensor, Tensor] | None
    block: int | None

    def lengthwise(self, dim: int, z: Tensor) -> Tensor:
        """Return what the gates of units multiply each position of a dimension by, shape (positions,).

        Args:
            dim: A dimension along which units lie.
            z: The gates of all units, shape (units + 1,), with a constant 1 at the end.
        """
        first, *more = (z.index_select(0, index) for index in self.gates[dim])
        return first * more[0] if more else first

    def expected(self, pi: Tensor, z: Tensor) -> Tensor:
        """Return how many entries are expected to be open, a scalar.

        Args:
            pi: The probabilities of the entries, shape (entries,).
            z: The probabilities of all units, shape (units + 1,), with a constant 1 at the end.
        """
        other = [d for d in range(len(self.shape)) if d not in self.gates]
        left = pi.view(self.shape).sum(other) if other else pi.view(self.shape)
        total = left
        for dim in sorted(self.gates, reverse=True):
            total = product(total, self.lengthwise(dim, z))
        if self.diagonal is not None:  # a gate times itself is that gate, so its expectation is pi and not pi squared
            one = z.index_select(0, self.gates[min(self.gates)][0].index_select(0, self.diagonal[0]))
            total = total + (left[self.diagonal] * one * (1 - one)).sum()
        return total if self.block is None else total * z[self.block]

    def reached(self, z: Tensor, but: int | None = None) -> Tensor:
        """Return which entries belong to open units, a boolean mask that broadcasts to the shape of the weight.

        Args:
            z: Which units are open, a boolean tensor of shape (units + 1,) with True at the end.
            but: A dimension whose units are not asked, or None.
        """
        mask = torch.ones([1] * len(self.shape), dtype=torch.bool, device=z.device)
        for dim in self.gates:
            if dim != but:
                mask = mask & along(self.lengthwise(dim, z), dim, len(self.shape))
        return mask if self.block is None else mask & z[self.block]


def entries(sites: Mapping[str, Units], model: nn.Module, names: Iterable[str]) -> list[Entries]:
    """Return the `Entries` of gated weights.

    Args:
        sites: The units of each site by name.
        model: The model.
        names: The names of the parameters whose entries have gates.
    """
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
    """Return whether units lie along this dimension of a tensor."""
    return any((s.tensor, s.dim) == (tensor, dim) for s in u.slices)


def _diagonal(gates: Mapping[int, list[Tensor]], one: int) -> tuple[Tensor, Tensor] | None:
    """Return the rows and columns of the entries whose row and column belong to the same unit, or None."""
    plain = [index[0] for _, index in sorted(gates.items()) if len(index) == 1]
    if len(plain) < 2 or len(gates) != 2:
        return None
    rows, columns = ((plain[0][:, None] == plain[1]) & (plain[0][:, None] != one)).nonzero(as_tuple=True)
    return (rows, columns) if len(rows) else None
