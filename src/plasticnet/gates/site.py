"""The gates of sites and of single weights: their logits and their probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.tools.fsdp_private import keep_whole
from plasticnet.units import BlockUnits, InputUnits, Units, is_skipped

# Gates start with this phi in a new network: they are open, with pi = 0.95 at k = 7, the setting of the authors.
INITIAL_LOGIT = 3.0 / 7
# Gates that are opened later start with this k phi: sigmoid(3) = 0.95, as in a new network.
OPEN_LOGIT = 3.0
# The grace of what sleeps: it is closed, has no price, and stays so whatever its logit is, until growth wakes it.
ASLEEP = -1


def gate_key(name: str) -> str:
    """Return the name of a site's module within the network, which has no dots and is no attribute's name."""
    return f"site/{name.replace('.', '/')}"


def buffer_key(name: str) -> str:
    """Return the key in the state dict of a network for a buffer that its module leaves out of state dicts."""
    return f"buffer/{name.replace('.', '/')}"


def probability(phi: Tensor, k: float) -> Tensor:
    """Return the probability ``sigmoid(k phi)`` of gates, which is 1/2 at k = 0 and 1[phi >= 0] at k = infinity.

    Args:
        phi: The logits, of any shape.
        k: A number from 0 to infinity.
    """
    if k == 0:
        return torch.full_like(phi, 0.5)
    if math.isinf(k):
        return (phi >= 0).to(phi.dtype)
    return torch.sigmoid(k * phi)


def held_open(pi: Tensor, grace: Tensor) -> Tensor:
    """Return the probabilities with 1 for every gate in its grace period, and 0 for every gate that sleeps.

    Args:
        pi: The probabilities, shape (gates,).
        grace: How many epochs are left of each grace period, or `ASLEEP`. Where it is shorter than ``pi``, the gates at
            the end have no grace period.
    """
    grace = grace if len(grace) == len(pi) else nn.functional.pad(grace, (0, len(pi) - len(grace)))
    return torch.where(grace == 0, pi, (grace > 0).to(pi.dtype))


class _Gates(nn.Module):
    """Gates, whose tensors keep their kind when a network is brought to another precision.

    Logits are real and never in half precision, in which steps of an optimizer would be lost, and integers stay such.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(partial(_of_its_kind, fn), recurse)


