"""Decides which units stay when a network is pruned, and finds the units that nothing reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.units import BlockUnits, InputUnits, Units


def to_keep(net: GatedModel, below: float, multiple_of: int) -> dict[str, list[int]]:
    """The units that `PlasticNet.prune` keeps, for every site that loses some."""
    if not isinstance(below, Real) or not 0 <= float(below) <= 1:
        raise PlasticError(f"below={below!r}: a probability, from 0 to 1")
    check_multiple(multiple_of)
    values = {s.name: s.probability(net.k).detach().cpu().numpy() for s in net.sites.values()}
    check_finite(net)
    floor = float(np.nextafter(np.float32(below), np.float32(-1)))
    if net.weights and math.isinf(net.k):
        left = read_units(net, {s.name: s.mean_gate(net.k) > 0 for s in net.sites.values()})
        for value, read_ in zip(values.values(), left, strict=True):
            value[~read_.cpu().numpy()] = 0.0
    for site in net.sites.values():
        if (values[site.name] > floor).sum() < site.minimum:
            values[site.name][site.likely(site.minimum)] = 1.0
    return survivors({s.name: s.units for s in net.sites.values()}, values, floor, multiple_of)


def check_finite(net: GatedModel) -> None:
    """Raise `PlasticError` unless all logits are finite."""
    for g in net.all_gates():
        if not bool(torch.isfinite(g.phi).all()):
            raise PlasticError(f"{g.name!r}: its gates are not finite; go back to a checkpoint")


def read_units(net: GatedModel, opened: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """Of the open units of every site, those that open weights read."""
    if not opened:
        return []
    left = read(net, torch.cat(list(opened.values())), {w.name: w.open for w in net.weights.values()})
    return left.split([len(z) for z in opened.values()])


def check_multiple(multiple_of: int) -> None:
    """Raise `PlasticError` unless this is a whole number from 1 on."""
    if type(multiple_of) is not int or multiple_of < 1:
        raise PlasticError(
            f"multiple_of={multiple_of!r}: widths are multiples of a whole number, 1 or more (such as 8)"
        )


def survivors(
    sites: Mapping[str, Units], values: Mapping[str, np.ndarray], above: float, multiple_of: int = 1
) -> dict[str, list[int]]:
    """For every site the units whose value exceeds ``above`` (the best one, if none does); without
    the units whose features are all gone. Then, for widths that are multiples of ``multiple_of``, the
    next best ones, where a site has as many."""
    sites = {name: u for name, u in sites.items() if not isinstance(u, BlockUnits)}  # `cut` removes those
    keep = {name: _best(values[name], values[name] > above) for name in sites}
    for name, u in sites.items():
        virtual = [s for s in u.slices if isinstance(sites.get(s.tensor), InputUnits)]
        if virtual and {c.tensor for c in u.consumers} == {sites[s.tensor].consumers[0].tensor for s in virtual}:
            read = np.zeros(u.size, dtype=bool)
            for s in virtual:
                features = sites[s.tensor]
                assert isinstance(features, InputUnits)
                present = np.isin(np.arange(features.full), features.features[keep[s.tensor]])
                read |= present[s.index].any(1)
            keep[name] = _best(np.where(read, values[name], values[name] - 2.0), keep[name] & read)
    inputs = {name: u for name, u in sites.items() if isinstance(u, InputUnits)}
    for name, u in inputs.items():  # one feature at least needs its producer
        if not alive(u, sites, keep).any():
            position = u.features[np.argmax(values[name])]
            for other, producer in sites.items():
                for s in producer.slices:
                    if s.tensor == name:
                        keep[other] = keep[other] | (s.index == position).any(1)
    for name in sites.keys() - inputs.keys():
        keep[name] = _padded(sites[name], values[name], keep[name], np.ones_like(keep[name]), multiple_of)
    for name, u in inputs.items():
        there = alive(u, sites, keep)
        keep[name] = _best(np.where(there, values[name], values[name] - 2.0), keep[name] & there)
        keep[name] = _padded(u, values[name], keep[name], there, multiple_of)
    return {name: np.flatnonzero(mask).tolist() for name, mask in keep.items() if not mask.all()}


def alive(u: InputUnits, sites: Mapping[str, Units], keep: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which features of an input site have a producer that stays."""
    there = np.ones(u.full, dtype=bool)
    for name, producer in sites.items():
        for s in producer.slices:
            if s.tensor == u.name:
                there[s.index[~keep[name]].reshape(-1)] = False
    return there[u.features]


def _padded(u: Units, values: np.ndarray, keep: np.ndarray, there: np.ndarray, multiple_of: int) -> np.ndarray:
    """``keep`` with the best others of those that are ``there``, up to the next multiple, if they suffice."""
    # A head, say, is many entries wide: fewer heads make a multiple.
    step = multiple_of // math.gcd(multiple_of, *(s.index.shape[1] for s in u.slices))
    missing = -int(keep.sum()) % step
    spare = np.flatnonzero(there & ~keep)
    if missing > len(spare) or u.norms:  # closed units would count in the statistics of a norm
        return keep
    keep = keep.copy()
    keep[spare[np.argsort(-values[spare], kind="stable")[:missing]]] = True
    return keep


def _best(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if not mask.any():
        mask = np.arange(len(values)) == int(np.argmax(values))
    return mask


def read(net: GatedModel, z: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """Of the open units, a mask (units,), those that something reads where only these entries of weights are open. The
    others contribute nothing. A unit that only such units read is not read either."""
    if not len(z):
        return z
    now, entries = torch.cat([z, z.new_ones(1)]), {e.name: e for e in net.cost.entries}
    otherwise = [not s.units.consumers or bool(s.units.norms) for s in net.sites.values() for _ in range(len(s))]
    kept = torch.tensor([*otherwise, True], device=z.device)  # what is read otherwise than by weights
    while True:
        alive = kept.clone()
        for r in net.gating.readers:
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
