"""What a network costs: units, parameters, multiply-adds, milliseconds; exactly or as an expectation over gates.

A tensor costs the product of its dimensions; the expected length of a dimension is a sum over the
sites that own parts of it, so everything follows from one number per site, the expected number of
open units. Gates are independent; where two dimensions share a site, the variance is added. A measured
latency is a sum of such products, too. All tensors are computed at once: a step of training asks for
this, and there may be hundreds of them. Of a weight whose entries have gates of their own each entry costs its
probability times those of its row's and its column's unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.units import BlockUnits, InputUnits, Units
from plasticnet.weights import entries

if TYPE_CHECKING:
    from plasticnet.latency import Latency

COSTS = ("units", "parameters", "macs", "latency")
SCALES = ("linear", "log")


def check_names(cost: str, scale: str) -> None:
    """Raise `PlasticError` unless these are a cost and a scale."""
    if cost not in COSTS or scale not in SCALES:
        raise PlasticError(f"cost={cost!r}, scale={scale!r}: choose from {', '.join(COSTS)} and {', '.join(SCALES)}")


class CostModel:
    """Expected cost of a network as a function of the gate probabilities of its sites."""

    def __init__(
        self,
        sites: Mapping[str, Units],
        model: nn.Module,
        uses: Mapping[str, float],
        latency: Latency | None = None,
        weights: Sequence[str] = (),
    ) -> None:
        """``weights`` are the names of those whose entries have gates."""
        meta = next(model.parameters()).is_meta  # there is nothing to compute, but to count
        self.device = torch.device("cpu") if meta else next(model.parameters()).device
        self._sizes = [u.size for u in sites.values()]
        self._starts = dict(zip(sites, np.cumsum([0, *self._sizes]).tolist(), strict=False))
        self._one = sum(self._sizes)  # where the constant 1 stands behind the probabilities
        self._place = {name: i for i, name in enumerate(sites)}
        owners: dict[tuple[str, int], dict[str, int]] = {}
        for name, u in sites.items():
            for s in u.slices:
                owners.setdefault((s.tensor, s.dim), {})[name] = s.index.shape[1]
        blocks = [(n, u) for n, u in sites.items() if isinstance(u, BlockUnits)]
        block_of = {
            t: self._starts[n] + i
            for t, _ in model.named_parameters()
            for n, u in blocks
            if (i := u.inside(t)) is not None
        }
        lengths = _Lengths(self, sites)
        tensors, timed, ungated = _Terms(self), _Terms(self), _Terms(self)
        place: dict[tuple[str, int], _Dim] = {}
        for tensor, p in model.named_parameters():
            owned = [d for d in range(p.dim()) if (tensor, d) in owners]
            for d in owned:
                place[tensor, d] = lengths.add(p.shape[d], owners[tensor, d]), owners[tensor, d]
            fixed = prod(n for d, n in enumerate(p.shape) if d not in owned)
            counts = {"parameters": float(fixed), "macs": fixed * uses.get(tensor, 0.0)}
            for terms in (tensors,) if tensor in weights else (tensors, ungated):
                terms.add([place[tensor, d] for d in owned], block_of.get(tensor), counts)
        for t in () if latency is None else latency.terms:
            timed.add([place[t.tensor, d] for d in t.dims], block_of.get(t.tensor), {"latency": t.rate})
        site_of = [i for i, n in enumerate(self._sizes) for _ in range(n)]
        self._site_of = torch.tensor(site_of, dtype=torch.int64, device=self.device)
        self._lengths = lengths
        self._terms = {"parameters": tensors, "macs": tensors, **({} if latency is None else {"latency": timed})}
        self._ungated = ungated
        self.entries = entries(sites, model, weights)
        self._entry_sizes = [e.shape.numel() for e in self.entries]
        self._entry_costs = {"parameters": [1.0] * len(weights), "macs": [uses.get(name, 0.0) for name in weights]}
        for part in (lengths, tensors, timed, *([ungated] if weights else [])):
            part.freeze(self.device)
        self._full: dict[str, Tensor] = {}
        self._strengths: tuple[Sequence[float], Tensor | None] = ([], None)

    def full(self, cost: str) -> Tensor:
        """The cost of the network with all units, a scalar."""
        if cost not in self._full:
            self._full[cost] = self.expected(torch.ones(self._one, device=self.device), cost)
        return self._full[cost]

    def expected(self, pi: Tensor, cost: str) -> Tensor:
        """The expected cost, a scalar, for the gate probabilities of all sites in order, shape (units,). Those of the
        gated weights may stand behind them, else all their entries are open; "units" and "latency" do not depend on
        them. Raises `PlasticError` for the latency where it has not been measured.
        """
        weights: Sequence[Tensor] = ()
        if len(pi) > self._one:
            pi, *weights = pi.split([self._one, *self._entry_sizes])
        if cost == "units":
            return pi.sum()
        if cost not in self._terms:
            raise PlasticError(
                'cost="latency" is not known yet: call net.measure_latency(example_inputs) first, on the device and '
                "with the batch that count"
            )
        sums = pi.new_zeros(len(self._sizes)).index_add(0, self._site_of, pi)
        gates = torch.cat([pi, pi.new_ones(1)])
        lengths = self._lengths(sums, gates)
        if not weights or cost not in self._entry_costs:
            total = self._terms[cost].total(cost, pi, lengths, gates)
            # A latency may be all constants: then its gradient is 0, not missing.
            return total if total.requires_grad or not pi.requires_grad else total + 0 * pi.sum()
        total = self._ungated.total(cost, pi, lengths, gates)
        for e, each, own in zip(self.entries, self._entry_costs[cost], weights, strict=True):
            total = total + each * e.expected(own, gates)
        return total

    def reached(self, z: Tensor) -> Tensor:
        """The entries of the gated weights whose units are open in z, a mask (units,): shape (weights,)."""
        z = torch.cat([z, z.new_ones(1)])
        return torch.cat([e.reached(z).expand(e.shape).flatten() for e in self.entries])

    def weighed(self, pi: Tensor, strengths: Sequence[float]) -> Tensor:
        """``pi``, shape (units,) and more, whose gradient is scaled by one number for each site; the values stay."""
        if self._strengths[0] != strengths:
            each = pi.new_tensor(strengths).index_select(0, self._site_of)
            self._strengths = strengths, None if all(s == 1 for s in strengths) else each
        each = self._strengths[1]
        if each is None:
            return pi
        each = each if len(each) == len(pi) else nn.functional.pad(each, (0, len(pi) - len(each)), value=1.0)
        return torch.lerp(pi.detach(), pi, each)


_Dim = tuple[int, Mapping[str, int]]  # its place among the lengths, and the width of a unit of each site


class _Terms:
    """Sums of products of lengths, each times the gate of the block it lies in. Several costs may share the
    products and have factors of their own."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.dims: list[list[int]] = []
        self.block: list[int] = []
        self.shared: list[tuple[int, int, float]] = []  # a term, a site that owns parts of two dims, their widths
        self.factors: dict[str, list[float]] = {}

    def add(self, dims: Sequence[_Dim], block: int | None, factors: Mapping[str, float]) -> None:
        """Another product, of these dimensions; ``factors`` are what it counts for each cost."""
        if len(dims) == 2:
            (_, first), (_, second) = dims
            for name in first.keys() & second.keys():
                self.shared.append((len(self.dims), self.cost._place[name], first[name] * second[name]))
        self.dims.append([place for place, _ in dims])
        self.block.append(self.cost._one if block is None else block)
        for name, factor in factors.items():
            self.factors.setdefault(name, []).append(factor)

    def freeze(self, device: torch.device) -> None:
        """To be called when all terms were added."""
        tensor = partial(torch.tensor, device=device)
        rank = max(map(len, self.dims), default=0)
        self._dims = [tensor([dims[d] if d < len(dims) else 0 for dims in self.dims]) for d in range(rank)]
        self._block = tensor(self.block) if any(b != self.cost._one for b in self.block) else None
        self._shared = tuple(tensor(list(column)) for column in zip(*self.shared, strict=True))
        self._factors = {name: tensor(values, dtype=torch.float64) for name, values in self.factors.items()}

    def total(self, cost: str, pi: Tensor, lengths: Tensor, gates: Tensor) -> Tensor:
        """The expectation of the sum, a scalar."""
        factors = self._factors[cost].to(pi.dtype)
        product = torch.ones_like(factors)
        for dims in self._dims:
            product = product * lengths.index_select(0, dims)
        if self._shared:
            term, site, widths = self._shared
            variances = pi.new_zeros(len(self.cost._sizes)).index_add(0, self.cost._site_of, pi * (1 - pi))
            product = product.index_add(0, term, widths * variances.index_select(0, site))
        if self._block is not None:
            product = product * gates.index_select(0, self._block)
        return factors @ product


