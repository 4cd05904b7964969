"""What a network costs: units, parameters, multiply-adds, exactly or as an expectation over gates.

A tensor costs the product of its dimensions; the expected length of a dimension is a sum over the
sites that own parts of it, so everything follows from one number per site, the expected number of
open units. Gates are independent; where two dimensions share a site, the variance is added.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.units import BlockUnits, InputUnits, Units

_Block = tuple[str, int] | None  # a site of blocks, and which of them
COSTS = ("units", "parameters", "macs")
SCALES = ("linear", "log")


def check_names(cost: str, scale: str) -> None:
    """Raise `PlasticError` unless these are a cost and a scale."""
    if cost not in COSTS or scale not in SCALES:
        raise PlasticError(f"cost={cost!r}, scale={scale!r}: choose from {', '.join(COSTS)} and {', '.join(SCALES)}")


class CostModel:
    """Expected cost of a network as a function of the gate probabilities of its sites."""

    def __init__(self, sites: Mapping[str, Units], model: nn.Module, uses: Mapping[str, float]) -> None:
        self.sites = sites
        self.inputs = {u.consumers[0].tensor: n for n, u in sites.items() if isinstance(u, InputUnits)}
        owners: dict[tuple[str, int], dict[str, int]] = {}
        for name, u in sites.items():
            for s in u.slices:
                owners.setdefault((s.tensor, s.dim), {})[name] = s.index.shape[1]
        blocks = [(n, u) for n, u in sites.items() if isinstance(u, BlockUnits)]
        # What does not shrink, by the gate of its block (None outside of blocks): parameters, MACs.
        self.constant: dict[_Block, dict[str, float]] = {}
        # One entry per tensor that shrinks: fixed factor, how often it is used, its gated dimensions, its block.
        self.terms: list[tuple[float, float, list[tuple[float, dict[str, int], str | None]], _Block]] = []
        for tensor, p in model.named_parameters():
            use = uses.get(tensor, 0.0)
            dims = []
            for dim, length in enumerate(p.shape):
                widths = owners.get((tensor, dim), {})
                site = next((n for n in widths if isinstance(sites[n], InputUnits)), None)
                if widths:
                    dims.append((float(length - sum(w * sites[n].size for n, w in widths.items())), widths, site))
            fixed = prod(n for d, n in enumerate(p.shape) if (tensor, d) not in owners)
            block = next(((n, i) for n, u in blocks if (i := u.inside(tensor)) is not None), None)
            if dims:
                self.terms.append((float(fixed), use, dims, block))
            else:
                constant = self.constant.setdefault(block, {"parameters": 0.0, "macs": 0.0})
                constant["parameters"] += p.numel()
                constant["macs"] += p.numel() * use

    def expected(self, pi: Mapping[str, Tensor], cost: str) -> Tensor:
        """The expected cost, a scalar, for gate probabilities of shape (units,) per site."""
        sums = {name: p.sum() for name, p in pi.items()}
        if cost == "units":
            return torch.stack(list(sums.values())).sum()
        total = torch.zeros_like(next(iter(sums.values())))
        for block, constant in self.constant.items():
            total = total + constant[cost] * (1.0 if block is None else pi[block[0]][block[1]])
        for fixed, use, dims, block in self.terms:
            factor = fixed * (use if cost == "macs" else 1.0)
            if factor:
                product = self._product(dims, pi, sums)
                total = total + factor * (product if block is None else product * pi[block[0]][block[1]])
        return total

    def _product(
        self, dims: list[tuple[float, dict[str, int], str | None]], pi: Mapping[str, Tensor], sums: Mapping[str, Tensor]
    ) -> Tensor:
        lengths = [self._length(*d, pi, sums) for d in dims]
        product = lengths[0]
        for length in lengths[1:]:
            product = product * length
        if len(dims) == 2:
            for name in dims[0][1].keys() & dims[1][1].keys():
                p = pi[name]
                product = product + dims[0][1][name] * dims[1][1][name] * (p * (1 - p)).sum()
        return product

    def _length(
        self,
        fixed: float,
        widths: Mapping[str, int],
        site: str | None,
        pi: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
    ) -> Tensor:
        """The expected length of one dimension; for an input site, of the features whose producer
        is open too."""
        if site is None:
            return fixed + torch.stack([w * sums[n] for n, w in widths.items()]).sum()
        u = self.sites[site]
        assert isinstance(u, InputUnits)
        both = torch.ones(u.full, device=pi[site].device, dtype=pi[site].dtype)
        for name, other in self.sites.items():
            for s in other.slices:
                if s.tensor == site:
                    index = torch.from_numpy(s.index.reshape(-1)).to(both.device)
                    both = both.index_put((index,), pi[name].repeat_interleave(s.index.shape[1]))
        return (pi[site] * both[torch.from_numpy(u.features).to(both.device)]).sum()
