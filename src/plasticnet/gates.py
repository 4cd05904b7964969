"""Gates: the logits of every site, their probabilities, and how consumers are multiplied by them.

A gate multiplies what the consumers of its unit read. Gates that differ between samples multiply
the activation, in a hook that lives for one forward pass; gates that the whole batch shares are
folded into the consumers' weights. `compact` folds by the same function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.units import InputUnits, Units

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

    def __len__(self) -> int:
        return self.units.size

    def probability(self, k: float) -> Tensor:
        """The probability of each gate, with those in their grace period at 1."""
        return torch.where(self.grace > 0, 1.0, probability(self.phi, k))

    def mean_gate(self, k: float) -> Tensor:
        """The gates at evaluation: pi where pi >= 1/2, else 0."""
        pi = self.probability(k).detach()
        return torch.where(self.open | (self.grace > 0), pi, 0.0)

    def extra_repr(self) -> str:
        """Name and number of units."""
        return f"{self.name!r}, units={len(self)}"


@dataclass(frozen=True, eq=False)
class Reader:
    """One gated dimension of one parameter. ``units`` gives, for each of its positions, the index
    into the gates of all sites (the last one, which is always 1, where nothing gates it);
    ``features`` the same for the input site on top. ``select`` are the features present."""

    tensor: str
    dim: int
    module: str
    axis: int | None
    per_sample: bool
    units: Tensor
    features: Tensor | None
    select: Tensor | None
    full: int

    def multiplier(self, z: Tensor) -> Tensor:
        """What each position is multiplied by: (..., positions) from gates (..., units + 1)."""
        result = z.index_select(-1, self.units)
        return result if self.features is None else result * z.index_select(-1, self.features)


def readers(sites: Mapping[str, Units], model: nn.Module) -> list[Reader]:
    """Every gated (parameter, dimension), in execution order."""
    offsets = dict(zip(sites, np.cumsum([0, *(u.size for u in sites.values())]).tolist(), strict=False))
    one = sum(u.size for u in sites.values())
    inputs = {u.consumers[0].tensor: u for u in sites.values() if isinstance(u, InputUnits)}
    shapes = dict(model.named_parameters())
    found: dict[tuple[str, int], Reader] = {}
    for consumer in dict.fromkeys(c for u in sites.values() for c in u.consumers):
        key = (consumer.tensor, consumer.dim)
        weight = shapes[consumer.tensor]
        feature = inputs.get(consumer.tensor)
        where = (feature.name, 0) if feature else key
        positions = np.full(feature.full if feature else weight.shape[consumer.dim], one)
        for name, u in sites.items():
            for s in u.slices:
                if (s.tensor, s.dim) == where:
                    positions[s.index] = offsets[name] + np.arange(u.size)[:, None]
        per_sample = consumer.per_sample and consumer.axis is not None
        if key in found:  # several calls of one module: they differ in rank or batch at most
            per_sample = per_sample and found[key].per_sample and found[key].axis == consumer.axis
        device = weight.device
        features = select = None
        if feature is not None:
            positions = positions[feature.features]
            features = torch.arange(feature.size, device=device) + offsets[feature.name]
            select = torch.from_numpy(feature.features).to(device) if feature.size < feature.full else None
        found[key] = Reader(
            consumer.tensor, consumer.dim, consumer.module, consumer.axis, per_sample,
            torch.from_numpy(positions).to(device), features, select, feature.full if feature else len(positions),
        )  # fmt: skip
    return list(found.values())


def per_sample_sites(sites: Mapping[str, Units], found: list[Reader]) -> dict[str, bool]:
    """Whether each site can draw once per sample: all its readers see samples as rows."""
    bad = {(r.tensor, r.dim) for r in found if not r.per_sample}
    return {
        name: not any((c.tensor, c.dim) in bad for c in u.consumers) and bool(u.consumers) for name, u in sites.items()
    }


def fold(model: nn.Module, found: list[Reader], z: Tensor) -> dict[str, Tensor]:
    """The consumers' weights times gates that the batch shares, z of shape (units + 1,), by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    folded: dict[str, Tensor] = {}
    for r in found:
        weight = folded.get(r.tensor, parameters[r.tensor])
        shape = [1] * weight.dim()
        shape[r.dim] = -1
        folded[r.tensor] = weight * r.multiplier(z).to(weight.dtype).reshape(shape)
    return folded


@contextmanager
def gated(model: nn.Module, found: list[Reader], z: Tensor | None) -> Iterator[None]:
    """Within this context the consumers' inputs are selected (input sites) and multiplied by
    per-sample gates ``z`` of shape (batch, units + 1), if any."""
    handles = []
    for r in found:
        if r.select is not None or z is not None:
            multiplier = None if z is None else r.multiplier(z)
            handles.append(model.get_submodule(r.module).register_forward_pre_hook(_hook(r, multiplier)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(reader: Reader, multiplier: Tensor | None) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x: Tensor = args[0]
        assert reader.axis is not None
        if reader.select is not None:
            x = x.index_select(reader.axis, reader.select)
        if multiplier is not None:
            if x.shape[0] != len(multiplier):
                raise PlasticError(
                    f"{reader.module} reads {x.shape[0]} rows, but gates were drawn for {len(multiplier)} samples; "
                    'construct PlasticNet with gates="batch"'
                )
            shape = [1] * x.dim()
            shape[0], shape[reader.axis] = len(multiplier), multiplier.shape[1]
            x = x * multiplier.to(x.dtype).reshape(shape)
        return (x, *args[1:])

    return hook
