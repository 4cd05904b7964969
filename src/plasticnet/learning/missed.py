"""Holds by how much single units are missed: what closing one of them adds to the training loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plasticnet.gates.gated import GatedModel


@dataclass(eq=False)
class Missed:
    """By how much some units are missed, summed over the training steps that were measured.

    Each step closes one unit in each sample, and the next one in the next sample, so that all units have their turn
    without a random number. Where the batch must share its gates, it closes one unit in the whole batch. What is
    measured is without bias: the mean over the samples, of the loss with the unit closed less that with all units as
    they are in evaluation.

    Args:
        units: The indices of the units, counted over all sites, in the order in which they have their turn; shape
            (units,). A unit may have several turns.
        sizes: How many units each site of the network has.

    Attributes:
        rises: The sum of what closing a unit has added to the loss, shape (units,).
        counts: Over how many samples, or batches, that sum is.
        squares: The sum of the squares of the same, shape (units,).
        loss: The sum over the steps of the mean loss with all units, a scalar.
        steps: How many training steps were measured.
        turn: The place of the unit whose turn it is.
    """

    units: Tensor
    sizes: tuple[int, ...]
    rises: Tensor = field(init=False)
    counts: Tensor = field(init=False)
    squares: Tensor = field(init=False)
    loss: Tensor = field(init=False)
    steps: int = 0
    turn: int = 0

    def __post_init__(self) -> None:
        self.rises = torch.zeros(len(self.units), dtype=torch.float64, device=self.units.device)
        self.counts = torch.zeros_like(self.rises)
        self.squares = torch.zeros_like(self.rises)
        self.loss = self.rises.new_zeros(())

    def fits(self, net: GatedModel) -> bool:
        """Return whether the sites of a network still have these sizes."""
        return self.sizes == sizes_of(net)

    def to(self, device: torch.device) -> None:
        """Bring all tensors to a device."""
        for name in _TENSORS:
            setattr(self, name, getattr(self, name).to(device))

    def anew(self) -> Missed:
        """Return an empty one for the same units, which goes on with the unit whose turn it is."""
        return Missed(self.units, self.sizes, turn=self.turn)

    def take(self, rows: int) -> Tensor:
        """Return the places of the units whose turn it is, one for each row, shape (rows,)."""
        return (self.turn + torch.arange(rows, device=self.units.device)) % len(self.units)

    def note(self, places: Tensor, losses: Tensor, closed: Tensor) -> None:
        """Note what closing units has added to the loss.

        Args:
            places: The places of the units, shape (rows,).
            losses: The losses with all units, shape (rows,).
            closed: The losses with the units closed, shape (rows,).
        """
        rises = (closed.detach() - losses.detach()).to(self.rises)
        self.rises.index_add_(0, places, rises)
        self.counts.index_add_(0, places, torch.ones_like(rises))
        self.squares.index_add_(0, places, rises.square())
        self.loss += losses.detach().mean().to(self.loss)
        self.turn = (self.turn + len(places)) % len(self.units)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers."""
        lists = {name: getattr(self, name).tolist() for name in _TENSORS}
        return {**lists, "sizes": list(self.sizes), "steps": self.steps, "turn": self.turn}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Missed:
        """Return what `state_dict` was made of, on the CPU.

        Raises:
            ValueError: The numbers do not fit together.
        """
        found = cls(torch.tensor(state["units"], dtype=torch.int64), tuple(state["sizes"]))
        if not all(0 <= unit < sum(found.sizes) for unit in state["units"]):
            raise ValueError("there are no such units")
        for name in _TENSORS[1:]:
            value = torch.tensor(state[name], dtype=torch.float64)
            if value.shape != getattr(found, name).shape:
                raise ValueError(f"{name} is not for as many units")
            setattr(found, name, value)
        found.steps, found.turn = int(state["steps"]), int(state["turn"]) % max(1, len(found.units))
        return found


def sizes_of(net: GatedModel) -> tuple[int, ...]:
    """Return how many units each site of a network has."""
    return tuple(map(len, net.sites.values()))


_TENSORS = ("units", "rises", "counts", "squares", "loss")


def in_turn(sites: Sequence[tuple[Sequence[int], int]]) -> list[int]:
    """Return units of several sites in an order in which each site has its turn early, whatever its width.

    Args:
        sites: For each site the units that are meant, as indices among all units, and how often each of them has its
            turn.
    """
    found = [
        ((i + 0.5) / (len(units) * times), unit) for units, times in sites for i, unit in enumerate([*units] * times)
    ]
    return [unit for _, unit in sorted(found)]
