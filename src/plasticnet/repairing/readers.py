"""Finds what is to be refitted: the parts of parameters that read closed units, in execution order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from plasticnet.gates.gated import GatedModel
from plasticnet.repairing.products import Place, overlap
from plasticnet.repairing.watching import Seen


@dataclass(frozen=True, eq=False)
class Reader:
    """A part of a parameter that is refitted.

    Attributes:
        place: The part.
        calls: How often it is multiplied with activations in a run.
        summed: Whether the result is added to other activations, such as a residual stream.
        inputs: Which of its inputs are open, shape (groups, inputs).
        outputs: Which of its outputs are open, or no units at all, shape (groups, outputs).
        bias: The part of a parameter that is added to the result, or None.
        shift: The part of a buffer, the running mean of a norm, that is subtracted from it, or None.
        recurrent: Whether its inputs are what its own layer has computed a step before, so that they change with it.
    """

    place: Place
    calls: int
    summed: bool
    inputs: Tensor
    outputs: Tensor
    bias: Place | None
    shift: Place | None
    recurrent: bool = False


def find_readers(net: GatedModel, seen: Seen) -> tuple[list[Reader], dict[str, str]]:
    """Return the readers of closed units, and why others are left out, by the name of the parameter.

    Where blocks are closed, whatever comes after them is a reader.

    Args:
        net: The network.
        seen: What was seen of its parameters in a run.
    """
    z = net.mean_gates()[0]
    blocks = any(bool(z[i] == 0) for _, i in net.gating.blocks)
    concerned = {r.tensor for r in net.gating.readers if not r.at_birth and not bool(r.multiplier(z).all())}
    parameters = dict(net.model.named_parameters())
    parts: dict[str, list[Place]] = {}
    for place in seen.places:
        parts.setdefault(place.tensor, []).append(place)
    reasons = {n: r for n in [*concerned, *parts] if (r := _reason(net, n, parts.get(n, []), seen, parameters[n]))}
    found = list[Reader]()
    for place, calls in seen.places.items():
        name = place.tensor
        if name in reasons or not (blocks or name in concerned):
            continue
        inputs, outputs = (place.matrices(place.of(mask)) for mask in _open_entries(net, name, parameters[name], z))
        if bool((inputs.any(2) != inputs.all(2)).any()):
            reasons[name] = "its gates are not those of its inputs"
            continue
        bias, shift = _constants(place, seen)
        summed = place in seen.sums and calls == 1
        recurrent = _recurrent(net, name)
        found.append(Reader(place, calls, summed, inputs.any(2), outputs.any(1), bias, shift, recurrent))
    return found, {n: r for n, r in reasons.items() if n in concerned}


def _reason(net: GatedModel, name: str, parts: list[Place], seen: Seen, parameter: Tensor) -> str | None:
    """Return why a parameter cannot be refitted, or None where it can."""
    if name in net.weights:
        return "single weights of it have gates"
    if not parameter.is_floating_point():
        return "its numbers are not real"
    if name in seen.otherwise:
        return f"it is read in another way, too ({seen.otherwise[name]})"
    if not parts:
        return "it is not multiplied with activations as it is"
    return "parts of it overlap" if len(parts) > 1 and overlap(parts, parameter) else None


def _recurrent(net: GatedModel, name: str) -> bool:
    """Return whether a parameter reads what its own layer has computed a step before."""
    owner, _, leaf = name.rpartition(".")
    return isinstance(net.model.get_submodule(owner), nn.RNNBase | nn.RNNCellBase) and leaf.startswith("weight_hh")


def _open_entries(net: GatedModel, name: str, parameter: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return which entries of a parameter read what is open, and which belong to outputs that are open.

    Args:
        net: The network.
        name: The name of the parameter.
        parameter: The parameter.
        z: The gates of all units, with a constant 1 at the end.
    """
    inputs, outputs = (torch.ones_like(parameter, dtype=torch.bool) for _ in range(2))
    for r in net.gating.readers:
        if r.tensor == name and not r.at_birth:
            inputs &= (r.multiplier(z) > 0).view([-1 if d == r.dim else 1 for d in range(parameter.dim())])
    for site in net.sites.values():
        closed = (~site.open & (site.grace == 0)).cpu().numpy()
        for s in site.units.slices:
            if s.tensor == name and not s.consumed and closed.any():
                index = torch.from_numpy(s.index[closed].reshape(-1)).to(parameter.device)
                outputs.index_fill_(s.dim, index, False)
    return inputs, outputs


def _constants(place: Place, seen: Seen) -> tuple[Place | None, Place | None]:
    """Return what may be changed to add a constant to a result: a bias, or else a running mean that is subtracted."""
    bias, shift = seen.biases.get(place), seen.shifts.get(place)
    if bias is not None and _only_here(bias, seen.biases) and bias.tensor not in seen.otherwise:
        return bias, None
    alone = shift is not None and _only_here(shift, seen.shifts) and seen.running[shift.tensor] == 1
    return None, shift if alone and seen.places[place] == 1 else None


def _only_here(constant: Place, known: Mapping[Place, Place]) -> bool:
    """Return whether a constant belongs to one part of a parameter only."""
    return sum(c.tensor == constant.tensor and c.offset == constant.offset for c in known.values()) == 1
