"""Compaction: folds what the gates multiply, cuts what they close, and leaves a plain module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.gates.gated import GatedModel
from plasticnet.gates.readers import fold, readers
from plasticnet.layers.attention import unfuse_encoders
from plasticnet.layers.experts import remove_expert
from plasticnet.layers.record import RECORD
from plasticnet.layers.skip import remove_block
from plasticnet.layers.take import Take, insert_take
from plasticnet.surgery.plan import Plan, lengths, plan_resize
from plasticnet.surgery.rewrite import apply_plan, replace_tensors
from plasticnet.surgery.survivors import alive, check_multiple, read_units, survivors
from plasticnet.tools.sharding import as_whole
from plasticnet.tools.snapshot import duplicate
from plasticnet.units import BlockUnits, ExpertUnits, InputUnits, Units, is_skipped


def compacted(net: GatedModel, multiple_of: int | None) -> nn.Module:
    """Return a compact copy of a network's model, plain and in evaluation mode.

    Closed units are cut, the mean gates of the others are multiplied into the weights that read them, and single
    weights that are closed are zeros.

    Args:
        net: The network.
        multiple_of: What widths are to be a multiple of, as in `survivors`; None for ``net.multiple_of``.

    Raises:
        PlasticError: ``multiple_of`` is not a whole number from 1 on, or modules of the model were replaced.
    """
    multiple_of = net.multiple_of if multiple_of is None else multiple_of
    check_multiple(multiple_of)
    net.check()
    with as_whole(net.model):
        small = duplicate(net.model).eval()
    sites = net.sites.values()
    best = {s.name: s.best.cpu().numpy() for s in sites}
    factors = {s.name: s.mean_gate(net.k) for s in sites}
    weights = net.mean_weights()
    if weights is not None:
        parameters = dict(small.named_parameters())
        with torch.no_grad():
            for name, z in weights.items():
                parameters[name].mul_(z.to(parameters[name].dtype))
        for s, left in zip(sites, read_units(net, {n: f > 0 for n, f in factors.items()}), strict=True):
            factors[s.name] = torch.where(left, factors[s.name], 0.0)
    return cut(small, {s.name: s.units for s in sites}, factors, best, multiple_of)


def cut(
    model: nn.Module,
    sites: Mapping[str, Units],
    factors: Mapping[str, Tensor],
    best: Mapping[str, np.ndarray] | None = None,
    multiple_of: int = 1,
) -> nn.Module:
    """Bring a model to its final form.

    Units whose factor is 0 are cut, and the other factors are multiplied into the weights that read the units. Closed
    blocks become a `Skip`, closed experts are taken out of their list, and the features that are left of a layer's
    input are selected by a `Take`. A site whose factors are all 0 keeps one unit, which is read with weights of zero;
    or several where a norm needs them, or a router.

    Args:
        model: The model, which is changed in place.
        sites: Its sites.
        factors: What is multiplied into the weights that read a unit, shape (units,) for each site.
        best: The units that stay in a site of which fewer would; by default the first one, or as many as norms need.
        multiple_of: What widths are to be a multiple of, as in `survivors`.

    Returns:
        The model.
    """
    values = {name: _kept(u, factors[name], (best or {}).get(name)) for name, u in sites.items()}
    gone, experts = list[str](), list[str]()
    for n, u in sites.items():
        if is_skipped(u):
            gone += _closed(u, values[n])
        elif isinstance(u, ExpertUnits) and u.listed:
            experts += _closed(u, values[n])
    sites = _without(sites, [*gone, *experts])
    for block in gone:
        remove_block(model, block)
    for expert in experts:
        remove_expert(model, expert)
    taken: list[str] = []
    if sites:
        unfuse_encoders(model)
        here = {name: values[name] for name in sites}
        sources = _counted_open(sites, here, survivors(sites, here, 0.0, multiple_of))
        with torch.random.fork_rng(devices=[]):  # because a plan may draw which feature comes back
            planned = plan_resize(sites, lengths(model), sources)
        apply_plan(model, planned, {})
        _fold_kept(model, planned, factors)
        taken = _insert_takes(model, planned)
    _remember(model, sites, taken, gone, experts)
    return model


def _closed(u: BlockUnits, factors: np.ndarray) -> list[str]:
    """Return the names of the blocks or experts whose factor is 0."""
    return [b for b, f in zip(u.blocks, factors, strict=True) if f == 0]


def _kept(u: Units, factors: Tensor, best: np.ndarray | None) -> np.ndarray:
    """Return the factors of units, with 1 for units that stay although they are closed, because too few are open.

    Args:
        u: The site.
        factors: The factors of its units, shape (units,).
        best: The units that stay then; by default the first ones.
    """
    f = factors.cpu().numpy().copy()
    if not is_skipped(u) and (f != 0).sum() < u.least:
        stay = np.arange(min(u.least, len(f))) if best is None else best
        f[stay[f[stay] == 0]] = 1.0
    return f


def _counted_open(
    sites: Mapping[str, Units], values: Mapping[str, np.ndarray], sources: Mapping[str, list[int]]
) -> dict[str, list[int]]:
    """Return the units that stay, without closed ones that a norm would count.

    A closed unit stays only for the last features of an input site, which must not become empty. There another feature
    takes the place of those of the unit: a closed one of a unit that stays, or one that was cut earlier. It is read
    with weights of zero, as they would be.

    Args:
        sites: All sites of the model.
        values: The factors of the units, shape (units,) for each site. At least one of each site is not 0.
        sources: The units that stay, for every site that loses some.
    """
    found = dict(sources)
    for name, u in sites.items():
        kept = found.get(name, range(u.size))
        opened = [i for i in kept if values[name][i]]
        if u.norms and len(opened) < len(kept):
            found[name] = opened
    if found != sources:
        masks = {n: np.isin(np.arange(u.size), found.get(n, range(u.size))) for n, u in sites.items()}
        for name, u in sites.items():
            if isinstance(u, InputUnits) and not (masks[name] & (there := alive(u, sites, masks))).any():
                found[name] = [int(there.argmax())] if there.any() else [-1]
    return found


def _fold_kept(model: nn.Module, planned: Plan, factors: Mapping[str, Tensor]) -> None:
    """Multiply the factors of the units that are left into the weights of a model that was cut."""
    kept = [
        factors[n][torch.from_numpy(planned.sources[n]).to(factors[n].device)] if n in planned.sources else factors[n]
        for n in planned.units
    ]
    z = torch.cat([*kept, kept[0].new_ones(1)])
    if bool((z != 1).any()):
        with torch.no_grad():
            parameters = dict(model.named_parameters(remove_duplicate=False))
            folded = fold(parameters, readers(planned.units, model), z)
            pairs = [(parameters[n], nn.Parameter(w, parameters[n].requires_grad)) for n, w in folded.items()]
            replace_tensors(model, pairs)


def _insert_takes(model: nn.Module, planned: Plan) -> list[str]:
    """Put a `Take` before every consumer that lost features, and return the names of these consumers."""
    taken: list[str] = []
    for u in planned.units.values():
        if isinstance(u, InputUnits) and (u.size < u.full):
            device = next(model.parameters()).device
            axis = u.consumers[0].axis
            assert axis is not None
            insert_take(model, u.consumers[0].module, Take(torch.from_numpy(u.features).to(device), axis))
            taken.append(u.consumers[0].module)
    return taken


def _remember(
    model: nn.Module, sites: Mapping[str, Units], taken: list[str], gone: list[str], experts: list[str]
) -> None:
    """Add what a cut did to the `RECORD` of the module."""
    record = getattr(model, RECORD, {"resized": [], "widths": [], "removed": []})
    inputs = {name for name, u in sites.items() if isinstance(u, InputUnits)}
    owned = {(s.tensor, s.dim) for u in sites.values() for s in u.slices if s.tensor not in inputs}
    resized = {(_renamed(tensor, taken), dim) for tensor, dim in [*owned, *map(tuple, record["resized"])]}
    widths = {(w.module, w.attribute) for u in sites.values() for w in u.widths} | set(map(tuple, record["widths"]))
    removed = {*record["removed"], *gone}
    new = {"resized": _sorted(resized), "widths": _sorted(widths), "removed": sorted(removed)}
    if lost := {*record.get("experts", []), *experts}:
        new["experts"] = sorted(lost)
    setattr(model, RECORD, new)


def _sorted(pairs: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    """Return the pairs as lists, in order, as JSON holds them."""
    return [list(pair) for pair in sorted(pairs)]


def _without(sites: Mapping[str, Units], gone: list[str]) -> dict[str, Units]:
    """Return the sites without everything in blocks that are gone, and without the sites of blocks themselves.

    Of sites of experts the rows of routers and the stacked parameters are left, which are cut like other units.
    """

    def stays(name: str) -> bool:
        return not any(f"{name}.".startswith(f"{block}.") for block in gone)

    left: dict[str, Units] = {}
    for name, u in sites.items():
        if isinstance(u, ExpertUnits):
            u = Units(name, u.size, u.slices, norms=u.norms, widths=u.widths, growable=False)
        elif isinstance(u, BlockUnits):
            continue
        slices = [s for s in u.slices if stays(s.tensor)]
        consumers = [c for c in u.consumers if stays(c.tensor)]
        if slices and (consumers or not u.consumers):
            norms = [n for n in u.norms if stays(n.tensor)]
            widths = tuple(w for w in u.widths if stays(w.module))
            left[name] = replace(u, slices=slices, consumers=consumers, norms=norms, widths=widths)
    return left


def _renamed(tensor: str, taken: list[str]) -> str:
    """Return the name of a tensor after `insert_take`."""
    owner, _, leaf = tensor.rpartition(".")
    return f"{owner}.1.{leaf}" if owner in taken else tensor
