"""Estimates the statistics of BatchNorms anew, where that makes the error of the outputs smaller."""

from __future__ import annotations

from torch import nn

from plasticnet.repairing.paired import Paired
from plasticnet.tools.batches import rows
from plasticnet.tools.torch_private import BatchNorm


def statistics_of(model: nn.Module) -> dict[str, BatchNorm]:
    """Return the norms over the batch by the names of their statistics."""
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    return {f"{n}.{leaf}".removeprefix("."): m for n, m in norms for leaf in ("running_mean", "running_var")}


def estimate_statistics(pair: Paired, error: float) -> tuple[tuple[str, ...], float]:
    """Estimate the statistics of all BatchNorms of the gated network anew, and keep them if the error is smaller.

    Args:
        pair: The network.
        error: The present error of its outputs on the inputs held out.

    Returns:
        The names of the norms whose statistics have changed, and the error now.
    """
    statistics = statistics_of(pair.net.model)
    if not statistics or error == 0 or any(rows(b) < 2 for b in pair.data.fitted):
        return (), error
    old = {name: pair.tensor(name).clone() for name in statistics}
    counts = {m: (m.momentum, m.num_batches_tracked) for m in statistics.values()}
    try:
        for m in counts:
            m.momentum, m.training = None, True
            if m.num_batches_tracked is not None:
                m.num_batches_tracked = m.num_batches_tracked.clone().zero_()
        for batch in pair.data.fitted:
            pair.run(batch)
    finally:
        for m, (momentum, tracked) in counts.items():
            m.momentum, m.num_batches_tracked, m.training = momentum, tracked, False
    now = pair.error()
    if now < error:
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in statistics)), now
    for name, before in old.items():
        pair.tensor(name).copy_(before)
    return (), error
