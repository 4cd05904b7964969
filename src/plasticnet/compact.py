"""Compaction: fold what the gates multiply, cut what they close, and leave a plain module."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet import resize
from plasticnet.attention import unfuse_encoders
from plasticnet.errors import PlasticError
from plasticnet.gating import Skip, fold, readers
from plasticnet.snapshot import duplicate
from plasticnet.units import BlockUnits, InputUnits, Units
from plasticnet.weights import mean_weights, read

if TYPE_CHECKING:
    from plasticnet.net import PlasticNet

# A compact module's plain record, for `save`: the dimensions that are not those of the original
# architecture ("resized"), attributes that were set for them ("widths"), and blocks that are gone ("removed").
RECORD = "_plasticnet"


class Take(nn.Module):
    """Selects features: ``x.index_select(axis, indices)``. Compaction puts it before a consumer whose
    input features were gated one by one."""

    indices: Tensor

    def __init__(self, indices: Tensor, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("indices", indices)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features, ...) to (..., len(indices), ...)."""
        return x.index_select(self.axis, self.indices)

    def extra_repr(self) -> str:
        """How many features are taken, and along which axis."""
        return f"{len(self.indices)}, axis={self.axis}"


def insert_take(model: nn.Module, consumer: str, take: Take) -> None:
    """Replace a module by ``Sequential(take, module)`` wherever the model holds it."""
    target = model.get_submodule(consumer)
    wrapped = nn.Sequential(take, target)
    wrapped.train(target.training)
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is target and module is not wrapped:
                module._modules[name] = wrapped


def compacted(net: PlasticNet, multiple_of: int) -> nn.Module:
    """See `PlasticNet.compact`."""
    check_multiple(multiple_of)
    small = duplicate(net.model).eval()
    sites = net._sites()
    best = {s.name: int(s.best) for s in sites}
    factors = {s.name: s.mean_gate(net.k) for s in sites}
    weights = mean_weights(net)
    if weights is not None:
        parameters = dict(small.named_parameters())
        with torch.no_grad():
            for name, z in weights.items():
                parameters[name].mul_(z.to(parameters[name].dtype))
        for s, left in zip(sites, _read(net, {n: f > 0 for n, f in factors.items()}), strict=True):
            factors[s.name] = torch.where(left, factors[s.name], 0.0)
    return cut(small, {s.name: s.units for s in sites}, factors, best, multiple_of)


def to_keep(net: PlasticNet, below: float, multiple_of: int) -> dict[str, list[int]]:
    """The units that `PlasticNet.prune` keeps, for every site that loses some."""
    if not isinstance(below, Real) or not 0 <= float(below) <= 1:
        raise PlasticError(f"below={below!r}: a probability, from 0 to 1")
    check_multiple(multiple_of)
    values = {s.name: s.probability(net.k).detach().cpu().numpy() for s in net._sites()}
    check_finite(net)
    floor = float(np.nextafter(np.float32(below), np.float32(-1)))
    if net._weights() and math.isinf(net.k):
        left = _read(net, {s.name: s.mean_gate(net.k) > 0 for s in net._sites()})
        for value, read_ in zip(values.values(), left, strict=True):
            value[~read_.cpu().numpy()] = 0.0
    for site in net._sites():
        if (values[site.name] > floor).sum() < site.minimum:
            values[site.name][site.likely(site.minimum)] = 1.0
    return survivors({s.name: s.units for s in net._sites()}, values, floor, multiple_of)


def check_finite(net: PlasticNet) -> None:
    """Raise `PlasticError` unless all logits are finite."""
    for g in net._gated():
        if not bool(torch.isfinite(g.phi).all()):
            raise PlasticError(f"{g.name!r}: its gates are not finite; go back to a checkpoint")


