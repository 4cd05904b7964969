"""Scores units by what is lost when they go and their readers are refitted: what others of the site cannot replace.

With G the mean products of a reader's inputs around their means, the part of a unit that the units left cannot predict
is its Schur complement in G, which is the inverse of its block of the inverse of G. The unit's Fisher score times the
share of its effect on the reader's outputs that is not predicted is an estimate of what is lost after `repair`. Units
of a site go one by one, the one that is least missed first, and after each of them the shares of the others are those
given what is left. So of two units that do the same the first one costs nothing, and the second one all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from plasticnet.gates.site import Site
from plasticnet.net import PlasticNet
from plasticnet.repairing.onward import Enough, Onward
from plasticnet.repairing.products import Place, Product
from plasticnet.repairing.sums import added
from plasticnet.repairing.watching import watching
from plasticnet.tools.batches import Forward, length_of, rows, run_batch
from plasticnet.tools.half import products_in_single

_ROWS, _LEAST = 4, 16384  # so many rows are read for each input of a reader, but at least so many in all
_RIDGE = 0.1  # as a share of the variance of each input
MEMORY = 2**30  # the bytes of sums that are taken in one pass
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
        self.x, self.xx = self.x + x.double().sum(0), added(self.xx, x.mT @ x)

    def covariance(self) -> Tensor:
        """Return the mean products around the means, with a ridge."""
        mean, found = self.x / self.n, self.xx / self.n
        squares = found.diagonal().clone()
        found -= torch.outer(mean, mean)
        # An input that hardly moves has a variance that is no more than rounding.
        least = 1e-6 * squares + 1e-12 * found.diagonal().mean().clamp(min=0) + 1e-30
        found.diagonal().add_(torch.maximum(_RIDGE * found.diagonal(), least))
        return found


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
    found, start = list[Tensor](), 0
    for sites, moments in _moments(net, batches, most, forward):
        for site in sites:
            readers = list[_Leaving]()
            for r in net.gating.readers:
                place = None if r.at_birth else next((p for p in moments if p.tensor == r.tensor), None)
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
        moments.clear()  # before those of the next sites are taken
    return torch.cat(found)


def _moments(
    net: PlasticNet, batches: Iterable[Any], most: int, forward: Forward | None
) -> Iterator[tuple[list[Site], dict[Place, _Moments]]]:
    """Yield some sites after the other, with the sums for the parts of parameters that read their units.

    The sums of all sites are taken in one pass where they have room. Else the sites go in groups, and the runs of each
    group begin where those of the group before it have ended.
    """
    reading = _Reading(net, batches, most, forward)
    groups = _groups(net)
    if len(groups) == 1:
        yield groups[0][0], reading.sums(groups[0][1])
        return
    with products_in_single(net.model), watching(net.model, lambda _: None, look=True) as mode:
        reading.run(next(iter(batches)))
    calls: dict[str, dict[Place, int]] = {}
    order = list(mode.seen.places)
    for place, n in mode.seen.places.items():
        calls.setdefault(place.tensor, {})[place] = n
    onward, ended = Onward(net.model, reading.run), -1
    for sites, tensors in groups:
        places = [p for t in tensors for p in calls.get(t, ())]
        if not places:
            yield sites, {}
            continue
        first, last = min(map(order.index, places)), max(map(order.index, places))
        if first <= ended:
            onward.forget()
        ended = last
        expected = (
            math.inf if any(t not in calls for t in tensors) else sum(n for t in tensors for n in calls[t].values())
        )
        yield sites, reading.sums(tensors, (onward, order[last], expected))


def _groups(net: PlasticNet) -> list[tuple[list[Site], set[str]]]:
    """Return the sites in groups whose sums have room together, each with the parameters that read their units."""
    groups: list[tuple[list[Site], dict[str, int]]] = []
    start = 0
    for site in net.sites.values():
        own = dict[str, int]()
        for r in net.gating.readers:
            units = r.units - start
            if bool(((units >= 0) & (units < len(site))).any()):
                p = net.model.get_parameter(r.tensor)
                own[r.tensor] = 8 * (p.shape[r.dim] if p.dim() < 3 else p.numel() // len(p)) ** 2
        start += len(site)
        if groups and sum((groups[-1][1] | own).values()) <= MEMORY:
            groups[-1][0].append(site)
            groups[-1][1].update(own)
        else:
            groups.append(([site], own))
    return [(sites, set(tensors)) for sites, tensors in groups]


class _Reading:
    """Takes sums over the inputs for parts of parameters that are multiplied with activations in one group.

    Args:
        net: The network.
        batches: The inputs.
        most: The number of inputs at which reading stops.
        forward: What runs the network on a batch, where its form does not fit.
    """

    def __init__(self, net: PlasticNet, batches: Iterable[Any], most: int, forward: Forward | None) -> None:
        self._net, self._batches, self._most, self._forward = net, batches, most, forward

    def run(self, batch: Any) -> Any:
        """Run the network on a batch."""
        return run_batch(self._net, batch, self._forward)

    def sums(self, tensors: set[str], onward: tuple[Onward, Place, float] | None = None) -> dict[Place, _Moments]:
        """Return the sums for every part of some parameters.

        Args:
            tensors: The names of the parameters.
            onward: What begins runs where the last ones have ended, where the next ones are to begin, and the number
                of products after which a run may end. By default runs are whole.
        """
        found, generator, left = dict[Place, _Moments](), torch.Generator().manual_seed(0), self._most
        share, met = 1.0, 0  # of the inputs, in the batch that is read
        length = length_of(self._batches)

        def notice(product: Product) -> None:
            nonlocal met
            place = product.place
            if place.groups == 1 and place.kind != "stack":
                read = place.matrices(torch.empty(place.size, device="meta")).shape[1]  # inputs of the reader
                wanted = math.ceil(share * max(_ROWS * read, _LEAST))
                # Rows are drawn for the others, too, because those of a reader should not hang on what else is read.
                pick = torch.randperm(product.rows, generator=generator)[:wanted].to(product.out.device)
                if place.tensor in tensors:
                    x = product.inputs(pick)[0]
                    found.setdefault(place, _Moments()).add(x if x.dtype == torch.float64 else x.float())
            met += place.tensor in tensors
            if onward is not None and met >= onward[2]:
                raise Enough

        with products_in_single(self._net.model):
            for i, batch in enumerate(self._batches):
                if left <= 0:
                    break
                n = rows(batch)
                inputs = self._most if length is None else length * n
                share = min(n / min(self._most, inputs), 1.0)
                met = 0
                if onward is None:
                    with watching(self._net.model, notice):
                        self.run(batch)
                else:
                    onward[0].until(i, batch, onward[1], notice, beside=tensors)
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
