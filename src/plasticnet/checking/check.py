"""The self-check: finds out for which sites closing units and cutting them give the same outputs.

A copy of the model gets random parameters, random units of it are closed, and the outputs with closed units (masked)
are compared with those of a copy from which these units were cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from plasticnet.checking.compare import BLIND, DIFFERS, FINE, ROUGH, Comparing, Pattern
from plasticnet.checking.culprits import Comparison, Repair, culprits
from plasticnet.checking.experts import settled
from plasticnet.checking.reached import reaching, unsure
from plasticnet.checking.twins import in_precision, random_twin
from plasticnet.checking.widths import repaired
from plasticnet.surgery.plan import lengths, plan_resize
from plasticnet.surgery.rewrite import apply_plan
from plasticnet.tools.inputs import Call, is_large
from plasticnet.tools.precision import full_precision
from plasticnet.tools.snapshot import left_as_it_was, sharing
from plasticnet.units import BlockUnits, ExpertUnits, Trace, Units, without_lost_inputs

# Where closing units has no effect, the check is repeated with other random parameters, up to this many runs in all.
# That may happen by chance, for example where a ReLU gives only zeros.
_ATTEMPTS = 3
# Where a model sorts, rounding decides between values that are equal, so that masking and cutting may differ by chance.
# After a first difference, as many other random parameters are tried at most, and two that show none are believed.
_OTHERS = 4
_ROUTERS = 2  # under how many other random parameters experts are compared
_FEW, _MANY = 7, 32  # to how many units a site of a large model is cut at least and at most, for the precise comparison
CLOSED_SHARES = (0.3, 0.8)  # 0.3 alone would miss errors that show only when most units are gone


def self_check(
    model: nn.Module, traced: Trace, calls: Sequence[Call], step: Callable[[str], None] = lambda _: None
) -> Trace:
    """Check the sites of a trace, and freeze those for which masking and cutting disagree.

    A site that can be cut but not grown stays, with ``growable`` set to False. A site may also come back with
    attributes that must follow its width, or tied to sites of other layers (see `repaired`). The model is left as it
    was.

    Args:
        model: The model that was traced.
        traced: What tracing found.
        calls: How the model is called, the first time in evaluation mode.
        step: Called after each of the two parts of the check, with a few words on what comes next.

    Returns:
        The checked trace. On the meta device, where no outputs can be compared, it is the given one, with ``checked``
        False.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not traced.sites or any(t.is_meta for t in tensors):
        return traced
    # Autocast is off, because it rounds as half precision does.
    with left_as_it_was(model), full_precision(tensors[0].device.type):
        found = _without_chance(model, traced, calls, step) if traced.sorting else None
        found = found or _trial(model, traced, calls, 0, step)
        for seed in range(1, _ATTEMPTS):
            if BLIND in found.frozen.values():
                found = _trial(model, traced, calls, seed, step)
    return replace(found, frozen={**traced.frozen, **found.frozen}, checked=True)


def _without_chance(
    model: nn.Module, traced: Trace, calls: Sequence[Call], step: Callable[[str], None]
) -> Trace | None:
    """Return what a check finds if all sites pass it together, at once or after a first difference twice; else None.

    What is no difference of outputs, such as a model that does not run when it is cut, is not left to chance.
    """
    found = _trial(model, traced, calls, 0, step, _together)
    if not found.frozen:
        return found
    passed = 0
    for seed in range(1, 1 + _OTHERS) if DIFFERS.intersection(found.frozen.values()) else ():
        found = _trial(model, traced, calls, seed, step, _together)
        passed += not found.frozen
        if passed == 2:
            return found
    return None


def _together(differs: Comparison, sites: dict[str, Units], repair: Repair | None = None) -> dict[str, str]:
    """Return all sites if a comparison of them fails, each with the reason, without a search for the culprits."""
    reason = differs(sites) if sites else None
    return {} if reason is None else dict.fromkeys(sites, reason)


