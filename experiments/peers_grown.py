"""Ways that grow a network to the widths that plasticnet has found, from three units a site, for peers.py.

They have the epochs of the wide network and of the other ways together, and grow after each epoch of the first half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from peers_training import DECAY, Start, anew, train
from torch import Tensor, nn

import plasticnet as pn

FIRST = 3  # units of each site at first
READ = 512  # inputs from which new units are found
FACTORS = (1.0, 0.5, 0.25, 0.1, 0.03)  # by which the new units of GroMo may be scaled


def _train(
    start: Start,
    network: nn.Module,
    rate: float,
    grow: Callable[[float, torch.optim.Optimizer], torch.optim.Optimizer],
) -> None:
    """Train, and call ``grow`` in the first half with the share of the growth that is due, and the optimizer."""
    epochs = start.task.dense + start.task.epochs
    growing = epochs // 2

    def after(epoch: int, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return grow((epoch + 1) / growing, optimizer) if epoch < growing else optimizer

    train(start.task, network, epochs, rate, start.taught, after_epoch=after)


def _due(first: int, last: int, share: float, now: int) -> int:
    """How many units are to be added now."""
    return max(0, first + round((last - first) * share) - now)


def gradmax(start: Start, widths: Mapping[str, int], rate: float) -> nn.Module:
    """New units by GradMax (Evci et al., arXiv 2201.05125), in plasticnet."""
    torch.manual_seed(start.seed)
    small = anew(start, {name: min(FIRST, n) for name, n in widths.items()})
    net = pn.PlasticNet(small, (start.task.parts[0][0][:2],))
    first = {name: len(site) for name, site in net.sites.items()}

    def grow(share: float, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        due = {name: _due(n, widths[name], share, len(net.sites[name])) for name, n in first.items()}
        i = start.chosen()[:READ]
        counts = {name: n for name, n in due.items() if n}
        net.grow(counts, optimizer, init="gradmax", loss=lambda: start.taught(net, i))
        return optimizer

    _train(start, net, rate, grow)
    return net.compact()


def tiny(start: Start, widths: Mapping[str, int], rate: float) -> nn.Module:
    """New units by TINY (Verbockhaven et al., TMLR 2024), in GroMo, for networks of linear layers alone.

    Its settings are those that GroMo names for this paper. Layers grow one after the other. New units are scaled by the
    factor at which the loss is smallest, and the optimizer begins anew, because its parameters are new ones.
    """
    from gromo.modules.linear_growing_module import LinearGrowingModule

    torch.manual_seed(start.seed)
    linear = [m for m in start.dense.modules() if isinstance(m, nn.Linear)]
    last = list(widths.values())
    if len(last) != len(linear) - 1:
        raise RuntimeError("GroMo's way is written for networks of linear layers alone")
    sizes = [linear[0].in_features, *(min(FIRST, n) for n in last), linear[-1].out_features]
    layers: list[Any] = []
    for n, (inputs, outputs) in enumerate(pairwise(sizes)):
        function = nn.ReLU() if n < len(last) else nn.Identity()
        before = layers[-1] if layers else None
        layers.append(LinearGrowingModule(inputs, outputs, post_layer_function=function, previous_module=before))
    network = nn.Sequential(*layers)

    def grow(share: float, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        i = start.chosen()[:READ]
        for n, layer in enumerate(layers[1:]):
            if due := _due(sizes[n + 1], last[n], share, layer.layer.in_features):
                _add(start, network, layer, due, i)
        return torch.optim.AdamW(network.parameters(), rate, weight_decay=DECAY)

    _train(start, network, rate, grow)
    reached = {name: layer.layer.in_features for name, layer in zip(widths, layers[1:], strict=True)}
    small = anew(start, reached)
    for layer, own in zip((m for m in small.modules() if isinstance(m, nn.Linear)), layers, strict=True):
        layer.load_state_dict(own.layer.state_dict())
    return small.eval()


def _add(start: Start, network: nn.Sequential, layer: Any, count: int, i: Tensor) -> None:
    """Add units before a layer of GroMo."""
    layer.init_computation()
    network.zero_grad()
    start.taught(network, i).mean().backward()
    layer.update_computation()
    layer.compute_optimal_updates(maximum_added_neurons=count, compute_delta=False)
    layer.reset_computation()

    def loss(factor: float) -> float:
        layer.scaling_factor = factor
        x, more = start.task.parts[0][0][i], None
        for each in network:
            x, more = each.extended_forward(x, more)
        return float(start.taught(lambda _: x, i).mean())

    with torch.no_grad():
        best = min(FACTORS, key=loss)
    layer.apply_change(scaling_factor=best)
    layer.delete_update()
    network.zero_grad()
