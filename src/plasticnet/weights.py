"""Single weights as gates: a gate on every entry of a weight, shared by the batch.

They close entries within what the units leave open. `WeightSite` holds the logits of one weight, `Entries` which
units its rows and columns belong to, for what entries cost and for units that nothing reads any more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from plasticnet.errors import PlasticError
from plasticnet.gates import INITIAL_LOGIT, probability
from plasticnet.gating import Gating, gate_offsets, gate_positions
from plasticnet.snapshot import duplicate, sharing, side_effect_free
from plasticnet.tracing import copy_inputs
from plasticnet.trees import tensors_within
from plasticnet.units import BlockUnits, InputUnits, Units

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet


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


def mean_weights(net: PlasticNet) -> Mapping[str, Tensor] | None:
    """`WeightSite.mean_gate` by name, or None where all are 1. On a GPU this is kept until a gate changes: asking would
    mean waiting."""
    weights = net._weights()
    if not weights:
        return None
    key = (net.k, *((id(w.phi), w.phi._version) for w in weights)) if net._like.is_cuda else None
    if key is None or net._mean_of_weights is None or net._mean_of_weights[0] != key:
        all_open = math.isinf(net.k) and all(bool(w.open.all()) for w in weights)
        net._mean_of_weights = (key, None if all_open else {w.name: w.mean_gate(net.k) for w in weights})
    return net._mean_of_weights[1]


def open_weights(net: PlasticNet) -> np.ndarray:
    """Which single weights are open, of all that have gates: a boolean mask, shape (weights,)."""
    return np.concatenate([np.zeros(0, dtype=bool), *(w.open.flatten().cpu().numpy() for w in net._weights())])


# -- which weights ----------------------------------------------------------------------------


def gateable(
    model: nn.Module, patterns: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """The weights of the modules whose name matches, and those that cannot be gated, with the reason.

    Raises `PlasticError` for a pattern that matches no module with a weight of two or more dimensions.
    """
    modules = {name: m for name, m in model.named_modules() if _has_matrix(m)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise PlasticError(
                f"weights={pattern!r} matches no module with a weight of two or more dimensions; these have one: "
                f"{', '.join(modules) or 'none'}"
            )
    places: dict[int, list[str]] = {}
    for name, m in model.named_modules():
        for leaf, p in m._parameters.items():
            places.setdefault(id(p), []).append(f"{name}.{leaf}".removeprefix("."))
    found: list[str] = []
    frozen: dict[str, str] = {}
    for name, m in modules.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            tensor = f"{name}.weight".removeprefix(".")
            reason = _reason(m, places.get(id(m._parameters.get("weight")), []))
            if reason:
                frozen[tensor] = reason
            else:
                found.append(tensor)
    for name, m in model.named_modules():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            others = [leaf for leaf, p in m._parameters.items() if leaf != "weight" and p is not None and p.dim() > 1]
            reason = 'only parameters of the name "weight" are gated entry by entry'
            frozen.update({f"{name}.{leaf}".removeprefix("."): reason for leaf in others})
    if _masking_differs(model, found, args, kwargs):
        wrong = [t for t in found if _masking_differs(model, [t], args, kwargs)] or found
        frozen.update(dict.fromkeys(wrong, "closing its entries is not what zeros in it are: something else reads it"))
        found = [t for t in found if t not in wrong]
    return found, frozen


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight.dim() > 1 if weight is not None else _computed(module)


def _computed(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight") or isinstance(module.__dict__.get("weight"), Tensor)


def _reason(module: nn.Module, places: list[str]) -> str:
    """Why the weight of a module cannot be gated, or nothing."""
    weight = module._parameters.get("weight")
    if weight is None:
        return "the weight is computed from other parameters"
    if not weight.is_floating_point():
        return f"the weight is {weight.dtype}: neither half, single nor double precision"
    if len(places) > 1:
        return f"the weight is shared: {', '.join(places)}"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "the weight is a table to look rows up in: nothing is multiplied by its entries"
    return ""


def _masking_differs(model: nn.Module, names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether gates that are 0 at random give other outputs than zeros in these weights."""
    parameters = dict(model.named_parameters())
    if not names or any(t.is_meta for t in (*parameters.values(), *model.buffers())):
        return False
    with side_effect_free(model):
        masks = {n: torch.rand_like(parameters[n]).round() for n in names}
        zeros = {id(parameters[n]): nn.Parameter(parameters[n] * m) for n, m in masks.items()}
        masked, zeroed = sharing(model).eval(), duplicate(model, lambda p: zeros.get(id(p), p)).eval()
        gating = Gating({}, masked, names)
        one = torch.ones(1, device=next(iter(masks.values())).device)
        inputs = [copy_inputs((args, kwargs)) for _ in range(2)]
        found = tensors_within(gating.run(one, *inputs[0], all_open=True, weights=masks))
        expected = tensors_within(zeroed(*inputs[1][0], **inputs[1][1]))
    pairs = zip(found, expected, strict=True)
    return not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs)


