"""Ways to a smaller network that learn a number for each unit, and that are not plasticnet's, for peers.py."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from peers_training import Points, Start, by_scores, gated, scale, train
from torch import Tensor, nn

TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1  # of the hard-concrete distribution (arXiv 1712.01312, section 3)
INITIAL = 3.0  # the logits of gates at first: 95 % open
DUAL = 0.05  # the learning rate of the multiplier, for each step
Values = dict[str, Tensor]
Share = Callable[[Values], Tensor]


def _share(start: Start) -> tuple[Share, dict[str, int]]:
    """The expected share of the multiply-adds, from the probabilities of units; and the numbers of units."""
    net = gated(start)
    sizes = {name: len(site) for name, site in net.sites.items()}
    whole = net.cost.full("macs")

    def share(open_: dict[str, Tensor]) -> Tensor:
        return net.cost.expected(torch.cat([open_[name] for name in sizes]), "macs") / whole

    return share, sizes


def _constrained(
    start: Start,
    share: float,
    rate: float,
    gate_rate: float,
    draw: Callable[[Tensor, int], Tensor],
    probability: Callable[[Tensor], Tensor],
    value: Callable[[Tensor], Tensor],
) -> nn.Module:
    """Learn gates for half of the epochs under a Lagrangian, cut to the budget, and train for the other half.

    The multiplier grows by what the constraint is violated, and is 0 again as soon as it is met (Gallego-Posada et al.,
    arXiv 2208.04425, algorithm 1).
    """
    task = start.task
    expected, sizes = _share(start)
    network = copy.deepcopy(start.dense)
    points = Points(task, network)
    logits = {name: nn.Parameter(torch.full((n,), INITIAL)) for name, n in sizes.items()}
    multiplier = 0.0

    def losses(network: nn.Module, i: Tensor) -> Tensor:
        points.values = {name: draw(phi, len(i)) for name, phi in logits.items()}
        return start.taught(network, i)

    def extra() -> Tensor:
        nonlocal multiplier
        beyond = expected({name: probability(phi) for name, phi in logits.items()}) - share
        multiplier = max(0.0, multiplier + DUAL * float(beyond.detach())) if float(beyond.detach()) > 0 else 0.0
        return multiplier * beyond

    train(task, network, task.epochs // 2, rate, losses, extra, list(logits.values()), gate_rate)
    points.remove()
    with torch.no_grad():
        factors = {name: value(phi) for name, phi in logits.items()}
        found = {name: probability(phi) for name, phi in logits.items()}
    return _second_half(start, network, share, rate, found, factors)


def _second_half(
    start: Start, network: nn.Module, share: float, rate: float, scores: Values, factors: Values
) -> nn.Module:
    """The network that half of the epochs have made, cut to the budget by these scores, after the other half.

    Args:
        start: What the way began with.
        network: The network, of its full size.
        share: The budget.
        rate: The largest learning rate.
        scores: A score for each unit; those that score least go.
        factors: What the network multiplies its units by, for the sites where it does.
    """
    net, task = gated(start), start.task
    net.model.load_state_dict(network.state_dict())
    scale(net, factors)
    small = by_scores(net, scores, share)
    train(task, small, task.epochs - task.epochs // 2, rate, start.taught)
    return small


def hard_concrete(start: Start, share: float, rate: float, gate_rate: float) -> nn.Module:
    """Constrained hard-concrete L0 (Louizos et al., arXiv 1712.01312; constrained as in arXiv 2208.04425)."""
    edge = TEMPERATURE * math.log(-LOW / HIGH)

    def stretched(s: Tensor) -> Tensor:
        return (s * (HIGH - LOW) + LOW).clamp(0, 1)

    def draw(phi: Tensor, n: int) -> Tensor:
        u = torch.rand(n, len(phi)).clamp(1e-6, 1 - 1e-6)
        return stretched(torch.sigmoid((u.log() - (-u).log1p() + phi) / TEMPERATURE))

    return _constrained(
        start, share, rate, gate_rate, draw, lambda phi: torch.sigmoid(phi - edge), lambda phi: stretched(phi.sigmoid())
    )


def straight_through(start: Start, share: float, rate: float, gate_rate: float) -> nn.Module:
    """Bernoulli gates whose gradient passes straight through (Bengio et al., arXiv 1308.3432)."""

    def draw(phi: Tensor, n: int) -> Tensor:
        p = phi.sigmoid().expand(n, -1)
        return torch.bernoulli(p.detach()) + p - p.detach()

    return _constrained(start, share, rate, gate_rate, draw, torch.sigmoid, lambda phi: torch.ones_like(phi))


def slimming(start: Start, share: float, rate: float, strength: float) -> nn.Module:
    """Network slimming: a scale for each unit, whose size is a price (Liu et al., arXiv 1708.06519).

    The networks here have no BatchNorm, so that the scales are numbers of their own that begin at 1.
    """
    task = start.task
    _, sizes = _share(start)
    network = copy.deepcopy(start.dense)
    points = Points(task, network)
    scales = [nn.Parameter(torch.ones(n)) for n in sizes.values()]
    points.values = dict(zip(sizes, scales, strict=True))

    def extra() -> Tensor:
        return strength * torch.stack([s.abs().sum() for s in scales]).sum()

    train(task, network, task.epochs // 2, rate, start.taught, extra, scales, rate)
    points.remove()
    factors = {name: s.detach() for name, s in points.values.items()}
    return _second_half(start, network, share, rate, {name: s.abs() for name, s in factors.items()}, factors)


def group_lasso(start: Start, share: float, rate: float, strength: float) -> nn.Module:
    """The norms of the weights that produce each unit are a price (Wen et al., arXiv 1608.03665, equation 1)."""
    task = start.task
    net = gated(start)
    made = {
        name: [(s.tensor, s.dim, torch.from_numpy(s.index)) for s in site.units.slices if not s.consumed]
        for name, site in net.sites.items()
    }

    def norms(network: nn.Module) -> dict[str, Tensor]:
        found = {}
        for name, slices in made.items():
            squares = [
                network.get_parameter(tensor).movedim(dim, 0)[index].flatten(1).square().sum(1)
                for tensor, dim, index in slices
            ]
            found[name] = (torch.stack(squares).sum(0) + 1e-12).sqrt()
        return found

    network = copy.deepcopy(start.dense)

    def extra() -> Tensor:
        return strength * torch.stack([n.sum() for n in norms(network).values()]).sum()

    train(task, network, task.epochs // 2, rate, start.taught, extra)
    with torch.no_grad():
        found = norms(network)
    return _second_half(start, network, share, rate, found, {})
