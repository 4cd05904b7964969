"""What experiments that prune share: the cost of a network, the smallest cut that meets it, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import plasticnet as pn


def operations(network: nn.Module, x: Tensor) -> int:
    """The multiply-adds of a network's layers for one input, as torch counts them; attention's products are left out.

    plasticnet does not take part in this count.

    Args:
        network: The network.
        x: Inputs, of which the first is run.
    """
    modes = [(m, m.training) for m in network.modules()]
    network.eval()
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter:
        network(x[:1])
    for module, mode in modes:
        module.training = mode
    counts = counter.get_flop_counts()["Global"]
    return sum(n for operation, n in counts.items() if "bmm" not in str(operation)) // 2


def smallest_cut(
    cut: Callable[[float], nn.Module], cost: Callable[[nn.Module], float], most: float, tries: int
) -> nn.Module | None:
    """The model cut at the smallest ratio, of those tried, at which it costs at most so much; None where it never does.

    Args:
        cut: Returns the model without a share of its units, from 0 to 1.
        cost: What a model costs.
        most: The most that it may cost.
        tries: How often the range of shares is halved.
    """
    low, high, best = 0.0, 1.0, None
    for _ in range(tries):
        ratio = (low + high) / 2
        small = cut(ratio)
        if cost(small) <= most:
            high, best = ratio, small
        else:
            low = ratio
    return best


def cycle(place: float, rate: float) -> float:
    """The learning rate at a place of the training, from 0 to 1: up over the first tenth, then down along a cosine."""
    return rate * min(place / 0.1 + 0.05, 0.5 + 0.5 * math.cos(math.pi * place))


def renewed(net: pn.PlasticNet, widths: Mapping[str, int]) -> nn.Module:
    """A network of these widths, with random weights, of the kind of another, which is cut."""
    net.resize({name: range(n) for name, n in widths.items()})
    small = net.compact()
    for module in small.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return small
