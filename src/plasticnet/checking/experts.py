"""Finds out by trial how the experts of a mixture can be cut, and how many of them must stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import nn

from plasticnet.checking.compare import STOPS
from plasticnet.checking.culprits import Comparison
from plasticnet.tracing.experts import variants
from plasticnet.units import ExpertUnits, Units

_FLOORS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # how many experts may have to stay, as is tried
_BY_NAME = "; a closed expert is taken out of its dict: let forward go through the dict by .items() or .values()"


def settled(
    model: nn.Module, differs: Comparison, sites: Mapping[str, Units]
) -> tuple[dict[str, Units], dict[str, str]]:
    """Return sites whose experts are cut as comparisons say, and the sites for which nothing that was tried is right.

    A router may choose several experts for each row, and then as many must stay. This is found by cutting: the first
    of some numbers with which masking and cutting agree is the floor.

    Args:
        model: The model that is compared.
        differs: Returns why masking and cutting of some sites differ, or None.
        sites: The sites by name.

    Returns:
        The sites, and the reason for each that fails, by name.
    """
    found: dict[str, Units] = dict(sites)
    bad: dict[str, str] = {}
    for name, u in sites.items():
        if not isinstance(u, ExpertUnits):
            continue
        reason = differs({name: u})
        for choice in _choices(model, u, {n: v for n, v in sites.items() if v is not u}) if reason is not None else ():
            trouble = differs({name: choice})
            if trouble is None:
                found[name], reason = choice, None
                break
            same = _places(choice) == _places(u)  # the last of these has the highest floor, which tells most
            if not trouble.startswith(STOPS) or (same and reason is not None and reason.startswith(STOPS)):
                reason = trouble  # what runs comes nearer to the truth than what does not
        if reason is not None:
            kept = model.get_submodule(name.rpartition(".")[0])
            by_name = isinstance(kept, nn.ModuleDict) and reason.startswith(STOPS)
            bad[name] = f"{reason}{_BY_NAME}" if by_name else reason
            del found[name]
    return found, bad


def _places(u: ExpertUnits) -> tuple[object, ...]:
    """Return where experts lie, and what follows their number."""
    return (*((s.tensor, s.dim) for s in u.slices), *u.widths)


def _choices(model: nn.Module, u: ExpertUnits, others: Mapping[str, Units]) -> Iterator[ExpertUnits]:
    """Yield what a site of experts may be beside others, with every floor that is tried; the given site comes first."""
    for variant in variants(model, u.name.rpartition(".")[0], others):
        for least in (n for n in _FLOORS if n < u.size):
            norms = [replace(n, least=least) for n in variant.norms]
            yield replace(variant, norms=norms, sparse=u.sparse)
