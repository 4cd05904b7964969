"""The ways to a smaller network that peers.py compares, each with its settings to try.

A way gets the trained wide network (`Start`), a share of the multiply-adds, and a setting. It returns a network that
costs at most this share, after as many epochs of the same training as all others have. "same widths", "uniform widths",
"plasticnet, from random weights", "GradMax" and "GroMo" begin from random weights instead, and have the epochs of the
wide network, too. "wide, trained on" cuts nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from norms import reestimated
from peers_gates import group_lasso, hard_concrete, slimming, straight_through
from peers_grown import gradmax, tiny
from peers_training import CLIP, DECAY, Start, anew, batches, by_scores, gated, train
from pruning import cycle, operations, smallest_cut
from torch import Tensor, nn

import plasticnet as pn

Setting = Mapping[str, Any]
Widths = Mapping[str, int]
Way = Callable[[Start, float, Setting, Widths], nn.Module]
PERIODS, GATE_RATE = 2, 4e-2  # steps of the schedule in an epoch, and the gates' learning rate
PLASTIC = 0.5  # the share of the largest learning rate at which weights learn while gates move


def shrink(start: Start, share: float, setting: Setting, widths: Widths) -> nn.Module:
    """`pn.shrink` at once, with its repair, and then the training."""
    x = start.task.parts[0][0][start.chosen()]
    small, _ = pn.shrink(start.dense, x.split(128), pn.Budget(macs=share))
    train(start.task, small, start.task.epochs, setting["rate"], start.taught)
    return small


def gates(start: Start, share: float, setting: Setting, widths: Widths) -> nn.Module:
    """Gates of plasticnet that learn under a budget for half of the epochs; the rest is ordinary training."""
    return _with_gates(start, gated(start), start.task.epochs, share, setting["rate"])


def from_random(start: Start, share: float, setting: Setting, widths: Widths) -> nn.Module:
    """One training from random weights at the full width, for the epochs of both; gates learn in its first half."""
    sizes = {name: len(site) for name, site in gated(start).sites.items()}
    net = pn.PlasticNet(anew(start, sizes), (start.task.parts[0][0][:2],))
    return _with_gates(start, net, start.task.dense + start.task.epochs, share, setting["rate"])


def _with_gates(start: Start, net: pn.PlasticNet, epochs: int, share: float, rate: float) -> nn.Module:
    task, half = start.task, epochs // 2
    optimizer = torch.optim.AdamW(net.param_groups(PLASTIC * rate, GATE_RATE, weight_decay=0.0))
    stages = [pn.Stage(half * PERIODS, 7.0), pn.Stage((epochs - half) * PERIODS)]
    schedule = pn.Schedule(net, optimizer, stages, budget=pn.Budget(macs=share))
    for epoch in range(epochs):
        order, last = list(batches(task)), epoch >= half
        for n, i in enumerate(order):
            net.train()
            if last:
                place = (epoch - half + n / len(order)) / (epochs - half)
                optimizer.param_groups[0].update(lr=cycle(place, rate), weight_decay=DECAY)
            loss = net.expected_loss(lambda i=i: start.taught(net, i)) + schedule.penalty()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], CLIP)
            optimizer.step()
            if (n + 1) % -(-len(order) // PERIODS) == 0 or n + 1 == len(order):
                schedule.step()
    return net.compact()


def _with_norms(start: Start, network: nn.Module) -> nn.Module:
    """The network with the statistics of its BatchNorms estimated anew, where it has any."""
    x = start.task.parts[0][0][start.chosen()]
    return reestimated(network.eval(), x.split(128), nn.Module.__call__) or network


def _tuned(start: Start, network: nn.Module, setting: Setting) -> nn.Module:
    network = _with_norms(start, network)
    train(start.task, network, start.task.epochs, setting["rate"], start.taught)
    return network


def magnitude(start: Start, share: float, setting: Setting, widths: Widths) -> nn.Module:
    """Units with the smallest weights go, ranked over all layers or in each layer."""
    net = gated(start)
    return _tuned(start, by_scores(net, pn.scores(net, "magnitude"), share, setting["uniform"]), setting)


def torch_pruning(start: Start, share: float, setting: Setting, widths: Widths) -> nn.Module:
    """Torch-Pruning with its group Taylor or group norm importance, ranked over all layers or in each layer."""
    x = start.task.parts[0][0]
    slopes = _slopes(start) if setting["importance"] == "GroupTaylorImportance" else {}
    most = share * operations(start.dense, x)
    best = smallest_cut(partial(_pruned, start, setting, slopes), lambda small: operations(small, x), most, 9)
    if best is None:
        raise RuntimeError("no ratio meets the budget")
    return _tuned(start, best, setting)


def _slopes(start: Start) -> dict[str, Tensor]:
    """The gradients of the loss that Taylor importance reads."""
    model = copy.deepcopy(start.dense).eval()
    for i in start.chosen().split(128):
        start.labelled(model, i).mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _pruned(start: Start, setting: Setting, slopes: Mapping[str, Tensor], ratio: float) -> nn.Module:
    """The wide network without a share of its channels, by Torch-Pruning."""
    from torch_pruning.pruner import BasePruner, importance

    model = copy.deepcopy(start.dense).eval()
    attention = [m for m in model.modules() if hasattr(m, "heads")]
    pruner = BasePruner(
        model,
        start.task.parts[0][0][:2],
        importance=getattr(importance, setting["importance"])(),
        global_pruning=setting["everywhere"],
        pruning_ratio=ratio,
        max_pruning_ratio=0.99,
        ignored_layers=[model.get_submodule(name) for name in start.task.spared],
        num_heads={layer: 4 for m in attention for layer in (m.q, m.k, m.v)},
        prune_num_heads=bool(attention),
        prune_head_dims=False,
        head_pruning_ratio=min(ratio, 0.75) if attention else 0.0,  # beyond that no head would be left
    )
    for name, p in model.named_parameters():
        if name in slopes:
            p.grad = slopes[name].clone()
    pruner.step()
    model.zero_grad(set_to_none=True)
    return model


def trained_on(start: Start, share: float, setting: Setting, widths: Widths) -> nn.Module:
    """The wide network itself, whole, after as many further epochs: what a smaller one is measured by."""
    return _tuned(start, copy.deepcopy(start.dense), setting)


def same_widths(start: Start, share: float, setting: Setting, widths: Widths) -> nn.Module:
    """The widths that `pn.shrink` has found, from random weights."""
    return _at_widths(start, widths, setting)


def uniform_widths(start: Start, share: float, setting: Setting, widths: Widths) -> nn.Module:
    """The same share of every layer's width, from random weights."""
    net = gated(start)
    pn.prune_once(net, pn.Budget(macs=share), scores="magnitude", scope="uniform")
    return _at_widths(start, {name: len(site) for name, site in net.sites.items()}, setting)


