"""Training steps, plain and gated, by processor time: of all units, of a tenth of them, and how the cost grows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from cost_models import LENET, RESNET, Network
from torch import Tensor

from plasticnet import PlasticNet

BATCH, K = 128, 7.0
PENALTY = {"strength": 0.1, "cost": "parameters", "scale": "log"}
RATE = 1e-9  # of weights and gates: what is open must not change while it is measured
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
WIDTHS = (0.25, 0.5, 1, 2, 4, 8, 16)
BUILDS = 10
SLOT = 0.05  # seconds that a variant runs at a time, at least
BUDGET = {"steps": 120.0, "growth of cost": 15.0}  # seconds after which a comparison ends, if repeated three times

Step = Callable[[], None]


def timed(
    variants: Mapping[str, Callable[[], object]], repeats: int, budget: float = math.inf
) -> dict[str, dict[str, float]]:
    """Seconds of processor time of one call: median, quartiles, repeats.

    The variants take turns, each round beginning with another one. After ``budget`` seconds there are no
    more rounds, but three at least.
    """
    return {name: spread(values) for name, values in _rounds(variants, repeats, budget).items()}


def timed_anew(
    make: Callable[[], Mapping[str, Callable[[], object]]], repeats: int, budget: float = math.inf
) -> dict[str, dict[str, float]]:
    """`timed`, with all variants made anew `BUILDS` times: where a network lies in memory moves its step by
    several per cent."""
    seconds: dict[str, list[float]] = {}
    for _ in range(BUILDS):
        for name, values in _rounds(make(), math.ceil(repeats / BUILDS), budget / BUILDS).items():
            seconds.setdefault(name, []).extend(values)
    return {name: spread(values) for name, values in seconds.items()}


def _rounds(variants: Mapping[str, Callable[[], object]], repeats: int, budget: float) -> dict[str, list[float]]:
    calls: dict[str, int] = {}
    for name, run in variants.items():
        run()
        run()
        calls[name] = max(1, math.ceil(SLOT / _seconds(run, 1)))
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    begin = time.process_time()
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(_seconds(variants[name], calls[name]))
        if i >= 2 and time.process_time() - begin > budget:
            break
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and how many there are."""
    lower, _, upper = quantiles(values, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "lower": lower, "upper": upper, "repeats": len(values)}


def _seconds(run: Callable[[], object], calls: int) -> float:
    begin = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - begin) / calls


def plain_step(network: Network, widths: Sequence[int]) -> Step:
    """A training step of the hand-written network, with Adam."""
    model = network.make(*widths).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    x, y = network.data(BATCH)

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def gated(network: Network, full: Sequence[int], widths: Sequence[int]) -> tuple[PlasticNet, torch.optim.Adam]:
    """The network gated at its full widths, then brought to ``widths`` by `PlasticNet.resize`."""
    net = PlasticNet(network.make(*full), (network.data(2)[0],), gates=network.gates).train()
    optimizer = torch.optim.Adam(net.param_groups(lr=RATE, gate_lr=RATE))
    if tuple(widths) != tuple(full):
        net.resize(network.sources([(n, len(s)) for n, s in net.sites.items()], widths), optimizer)
    by_hand = {n: p.shape for n, p in network.make(*widths).named_parameters()}
    assert {n: p.shape for n, p in net.model.named_parameters()} == by_hand
    return net, optimizer


def gated_step(net: PlasticNet, optimizer: torch.optim.Optimizer, network: Network, penalty: bool = True) -> Step:
    """A training step as the README writes it, at the k that the network has now."""
    x, y = network.data(BATCH)
    k = net.k

    def losses() -> Tensor:
        return F.cross_entropy(net(x), y, reduction="none")

    def step() -> None:
        net.k = k
        loss = net.expected_loss(losses)
        if penalty:
            loss = loss + net.penalty(**PENALTY)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def at(k: float, network: Network, widths: Sequence[int], penalty: bool = True) -> Step:
    """`gated_step` of a new network at this k."""
    net, optimizer = gated(network, network.widths, widths)
    net.k = k
    return gated_step(net, optimizer, network, penalty)


def steps(repeats: int) -> list[dict[str, Any]]:
    """A row for LeNet-5 and ResNet-20, with all units and with 10 % of them open."""
    rows = []
    for network in (LENET, RESNET):

        def make(network: Network = network) -> dict[str, Callable[[], object]]:
            variants = {"plain again": plain_step(network, network.widths)}  # differs from "plain 100" by noise only
            for percent in (100, 10):
                widths = network.share(percent / 100)
                variants |= {
                    f"plain {percent}": plain_step(network, widths),
                    f"stage 2 {percent}": at(K, network, widths),
                    f"infinity {percent}": at(math.inf, network, widths),
                    f"infinity, no penalty {percent}": at(math.inf, network, widths, penalty=False),
                }
            return variants

        rows.append({"network": network.name, "seconds": timed_anew(make, repeats, BUDGET["steps"])})
        print(network.name, {n: f"{1000 * t['median']:.1f} ms" for n, t in rows[-1]["seconds"].items()}, flush=True)
    return rows


def growth_of_cost(repeats: int) -> list[dict[str, Any]]:
    """A row for each share of open units and each width; "full" is the plain step of the full network
    (of LeNet-5 as it is, where the width varies), "plain" that of the open one."""
    points = [(n, "open units", s, n.widths, n.share(s)) for n in (LENET, RESNET) for s in SHARES]
    wide = [(w, LENET.share(w)) for w in WIDTHS]
    points += [(LENET, "width", w, widths, widths) for w, widths in wide]
    macs = {n.name: gated(n, n.widths, n.widths)[0].summary().macs for n in (LENET, RESNET)}
    rows = []
    for network, axis, value, full, widths in points:
        net, optimizer = gated(network, full, widths)
        net.k = K
        variants = {
            "full": plain_step(network, network.widths),
            "plain": plain_step(network, widths),
            "stage 2": gated_step(net, optimizer, network),
        }
        seconds = timed(variants, repeats, BUDGET["growth of cost"])
        share = net.summary().macs / macs[network.name]
        rows.append({"network": network.name, "axis": axis, "value": value, "widths": widths, "macs": share})
        rows[-1]["seconds"] = seconds
        times = {n: f"{1000 * t['median']:.1f} ms" for n, t in rows[-1]["seconds"].items()}
        print(f"{network.name}, {axis} {value:g}", times, flush=True)
    return rows
