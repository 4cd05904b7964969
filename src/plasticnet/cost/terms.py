"""Holds the parts of a cost: where gates lie, the expected lengths of dimensions, and sums of products of lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from plasticnet.tools.precision import product
from plasticnet.units import BlockUnits, ExpertUnits, InputUnits, Units


class Places:
    """Where the gates of each site lie in the vector of all gates.

    Args:
        sites: The units of each site by name.
        device: Where tensors are made.

    Attributes:
        sizes: How many units each site has.
        starts: The index of the first gate of each site, by the name of the site.
        one: The index of the constant 1 at the end of the vector.
        number: The place of each site among the sites, by the name of the site.
        site_of: For every gate, the place of its site, shape (units,).
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
        """Return the index of the gate of the block that a tensor lies in, or None."""
        found = None
        for name, u in self.sites.items():
            if isinstance(u, BlockUnits) and (i := u.inside(tensor)) is not None:
                found = self.starts[name] + i
        return found

    def sparse_experts(self, tensor: str) -> str | None:
        """Return the name of the site of sparse experts in which a tensor lies, or None.

        The rows of their router are no part of the experts.
        """
        for name, u in self.sites.items():
            if isinstance(u, ExpertUnits) and u.sparse:
                held = name.rpartition(".")[0]
                if u.inside(tensor) is not None or (not u.listed and tensor.rpartition(".")[0] == held):
                    return name
        return None


# A dimension is given by its place among the lengths, and by the width of a unit of each site that owns parts of it.
Dim = tuple[int, Mapping[str, int]]


class Terms:
    """Sums of products of lengths, one sum for each cost.

    Every product has the gate of the block that it lies in as a further factor. Several costs may share the products
    and have coefficients of their own.

    Args:
        places: Where the gates lie.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self.dims: list[list[int]] = []
        self.block: list[int] = []
        # Each entry has a term, a site that owns parts of both its dimensions, and the product of the units' widths.
        self.shared: list[tuple[int, int, float]] = []
        self.factors: dict[str, list[float]] = {}

    def add(self, dims: Sequence[Dim], block: int | None, factors: Mapping[str, float]) -> None:
        """Add a product to the sums.

        Args:
            dims: The dimensions whose lengths are multiplied.
            block: The index of the gate of the block that the product lies in, or None.
            factors: The coefficient of the product for each cost.
        """
        if len(dims) == 2:
            (_, first), (_, second) = dims
            for name in first.keys() & second.keys():
                self.shared.append((len(self.dims), self.places.number[name], first[name] * second[name]))
        self.dims.append([place for place, _ in dims])
        self.block.append(self.places.one if block is None else block)
        for name, factor in factors.items():
            self.factors.setdefault(name, []).append(factor)

    def freeze(self, device: torch.device) -> None:
        """Make the tensors of the sums; this must be called when all products were added."""
        tensor = partial(torch.tensor, device=device)
        rank = max(map(len, self.dims), default=0)
        self._dims = [tensor([dims[d] if d < len(dims) else 0 for dims in self.dims]) for d in range(rank)]
        self._block = tensor(self.block) if any(b != self.places.one for b in self.block) else None
        self._shared = tuple(tensor(list(column)) for column in zip(*self.shared, strict=True))
        self._factors = {name: tensor(values, dtype=torch.float64) for name, values in self.factors.items()}

    def total(self, cost: str, pi: Tensor, lengths: Tensor, gates: Tensor) -> Tensor:
        """Return the expectation of the sum for one cost, a scalar.

        Args:
            cost: The name of the cost.
            pi: The probabilities of the gates, shape (units,).
            lengths: The expected lengths of all dimensions, shape (dimensions,).
            gates: The probabilities with a constant 1 at the end, shape (units + 1,).
        """
        factors = self._factors[cost].to(pi.dtype)
        each = torch.ones_like(factors)
        for dims in self._dims:
            each = each * lengths.index_select(0, dims)
        if self._shared:
            term, site, widths = self._shared
            variances = pi.new_zeros(len(self.places.sizes)).index_add(0, self.places.site_of, pi * (1 - pi))
            each = each.index_add(0, term, widths * variances.index_select(0, site))
        if self._block is not None:
            each = each * gates.index_select(0, self._block)
        return product(factors, each)


class Lengths:
    """The expected lengths of dimensions. The first of them is always 1.

    Args:
        places: Where the gates lie.
    """

    def __init__(self, places: Places) -> None:
        self.places, self.sites = places, places.sites
        self.fixed = [1.0]
        # Each entry has a dimension, the place of a site that owns parts of it, and the width of a unit.
        self.owned: list[tuple[int, int, int]] = []
        # Each entry has a dimension, the gates of its features, and the gates of their producers, as indices.
        self.features: list[tuple[int, Tensor, Tensor]] = []

    def add(self, length: int, widths: Mapping[str, int]) -> int:
        """Add a dimension.

        Args:
            length: How long it is now.
            widths: For each site that owns parts of it, the width of a unit, by the name of the site.

        Returns:
            The place of the dimension among the lengths.
        """
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
        """Return the indices of the gates of an input site's features, and of the gates of their producers."""
        start = self.places.starts[u.name]
        producer = np.full(u.full, self.places.one)
        for name, other in self.sites.items():
            for s in other.slices:
                if s.tensor == u.name:
                    producer[s.index] = self.places.starts[name] + np.arange(other.size)[:, None]
        return torch.arange(start, start + u.size), torch.from_numpy(producer[u.features])

    def freeze(self, device: torch.device) -> None:
        """Make the tensors of the lengths; this must be called when all dimensions were added."""
        self._fixed = torch.tensor(self.fixed, dtype=torch.float64, device=device)
        weights = np.zeros((len(self.fixed), len(self.places.sizes)))
        for dim, site, width in self.owned:
            weights[dim, site] += width
        self._weights = torch.tensor(weights, device=device)
        self._features = [(torch.tensor([d], device=device), f.to(device), p.to(device)) for d, f, p in self.features]

    def __call__(self, sums: Tensor, gates: Tensor) -> Tensor:
        """Return the expected lengths of all dimensions, shape (dimensions,).

        A feature of an input site counts if both its own gate and that of its producer are open.

        Args:
            sums: The expected number of open units of each site, shape (sites,).
            gates: The probabilities with a constant 1 at the end, shape (units + 1,).
        """
        lengths = self._fixed.to(sums.dtype) + product(self._weights.to(sums.dtype), sums)
        for dim, features, producers in self._features:
            open_both = gates.index_select(0, features) * gates.index_select(0, producers)
            lengths = lengths.index_add(0, dim, open_both.sum().reshape(1))
        return lengths