def _trial(
    model: nn.Module,
    traced: Trace,
    calls: Sequence[Call],
    seed: int,
    step: Callable[[str], None],
    culprits: Callable[..., dict[str, str]] = culprits,
) -> Trace:
    """Run the check once, with the random parameters and gates that follow from a seed, as ``culprits`` judges.

    A large model is compared once at full size, with most of its units closed. Then most units are cut from it, and
    everything else is done with this small model, which has the same layers and runs quickly.

    Returns:
        A trace whose ``sites`` are those that passed. Its ``frozen`` holds those that failed, each with the reason,
        and nothing else.
    """
    twin, calls = random_twin(model, calls, seed)
    sites = dict(traced.sites)
    if is_large(twin):
        all_alike = partial(_alike, share=CLOSED_SHARES[-1])
        rough = Comparing(twin, calls[:1], ROUGH, [all_alike], random=traced.random, vouch=False)
        sites, bad = settled(twin, rough.cut_differs, sites)
        bad |= culprits(rough.cut_differs, sites, partial(repaired, twin))
        del rough  # which holds the model at full size
        sites = without_lost_inputs({n: u for n, u in sites.items() if n not in bad})
        twin, current = _narrowed(twin, sites)
        calls, reached = reaching(twin, calls, sites, traced.steered)
        run = _precise(twin, calls, traced, [*_apart(current), _falling, _rising])
        bad |= culprits(run.cut_differs, dict(current))
    else:
        calls, reached = reaching(twin, calls, sites, traced.steered)
        patterns = [_falling, _rising, *_apart(sites), partial(_alike, share=CLOSED_SHARES[-1])]
        run = _precise(twin, calls, traced, patterns)
        others = partial(_other, model, calls, traced, patterns, seed)
        sites, bad = settled(run.model, _under_all(run, others), sites)
        current = sites
        bad |= culprits(run.cut_differs, sites, partial(repaired, run.model))
    bad |= unsure(sites, reached, bad)
    good = without_lost_inputs({n: sites[n] for n in traced.sites if n in sites and n not in bad})
    step("adding units")
    stuck = culprits(run.growth_differs, {n: current[n] for n in good})
    good = {n: replace(u, growable=u.growable and n not in stuck) for n, u in good.items()}
    for n in [n for n, u in good.items() if u.size == 1 and not u.growable and not isinstance(u, BlockUnits)]:
        bad[n] = "all its channels form a single unit, which can be neither cut nor added to"
        del good[n]
    step("single weights")
    return replace(traced, sites=without_lost_inputs(good), frozen={n: str(reason) for n, reason in bad.items()})


def _under_all(run: Comparing, others: Callable[[int], Comparing]) -> Comparison:
    """Return a comparison under several random parameters, which are drawn when they are first needed.

    Routers need it: their rows may be such that an expert whose place matters is hardly ever chosen.

    Args:
        run: The comparison under the first parameters.
        others: Returns the comparison under other ones, by their number from 1.
    """
    runs = [run]

    def differs(sites: Mapping[str, Units]) -> str | None:
        for i in range(1 + _ROUTERS):
            if i == len(runs):
                runs.append(others(i))
            reason = runs[i].cut_differs(sites)
            if reason is not None:
                return reason
        return None

    return differs


def _other(
    model: nn.Module, calls: Sequence[Call], traced: Trace, patterns: list[Pattern], seed: int, number: int
) -> Comparing:
    """Return the comparison under other random parameters, which does not ask that closing units moves the output.

    The biases of experts have both signs, as they do not have otherwise: closed experts contribute zeros, which hide
    among numbers that are all positive where a model takes the largest of what its experts say.
    """
    twin, calls = random_twin(model, calls, _ATTEMPTS + _OTHERS + seed * _ROUTERS + number)
    experts = [u for u in traced.sites.values() if isinstance(u, ExpertUnits)]
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name.endswith("bias") and p.is_floating_point() and any(u.inside(name) is not None for u in experts):
                p.sub_(1.0)
    run = _precise(twin, calls, traced, patterns)
    run.vouch = False
    return run


