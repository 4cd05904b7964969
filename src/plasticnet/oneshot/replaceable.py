"""Scores units by what is lost when they go and their readers are refitted: what others of the site cannot replace.

With G the mean products of a reader's inputs around their means, the part of a unit that the units left cannot predict
is its Schur complement in G, which is the inverse of its block of the inverse of G. The unit's Fisher score times the
share of its effect on the reader's outputs that is not predicted is an estimate of what is lost after `repair`. Units
of a site go one by one, the one that is least missed first, and after each of them the shares of the others are those
given what is left. So of two units that do the same the first one costs nothing, and the second one all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from plasticnet.net import PlasticNet
from plasticnet.repairing.products import Place, Product
from plasticnet.repairing.watching import watching
from plasticnet.tools.batches import Forward, rows, run_batch

_ROWS, _LEAST = 4, 1024  # so many rows of each batch are read for each input of a reader, but at least so many
_RIDGE = 0.1  # as a share of the variance of each input


class _Moments:
    """Sums over the rows that a reader sees.

    Attributes:
        n: The number of rows.
        x: Their sum, shape (inputs,).
        xx: Their products, shape (inputs, inputs).
    """

    def __init__(self) -> None:
        self.n = 0
        self.x = self.xx = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add rows, shape (rows, inputs)."""
        self.n += len(x)
        self.x, self.xx = self.x + x.double().sum(0), self.xx + (x.mT @ x).double()

    def covariance(self) -> Tensor:
        """Return the mean products around the means, with a ridge."""
        mean = self.x / self.n
        found = self.xx / self.n - torch.outer(mean, mean)
        return found + torch.diag_embed(
            _RIDGE * found.diagonal().clamp(min=1e-12 * float(found.diagonal().mean()) + 1e-30)
        )


def unreplaceable(
    net: PlasticNet, fisher: Tensor, batches: Iterable[Any], most: int, forward: Forward | None
) -> Tensor:
    """Return for each unit the Fisher score of what the units that stay longer than it cannot replace.

    Args:
        net: The network, in evaluation mode.
        fisher: The Fisher scores of the units of all sites, shape (units,).
        batches: The inputs.
        most: The number of inputs at which reading stops.
        forward: What runs the network on a batch, where its form does not fit.
    """
    moments = _moments(net, batches, most, forward)
    found, start = list[Tensor](), 0
    for site in net.sites.values():
        readers = list[tuple[Tensor, Tensor, Tensor]]()  # inverse covariance, weights, and the inputs of each unit
        for r in net.gating.readers:
            place = next((p for p in moments if p.tensor == r.tensor), None)
            units = r.units - start
            if place is None or not bool(((units >= 0) & (units < len(site))).any()):
                continue
            weight = place.matrices(place.of(net.model.get_parameter(r.tensor).detach()))[0].double()
            if len(weight) % len(units):
                continue
            wide = units.repeat_interleave(len(weight) // len(units))
            where = [(wide == i).nonzero()[:, 0] for i in range(len(site))]
            if len({len(w) for w in where}) == 1:
                readers.append((torch.linalg.inv(moments[place].covariance()), weight, torch.stack(where)))
        own = fisher[start : start + len(site)]
        start += len(site)
        found.append(own * _shares(readers, own).to(own) if readers else own)
    return torch.cat(found)


def _moments(net: PlasticNet, batches: Iterable[Any], most: int, forward: Forward | None) -> dict[Place, _Moments]:
    """Return the sums for every part of a parameter that is multiplied with activations in one group."""
    found, generator, left = dict[Place, _Moments](), torch.Generator().manual_seed(0), most

    def notice(product: Product) -> None:
        if product.place.groups > 1 or product.place.kind == "stack":
            return
        inputs = product.place.matrices(product.place.of(net.model.get_parameter(product.place.tensor))).shape[1]
        n = product.rows
        pick = torch.randperm(n, generator=generator)[: max(_ROWS * inputs, _LEAST)].to(product.out.device)
        x = product.inputs(pick)[0]
        found.setdefault(product.place, _Moments()).add(x if x.dtype == torch.float64 else x.float())

    with watching(net.model, notice):
        for batch in batches:
            if left <= 0:
                break
            run_batch(net, batch, forward)
            left -= rows(batch)
    return found


def _shares(readers: list[tuple[Tensor, Tensor, Tensor]], fisher: Tensor) -> Tensor:
    """Return for each unit the share of its effect on its readers that the units that stay longer cannot replace.

    Args:
        readers: The inverse covariances, weights and the inputs of each unit, shape (units, width), of each reader.
        fisher: The Fisher scores, by which the unit that goes next is chosen.
    """
    n = len(fisher)
    whole = torch.zeros(n, dtype=torch.float64, device=fisher.device)
    for inverse, weight, where in readers:
        blocks = torch.linalg.inv(inverse)[where[:, :, None], where[:, None, :]]
        whole += (weight[where] * (blocks @ weight[where])).sum((1, 2))
    inverses = [inverse.clone() for inverse, _, _ in readers]
    left = torch.ones(n, dtype=torch.bool, device=fisher.device)
    shares = torch.ones(n, dtype=torch.float64, device=fisher.device)
    for _ in range(n - 1):
        rest = torch.zeros_like(whole)
        for inverse, (_, weight, where) in zip(inverses, readers, strict=True):
            index = where[left]
            blocks = inverse[index[:, :, None], index[:, None, :]]
            rest[left] += (weight[index] * torch.linalg.solve(blocks, weight[index])).sum((1, 2))
        share = (rest / whole.clamp(min=1e-30)).clamp(max=1)
        i = int(torch.where(left, share * fisher.double(), torch.inf).argmin())
        shares[i], left[i] = share[i], False
        for inverse, (_, _, where) in zip(inverses, readers, strict=True):
            gone = where[i]
            inverse -= inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
            inverse[gone], inverse[:, gone] = 0.0, 0.0
            inverse[gone, gone] = 1.0
    return shares