def _read(net: PlasticNet, opened: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """Of the open units of every site, those that open weights read."""
    if not opened:
        return []
    left = read(net, torch.cat(list(opened.values())), {w.name: w.open for w in net._weights()})
    return left.split([len(z) for z in opened.values()])


def lengths(model: nn.Module) -> dict[tuple[str, int], int]:
    """The size of every dimension of every parameter and buffer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {(name, d): n for name, t in tensors for d, n in enumerate(t.shape)}


def cut(
    model: nn.Module,
    sites: Mapping[str, Units],
    factors: Mapping[str, Tensor],
    best: Mapping[str, int] | None = None,
    multiple_of: int = 1,
) -> nn.Module:
    """Bring ``model`` (changed in place and returned) to its final form: the units whose factor is
    0 are cut, other factors are multiplied into the consumers' weights, input sites become `Take`.

    ``factors`` has shape (units,) per site. A site whose factors are all 0 keeps one unit, with
    weights of zero: the one in ``best``, or its first. ``multiple_of`` is that of `survivors`.
    """
    gone = [
        b
        for n, u in sites.items()
        if isinstance(u, BlockUnits)
        for b, f in zip(u.blocks, factors[n], strict=True)
        if f == 0
    ]
    sites = _without(sites, gone)
    for block in gone:
        remove_block(model, block)
    taken: list[str] = []
    if sites:
        unfuse_encoders(model)
        values = {name: factors[name].cpu().numpy().copy() for name in sites}
        for name, f in values.items():
            if not f.any():
                f[(best or {}).get(name, 0)] = 1.0
        planned = resize.plan(sites, lengths(model), survivors(sites, values, 0.0, multiple_of))
        resize.apply(model, planned, {})
        _fold_kept(model, planned, factors)
        taken = _insert_takes(model, planned)
    _remember(model, sites, taken, gone)
    return model


def _fold_kept(model: nn.Module, planned: resize.Plan, factors: Mapping[str, Tensor]) -> None:
    """Multiply the weights of a model that was cut by the factors of what is left."""
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
            resize.replace_tensors(model, pairs)


def _insert_takes(model: nn.Module, planned: resize.Plan) -> list[str]:
    """Put a `Take` before every consumer that lost features; returns these consumers."""
    taken: list[str] = []
    for u in planned.units.values():
        if isinstance(u, InputUnits) and (u.size < u.full):
            device = next(model.parameters()).device
            axis = u.consumers[0].axis
            assert axis is not None
            insert_take(model, u.consumers[0].module, Take(torch.from_numpy(u.features).to(device), axis))
            taken.append(u.consumers[0].module)
    return taken


def _remember(model: nn.Module, sites: Mapping[str, Units], taken: list[str], gone: list[str]) -> None:
    """Add to the module's `RECORD` what a cut did."""
    record = getattr(model, RECORD, {"resized": [], "widths": [], "removed": []})
    inputs = {name for name, u in sites.items() if isinstance(u, InputUnits)}
    owned = {(s.tensor, s.dim) for u in sites.values() for s in u.slices if s.tensor not in inputs}
    resized = {(_renamed(tensor, taken), dim) for tensor, dim in [*owned, *map(tuple, record["resized"])]}
    widths = {(w.module, w.attribute) for u in sites.values() for w in u.widths} | set(map(tuple, record["widths"]))
    removed = {*record["removed"], *gone}
    setattr(model, RECORD, {"resized": _sorted(resized), "widths": _sorted(widths), "removed": sorted(removed)})


def _sorted(pairs: Iterable[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(pair) for pair in sorted(pairs)]


def remove_block(model: nn.Module, name: str) -> None:
    """Put a `Skip` in the place of a block."""
    owner, _, key = name.rpartition(".")
    model.get_submodule(owner)._modules[key] = Skip()


def _without(sites: Mapping[str, Units], gone: list[str]) -> dict[str, Units]:
    """The sites, less whatever lies in blocks that are gone, and less the sites of blocks."""

    def stays(name: str) -> bool:
        return not any(f"{name}.".startswith(f"{block}.") for block in gone)

    left: dict[str, Units] = {}
    for name, u in sites.items():
        if isinstance(u, BlockUnits):
            continue
        slices = [s for s in u.slices if stays(s.tensor)]
        consumers = [c for c in u.consumers if stays(c.tensor)]
        if slices and (consumers or not u.consumers):
            norms = [n for n in u.norms if stays(n.tensor)]
            widths = tuple(w for w in u.widths if stays(w.module))
            left[name] = replace(u, slices=slices, consumers=consumers, norms=norms, widths=widths)
    return left


def _renamed(tensor: str, taken: list[str]) -> str:
    """The name of a tensor after `insert_take`."""
    owner, _, leaf = tensor.rpartition(".")
    return f"{owner}.1.{leaf}" if owner in taken else tensor


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
