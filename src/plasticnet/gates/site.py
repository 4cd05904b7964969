"""Gates: the logits of every site, and their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.units import BlockUnits, InputUnits, Units

INITIAL_LOGIT = 3.0 / 7  # phi of a new network: open, at the authors' k = 7
OPEN_LOGIT = 3.0  # k phi of a gate that starts open: sigmoid(3) = 0.95 (the authors' setting)


def gate_key(name: str) -> str:
    """The name of a site's module within the network: no dots, and no clash with attributes."""
    return f"site/{name.replace('.', '/')}"


def probability(phi: Tensor, k: float) -> Tensor:
    """``sigmoid(k phi)``, with its limits: 1/2 at k = 0, and 1[phi >= 0] at k = infinity."""
    if k == 0:
        return torch.full_like(phi, 0.5)
    if math.isinf(k):
        return (phi >= 0).to(phi.dtype)
    return torch.sigmoid(k * phi)


def held_open(pi: Tensor, grace: Tensor) -> Tensor:
    """The probabilities, with 1 for gates in their grace period. Gates behind those have none."""
    grace = grace if len(grace) == len(pi) else nn.functional.pad(grace, (0, len(pi) - len(grace)))
    return torch.where(grace > 0, 1.0, pi)


class Site(nn.Module):
    """One site of a network: its units and their gates.

    ``phi`` are the logits, shape (units,); ``grace`` counts the epochs for which a new unit is still
    held open and unpriced.
    """

    phi: nn.Parameter
    grace: Tensor

    def __init__(self, units: Units, like: Tensor) -> None:
        super().__init__()
        self.units = units
        self.minimum = self.usual_minimum  # units that pruning leaves
        self.maximum = math.inf  # to which growth adds
        self.strength = 1.0  # what the pressure on these gates is multiplied by
        device, dtype = like.device, torch.promote_types(torch.float32, like.dtype)  # never half
        self.phi = nn.Parameter(torch.full((units.size,), INITIAL_LOGIT, dtype=dtype, device=device))
        self.register_buffer("grace", torch.zeros(units.size, dtype=torch.int64, device=device))
        if isinstance(units, InputUnits):
            self.register_buffer("features", torch.from_numpy(units.features).to(device))

    @property
    def name(self) -> str:
        """The producer's name, or ``consumer.input``."""
        return self.units.name

    @property
    def open(self) -> Tensor:
        """Which units are open, a boolean mask of shape (units,): phi >= 0."""
        return self.phi.detach() >= 0

    @property
    def usual_minimum(self) -> int:
        """The minimum unless another one was set: blocks may all close."""
        return 0 if isinstance(self.units, BlockUnits) else 1

    @property
    def least(self) -> int:
        """How many units stay in any case: the minimum, and one, but of blocks."""
        return max(self.minimum, self.usual_minimum)

    @property
    def room(self) -> float:
        """How many units growth may add: up to the maximum, and to the features that there are."""
        return max(0, min(self.maximum - len(self), self.features_left))

    @property
    def features_left(self) -> float:
        """How many features of an input site are closed; of other sites there is no limit."""
        return self.units.full - len(self) if isinstance(self.units, InputUnits) else math.inf

    @property
    def best(self) -> Tensor:
        """The unit most likely to be open, a scalar: the one that stays when all are closed."""
        return self.phi.detach().argmax()

    def likely(self, n: int) -> np.ndarray:
        """The ``n`` units (or all, where there are fewer) most likely to be open, as indices."""
        return self.phi.detach().argsort(descending=True, stable=True)[:n].cpu().numpy()

    def __len__(self) -> int:
        return self.units.size

    def probability(self, k: float) -> Tensor:
        """The probability of each gate, with those in their grace period at 1."""
        return held_open(probability(self.phi, k), self.grace)

    def mean_gate(self, k: float) -> Tensor:
        """The gates at evaluation: pi where pi >= 1/2, else 0. A block is there or not: 1 or 0."""
        return mean_gates([self], k)[0][:-1]

    def extra_repr(self) -> str:
        """Name and number of units."""
        return f"{self.name!r}, units={len(self)}"


def probabilities(gated: Sequence[Site | WeightSite], k: float) -> Tensor:
    """The probabilities of sites, and of gated weights behind them, in one vector: (units,) or (units + weights,)."""
    pi = probability(torch.cat([g.phi.flatten() for g in gated]), k)
    graces = [g.grace for g in gated if isinstance(g, Site)]
    return held_open(pi, torch.cat(graces)) if graces else pi


def transition(pi: Tensor) -> float:
    """The mean probability with which a gate differs between two draws, ``2 pi (1 - pi)`` (NPN, section 3)."""
    return float((2 * pi * (1 - pi)).mean())


def mean_gates(sites: Sequence[Site], k: float) -> tuple[Tensor, bool]:
    """`Site.mean_gate` of all sites in one vector, which ends with a constant 1: shape (units + 1,); and
    whether all are 1."""
    one = sites[0].phi.new_ones(1)
    phi = torch.cat([*(s.phi.detach() for s in sites), one])
    if math.isinf(k) and bool(phi.min() >= 0):  # the usual case of ordinary training
        return torch.ones_like(phi), True
    grace = torch.cat([*(s.grace for s in sites), sites[0].grace.new_ones(1)])
    pi = held_open(probability(phi, k), grace)
    start = 0
    for s in sites:
        if isinstance(s.units, BlockUnits):
            pi[start : start + len(s)] = 1.0
        start += len(s)
    z = torch.where((phi >= 0) | (grace > 0), pi, 0.0)
    return z, bool((z == 1).all())


def set_logits(gated: Site | WeightSite, some: Tensor | slice, logit: float) -> None:
    """Set some of the logits, given by a mask, indices or a slice."""
    with torch.no_grad():
        gated.phi[some] = logit


class WeightSite(nn.Module):
    """The gates of one weight: ``phi`` are the logits, of the weight's shape."""

    phi: nn.Parameter

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__()
        self.name = name  # of the parameter
        dtype = torch.promote_types(torch.float32, weight.dtype)  # never half
        self.phi = nn.Parameter(torch.full(weight.shape, INITIAL_LOGIT, dtype=dtype, device=weight.device))

    @property
    def open(self) -> Tensor:
        """Which entries are open, a boolean mask of the weight's shape: phi >= 0."""
        return self.phi.detach() >= 0

    def probability(self, k: float) -> Tensor:
        """The probability of each gate."""
        return probability(self.phi, k)

    def mean_gate(self, k: float) -> Tensor:
        """The gates at evaluation: pi where pi >= 1/2, else 0."""
        return torch.where(self.open, probability(self.phi.detach(), k), 0.0)

    def extra_repr(self) -> str:
        """Name and shape."""
        return f"{self.name!r}, {tuple(self.phi.shape)}"


def weight_key(tensor: str) -> str:
    """The name of a weight site's module within the network."""
    return f"weight/{tensor.replace('.', '/')}"
