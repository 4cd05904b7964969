"""Scores units by what is lost when they go and their readers are refitted: what others of the site cannot replace.

With G the mean products of a reader's inputs around their means, the part of a unit that the units left cannot predict
is its Schur complement in G, which is the inverse of its block of the inverse of G. The unit's Fisher score times the
share of its effect on the reader's outputs that is not predicted is an estimate of what is lost after `repair`. Units
of a site go one by one, the one that is least missed first, and after each of them the shares of the others are those
given what is left. So of two units that do the same the first one costs nothing, and the second one all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor

from plasticnet.net import PlasticNet
from plasticnet.repairing.products import Place, Product
from plasticnet.repairing.watching import watching
from plasticnet.tools.batches import Forward, rows, run_batch

_ROWS, _LEAST = 4, 16384  # so many rows are read for each input of a reader, but at least so many in all
_RIDGE = 0.1  # as a share of the variance of each input
_BLOCK = 128  # so many columns are gathered before they are subtracted


class _Moments:
    """Sums over the rows that a reader sees, less the mean of the first ones, so that small variances survive.

    Attributes:
        n: The number of rows.
        start: The mean of the first rows, shape (inputs,).
        x: Their sum, shape (inputs,).
        xx: Their products, shape (inputs, inputs).
    """

    def __init__(self) -> None:
        self.n = 0
        self.start = torch.zeros(())
        self.x = self.xx = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Add rows, shape (rows, inputs)."""
        if not self.n:
            self.start = x.mean(0)
        x = x - self.start
        self.n += len(x)
        self.x, self.xx = self.x + x.double().sum(0), self.xx + (x.mT @ x).double()

    def covariance(self) -> Tensor:
        """Return the mean products around the means, with a ridge."""
        mean, squares = self.x / self.n, self.xx / self.n
        found = squares - torch.outer(mean, mean)
        # An input that hardly moves has a variance that is no more than rounding.
        least = 1e-6 * squares.diagonal() + 1e-12 * found.diagonal().mean().clamp(min=0) + 1e-30
        return found + torch.diag_embed(torch.maximum(_RIDGE * found.diagonal(), least))


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
        readers = list[_Leaving]()
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
                readers.append(_Leaving(moments[place].covariance(), weight, torch.stack(where)))
        own = fisher[start : start + len(site)]
        start += len(site)
        found.append(own * _shares(readers, own).to(own) if readers else own)
    return torch.cat(found)


def _moments(net: PlasticNet, batches: Iterable[Any], most: int, forward: Forward | None) -> dict[Place, _Moments]:
    """Return the sums for every part of a parameter that is multiplied with activations in one group."""
    found, generator, left = dict[Place, _Moments](), torch.Generator().manual_seed(0), most
    share = 1.0  # of the inputs, in the batch that is read

    def notice(product: Product) -> None:
        if product.place.groups > 1 or product.place.kind == "stack":
            return
        inputs = product.place.matrices(product.place.of(net.model.get_parameter(product.place.tensor))).shape[1]
        wanted = math.ceil(share * max(_ROWS * inputs, _LEAST))
        pick = torch.randperm(product.rows, generator=generator)[:wanted].to(product.out.device)
        x = product.inputs(pick)[0]
        found.setdefault(product.place, _Moments()).add(x if x.dtype == torch.float64 else x.float())

    with watching(net.model, notice):
        for batch in batches:
            if left <= 0:
                break
            n = rows(batch)
            share = min(n / min(most, len(batches) * n if isinstance(batches, Sized) else most), 1.0)
            run_batch(net, batch, forward)
            left -= n
    return found


class _Leaving:
    """What of each unit a reader cannot predict, as units of the site go one by one.

    The inverse covariance of the inputs left is the one before minus a product of columns. These products are gathered
    and subtracted in blocks, because only the blocks of the diagonal are needed at every step, and those are kept.

    Args:
        covariance: The covariance of the inputs.
        weight: The reader's weights, shape (inputs, outputs).
        where: The inputs of each unit, shape (units, width).
    """

    def __init__(self, covariance: Tensor, weight: Tensor, where: Tensor) -> None:
        self._where = where
        self._effects = weight[where] @ weight[where].mT  # (units, width, width)
        factor, info = torch.linalg.cholesky_ex(covariance)
        if bool(info.any()):  # by rounding only
            factor = torch.linalg.cholesky(covariance + torch.diag_embed(covariance.diagonal()))
        self._inverse = torch.cholesky_inverse(factor)
        self._blocks = self._inverse[where[:, :, None], where[:, None, :]]
        self._columns = covariance.new_zeros(len(covariance), max(_BLOCK, where.shape[1]))
        self._used = 0
        self.whole = (covariance[where[:, :, None], where[:, None, :]] * self._effects).sum((1, 2))

    def rest(self) -> Tensor:
        """Return for each unit the effect on the reader that the units left cannot replace, shape (units,)."""
        if self._where.shape[1] == 1:
            return (self._effects / self._blocks)[:, 0, 0]
        return torch.linalg.solve(self._blocks, self._effects).diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, unit: int) -> None:
        """Let a unit go."""
        gone = self._where[unit]
        width, before = len(gone), self._columns[:, : self._used]
        columns = self._inverse[:, gone] - before @ before[gone].mT
        factor = torch.linalg.cholesky(self._blocks[unit])
        columns = torch.linalg.solve_triangular(factor, columns.mT, upper=False).mT
        columns[gone] = factor
        own = columns[self._where]
        self._blocks -= own @ own.mT
        self._blocks[unit] = torch.eye(width, dtype=factor.dtype, device=factor.device)
        self._columns[:, self._used : self._used + width] = columns
        self._used += width
        if self._used + width > self._columns.shape[1]:
            self._inverse.addmm_(self._columns[:, : self._used], self._columns[:, : self._used].mT, alpha=-1)
            self._used = 0


def _shares(readers: list[_Leaving], fisher: Tensor) -> Tensor:
    """Return for each unit the share of its effect on its readers that the units that stay longer cannot replace.

    Args:
        readers: The readers.
        fisher: The Fisher scores, by which the unit that goes next is chosen.
    """
    n = len(fisher)
    whole = torch.stack([r.whole for r in readers]).sum(0).clamp(min=1e-30)
    left = torch.ones(n, dtype=torch.bool, device=fisher.device)
    shares = torch.ones(n, dtype=torch.float64, device=fisher.device)
    for _ in range(n - 1):
        share = (torch.stack([r.rest() for r in readers]).sum(0) / whole).clamp(max=1)
        i = int(torch.where(left, share * fisher.double(), torch.inf).argmin())
        shares[i], left[i] = share[i], False
        for reader in readers:
            reader.remove(i)
    return shares
