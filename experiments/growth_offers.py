"""What new units of a site would bring at once, with outgoing weights in closed form, for growth_price.py.

Candidates are added with random incoming weights. Of the gradient with respect to what a reader of the site computes,
the part that is linear in the units that are there is taken away, because training their weights can bring that. What
the candidates explain of the rest by least squares is theirs (TINY, arXiv 2405.19816), and gives their outgoing weights
up to a factor, which a search on other inputs finds. Of several times as many candidates as wanted, those are dropped
one after another without which least of the rest is left unexplained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import plasticnet as pn
from plasticnet.repairing.products import Place, Product
from plasticnet.repairing.watching import watching
from plasticnet.surgery.candidates import aside

OVER = 4  # so many candidates for each unit that is wanted
RIDGE = 1e-3  # as a share of the mean square of the inputs
ROWS = 4096  # the most rows of a batch that a reader's sums are taken over
FACTORS = (1.0, 2.0, 4.0, 0.5, 0.25, 0.12, 0.06, 0.03)
Loss = Callable[[], Tensor]  # runs the network on some inputs and returns its losses, shape (batch,)


@dataclass(eq=False)
class Part:
    """What the candidates can bring through one group of one reader.

    Attributes:
        place: The part of a parameter that reads the site.
        group: The group of it.
        columns: Which of its inputs belong to candidates, shape (inputs,).
        owners: The candidates that these belong to, counted from 0.
        products: The mean products of these inputs with each other, without what is linear in all other inputs.
        gradient: The gradient of their weights, without that part; shape (inputs of candidates, outputs).
        shape: That of the matrices of the place.
    """

    place: Place
    group: int
    columns: Tensor
    owners: Tensor
    products: Tensor
    gradient: Tensor
    shape: torch.Size

    def solved(self, alive: Tensor) -> tuple[Tensor, Tensor]:
        """The best outgoing weights of some candidates, and how much each of their inputs alone explains."""
        chosen = alive[self.owners]
        weights, lost = torch.zeros_like(self.gradient), self.gradient.new_zeros(len(self.gradient))
        if chosen.any():
            inverse = torch.linalg.inv(self.products[chosen][:, chosen])
            weights[chosen] = -inverse @ self.gradient[chosen]
            lost[chosen] = (weights[chosen].square() / inverse.diagonal()[:, None]).sum(1)
        return weights, lost


def add_best(
    net: pn.PlasticNet, optimizer: torch.optim.Optimizer, site: str, units: int, fit: Loss, held: Loss
) -> float:
    """Add units to a site, the best of several times as many candidates, and return by how much the loss falls at once.

    Args:
        net: The network.
        optimizer: Its optimizer.
        site: The name of the site.
        units: How many units are added.
        fit: The losses on the inputs from which outgoing weights are computed.
        held: The losses on other inputs, by which their factor is found and which say what falls.
    """
    old = len(net.sites[site])
    graces = {name: s.grace.clone() for name, s in net.sites.items()}
    net.grow({site: OVER * units}, optimizer)
    with aside(net):
        net.eval()
        parts = _parts(net, site, old, fit)
        alive = torch.ones(OVER * units, dtype=torch.bool)
        while (more := int(alive.sum()) - units) > 0:
            lost = torch.where(alive, _lost(parts, alive), math.inf)
            alive[lost.argsort()[: max(1, min(more, int(alive.sum()) // 4))]] = False
        gain = _searched(net, parts, alive, held)
    net.train()
    net.resize({site: [*range(old), *(old + alive.nonzero()[:, 0]).tolist()]}, optimizer)
    for name, grace in graces.items():
        net.sites[name].grace[: len(grace)] = grace
    return gain


def _parts(net: pn.PlasticNet, site: str, old: int, fit: Loss) -> list[Part]:
    """What candidates, which are the units of a site from ``old`` on, can bring through each reader."""
    parameters = dict(net.model.named_parameters())
    owners = _owners(net, site, old)
    sums: dict[Place, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def notice(product: Product) -> None:
        if product.place.tensor in owners:
            some = torch.randperm(product.rows, generator=generator)[:ROWS] if product.rows > ROWS else None
            x = product.inputs(some).detach().double()
            sums[product.place] = sums.get(product.place, torch.zeros(())) + x.mT @ x / x.shape[1]

    with torch.enable_grad():
        with watching(net.model, notice):
            losses = fit()
        found = torch.autograd.grad(losses.mean(), [parameters[name] for name in owners])
    gradients = dict(zip(owners, found, strict=True))
    parts = []
    for place, products in sums.items():
        gradient = place.matrices(place.of(gradients[place.tensor].contiguous())).double()
        whose = place.matrices(place.of(owners[place.tensor]))[..., 0]
        parts += [_part(place, i, whose[i], products[i], gradient[i], gradient.shape) for i in range(len(whose))]
    return [part for part in parts if part.columns.any()]


def _owners(net: pn.PlasticNet, site: str, old: int) -> dict[str, Tensor]:
    """For each parameter that reads candidates, which of them each entry reads, counted from 0, or -1."""
    names = list(net.sites)
    first = sum(len(net.sites[name]) for name in names[: names.index(site)]) + old
    last = first + len(net.sites[site]) - old
    parameters = dict(net.model.named_parameters())
    found = {}
    for reader in net.gating.readers:
        candidates = (reader.units >= first) & (reader.units < last)
        if candidates.any():
            weight = parameters[reader.tensor]
            along = [-1 if d == reader.dim else 1 for d in range(weight.dim())]
            whose = torch.where(candidates, reader.units - first, -1)
            found[reader.tensor] = whose.view(along).expand(weight.shape).contiguous()
    return found


def _part(place: Place, group: int, whose: Tensor, products: Tensor, gradient: Tensor, shape: torch.Size) -> Part:
    """Take away what is linear in the inputs that are no candidates'."""
    new = whose >= 0
    there = products[~new][:, ~new]
    there = there + RIDGE * there.diagonal().mean().clamp(min=1e-9) * torch.eye(len(there), dtype=there.dtype)
    across, own = products[new][:, ~new], products[new][:, new]
    by_them = torch.linalg.solve(there, torch.cat([across.T, gradient[~new]], 1))
    rest = own - across @ by_them[:, : len(own)]
    rest = rest + RIDGE * own.diagonal().mean().clamp(min=1e-9) * torch.eye(len(own), dtype=own.dtype)
    return Part(place, group, new, whose[new], rest, gradient[new] - across @ by_them[:, len(own) :], shape)


