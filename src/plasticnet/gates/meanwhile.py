"""Contexts in which a network has another k or other gates for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import INITIAL_LOGIT


@contextmanager
def at_k(net: GatedModel, k: float) -> Iterator[None]:
    """Put the network at another k within this context.

    Afterwards the network has its own k, and its gates have the gradients that they had before.

    Args:
        net: The network.
        k: The k within the context.
    """
    before, gradients = net.k, [(g.phi, g.phi.grad) for g in net.all_gates()]
    net.k = k
    try:
        yield
    finally:
        net.k = before
        for phi, gradient in gradients:
            phi.grad = gradient


@contextmanager
def own_gates(net: GatedModel, opened: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Give the units of a network other gates in this context, which may be closed and opened at will.

    Args:
        net: The network.
        opened: Which units are open at first, shape (units,), for each site; by default all that do not sleep.
    """
    before = [(site, site.phi, site.grace) for site in net.sites.values()]
    try:
        for site, phi, grace in before:
            logits = torch.full_like(phi, INITIAL_LOGIT)
            logits[site.asleep if opened is None else ~opened[site.name]] = -INITIAL_LOGIT
            site.phi = nn.Parameter(logits, requires_grad=False)
            site.grace = torch.zeros_like(grace)
        yield
    finally:
        for site, phi, grace in before:
            site.phi, site.grace = phi, grace
