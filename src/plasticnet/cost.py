"""What a network costs: units, parameters, multiply-adds, exactly or as an expectation over gates.

A tensor costs the product of its dimensions; the expected length of a dimension is a sum over the
sites that own parts of it, so everything follows from one number per site, the expected number of
open units. Gates are independent; where two dimensions share a site, the variance is added. All
tensors are computed at once: a step of training asks for this, and there may be hundreds of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.units import BlockUnits, InputUnits, Units

COSTS = ("units", "parameters", "macs")
SCALES = ("linear", "log")


def check_names(cost: str, scale: str) -> None:
    """Raise `PlasticError` unless these are a cost and a scale."""
    if cost not in COSTS or scale not in SCALES:
        raise PlasticError(f"cost={cost!r}, scale={scale!r}: choose from {', '.join(COSTS)} and {', '.join(SCALES)}")


class CostModel:
    """Expected cost of a network as a function of the gate probabilities of its sites."""

    def __init__(self, sites: Mapping[str, Units], model: nn.Module, uses: Mapping[str, float]) -> None:
        meta = next(model.parameters()).is_meta  # there is nothing to compute, but to count
        self._device = torch.device("cpu") if meta else next(model.parameters()).device
        self._sizes = [u.size for u in sites.values()]
        self._starts = dict(zip(sites, np.cumsum([0, *self._sizes]).tolist(), strict=False))
        self._one = sum(self._sizes)  # where the constant 1 stands behind the probabilities
        self._place = {name: i for i, name in enumerate(sites)}
        owners: dict[tuple[str, int], dict[str, int]] = {}
        for name, u in sites.items():
            for s in u.slices:
                owners.setdefault((s.tensor, s.dim), {})[name] = s.index.shape[1]
        blocks = [(n, u) for n, u in sites.items() if isinstance(u, BlockUnits)]
        lengths = _Lengths(self, sites)
        rank = max((p.dim() for p in model.parameters()), default=1)
        terms: dict[str, list[Any]] = {"dims": [], "block": [], "parameters": [], "macs": []}
        shared: list[tuple[int, int, float]] = []  # a term, a site that owns parts of two dimensions, their widths
        for tensor, p in model.named_parameters():
            block = next((self._starts[n] + i for n, u in blocks if (i := u.inside(tensor)) is not None), self._one)
            owned = [(d, owners[tensor, d]) for d in range(p.dim()) if (tensor, d) in owners]
            dims = [lengths.add(p.shape[d], widths) for d, widths in owned]
            fixed = prod(n for d, n in enumerate(p.shape) if (tensor, d) not in owners)
            if len(owned) == 2:
                for name in owned[0][1].keys() & owned[1][1].keys():
                    shared.append((len(terms["dims"]), self._place[name], owned[0][1][name] * owned[1][1][name]))
            terms["dims"].append(dims + [0] * (rank - len(dims)))
            terms["block"].append(block)
            terms["parameters"].append(float(fixed))
            terms["macs"].append(fixed * uses.get(tensor, 0.0))
        tensor = partial(torch.tensor, device=self._device)
        self._lengths = lengths
        self._site_of = tensor([i for i, n in enumerate(self._sizes) for _ in range(n)])
        used = [d for d in range(rank) if any(t[d] for t in terms["dims"])]
        self._dims = [tensor([t[d] for t in terms["dims"]]) for d in used]
        self._block = tensor(terms["block"]) if blocks else None
        self._factors = {c: tensor(terms[c], dtype=torch.float64) for c in ("parameters", "macs")}
        self._shared = tuple(tensor(list(column)) for column in zip(*shared, strict=True))
        lengths.freeze(self._device)
        self._full: dict[str, Tensor] = {}

    def full(self, cost: str) -> Tensor:
        """The cost of the network with all units, a scalar."""
        if cost not in self._full:
            self._full[cost] = self.expected(torch.ones(self._one, device=self._device), cost)
        return self._full[cost]

    def expected(self, pi: Tensor, cost: str) -> Tensor:
        """The expected cost, a scalar, for the gate probabilities of all sites in order, shape (units,)."""
        if cost == "units":
            return pi.sum()
        sums = pi.new_zeros(len(self._sizes)).index_add(0, self._site_of, pi)
        gates = torch.cat([pi, pi.new_ones(1)])
        lengths = self._lengths(sums, gates)
        product = torch.ones_like(self._factors[cost], dtype=pi.dtype)
        for dims in self._dims:
            product = product * lengths.index_select(0, dims)
        if self._shared:
            term, site, widths = self._shared
            variances = pi.new_zeros(len(self._sizes)).index_add(0, self._site_of, pi * (1 - pi))
            product = product.index_add(0, term, widths * variances.index_select(0, site))
        if self._block is not None:
            product = product * gates.index_select(0, self._block)
        return self._factors[cost].to(pi.dtype) @ product


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
