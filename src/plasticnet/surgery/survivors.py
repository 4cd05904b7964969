"""Decides which units stay when a network is pruned, and finds the units that nothing reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.tools.reals import real, shown
from plasticnet.units import BlockUnits, InputUnits, Units


def to_keep(net: GatedModel, below: float, multiple_of: int) -> dict[str, list[int]]:
    """Return the units that `PlasticNet.prune` keeps, for every site that loses some.

    Args:
        net: The network.
        below: The probability below which a unit is cut.
        multiple_of: What widths are to be a multiple of.

    Raises:
        PlasticError: An option is out of range, or gates are not finite.
    """
    if (least := real(below)) is None or not 0 <= least <= 1:
        raise PlasticError(f"below={shown(below)}: a probability, from 0 to 1")
    check_multiple(multiple_of)
    net.check()
    values = {s.name: s.probability(net.k).detach().cpu().numpy() for s in net.sites.values()}
    check_finite(net)
    for site in net.sites.values():  # What sleeps has no say, and stays as it is.
        values[site.name][site.asleep.cpu().numpy()] = 1.0
    floor = float(np.nextafter(np.float32(least), np.float32(-1)))
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
    """Return which of the open units are read by an open weight, as a mask of shape (units,) for each site.

    Args:
        net: The network.
        opened: For each site a mask of its open units, shape (units,).
    """
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
    """Return the units that stay, for every site that loses some.

    The units whose value exceeds ``above`` stay, without channels whose features are all gone, unless a norm counts
    them, and without features whose channel is gone. A site in which no unit stays keeps its best one. Sites of blocks
    are left out.

    Args:
        sites: All sites of the model.
        values: The values of the units, shape (units,) for each site.
        above: The threshold.
        multiple_of: What widths are to be a multiple of. The next best units then stay too, in sites that have enough.
    """
    # Blocks are removed by `cut`.
    sites = {name: u for name, u in sites.items() if not isinstance(u, BlockUnits)}
    keep = {name: _best(values[name], values[name] > above) for name in sites}
    for name, u in sites.items():
        if by_features_only(u, sites):
            read = np.zeros(u.size, dtype=bool)
            for s in u.slices:
                if isinstance(features := sites.get(s.tensor), InputUnits):
                    present = np.isin(np.arange(features.full), features.features[keep[s.tensor]])
                    read |= present[s.index].any(1)
            keep[name] = _best(np.where(read, values[name], values[name] - 2.0), keep[name] & read)
    inputs = {name: u for name, u in sites.items() if isinstance(u, InputUnits)}
    for name, u in inputs.items():  # At least one feature must stay, and so must its producer.
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


def by_features_only(u: Units, sites: Mapping[str, Units]) -> bool:
    """Return whether the units of a site are read through gated features only, and so go when their features go.

    What a norm counts is read by the norm as well: without such a unit, its statistics would be others.

    Args:
        u: The site.
        sites: All sites of the model.
    """
    through = {sites[s.tensor].consumers[0].tensor for s in u.slices if isinstance(sites.get(s.tensor), InputUnits)}
    return bool(through) and {c.tensor for c in u.consumers} == through and not u.norms


def alive(u: InputUnits, sites: Mapping[str, Units], keep: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which features of an input site have a producer that stays, or have none, as a mask of shape (units,).

    Args:
        u: The input site.
        sites: All sites of the model.
        keep: Masks of the units that stay, shape (units,), by site.
    """
    there = np.ones(u.full, dtype=bool)
    for name, producer in sites.items():
        for s in producer.slices:
            if s.tensor == u.name:
                there[s.index[~keep[name]].reshape(-1)] = False
    return there[u.features]


def units_of_multiple(u: Units, multiple_of: int) -> int:
    """Return by how many units the number of a site's units must be divisible, so that its widths are multiples.

    Where a unit is several entries wide, as a head is, fewer units make a multiple.
    """
    return multiple_of // math.gcd(multiple_of, *(s.index.shape[1] for s in u.slices))


def _padded(u: Units, values: np.ndarray, keep: np.ndarray, there: np.ndarray, multiple_of: int) -> np.ndarray:
    """Return which units stay so that a width is a multiple of a number.

    Args:
        u: The site.
        values: The values of its units, shape (units,).
        keep: The mask of the units that stay in any case.
        there: The mask of the units that could stay.
        multiple_of: The number.

    Returns:
        ``keep`` and the best of the other units up to the next multiple; ``keep`` alone where they do not suffice.
    """
    missing = -int(keep.sum()) % units_of_multiple(u, multiple_of)
    spare = np.flatnonzero(there & ~keep)
    if missing > len(spare) or u.norms:  # Closed units would count in a norm.
        return keep
    keep = keep.copy()
    keep[spare[np.argsort(-values[spare], kind="stable")[:missing]]] = True
    return keep


def _best(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a mask of units, or of the best unit alone where the mask is empty."""
    if not mask.any():
        mask = np.arange(len(values)) == int(np.argmax(values))
    return mask


def read(net: GatedModel, z: Tensor, masks: Mapping[str, Tensor]) -> Tensor:
    """Return which of the open units are read when only some entries of weights are open.

    The other units contribute nothing. A unit that only such units read counts as not read.

    Args:
        net: The network.
        z: The mask of the open units of all sites, shape (units,).
        masks: For each parameter whose entries have gates, the mask of its open entries.

    Returns:
        A mask of shape (units,).
    """
    if not len(z):
        return z
    now, entries = torch.cat([z, z.new_ones(1)]), {e.name: e for e in net.cost.entries}
    otherwise = [not s.units.consumers or bool(s.units.norms) for s in net.sites.values() for _ in range(len(s))]
    kept = torch.tensor([*otherwise, True], device=z.device)  # the units that are not read by weights only
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