def _at_widths(start: Start, widths: Widths, setting: Setting) -> nn.Module:
    network = anew(start, widths)
    train(start.task, network, start.task.dense + start.task.epochs, setting["rate"], start.taught)
    return network


RATES = (1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 32e-3)
SHRINK, GATES, ANEW = "plasticnet, shrink", "plasticnet, gates", "plasticnet, from random weights"
WIDE = "wide, trained on"

# Validation data choose a setting for each way, on a seed that is not measured. Every way has these rates; a way that
# has a second choice to make has one rate more, and tries all rates with both.
MORE = (1e-3, 2e-3, 4e-3, 8e-3, 12e-3, 16e-3, 32e-3)
SETTINGS: dict[str, list[dict[str, Any]]] = {
    WIDE: [{"rate": rate} for rate in RATES],
    SHRINK: [{"rate": rate} for rate in RATES],
    GATES: [{"rate": rate} for rate in RATES],
    ANEW: [{"rate": rate} for rate in RATES],
    "magnitude": [{"uniform": False, "rate": rate} for rate in RATES],
    "Torch-Pruning, Taylor": [
        {"importance": "GroupTaylorImportance", "everywhere": everywhere, "rate": rate}
        for everywhere in (False, True)
        for rate in MORE
    ],
    "hard concrete": [{"rate": rate, "gate_rate": g} for rate in MORE for g in (2e-2, 1e-1)],
    "same widths": [{"rate": rate} for rate in RATES],
    "uniform widths": [{"rate": rate} for rate in RATES],
    "magnitude, each layer": [{"uniform": True, "rate": rate} for rate in RATES],
    "group lasso": [{"rate": rate, "strength": s} for rate in MORE for s in (1e-4, 1e-3)],
    "straight-through": [{"rate": rate, "gate_rate": g} for rate in MORE for g in (2e-2, 1e-1)],
    "slimming": [{"rate": rate, "strength": s} for rate in MORE for s in (1e-4, 1e-3)],
    "Torch-Pruning, norm": [
        {"importance": "GroupMagnitudeImportance", "everywhere": everywhere, "rate": rate}
        for everywhere in (False, True)
        for rate in MORE
    ],
    "GradMax": [{"rate": rate} for rate in RATES],
    "GroMo": [{"rate": rate} for rate in RATES],
}
OURS = (SHRINK, GATES)  # in the full grid
PEERS = ("magnitude", "Torch-Pruning, Taylor", "hard concrete", "same widths")


def made(way: str, start: Start, share: float, setting: Setting, widths: Widths) -> nn.Module:
    """The network of a way. ``widths`` are those that `pn.shrink` has found for this budget and seed."""
    if way.startswith("magnitude"):
        return magnitude(start, share, setting, widths)
    if way.startswith("Torch-Pruning"):
        return torch_pruning(start, share, setting, widths)
    learned = {
        "hard concrete": hard_concrete,
        "straight-through": straight_through,
        "slimming": slimming,
        "group lasso": group_lasso,
    }
    if way in learned:
        return learned[way](start, share, **setting)
    if way in ("GradMax", "GroMo"):
        return {"GradMax": gradmax, "GroMo": tiny}[way](start, widths, **setting)
    others: dict[str, Way] = {SHRINK: shrink, GATES: gates, ANEW: from_random, WIDE: trained_on}
    others |= {"same widths": same_widths, "uniform widths": uniform_widths}
    return others[way](start, share, setting, widths)
