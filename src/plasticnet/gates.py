"""Gates: the logits of every site, and their probabilities."""

from __future__ import annotations

import math

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
    def best(self) -> Tensor:
        """The unit most likely to be open, a scalar: the one that stays when all are closed."""
        return self.phi.detach().argmax()

    def __len__(self) -> int:
        return self.units.size

    def probability(self, k: float) -> Tensor:
        """The probability of each gate, with those in their grace period at 1."""
        return torch.where(self.grace > 0, 1.0, probability(self.phi, k))

    def mean_gate(self, k: float) -> Tensor:
        """The gates at evaluation: pi where pi >= 1/2, else 0. A block is there or not: 1 or 0."""
        pi = self.probability(k).detach()
        pi = torch.ones_like(pi) if isinstance(self.units, BlockUnits) else pi
        return torch.where(self.open | (self.grace > 0), pi, 0.0)

    def extra_repr(self) -> str:
        """Name and number of units."""
        return f"{self.name!r}, units={len(self)}"
