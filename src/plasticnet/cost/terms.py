"""The parts of a cost: where gates lie, the expected lengths of dimensions, and sums of products of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from plasticnet.units import BlockUnits, InputUnits, Units


class Places:
    """Where the gates of each site lie in the vector of all.

    Attributes: ``sites``, the units by name; ``sizes``, how many units each has; ``starts``, where its gates begin;
    ``one``, where the constant 1 stands after the gates of all; ``number``, the place of a site among the sites;
    ``site_of``, for every gate the number of its site.
    """

    def __init__(self, sites: Mapping[str, Units], device: torch.device) -> None:
        self.sites = sites
        self.sizes = [u.size for u in sites.values()]
        self.starts: dict[str, int] = dict(zip(sites, np.cumsum([0, *self.sizes]).tolist(), strict=False))
        self.one = sum(self.sizes)
        self.number = {name: i for i, name in enumerate(sites)}
        site_of = [i for i, n in enumerate(self.sizes) for _ in range(n)]
        self.site_of = torch.tensor(site_of, dtype=torch.int64, device=device)

    def block_of(self, tensor: str) -> int | None:
        """The gate of the block that a tensor lies in, or None."""
        found = None
        for name, u in self.sites.items():
            if isinstance(u, BlockUnits) and (i := u.inside(tensor)) is not None:
                found = self.starts[name] + i
        return found


Dim = tuple[int, Mapping[str, int]]  # its place among the lengths, and the width of a unit of each site


class Terms:
    """Sums of products of lengths, each times the gate of the block it lies in. Several costs may share the
    products and have factors of their own."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.dims: list[list[int]] = []
        self.block: list[int] = []
        self.shared: list[tuple[int, int, float]] = []  # a term, a site that owns parts of two dims, their widths
        self.factors: dict[str, list[float]] = {}

    def add(self, dims: Sequence[Dim], block: int | None, factors: Mapping[str, float]) -> None:
        """Another product, of these dimensions; ``factors`` are what it counts for each cost."""
        if len(dims) == 2:
            (_, first), (_, second) = dims
            for name in first.keys() & second.keys():
                self.shared.append((len(self.dims), self.places.number[name], first[name] * second[name]))
        self.dims.append([place for place, _ in dims])
        self.block.append(self.places.one if block is None else block)
        for name, factor in factors.items():
            self.factors.setdefault(name, []).append(factor)

    def freeze(self, device: torch.device) -> None:
        """To be called when all terms were added."""
        tensor = partial(torch.tensor, device=device)
        rank = max(map(len, self.dims), default=0)
        self._dims = [tensor([dims[d] if d < len(dims) else 0 for dims in self.dims]) for d in range(rank)]
        self._block = tensor(self.block) if any(b != self.places.one for b in self.block) else None
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
            variances = pi.new_zeros(len(self.places.sizes)).index_add(0, self.places.site_of, pi * (1 - pi))
            product = product.index_add(0, term, widths * variances.index_select(0, site))
        if self._block is not None:
            product = product * gates.index_select(0, self._block)
        return factors @ product


class Lengths:
    """The expected lengths of dimensions; the first one is constantly 1."""

    def __init__(self, places: Places) -> None:
        self.places, self.sites = places, places.sites
        self.fixed = [1.0]
        self.owned: list[tuple[int, int, int]] = []  # dimension, site, width
        self.features: list[tuple[int, Tensor, Tensor]] = []  # dimension, gates of its features, of their producers

    def add(self, length: int, widths: Mapping[str, int]) -> int:
        """Another dimension: how long it is now, and the width of a unit of each site that owns parts of it."""
        self.fixed.append(float(length - sum(w * self.sites[n].size for n, w in widths.items())))
        here = len(self.fixed) - 1
        u = next((u for n in widths if isinstance(u := self.sites[n], InputUnits)), None)
        if u is None:
            self.owned += [(here, self.places.number[n], w) for n, w in widths.items()]
        else:
            self.fixed[here] = 0.0
            self.features.append((here, *self._gates_of(u)))
        return here

    def _gates_of(self, u: InputUnits) -> tuple[Tensor, Tensor]:
        start = self.places.starts[u.name]
        producer = np.full(u.full, self.places.one)
        for name, other in self.sites.items():
            for s in other.slices:
                if s.tensor == u.name:
                    producer[s.index] = self.places.starts[name] + np.arange(other.size)[:, None]
        return torch.arange(start, start + u.size), torch.from_numpy(producer[u.features])

    def freeze(self, device: torch.device) -> None:
        """To be called when all dimensions were added."""
        self._fixed = torch.tensor(self.fixed, dtype=torch.float64, device=device)
        weights = np.zeros((len(self.fixed), len(self.places.sizes)))
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
