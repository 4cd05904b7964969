"""Finds the dimensions of weights that read gated units, and multiplies gates into weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plasticnet.tools.shapes import along
from plasticnet.units import InputUnits, Units, gate_offsets, gate_positions


@dataclass(frozen=True, eq=False)
class Reader:
    """One gated dimension of one parameter. ``units`` gives, for each of its positions, the index
    into the gates of all sites (the last one, which is always 1, where nothing gates it);
    ``features`` the same for the input site on top. ``select`` are the features present."""

    tensor: str
    dim: int
    module: str
    owner: nn.Module
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
    offsets, _ = gate_offsets(sites)
    inputs = {u.consumers[0].tensor: u for u in sites.values() if isinstance(u, InputUnits)}
    shapes = dict(model.named_parameters())
    found: dict[tuple[str, int], Reader] = {}
    for consumer in dict.fromkeys(c for u in sites.values() for c in u.consumers):
        key = (consumer.tensor, consumer.dim)
        weight = shapes[consumer.tensor]
        feature = inputs.get(consumer.tensor)
        where = (feature.name, 0) if feature else key
        positions = gate_positions(sites, where, feature.full if feature else weight.shape[consumer.dim])
        per_sample = consumer.per_sample and consumer.axis is not None
        if key in found:  # several calls of one module: they differ in rank or batch at most
            per_sample = per_sample and found[key].per_sample and found[key].axis == consumer.axis
        device = weight.device
        features = select = None
        if feature is not None:
            positions = positions[feature.features]
            features = torch.arange(feature.size, device=device) + offsets[feature.name]
            select = torch.from_numpy(feature.features).to(device) if feature.size < feature.full else None
        full = feature.full if feature else len(positions)
        found[key] = Reader(
            consumer.tensor, consumer.dim, consumer.module, model.get_submodule(consumer.module), consumer.axis,
            per_sample, torch.from_numpy(positions).to(device), features, select, full,
        )  # fmt: skip
    return list(found.values())


def fold(parameters: Mapping[str, Tensor], found: list[Reader], z: Tensor) -> dict[str, Tensor]:
    """The consumers' weights times gates that the batch shares, z of shape (units + 1,), by name."""
    folded: dict[str, Tensor] = {}
    for r in found:
        weight = folded.get(r.tensor, parameters[r.tensor])
        folded[r.tensor] = weight * along(r.multiplier(z).to(weight.dtype), r.dim, weight.dim())
    return folded
