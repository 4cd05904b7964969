"""Presses on the gates so that a budget is kept: costs come down to their targets, or as far as the loss allows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plasticnet.budgets.budget import Budget, present
from plasticnet.errors import PlasticError
from plasticnet.gates.site import held_open, probability
from plasticnet.net import PlasticNet

FALL = 0.6  # the share of the plastic epochs in which the target comes down
OUTGROWN = 2.0  # growth stops at this multiple of a target
START, LOWEST, HIGHEST = 0.03, 1e-3, 1e3  # the multiplier, relative to the loss
GAIN = 6.0  # how much the logarithm of the multiplier follows that of the excess at once,
RATE = 0.02  # and with every step
MEMORY = 0.98  # of the running means of gradients
RISE = 0.8  # with a budget of loss, the share of the plastic epochs in which the multiplier may rise,
REACH = 1e4  # by this factor in all, if the loss stays within the limit,
FASTER, SLOWER = 4.0, 0.5  # and at most by the first in one epoch; by the second after one above

_NUMBERS = ("begun", "steps", "per_epoch", "reference", "within")  # what a state dict holds of a controller
_LISTS = ("level", "sizes", "base")


class Controller:
    """The multipliers of a budget, one for each cost, and what they are decided by."""

    def __init__(self, net: PlasticNet, budget: Budget) -> None:
        self.loss = budget.loss
        self.targets = budget.targets(net)
        self.costs = tuple(self.targets) or ("parameters", "macs")
        self.like = net.like
        self.widths: dict[str, int] = {}
        self.notice(net)
        self.reset()

    def reset(self) -> None:
        """Begin anew; the targets stay."""
        n = len(self.costs)
        self.level = self.like.new_full((n,), math.log(START))  # the logarithm of the multipliers
        self.sizes = self.like.new_zeros(n + 1)  # running means of the gradients' sizes: of the costs, of the loss
        self.begun = math.nan  # the epoch from which on there is pressure, and the logarithm of the costs then
        self.base = [0.0] * n
        self.steps, self.per_epoch = 0, 0  # calls in this epoch, and in the one before
        self.reference, self.within = math.inf, True  # the validation loss to compare with; whether it was kept to
        self.good: dict[str, Tensor] = {}  # the logits of the last epoch in which it was

    def notice(self, net: PlasticNet) -> None:
        """Keep the largest width that each site has had."""
        self.widths = {name: max(self.widths.get(name, 0), len(site)) for name, site in net.sites.items()}

    def outgrown(self, net: PlasticNet) -> bool:
        """Whether the network costs more than twice a target: enough to choose from."""
        return any(present(net, cost) > OUTGROWN * target for cost, target in self.targets.items())

    def penalty(self, net: PlasticNet, epoch: int, end: int) -> Tensor:
        """A scalar whose gradient presses on the gates; ``end`` is the last of the plastic epochs."""
        sites = net.sites.values()
        if math.isnan(self.begun) and any(bool(s.grace.any()) for s in sites):
            return self.like.new_zeros(())  # what is held open cannot follow
        phi = net.phi()
        leaf = phi.detach().requires_grad_()
        with torch.enable_grad():
            grace = torch.cat([torch.zeros(0, dtype=torch.int64, device=leaf.device), *(s.grace for s in sites)])
            pi = held_open(probability(leaf, net.k), grace)
            pi = net.cost.weighed(pi, [s.strength for s in sites])
            logs = [net.cost.expected(pi, cost).log() for cost in self.costs]
            gradients = torch.stack([torch.autograd.grad(log, leaf, retain_graph=True)[0] for log in logs])
        costs = torch.stack(logs).detach()
        if math.isnan(self.begun):
            self.begun, self.base = float(epoch), costs.tolist()
            self.remember(net)
        excess = self._follow(costs, epoch, end)
        self._weigh(gradients, net.sampler.gradient)
        net.sampler.gradient = None
        ratio = torch.where(self.sizes[:-1] > 0, self.sizes[-1] / self.sizes[:-1], 0.0)  # 0: nothing can be pressed on
        strength = (self.level + GAIN * excess).exp() * ratio
        total = phi @ (strength / len(self.costs) @ gradients)
        return total - total.detach() + (strength * excess).sum()

    def _follow(self, costs: Tensor, epoch: int, end: int) -> Tensor:
        """Move the multipliers; returns the logarithms of expected cost over target of now, within -1 and 1."""
        if self.loss is not None:
            return torch.zeros_like(costs)
        passed = epoch + self.steps / self.per_epoch if self.per_epoch else epoch
        share = min(1.0, max(0.0, (passed - self.begun) / max(FALL * (end - self.begun), 1e-9)))
        finals = [math.log(target) for target in self.targets.values()]
        now = [final + (1 - share) * max(0.0, base - final) for base, final in zip(self.base, finals, strict=True)]
        excess = (costs - costs.new_tensor(now)).clamp(-1, 1)
        self.level = (self.level + RATE * excess).clamp(math.log(LOWEST), math.log(HIGHEST))
        return excess

    def _weigh(self, gradients: Tensor, of_loss: Tensor | None) -> None:
        """Keep running means of the gradients' sizes; their ratio makes the multipliers those of any loss."""
        if of_loss is not None:
            sizes = torch.cat([gradients.abs().sum(1), of_loss.abs().sum().reshape(1)])
            now = MEMORY * self.sizes + (1 - MEMORY) * sizes
            # A loss scaler tries scales that overflow.
            self.sizes = torch.where(torch.isfinite(now).all(), now, self.sizes)

    def step(self, val_loss: float, plastic: bool, passed: int, epochs: int) -> None:
        """To be called at the end of an epoch; ``passed`` of the plastic ``epochs`` are over."""
        self.steps, self.per_epoch = 0, self.steps
        if self.loss is None:
            return
        if math.isinf(self.reference) or math.isnan(self.begun):
            self.reference = min(self.reference, math.inf if math.isnan(val_loss) else val_loss)
        if plastic and not math.isnan(self.begun):
            self.within = val_loss <= self.reference + self.loss
            faster = min(FASTER, REACH ** (1 / max(1, RISE * epochs)))
            factor = SLOWER if not self.within else faster if passed <= RISE * epochs else 1.0
            self.level = (self.level + math.log(factor)).clamp(math.log(LOWEST), math.log(HIGHEST))

    def remember(self, net: PlasticNet) -> None:
        """Note the gates as they are, for a budget of loss."""
        if self.loss is not None:
            self.good = {g.name: g.phi.detach().clone() for g in net.all_gates()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        state = {name: getattr(self, name) for name in _NUMBERS}
        lists = {name: [float(v) for v in getattr(self, name)] for name in _LISTS}
        return {**state, **lists, "targets": dict(self.targets), "good": dict(self.good), "widths": dict(self.widths)}

    def load_state_dict(self, state: Any) -> None:
        """Restore `state_dict`. Raises `PlasticError` when something else is given."""
        sizes = {"level": len(self.costs), "sizes": len(self.costs) + 1, "base": len(self.costs)}
        if (
            not isinstance(state, Mapping)
            or any(not isinstance(state.get(name), int | float) for name in _NUMBERS)
            or any(not isinstance(state.get(n), Sequence) or len(state[n]) != size for n, size in sizes.items())
            or not isinstance(state.get("targets"), Mapping)
            or list(state["targets"]) != list(self.targets)
            or not isinstance(state.get("widths"), Mapping)
            or list(state["widths"]) != list(self.widths)
            or not isinstance(state.get("good", {}), Mapping)
        ):
            raise PlasticError(f"the state of the budget is not one of {', '.join(self.costs)}: {state!r}")
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self.targets, self.base = dict(state["targets"]), list(state["base"])
        self.widths = dict(state["widths"])
        self.good = {name: phi.to(self.like.device) for name, phi in state.get("good", {}).items()}
        self.level, self.sizes = (self.like.new_tensor(state[n]) for n in ("level", "sizes"))