# -- entries and units ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of one gated weight. ``gates`` has, for each dimension along which units lie, for every position the
    index of its unit's gate in those of all sites (the last one, which is always 1, where there is none), and of
    the gate of its feature. ``diagonal`` are the places of a matrix whose row and column are of the same unit."""

    name: str
    shape: torch.Size
    gates: Mapping[int, list[Tensor]]
    diagonal: tuple[Tensor, Tensor] | None
    block: int | None

    def lengthwise(self, dim: int, z: Tensor) -> Tensor:
        """What the units do to each position of a dimension; z has shape (units + 1,)."""
        first, *more = (z.index_select(0, index) for index in self.gates[dim])
        return first * more[0] if more else first

    def expected(self, pi: Tensor, z: Tensor) -> Tensor:
        """How many entries are expected to be open, a scalar, for their probabilities, shape (entries,), and those of
        all units and a 1 behind them."""
        other = [d for d in range(len(self.shape)) if d not in self.gates]
        left = pi.view(self.shape).sum(other) if other else pi.view(self.shape)
        total = left
        for dim in sorted(self.gates, reverse=True):
            total = total @ self.lengthwise(dim, z)
        if self.diagonal is not None:  # a gate times itself is that gate
            one = z.index_select(0, self.gates[min(self.gates)][0].index_select(0, self.diagonal[0]))
            total = total + (left[self.diagonal] * one * (1 - one)).sum()
        return total if self.block is None else total * z[self.block]

    def reached(self, z: Tensor, but: int | None = None) -> Tensor:
        """The entries whose units are open in z, boolean, (units + 1,): a mask of the weight's shape, or one that
        broadcasts to it; whatever the dimension ``but`` says."""
        mask = torch.ones([1] * len(self.shape), dtype=torch.bool, device=z.device)
        for dim in self.gates:
            if dim != but:
                shape = [1] * len(self.shape)
                shape[dim] = -1
                mask = mask & self.lengthwise(dim, z).reshape(shape)
        return mask if self.block is None else mask & z[self.block]


def entries(sites: Mapping[str, Units], model: nn.Module, names: Iterable[str]) -> list[Entries]:
    """What `Entries` says, for the weights of these names."""
    parameters = dict(model.named_parameters())
    starts, one = gate_offsets(sites)
    found: list[Entries] = []
    for name in names:
        weight = parameters[name]
        device = torch.device("cpu") if weight.is_meta else weight.device
        gates: dict[int, list[Tensor]] = {}
        for dim, length in enumerate(weight.shape):
            features = next((u for u in sites.values() if isinstance(u, InputUnits) and _lies(u, name, dim)), None)
            if features is not None:
                own = starts[features.name] + torch.arange(features.size)
                producers = gate_positions(sites, (features.name, 0), features.full)[features.features]
                gates[dim] = [torch.from_numpy(producers).to(device), own.to(device)]
            elif any(_lies(u, name, dim) for u in sites.values()):
                gates[dim] = [torch.from_numpy(gate_positions(sites, (name, dim), length)).to(device)]
        block = None
        for site, u in sites.items():
            if isinstance(u, BlockUnits) and (i := u.inside(name)) is not None:
                block = starts[site] + i
        found.append(Entries(name, weight.shape, gates, _diagonal(gates, one), block))
    return found


def _lies(u: Units, tensor: str, dim: int) -> bool:
    return any((s.tensor, s.dim) == (tensor, dim) for s in u.slices)


def _diagonal(gates: Mapping[int, list[Tensor]], one: int) -> tuple[Tensor, Tensor] | None:
    plain = [index[0] for _, index in sorted(gates.items()) if len(index) == 1]
    if len(plain) < 2 or len(gates) != 2:
        return None
    rows, columns = ((plain[0][:, None] == plain[1]) & (plain[0][:, None] != one)).nonzero(as_tuple=True)
    return (rows, columns) if len(rows) else None


def read(net: PlasticNet, z: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """Of the open units, a mask (units,), those that something reads where only these entries of weights are open. The
    others contribute nothing. A unit that only such units read is not read either."""
    if not len(z):
        return z
    now, entries = torch.cat([z, z.new_ones(1)]), {e.name: e for e in net._cost.entries}
    otherwise = [not s.units.consumers or bool(s.units.norms) for s in net._sites() for _ in range(len(s))]
    kept = torch.tensor([*otherwise, True], device=z.device)  # what is read otherwise than by weights
    while True:
        alive = kept.clone()
        for r in net._gating.readers:
            here = now.new_ones(len(r.units))
            if r.tensor in masks:
                left = masks[r.tensor] & entries[r.tensor].reached(now, but=r.dim)
                here = left.movedim(r.dim, 0).flatten(1).any(1)
            if r.features is not None:
                here = here & now[r.features]
                alive[r.features[here]] = True
            alive[r.units[here]] = True
        if bool((now <= alive).all()):
            return now[:-1]
        now = now & alive
