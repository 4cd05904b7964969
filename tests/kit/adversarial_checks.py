"""What must hold of every adversarial network: closing, cutting, saving, training and growing agree."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils._pytree import tree_leaves, tree_map

import plasticnet as pn
from plasticnet.tools.snapshot import duplicate
from tests.kit.adversarial import Case
from tests.kit.generated import randomise


def outputs(tree: object) -> list[Tensor]:
    """The floating and complex tensors, detached."""
    leaves = [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
    found = [t.detach() for t in leaves if t.is_floating_point() or t.is_complex()]
    assert found
    return found


def distance(a: object, b: object) -> float:
    """The largest relative difference."""
    pairs = list(zip(outputs(a), outputs(b), strict=True))
    assert all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)
    return max(((x - y).abs().max() / x.abs().max().clamp_min(1e-300)).item() for x, y in pairs)


def precise(model: nn.Module) -> nn.Module:
    """Random, in double precision (complex tensors in double complex)."""
    complex_ones = any(t.is_complex() for t in [*model.parameters(), *model.buffers()])
    if not complex_ones:
        return randomise(model)
    return model._apply(lambda t: t.to(torch.complex128) if t.is_complex() else t.double())


def double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t.to(torch.complex128) if t.is_complex() else t


def close_units(net: pn.PlasticNet, share: float) -> None:
    """About this share of every site, an odd number open."""
    with torch.no_grad():
        for site in net.sites.values():
            gates = torch.rand(len(site)) >= share
            if int(gates.sum()) % 2 == 0:
                gates[int(torch.randint(len(site), ()))] ^= True
            site.phi.copy_((torch.rand(len(site)) * 0.5 + 0.1) * torch.where(gates, 1.0, -1.0))


def loss_of(tree: object, n: int) -> Tensor:
    """Per sample where every output is, else a scalar."""
    found = [t.abs().pow(2).double() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.dtype != torch.int64]
    if all(t.dim() and t.shape[0] == n for t in found):
        return torch.stack([t.flatten(1).sum(1) for t in found]).sum(0)
    return torch.stack([t.mean() for t in found]).sum()


def train(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, x: tuple[Tensor, ...]) -> None:
    net.train()
    optimizer.zero_grad()
    loss = net.expected_loss(lambda: loss_of(net(*x), len(x[0])).mean() / 100) + net.penalty(0.1, "macs", "log")
    loss.backward()
    optimizer.step()
    assert all(s.phi.grad is not None and torch.isfinite(s.phi.grad).all() for s in net.sites.values())
    assert all(torch.isfinite(p.abs()).all() for p in net.parameters())


def fits(net: pn.PlasticNet, exact: Mapping[str, int], frozen: Mapping[str, str]) -> bool:
    return {n: len(s) for n, s in net.sites.items()} == dict(exact) and all(
        n in net.frozen and re.search(reason, net.frozen[n]) for n, reason in frozen.items()
    )


def check_exact(net: pn.PlasticNet, x: tuple[Tensor, ...], full: object, tolerance: float = 1e-9) -> None:
    """Whatever is closed, compaction changes nothing; closing changes something."""
    for k, share in ((math.inf, 0.3), (math.inf, 0.8), (3.0, 0.5)):
        net.k = k
        close_units(net, share)
        masked = net.eval()(*x)
        assert distance(masked, net.compact()(*x)) <= tolerance
        closed = any(not bool(s.open.all()) for s in net.sites.values())
        assert not (closed or k == 3.0) or distance(full, masked) > 10 * tolerance


def check_expectation(case: Case) -> None:
    """The sites and the reasons are the expected ones, or the others that are right."""
    assert re.match(r"(Exact|Frozen)", case.why)
    net = pn.PlasticNet(case.factory(), case.inputs())
    found = {n: len(s) for n, s in net.sites.items()}, dict(net.frozen)
    assert fits(net, case.exact, case.frozen) or (case.otherwise and fits(net, *case.otherwise)), found


def check_life(factory: Callable[[], nn.Module], inputs: tuple[Tensor, ...], folder: Path) -> pn.PlasticNet:
    """Close, compact, save, load, train, cut and grow; returns the network."""
    x = tree_map(double, inputs)
    net = pn.PlasticNet(precise(factory()), x)
    full = net.eval()(*x)
    held = dict(net.model.named_parameters(remove_duplicate=False))
    check_exact(net, x, full)
    now = dict(net.model.named_parameters(remove_duplicate=False))
    assert all(now[n] is p for n, p in held.items()), "running the network replaced its parameters"

    small = net.compact()
    pn.save(small, folder / "small.safetensors")
    loaded = pn.load(folder / "small.safetensors", lambda: precise(factory()))
    assert distance(small(*x), loaded(*x)) <= 1e-12
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in small.state_dict().items())
    loss_of(small.train()(*x), len(x[0])).sum().backward()
    loss_of(net.model.train()(*x), len(x[0])).sum().backward()
    for (name, p), q in zip(small.named_parameters(), net.model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name

    check_hibernation(duplicate(net), x)
    optimizer = Adam(net.param_groups(1e-3))
    for init in ("preserve", "random"):
        net.k = 2.0
        train(net, optimizer, x)
        growable = {n: s.units.growable for n, s in net.sites.items()}
        sources = {n: [*range(1, len(s)), *[-1] * (2 * growable[n])] for n, s in net.sites.items() if len(s) > 1}
        net.resize(sources, optimizer, init=init)
        train(net, optimizer, x)
    check_exact(net, x, net.eval()(*x))
    return net


def check_hibernation(net: pn.PlasticNet, x: tuple[Tensor, ...]) -> None:
    """In training mode closed units are as good as gone, and pruning takes them."""
    net.k = math.inf
    close_units(net, 0.5)
    twin = duplicate(net).train()
    masked = twin(*x)
    net.train()
    net.prune()
    assert all(bool(s.open.all()) for s in net.sites.values())
    assert distance(masked, net(*x)) <= 1e-9
    assert distance(twin.eval()(*x), net.eval()(*x)) <= 1e-9