def _lost(parts: list[Part], alive: Tensor) -> Tensor:
    """How much less would be explained without each candidate, shape (candidates,)."""
    total = torch.zeros(len(alive), dtype=torch.float64)
    for part in parts:
        total.index_add_(0, part.owners, part.solved(alive)[1])
    return total


@torch.no_grad()
def _searched(net: pn.PlasticNet, parts: list[Part], alive: Tensor, held: Loss) -> float:
    """Give candidates their outgoing weights, times the best factor, and return by how much the loss falls."""
    parameters = dict(net.model.named_parameters())
    changes: dict[Place, Tensor] = {}
    for part in parts:
        change = changes.setdefault(part.place, torch.zeros(part.shape, dtype=torch.float64))
        change[part.group][part.columns] = part.solved(alive)[0]

    def move(factor: float) -> None:
        for place, change in changes.items():
            view = place.of(parameters[place.tensor])
            view += place.operand((factor * change).to(view.dtype)).reshape(view.shape)

    before = least = held().mean().item()
    now = best = 0.0
    for factor in FACTORS:
        if best and (factor < best or now > best):  # a larger step was worse, or smaller ones would follow
            break
        move(factor - now)
        now, loss = factor, held().mean().item()
        if loss < least:
            least, best = loss, factor
    move(best - now)
    return before - least
