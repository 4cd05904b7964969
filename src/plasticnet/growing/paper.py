"""The rule of the paper: after every epoch with the best validation loss so far, each site gets a unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from plasticnet.errors import PlasticError
from plasticnet.growing.moves import Moves
from plasticnet.growing.rule import GrowthRule, Turnover
from plasticnet.net import PlasticNet
from plasticnet.surgery.optimizers import Optimizers


class PaperGrowth(GrowthRule):
    """The rule of the paper (Neural Plasticity Networks, arXiv 1908.08118, section 4.2).

    After each epoch whose validation loss is the best so far, every site gets one unit, with random weights and a
    probability of 1/2. The unit is under pressure at once. This rule does not stop by itself. It leaves depth alone:
    blocks that sleep (see `narrow`) stay closed.

    Attributes:
        best: The lowest validation loss so far.
    """

    endless = True
    needs_loss = True

    def __init__(self) -> None:
        super().__init__()
        self.best = math.inf

    def reset(self) -> None:
        super().reset()
        self.best = math.inf

    def step(self, net: PlasticNet, optimizer: Optimizers, *, val_loss: float, over: float) -> Turnover:
        if self.stopped or val_loss >= self.best:
            return Turnover()
        self.best = val_loss
        moves = Moves(dict.fromkeys(net.sites, 1)).allowed(net, deeper=False)
        self.stopped = not moves
        net.grow(moves.added, optimizer, init="paper")
        return Turnover(grown=moves.added)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "stopped": self.stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        good = isinstance(state, Mapping) and type(state.get("stopped")) is bool
        if not good or not isinstance(state.get("best"), int | float):
            raise PlasticError(f"the state of growth by the paper's rule has best and stopped; this is {state!r}")
        self.best, self.stopped = float(state["best"]), state["stopped"]
