"""Finds the dimensions of weights that read gated units, and multiplies gates into weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plasticnet.tools.lengths import with_kept_scale
from plasticnet.tools.shapes import along
from plasticnet.tools.torch_private import version
from plasticnet.units import InputUnits, Units, gate_offsets, gate_positions


@dataclass(frozen=True, eq=False)
class Reader:
    """One gated dimension of one parameter, and where its gates lie.

    Attributes:
        tensor: The name of the parameter.
        dim: The dimension.
        module: The name of the module that owns the parameter.
        owner: This module.
        axis: The axis of the module's first input that carries the units, counted from the end. None where the gates
            can only be multiplied into the parameter.
        per_sample: Whether gates may differ between samples here.
        units: For each position of the dimension, the index of its gate in the vector of all gates, shape (positions,).
            Where nothing gates a position, this is the index of the constant 1 at the end.
        features: For each position, the index of the gate of its feature, where the module has an input site.
        select: The features that are present, as indices into the full axis of the input. None where all are present.
        full: The length of the full axis.
        length: The length of a weight_norm that takes norms over this dimension, as in `Slice`, or None.
        at_birth: Whether the units are multiplied where they are born, as in `Consumer`.
    """

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
    length: tuple[str, int] | None = None
    at_birth: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the parameters that change where gates are folded: a weight_norm's length changes, too."""
        return (self.tensor,) if self.length is None else (self.tensor, self.length[0])

    def multiplier(self, z: Tensor) -> Tensor:
        """Return what each position is multiplied by, shape (..., positions).

        Args:
            z: The gates, shape (..., units + 1), with a constant 1 at the end.
        """
        result = z.index_select(-1, self.units)
        return result if self.features is None else result * z.index_select(-1, self.features)


def readers(sites: Mapping[str, Units], model: nn.Module) -> list[Reader]:
    """Return a reader for every gated dimension of a parameter, in execution order."""
    offsets, _ = gate_offsets(sites)
    inputs = {u.consumers[0].tensor: u for u in sites.values() if isinstance(u, InputUnits)}
    shapes = dict(model.named_parameters())
    lengths = {(s.tensor, s.dim): s.length for u in sites.values() for s in u.slices if s.virtual is None}
    found: dict[tuple[str, int], Reader] = {}
    for consumer in dict.fromkeys(c for u in sites.values() for c in u.consumers):
        key = (consumer.tensor, consumer.dim)
        weight = shapes[consumer.tensor]
        feature = inputs.get(consumer.tensor)
        where = (feature.name, 0) if feature else key
        positions = gate_positions(sites, where, feature.full if feature else weight.shape[consumer.dim])
        per_sample = consumer.per_sample and consumer.axis is not None
        if key in found:  # the module is called several times, with inputs that may differ in rank or batch
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
            per_sample, torch.from_numpy(positions).to(device), features, select, full, lengths.get(key),
            consumer.at_birth,
        )  # fmt: skip
    return list(found.values())


def fold(parameters: Mapping[str, Tensor], found: list[Reader], z: Tensor) -> dict[str, Tensor]:
    """Return the weights of consumers multiplied by gates that the batch shares.

    Args:
        parameters: The parameters by name.
        found: The readers whose gates are folded into weights.
        z: The gates, shape (units + 1,), with a constant 1 at the end.

    Returns:
        The multiplied weights, by the name of the parameter, and the lengths of a weight_norm that changed with them.
    """
    folded: dict[str, Tensor] = {}
    for r in found:
        weight = folded.get(r.tensor, parameters[r.tensor])
        folded[r.tensor] = multiplied(weight, r.multiplier(z), r.dim)
    for tensor, length in {r.tensor: r.length for r in found if r.length is not None}.items():
        old = folded.get(length[0], parameters[length[0]])
        folded[tensor], folded[length[0]] = with_kept_scale(parameters[tensor], folded[tensor], old, length[1])
    return folded


class Folded:
    """Weights that gates were multiplied into, kept for as long as neither changes."""

    def __init__(self) -> None:
        self._z: Tensor | None = None
        self._kept: dict[str, tuple[Tensor, int, Tensor]] = {}  # of each weight what it was made of, and its version

    def fold(self, parameters: Mapping[str, Tensor], found: list[Reader], z: Tensor) -> dict[str, Tensor]:
        """Return what `fold` of the readers does."""
        if self._z is None or not torch.equal(self._z, z):
            self._z, self._kept = z.clone(), {}
        names = {name for r in found for name in r.tensors}
        for name in names & self._kept.keys():
            of, then, _ = self._kept[name]
            if of is not parameters[name] or version(of) != then:
                del self._kept[name]
        stale = names - self._kept.keys()
        linked = {n for r in found if r.length is not None for n in r.tensors}
        stale |= linked if stale & linked else set()
        new = fold(parameters, [r for r in found if r.tensor in stale], z)
        self._kept |= {n: (parameters[n], version(parameters[n]), t) for n, t in new.items()}
        return {n: self._kept[n][2] for n in dict.fromkeys(name for r in found for name in r.tensors)}


def multiplied(t: Tensor, gates: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Return a tensor times gates, in the dtype of the tensor.

    The slopes of gates are sums over many entries. In half precision they would overflow where no entry does, so the
    product is then taken in the precision of the gates.

    Args:
        t: The tensor.
        gates: The gates, one dimension for each of ``dims``.
        dims: The dimensions of the tensor along which the gates lie.
    """
    if gates.requires_grad and t.is_floating_point() and t.dtype.itemsize < gates.dtype.itemsize:
        return (t * along(gates, dims, t.dim())).to(t.dtype)
    return t * along(gates.to(t.dtype), dims, t.dim())
