"""One training step on the shares of two ranks, in two processes or, one after the other, in one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Shares:
    """The ranks whose shares of the batch this process trains on: its own, or both, as one process would.

    Each rank draws random numbers of its own in every step.
    """

    def __init__(self, *ranks: int) -> None:
        self.ranks = ranks
        self.steps = 0

    def backward(self, loss: Callable[[Any], Tensor], data: Sequence[Any]) -> None:
        """The gradients of the mean over all shares; ``data`` has that of every rank."""
        self.steps += 1
        for rank in self.ranks:
            torch.manual_seed(2 * self.steps + rank)
            (loss(data[rank]) / len(self.ranks)).backward()

    def alike(self) -> None:
        """Let the next resize draw the same in both ways; among several ranks it takes a seed from rank 0."""
        torch.manual_seed(self.steps)
        if len(self.ranks) > 1:
            torch.manual_seed(int(torch.randint(2**62, (1,))))


def whole(t: Tensor) -> Tensor:
    """A copy of all values of a tensor, of which every process may hold a part."""
    full: Any = t.detach()
    return full.full_tensor() if hasattr(full, "full_tensor") else full.clone()


def everything(net: nn.Module, optimizer: Optimizer | None = None) -> dict[str, Tensor]:
    """The state of a network and of an optimizer, whole."""
    found = {n: whole(t) for n, t in net.state_dict().items()}
    if optimizer is None:
        return found
    held = {id(p): n for n, p in net.named_parameters()}
    states = [(held[id(p)], s) for p, s in optimizer.state.items()]
    return found | {f"{n} {k}": whole(v) for n, s in states for k, v in s.items() if isinstance(v, Tensor)}


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else whole(p.grad) for n, p in net.named_parameters()}


def assert_near(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    for name, t in found.items():
        other = expected[name]
        assert (t is None) == (other is None), name
        if t is not None:
            assert t.shape == other.shape, name
            torch.testing.assert_close(
                t, other, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
            )