def _narrowed(model: nn.Module, sites: Mapping[str, Units]) -> tuple[nn.Module, dict[str, Units]]:
    """Return a copy of the model from which most units of every site were cut, and the sites of this copy."""
    kept = {
        n: sorted(torch.randperm(u.size)[: min(max(_FEW, u.size // 20), _MANY)].tolist())
        for n, u in sites.items()
        if not isinstance(u, BlockUnits)
    }
    small = sharing(model)
    planned = plan_resize(sites, lengths(small), kept)
    apply_plan(small, planned, {})
    return small, planned.units


def _precise(twin: nn.Module, calls: Sequence[Call], traced: Trace, patterns: list[Pattern]) -> Comparing:
    """Return the comparison in double precision, or in the model's own precision where it does not run in double."""
    if traced.positional:  # closing one unit shifts the others by one, which shows what takes units by their position
        patterns = [partial(_one_closed, place=0), partial(_one_closed, place=-1), *patterns]
    try:
        run = Comparing(*in_precision(twin, calls, torch.float64), FINE, patterns, traced.stateful, traced.random)
        run.reference = run.outputs(run.model)
    except Exception:  # a model may refuse double precision in any way; it is then compared in its own
        run = Comparing(twin, calls, ROUGH, patterns, traced.stateful, traced.random)
    run.keep_what_repeats()
    return run


def random_gates(units: int, share: float) -> Tensor:
    """Return random gates that close about a share of the units and leave an odd number of them open.

    The number is odd because an even one can agree by luck with a width that is hard-coded. Of three units two stay
    open at the smaller of the `CLOSED_SHARES`, because an axis with a single unit broadcasts, and that can hide an
    error. At the larger share a single unit may be left.

    Args:
        units: The number of units of a site.
        share: The share of the units to close, between 0 and 1.

    Returns:
        Gates of 0 and 1, shape (units,), of which at least one is 1.
    """
    count = round(units * (1 - share))
    if count % 2 == 0 and units != 3:
        count += 1 if count + 1 < units else -1
    gates = torch.zeros(units)
    gates[torch.randperm(units)[: max(count, 1)]] = 1.0
    return gates


def _alike(units: int, _: int, share: float) -> Tensor:
    """Return random gates that close about a share of the units, of as many in all sites of a size."""
    return random_gates(units, share)


def _falling(units: int, site: int) -> Tensor:
    """Return random gates of which fewer are open the later a site comes, and then as many as at first again.

    Were they as many in all sites of a size, and always an odd number, a model could read the width of one layer from
    another one, or halve the width of two layers together, without a difference.

    Args:
        units: The number of units of the site.
        site: The place of the site among those that are compared.
    """
    counts = _counts(units)
    gates = torch.zeros(units)
    gates[torch.randperm(units)[: counts[site % len(counts)]]] = 1.0
    return gates


def _counts(units: int) -> Sequence[int]:
    """Return how many units of a site are open under `_falling`, of the first site, the next, and so on."""
    most, least = (int(random_gates(units, share).sum()) for share in CLOSED_SHARES)
    return range(most, least - 1, -1) if most > 1 or units == 1 else (1, 2)


def _apart(sites: Mapping[str, Units]) -> list[Pattern]:
    """Return patterns that tell apart sites of a size of which `_falling` leaves equally many units open.

    The place of a site is written with as many digits as there are such numbers. `_falling` and `_rising` take the last
    digit, and each pair of patterns the one before it, until any two sites differ in one.
    """
    places: dict[int, list[int]] = {}
    for place, u in enumerate(sites.values()):
        if not isinstance(u, BlockUnits):
            places.setdefault(u.size, []).append(place)
    digits = 1
    for size, found in places.items():
        base = len(_counts(size))
        while base > 1 and len({place % base**digits for place in found}) < len(found):
            digits += 1
    return [partial(_by_digit, by=by, digit=digit) for digit in range(1, digits) for by in (_falling, _rising)]


def _by_digit(units: int, site: int, by: Pattern, digit: int) -> Tensor:
    """Return what a pattern does by another digit of the place of a site; see `_apart`."""
    return by(units, site // len(_counts(units)) ** digit)


def _rising(units: int, site: int) -> Tensor:
    """Return what `_falling` does in the other order, because a slice may be too short and never too long."""
    return _falling(units, -1 - site)


def _one_closed(units: int, _: int, place: int) -> Tensor:
    """Return gates of which only the one at ``place`` is 0; the only unit of a site stays open."""
    gates = torch.ones(units)
    if units > 1:
        gates[place] = 0.0
    return gates
