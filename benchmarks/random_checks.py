"""What must hold of every random network: exact, or frozen with a reason; never a crash, never wrong in silence."""

from __future__ import annotations

import copy
import math
import re
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from random_compare import Arguments, Wrong, agree, differences, differs, leaves, outputs_of
from random_recipes import Recipe, build, examples, kinds_of
from torch import Tensor, nn
from torch.optim import Adam

import plasticnet as pn
from plasticnet.gates.gated import GatedModel

KS = (0.0, 0.5, 7.0, math.inf)
REFUSED = ("all features would be removed", "closed features were to be re-opened")  # resizes of input sites
COSTS = ("units", "parameters", "macs", {"macs": 1.0, "parameters": 0.5})


class Unfit(Exception):
    """The generator made a network that cannot be checked; the library is not to blame."""


class OutOfTime(BaseException):
    """The time limit of a network has passed; no handler of `Exception` catches this."""


class Progress:
    """Which step of the checks is running, and what was found on the way."""

    def __init__(self) -> None:
        self.step = "build"
        self.found: dict[str, Any] = {}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` when this context takes more seconds of the processor."""

    def ring(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check(
    recipe: Recipe, seconds: float = 10.0, lives: Callable[[Recipe, Progress], None] | None = None
) -> dict[str, Any]:
    """Check one network.

    Args:
        recipe: Its recipe.
        seconds: The time limit.
        lives: What the network goes through; by default `life`.

    Returns:
        A row with the ``status``: "ok", "refused" (nothing to gate), "wrong", "crash", "error" (the library refuses
        something after it has accepted the network), "timeout", or "unfit" (a fault of the generator); the ``step``
        that was running; ``what`` happened; and what was found on the way.
    """
    progress, begin = Progress(), time.perf_counter()
    status, what, trace = "ok", "", ""
    try:
        with time_limit(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (lives or life)(recipe, progress)
    except Unfit as error:
        status, what = "unfit", str(error)
    except Wrong as error:
        status, what = "wrong", str(error)
    except OutOfTime:
        status, what = "timeout", f"more than {seconds:.0f} s"
    except pn.PlasticError as error:
        attaching, what = progress.step == "attach", str(error)
        status = "error" if not attaching else "crash" if "does not run on" in what else "refused"
    except Exception as error:  # whatever it is, it is what this benchmark looks for
        status = "unfit" if progress.step == "build" else "crash"
        what, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    row = {"status": status, "step": progress.step, "what": what.strip()[:600], **progress.found}
    if trace:
        row["traceback"] = trace[-2500:]
    return {**row, "seconds": time.perf_counter() - begin}


def life(recipe: Recipe, progress: Progress) -> None:
    """Attach, close, cut, save, load, copy, train, resize and prune a network; raise where something is wrong."""
    rng = Random(recipe["seed"])
    inputs = [examples(recipe, batch, seed) for batch, seed in ((3, 1), (3, 2), (5, 3))]
    model = build(recipe)
    plain = copy.deepcopy(model)
    check_generator(model, inputs)

    progress.step = "attach"
    net = attach(recipe, model, inputs[0])
    progress.found |= {
        "sites": len(net.sites),
        "units": sum(len(site) for site in net.sites.values()),
        "weights": len(net.weights),
        "frozen": dict(net.frozen),
    }
    spare = attach(recipe, build(recipe), inputs[0])
    progress.step = "after attaching"
    if list(spare.sites) != list(net.sites) or dict(spare.frozen) != dict(net.frozen):
        raise Wrong("attaching to an equal network finds other sites, or freezes for other reasons")
    if not all(isinstance(r, str) and r for r in net.frozen.values()):
        raise Wrong(f"something is frozen without a reason: {dict(net.frozen)}")
    if any(re.search(r": \('|KeyError|IndexError|AssertionError", r) for r in net.frozen.values()):
        raise Wrong(f"an error of the library itself is the reason: {dict(net.frozen)}")
    check_untouched(plain, net.model)
    agree(plain.eval(), net.eval(), inputs)
    if recipe["minimum"] and net.sites:
        net.limit("*", minimum=0)

    for k in rng.sample(KS, 4):
        progress.step = f"compact at k={k:g}"
        net.k = k
        random_logits(net, rng)
        check_compact(net, inputs)
    check_copies(recipe, net, spare, inputs, progress, "")

    optimizer = Adam(net.param_groups(1e-3))
    net.k = rng.choice((0.0, 2.0, 2.0, 7.0, 7.0, math.inf))
    for i in range(3):
        progress.step = f"training step {i + 1} at k={net.k:g}"
        train(net, optimizer, inputs[i], rng)
    progress.step = f"compact after training at k={net.k:g}"
    check_compact(net, inputs)

    progress.step = f"resize at k={net.k:g}"
    resize(net, optimizer, rng)
    progress.step = f"training after resizing at k={net.k:g}"
    train(net, optimizer, inputs[1], rng)
    progress.step = f"compact after resizing at k={net.k:g}"
    check_compact(net, inputs)
    check_copies(recipe, net, spare, inputs, progress, " after resizing")

    progress.step = "prune"
    net.k = math.inf
    random_logits(net, rng)
    small, before = net.compact(), {n: len(s) for n, s in net.sites.items()}
    net.prune(0.5, optimizer)
    agree(small, net.eval(), inputs)
    left = [n for n, s in net.sites.items() if not isinstance(s.units, pn.BlockUnits) and not all_open(s, net)]
    if left:
        raise Wrong(f"closed units are left after prune in {left}")
    if any(len(s) > before[n] for n, s in net.sites.items()):
        raise Wrong("prune has added units")
    progress.step = "training after pruning"
    train(net, optimizer, inputs[2], rng)
    progress.step = "compact after pruning"
    check_compact(net, inputs)
    check_copies(recipe, net, spare, inputs, progress, " after pruning")


def all_open(site: pn.Site, net: pn.PlasticNet) -> bool:
    """Return whether every unit is open, or none but the one that every site keeps.

    A closed unit also stays where an input site has features of closed units only, because it must not become empty.
    """
    needed = torch.zeros(len(site), dtype=torch.bool)
    for s in site.units.slices:
        if s.virtual is not None:
            lost = s.index[~site.open.numpy()]
            features = net.sites[s.tensor].features.numpy()
            if np.isin(features, lost).all():
                needed |= torch.from_numpy(np.isin(s.index, features).any(1))
    left = int((~(site.open | needed)).sum())
    return left == 0 or (left == 1 and not bool(site.open.any()))


def check_generator(model: nn.Module, inputs: list[Arguments]) -> None:
    """Raise `Unfit` unless the model runs in both modes, is deterministic, and gives finite numbers."""
    for args, kwargs in inputs:
        once, again = (outputs_of(copy.deepcopy(model).eval(), (args, kwargs)) for _ in range(2))
        if differences(once, again, 0.0):
            raise Unfit("it is not deterministic")
        if not all(bool(torch.isfinite(t).all()) for t in once.values()):
            raise Unfit("its outputs are not finite")
        if not any(t.is_floating_point() and t.requires_grad for t in once.values()):
            raise Unfit("its outputs depend on no parameter")
        copy.deepcopy(model).train()(*copy.deepcopy(args), **copy.deepcopy(kwargs))


def attach(recipe: Recipe, model: nn.Module, example: Arguments) -> pn.PlasticNet:
    """Return the network with its gates."""
    options = dict(recipe["options"])
    example_inputs = example[1] or example[0]
    if "exclude" in options:
        draw = Random(options.pop("exclude"))
        without = pn.PlasticNet(copy.deepcopy(model), example_inputs, **options)
        names = list(without.sites)
        if names:
            options["exclude"] = draw.sample(names, draw.randint(1, max(1, len(names) - 1)))
    torch.manual_seed(recipe["seed"])
    return pn.PlasticNet(model, example_inputs, **options)


def check_untouched(plain: nn.Module, model: nn.Module) -> None:
    """Raise `Wrong` unless two modules have equal parameters and buffers."""
    ours, theirs = (dict([*m.named_parameters(), *m.named_buffers()]) for m in (plain, model))
    changed = [
        n for n in ours.keys() | theirs.keys() if n not in ours or n not in theirs or differs(ours[n], theirs[n])
    ]
    if changed:
        raise Wrong(f"attaching has changed {sorted(changed)[:5]}")


def check_compact(net: pn.PlasticNet, inputs: list[Arguments]) -> None:
    """Raise `Wrong` unless the compact module gives what the network gives in evaluation, call after call."""
    small = net.compact()
    if any(isinstance(m, GatedModel) for m in small.modules()) or small.training:
        raise Wrong("the compact module is not plain, or not in evaluation mode")
    agree(net.eval(), small, [inputs[0], inputs[0], *inputs[1:]])


def check_copies(
    recipe: Recipe, net: pn.PlasticNet, spare: pn.PlasticNet, inputs: list[Arguments], progress: Progress, when: str
) -> None:
    """Raise `Wrong` unless a copy, a file, and a state dict in the spare network give the same network."""
    copies = "Stores" not in set(kinds_of(recipe["nodes"]))  # torch does not copy what is stored with its graph
    progress.step = f"deepcopy{when}"
    twin = copy.deepcopy(net) if copies else None
    progress.step = f"save{when}"
    small = net.compact()
    with tempfile.TemporaryDirectory() as folder:
        pn.save(small, Path(folder) / "small.safetensors")
        progress.step = f"load{when}"
        loaded = pn.load(Path(folder) / "small.safetensors", lambda: build(recipe))
    agree(small, loaded, inputs)
    progress.step = f"load_state_dict{when}"
    fresh = copy.deepcopy(spare)
    fresh.load_state_dict(net.state_dict())
    agree(copy.deepcopy(net).eval() if copies else net.eval(), fresh.eval(), inputs)
    if twin is not None:
        progress.step = f"deepcopy{when}"
        agree(net.eval(), twin.eval(), inputs)


def random_logits(net: pn.PlasticNet, rng: Random) -> None:
    """Open and close units at random; now and then all of a site, or all but one."""
    with torch.no_grad():
        for gates in (*net.sites.values(), *net.weights.values()):
            phi = torch.empty_like(gates.phi)
            phi.normal_(0, 0.5)
            match rng.choice(("mixed",) * 7 + ("closed", "open", "one")):
                case "closed":
                    phi = -phi.abs() - 0.01
                case "open":
                    phi.abs_()
                case "one":
                    phi = -phi.abs() - 0.01
                    phi.view(-1)[rng.randrange(phi.numel())] = 0.4
            gates.phi.copy_(phi)


def resize(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, rng: Random) -> None:
    """Resize a network at random; what input sites cannot follow is refused, and drawn anew."""
    for _ in range(20):
        sources, init = random_sources(net, rng), rng.choice(("preserve", "random", "paper"))
        try:
            net.resize(sources, optimizer, init=init)
        except pn.PlasticError as error:
            if not any(reason in str(error) for reason in REFUSED):
                raise
        else:
            return


def random_sources(net: pn.PlasticNet, rng: Random) -> dict[str, list[int]]:
    """Draw for most sites which units stay, and how many are added."""
    sources = {}
    for name, site in net.sites.items():
        if isinstance(site.units, pn.BlockUnits) or rng.random() < 0.2:
            continue
        kept = sorted(rng.sample(range(len(site)), rng.randint(1, len(site))))
        room = site.units.full - len(site) if isinstance(site.units, pn.InputUnits) else 3
        new = rng.randint(0, min(3, room)) if site.units.growable else 0
        sources[name] = [*kept, *[-1] * new]
    return sources


def train(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, arguments: Arguments, rng: Random) -> None:
    """Take one step, with a penalty."""
    net.train()
    args, kwargs = arguments
    optimizer.zero_grad()
    loss = net.expected_loss(lambda: losses(net(*args, **kwargs), arguments))
    loss = loss + net.penalty(0.05, rng.choice(COSTS), rng.choice(("linear", "log")))
    loss.backward()
    optimizer.step()
    broken = [n for n, p in net.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise Wrong(f"no longer finite after a step: {broken[:5]}")
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    lost = [n for n, p in net.named_parameters() if id(p) not in held]
    if lost:
        raise Wrong(f"the optimizer does not hold {lost[:5]}")


def losses(output: Any, arguments: Arguments) -> Tensor:
    """Return a loss for each sample, or their mean where outputs are not one for each sample."""
    args, kwargs = arguments
    batch = len(args[0] if args else kwargs["x"])
    tensors = [t for t in leaves(output).values() if t.is_floating_point()]
    if all(t.dim() and len(t) == batch for t in tensors):
        return torch.stack([t.flatten(1).square().mean(1).log1p() for t in tensors]).sum(0)
    return torch.stack([t.square().mean().log1p() for t in tensors]).sum()