def _of_its_kind(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Return what a function makes of a tensor of gates, in a precision that gates can have."""
    new = fn(tensor)
    if not tensor.is_floating_point():
        return new if new.dtype == tensor.dtype else tensor.to(new.device)
    wanted = new.dtype.to_real()
    wanted = wanted if wanted == torch.float64 else torch.float32
    return new if new.dtype == wanted else tensor.to(new.device, wanted)


class Gates(nn.ModuleDict):
    """All gates of a network, one module for each site or weight; ``fully_shard`` leaves them whole.

    There are few of them, and every process needs all.
    """


keep_whole(Gates)


class Site(_Gates):
    """One site of a network: its units and their gates. Its length is the number of units.

    Args:
        units: The units, as tracing found them.
        like: A tensor whose device and dtype the logits get; the dtype is never half precision.

    Attributes:
        phi: The logits of the gates, shape (units,).
        grace: For how many epochs each unit is still held open and unpriced, shape (units,); `ASLEEP` for blocks that
            sleep, and for the units within them.
        usual_minimum: The minimum unless another one is set: 0 for blocks, which may all be closed, and mostly 1 for
            other units; more where a norm needs it, or where the output layer reads them (`plasticnet.budgets.floors`).
        minimum: How many units pruning leaves; the usual minimum unless it is set, and again once it is set to None.
        maximum: The number of units at which growth stops.
        strength: What the pressure on these gates is multiplied by.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = pn.PlasticNet(model, (torch.zeros(2, 4),))
        >>> site = net.sites["0"]
        >>> site.name, len(site), site.phi.shape
        ('0', 8, torch.Size([8]))
        >>> with torch.no_grad():
        ...     site.phi[:3] = -1.0
        >>> int(site.open.sum())
        5
    """

    phi: nn.Parameter
    grace: Tensor

    def __init__(self, units: Units, like: Tensor) -> None:
        super().__init__()
        self.units = units
        self.usual_minimum = self._lowest
        self._own_minimum: int | None = None
        self.maximum = math.inf
        self.strength = 1.0
        device, dtype = like.device, torch.promote_types(torch.float32, like.dtype)  # never half precision
        self.phi = nn.Parameter(torch.full((units.size,), INITIAL_LOGIT, dtype=dtype, device=device))
        self.register_buffer("grace", torch.zeros(units.size, dtype=torch.int64, device=device))
        if isinstance(units, InputUnits):
            self.register_buffer("features", torch.from_numpy(units.features).to(device))

    @property
    def name(self) -> str:
        """The name of the module that produces the units, or ``<consumer>.input`` for an input site."""
        return self.units.name

    @property
    def open(self) -> Tensor:
        """Which units are open, a boolean mask of shape (units,): phi >= 0."""
        return self.phi.detach() >= 0

    @property
    def minimum(self) -> int:
        return self.usual_minimum if self._own_minimum is None else self._own_minimum

    @minimum.setter
    def minimum(self, units: int | None) -> None:
        self._own_minimum = units

    @property
    def _lowest(self) -> int:
        """The fewest units that a site can have: what its norms need, mostly 1; 0 for blocks, which may all close."""
        return 0 if is_skipped(self.units) else self.units.least

    @property
    def least(self) -> int:
        """How many units stay in any case: the minimum, but at least one unless the units are blocks."""
        return max(self.minimum, self._lowest)

    @property
    def room(self) -> float:
        """How many units growth may add, given the maximum, and the number of closed features or sleeping blocks."""
        return max(0, min(self.maximum - self.awake, self.spare))

    @property
    def spare(self) -> float:
        """How many features of an input site have been cut, or how many blocks sleep; infinity for other sites."""
        if isinstance(self.units, BlockUnits):
            return len(self) - self.awake
        return self.units.full - len(self) if isinstance(self.units, InputUnits) else math.inf

    @property
    def asleep(self) -> Tensor:
        """Which units sleep, a boolean mask of shape (units,): they are closed and have no price."""
        return self.grace < 0

    @property
    def awake(self) -> int:
        """How many units do not sleep."""
        return len(self) if self.grace.is_meta else len(self) - int(self.asleep.sum())

    @property
    def best(self) -> Tensor:
        """The indices of the units that stay, and count in norms, when too few are open: mostly a single one.

        They are those that are most likely to be open.
        """
        return self.phi.detach().argsort(descending=True, stable=True)[: self.units.least]

    def likely(self, n: int) -> np.ndarray:
        """Return the indices of the ``n`` units that are most likely to be open, or of all if there are fewer.

        Units that sleep come last.
        """
        phi = self.phi.detach().masked_fill(self.asleep, -math.inf)
        return phi.argsort(descending=True, stable=True)[:n].cpu().numpy()

    def __len__(self) -> int:
        return self.units.size

    def probability(self, k: float) -> Tensor:
        """Return the probability of each gate at this k, shape (units,); 1 in a grace period, 0 for what sleeps."""
        return held_open(probability(self.phi, k), self.grace)

    def mean_gate(self, k: float) -> Tensor:
        """Return the gates at evaluation, shape (units,): pi where pi >= 1/2, else 0. For blocks they are 1 or 0."""
        return mean_gates([self], k)[0][:-1]

    def extra_repr(self) -> str:
        """Return the name and the number of units, for ``repr``."""
        return f"{self.name!r}, units={len(self)}"


def probabilities(gated: Sequence[Site | WeightSite], k: float) -> Tensor:
    """Return the probabilities of all gates in one vector.

    Args:
        gated: The sites, followed by the gated weights, if there are any.
        k: A number from 0 to infinity.

    Returns:
        Shape (units,) or (units + weights,).
    """
    pi = probability(torch.cat([g.phi.flatten() for g in gated]), k)
    graces = [g.grace for g in gated if isinstance(g, Site)]
    return held_open(pi, torch.cat(graces)) if graces else pi


def transition(pi: Tensor) -> float:
    """Return the mean probability with which a gate differs between two draws, ``2 pi (1 - pi)``.

    Its limit of 0 means that all gates are decided (Neural Plasticity Networks, arXiv 1908.08118, section 3).
    """
    return float((2 * pi * (1 - pi)).mean())


def mean_gates(sites: Sequence[Site], k: float) -> tuple[Tensor, bool]:
    """Return the gates of all sites at evaluation.

    Args:
        sites: The sites, at least one.
        k: A number from 0 to infinity.

    Returns:
        The gates, as `Site.mean_gate` gives them, in one vector that ends with a constant 1, shape (units + 1,); and
        whether all of them are 1.

    Raises:
        PlasticError: A logit is NaN. Infinite ones say what they mean: open or closed.
    """
    one = sites[0].phi.new_ones(1)
    depth = any(isinstance(s.units, BlockUnits) for s in sites)
    # What sleeps is closed whatever its logit is; only blocks sleep, and what is within them.
    logits = [s.phi.detach().masked_fill(s.asleep, -1.0) if depth else s.phi.detach() for s in sites]
    phi = torch.cat([*logits, one])
    lowest = phi.min()  # this is NaN where any of them is
    if math.isinf(k) and bool(lowest >= 0):  # the usual case in ordinary training
        return torch.ones_like(phi), True
    if bool(lowest.isnan()):
        refuse_nan(sites)
    grace = torch.cat([*(s.grace for s in sites), sites[0].grace.new_ones(1)])
    pi = held_open(probability(phi, k), grace)
    start = 0
    for s in sites:
        if isinstance(s.units, BlockUnits):
            pi[start : start + len(s)] = 1.0
        start += len(s)
    z = torch.where((phi >= 0) | (grace > 0), pi, 0.0)
    return z, bool((z == 1).all())


def refuse_nan(gated: Sequence[Site | WeightSite]) -> None:
    """Raise `PlasticError` if a logit is NaN, which would count as closed."""
    for g in gated:
        if bool(g.phi.detach().isnan().any()):
            raise PlasticError(f"{g.name!r}: its gates are not finite (NaN); go back to a checkpoint")


def set_logits(gated: Site | WeightSite, some: Tensor | slice, logit: float) -> None:
    """Set the logits that a mask, indices or a slice select to one value."""
    with torch.no_grad():
        gated.phi[some] = logit


class WeightSite(_Gates):
    """The gates of the entries of one weight.

    Args:
        name: The name of the parameter.
        weight: The parameter, whose shape and device the logits get.

    Attributes:
        name: The name of the parameter.
        phi: The logits of the gates, in the shape of the weight.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = pn.PlasticNet(model, (torch.zeros(2, 4),), weights=["2"])
        >>> weight = net.weights["2.weight"]
        >>> weight.phi.shape, bool(weight.open.all())
        (torch.Size([2, 8]), True)
    """

    phi: nn.Parameter

    def __init__(self, name: str, weight: Tensor) -> None:
        super().__init__()
        self.name = name
        dtype = torch.promote_types(torch.float32, weight.dtype)  # never half precision
        self.phi = nn.Parameter(torch.full(weight.shape, INITIAL_LOGIT, dtype=dtype, device=weight.device))

    @property
    def open(self) -> Tensor:
        """Which entries are open, a boolean mask in the shape of the weight: phi >= 0."""
        return self.phi.detach() >= 0

    def probability(self, k: float) -> Tensor:
        """Return the probability of each gate at this k, in the shape of the weight."""
        return probability(self.phi, k)

    def mean_gate(self, k: float) -> Tensor:
        """Return the gates at evaluation, in the shape of the weight: pi where pi >= 1/2, else 0."""
        return torch.where(self.open, probability(self.phi.detach(), k), 0.0)

    def extra_repr(self) -> str:
        """Return the name and the shape, for ``repr``."""
        return f"{self.name!r}, {tuple(self.phi.shape)}"


def weight_key(tensor: str) -> str:
    """Return the name of a weight site's module within the network."""
    return f"weight/{tensor.replace('.', '/')}"