class _Lengths:
    """The expected lengths of dimensions; the first one is constantly 1."""

    def __init__(self, cost: CostModel, sites: Mapping[str, Units]) -> None:
        self.cost, self.sites = cost, sites
        self.fixed = [1.0]
        self.owned: list[tuple[int, int, int]] = []  # dimension, site, width
        self.features: list[tuple[int, Tensor, Tensor]] = []  # dimension, gates of its features, of their producers

    def add(self, length: int, widths: Mapping[str, int]) -> int:
        """Another dimension: how long it is now, and the width of a unit of each site that owns parts of it."""
        self.fixed.append(float(length - sum(w * self.sites[n].size for n, w in widths.items())))
        here = len(self.fixed) - 1
        u = next((u for n in widths if isinstance(u := self.sites[n], InputUnits)), None)
        if u is None:
            self.owned += [(here, self.cost._place[n], w) for n, w in widths.items()]
        else:
            self.fixed[here] = 0.0
            self.features.append((here, *self._gates_of(u)))
        return here

    def _gates_of(self, u: InputUnits) -> tuple[Tensor, Tensor]:
        start = self.cost._starts[u.name]
        producer = np.full(u.full, self.cost._one)
        for name, other in self.sites.items():
            for s in other.slices:
                if s.tensor == u.name:
                    producer[s.index] = self.cost._starts[name] + np.arange(other.size)[:, None]
        return torch.arange(start, start + u.size), torch.from_numpy(producer[u.features])

    def freeze(self, device: torch.device) -> None:
        """To be called when all dimensions were added."""
        self._fixed = torch.tensor(self.fixed, dtype=torch.float64, device=device)
        weights = np.zeros((len(self.fixed), len(self.cost._sizes)))
        for dim, site, width in self.owned:
            weights[dim, site] += width
        self._weights = torch.tensor(weights, device=device)
        self._features = [(torch.tensor([d], device=device), f.to(device), p.to(device)) for d, f, p in self.features]

    def __call__(self, sums: Tensor, gates: Tensor) -> Tensor:
        """From the expected number of open units of each site, and the gates of all: shape (dimensions,). Of a
        layer with an input site, the features whose producer is open too are counted."""
        lengths = self._fixed.to(sums.dtype) + self._weights.to(sums.dtype) @ sums
        for dim, features, producers in self._features:
            open_both = gates.index_select(0, features) * gates.index_select(0, producers)
            lengths = lengths.index_add(0, dim, open_both.sum().reshape(1))
        return lengths
