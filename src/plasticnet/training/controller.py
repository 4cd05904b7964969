"""Controls the pressure by which a budget makes a network cheaper.

With targets on costs, the pressure brings the expected costs down to the targets. With a budget of loss, it brings the
costs down as far as the loss allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError
from plasticnet.gates.site import held_open, probability
from plasticnet.growing.rule import GrowthRule
from plasticnet.learning.guard import guarded
from plasticnet.net import PlasticNet
from plasticnet.tools.precision import product
from plasticnet.training.force import Force, unit_prices

# The target comes down over this share of the plastic epochs.
FALL = 0.6
# A network may grow to this multiple of a target, so that the budget has units to choose from.
OUTGROWN = 1.25
# These are the first, the lowest and the highest multiplier. A multiplier of 1 presses as hard as the loss.
START, LOWEST, HIGHEST = 0.03, 1e-3, 1e3
# This times the logarithm of cost over target is added to the logarithm of the multiplier, for the present step only.
GAIN = 6.0
# This times the logarithm of cost over target is added to the level with every step, and stays.
RATE = 0.02
# This is the weight of the old value in the running means of the gradients' sizes.
MEMORY = 0.98
# With a budget of loss, the multiplier may rise during this share of the plastic epochs.
RISE = 0.8
# It rises by at most this factor in all of them, which it reaches if the loss always keeps to its limit.
REACH = 1e4
# It rises by at most the first factor in one epoch, and falls by the second after an epoch above the limit.
FASTER, SLOWER = 4.0, 0.5

# A state dict holds these attributes of a controller, apart from its mappings.
_NUMBERS = ("begun", "steps", "per_epoch", "reference", "within")
_LISTS = ("level", "sizes", "base")


class Controller(Force):
    """The multipliers of a budget, one for each cost, and the pressure on the gates that they make.

    The multiplier of a cost is ``exp(level + 6 e)`` times the size of the loss gradient over the size of the gradient
    of the cost's logarithm. Here e is the logarithm of expected cost over target, between -1 and 1, and a size is a
    running mean of the L1 norm of a gradient with respect to the logits. So a multiplier of 1 presses as hard as the
    loss, whatever the scale of the loss is. Every step adds 0.02 e to the level. The target itself comes down
    geometrically, from the expected cost at the beginning to the final target, so that the network can follow it.

    With a budget of loss there is no target and e is 0. Then only the level moves, once at the end of every epoch.

    Args:
        net: The network at the beginning of the schedule. Shares in the budget refer to its present costs.
        budget: The targets on costs, or the tolerated increase of the loss.

    Raises:
        PlasticError: The budget has a target for the latency, which has not been measured.
    """

    kind = "budget"

    def __init__(self, net: PlasticNet, budget: Budget) -> None:
        self.loss, targets = budget.loss, budget.targets(net)
        self.costs = tuple(targets) or ("parameters", "macs")
        self.like = net.like
        super().__init__()
        self.targets = targets
        self.notice(net)

    def reset(self) -> None:
        """Begin anew with the same targets."""
        super().reset()
        n = len(self.costs)
        self.level = self.like.new_full((n,), math.log(START))
        # These are running means of the gradients' sizes, for each cost and then for the loss.
        self.sizes = self.like.new_zeros(n + 1)
        # The pressure begins in this epoch, and these are the logarithms of the costs at that time.
        self.begun = math.nan
        self.base = [0.0] * n
        # The validation loss may exceed this one by ``loss``.
        self.reference = math.inf

    def notice(self, net: PlasticNet) -> None:
        """Update the largest width that each site has had."""
        self.widths = {name: max(self.widths.get(name, 0), len(site)) for name, site in net.sites.items()}

    def ends_growth(self, net: PlasticNet, late: bool) -> bool:
        """Return whether it is too late to grow, or the network costs more than it may grow to."""
        return late or not self.has_room(net, {})

    @property
    def relative(self) -> bool:
        """Whether the prices of units are only known up to a factor."""
        return self.loss is None

    def unit_prices(self, net: PlasticNet) -> dict[str, float]:
        """Return what one unit of each site costs in addition to all others.

        With targets it is the sum of its shares in them. With a budget of loss it is a unit's share of the tolerated
        loss.
        """
        if self.loss is not None:
            return dict.fromkeys(net.sites, self.loss / max(1, sum(s.awake for s in net.sites.values())))
        return unit_prices(net, {cost: 1 / target for cost, target in self.targets.items()})

    def has_room(self, net: PlasticNet, counts: Mapping[str, int]) -> bool:
        """Return whether the network may get so many units more: a little above the targets, to choose from."""
        scales = [
            torch.full((len(s),), 1 + counts.get(name, 0) / max(1, s.awake), dtype=torch.float64, device=s.phi.device)
            for name, s in net.sites.items()
        ]
        # A cost is a sum of products of widths, so that it follows them beyond 1, too.
        pi = torch.cat(scales) * net.cost.awake
        return all(float(net.cost.expected(pi, c)) <= OUTGROWN * target for c, target in self.targets.items())

    def penalty(self, net: PlasticNet, growth: GrowthRule | None, epoch: int, end: int) -> Tensor:
        """Return a scalar whose gradient presses on the gates; every call moves the multipliers by a step.

        The pressure begins with the first call after growth in which no unit is held open any more, because gates that
        are held open cannot follow it. Before that the result is 0.

        Args:
            net: The network.
            growth: How the network grows, or None.
            epoch: The epoch that is running, counted from 0.
            end: The first epoch after the plastic ones.
        """
        sites = net.sites.values()
        growing = growth is not None and not growth.stopped
        if growing or (math.isnan(self.begun) and any(bool((s.grace > 0).any()) for s in sites)):
            return net.like.new_zeros(())
        phi = net.phi()
        self.like = net.like  # the network may have been brought to another device or precision
        self.level, self.sizes = self.level.to(phi), self.sizes.to(phi)
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
        # The ratio is 0 where no gate can lower a cost.
        ratio = torch.where(self.sizes[:-1] > 0, self.sizes[-1] / self.sizes[:-1], 0.0)
        strength = (self.level + GAIN * excess).exp() * ratio
        total = product(phi, product(gradients.t(), strength / len(self.costs)))
        return guarded(net, total - total.detach() + (strength * excess).sum())

    def _follow(self, costs: Tensor, epoch: int, end: int) -> Tensor:
        """Move the levels by a step, and return by how much the costs exceed their present targets.

        Args:
            costs: The logarithms of the expected costs, shape (costs,).
            epoch: The epoch that is running.
            end: The first epoch after the plastic ones.

        Returns:
            The logarithms of expected cost over target, clamped to the range from -1 to 1; zeros with a budget of loss.
        """
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
        """Update the running means of the gradients' sizes.

        The ratio of these means makes the multipliers independent of the scale of the loss.

        Args:
            gradients: The gradients of the costs' logarithms with respect to the logits, shape (costs, logits).
            of_loss: The gradient of the loss with respect to the logits, or None where the last step has estimated
                none. Then the means stay.
        """
        if of_loss is not None:
            sizes = torch.cat([gradients.abs().sum(1), of_loss.abs().sum().reshape(1)])
            now = MEMORY * self.sizes + (1 - MEMORY) * sizes
            # A gradient may be infinite, because a loss scaler also tries scales that overflow.
            self.sizes = torch.where(torch.isfinite(now).all(), now, self.sizes)

    def step(self, val_loss: float, plastic: bool, passed: int, epochs: int) -> None:
        """End an epoch; with a budget of loss, let the multipliers follow the validation loss.

        They rise after an epoch in which the loss kept to its limit, and fall after one in which it did not.

        Args:
            val_loss: The validation loss after this epoch; NaN where none is needed.
            plastic: Whether the epoch was a plastic one.
            passed: How many of the plastic epochs are over.
            epochs: How many plastic epochs there are.
        """
        super().step(val_loss, plastic, passed, epochs)
        if self.loss is None:
            return
        if math.isinf(self.reference) or math.isnan(self.begun):
            self.reference = min(self.reference, math.inf if math.isnan(val_loss) else val_loss)
        if plastic and not math.isnan(self.begun):
            self.within = val_loss <= self.reference + self.loss
            faster = min(FASTER, REACH ** (1 / max(1, RISE * epochs)))
            factor = SLOWER if not self.within else faster if passed <= RISE * epochs else 1.0
            self.level = (self.level + math.log(factor)).clamp(math.log(LOWEST), math.log(HIGHEST))

    def metrics(self) -> dict[str, float]:
        """Return the level of each multiplier, as "multiplier/COST", and the targets, as "target/COST"."""
        levels = zip(self.costs, self.level.exp().tolist(), strict=True)
        targets = {f"target/{cost}": float(target) for cost, target in self.targets.items()}
        return {f"multiplier/{cost}": level for cost, level in levels} | targets

    def remember(self, net: PlasticNet) -> None:
        """Keep a copy of the present logits, to which a budget of loss may return once the pressure has begun."""
        if self.loss is not None and not math.isnan(self.begun):
            self.good = {g.name: g.phi.detach().clone() for g in net.all_gates()}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs, which includes the logits to which a budget of loss may return."""
        state = {name: getattr(self, name) for name in _NUMBERS}
        lists = {name: [float(v) for v in getattr(self, name)] for name in _LISTS}
        return {**state, **lists, "targets": dict(self.targets), "good": dict(self.good), "widths": dict(self.widths)}

    def load_state_dict(self, state: Any) -> None:
        """Restore what `state_dict` returned.

        Raises:
            PlasticError: The state is not that of a budget with the same costs and of a network with the same sites.
                Nothing was changed.
        """
        if not isinstance(state, Mapping) or not self._takes(state):
            raise PlasticError(f"the state of the budget is not one of {', '.join(self.costs)}: {state!r}")
        for name in _NUMBERS:
            setattr(self, name, state[name])
        self.targets, self.base = dict(state["targets"]), list(state["base"])
        self.widths = dict(state["widths"])
        self.good = {name: phi.to(self.like.device) for name, phi in state.get("good", {}).items()}
        self.level, self.sizes = (self.like.new_tensor(state[n]) for n in ("level", "sizes"))

    def _takes(self, state: Mapping[str, Any]) -> bool:
        """Return whether a state has everything that this controller keeps, in a form that it can use."""
        sizes = {"level": len(self.costs), "sizes": len(self.costs) + 1, "base": len(self.costs)}
        lists, good = [state.get(name) for name in sizes], state.get("good", {})
        targets, widths = state.get("targets"), state.get("widths")
        return (
            all(_is_number(state.get(name), finite=False) for name in _NUMBERS)
            and all(isinstance(v, Sequence) and len(v) == n for v, n in zip(lists, sizes.values(), strict=True))
            and all(_is_number(v) for values in lists for v in values or ())
            and isinstance(targets, Mapping)
            and list(targets) == list(self.targets)
            and all(_is_number(v) and v > 0 for v in targets.values())
            and isinstance(widths, Mapping)
            and list(widths) == list(self.widths)
            and all(type(v) is int and v > 0 for v in widths.values())
            and isinstance(good, Mapping)
            and all(isinstance(v, Tensor) and v.is_floating_point() and _is_finite(v) for v in good.values())
        )


def _is_number(value: Any, finite: bool = True) -> bool:
    """Return whether a value is a number, and a finite one where that is asked for."""
    return isinstance(value, int | float) and not (finite and not math.isfinite(value))


def _is_finite(t: Tensor) -> bool:
    """Return whether a tensor has values, and no NaN or infinity among them."""
    return not t.is_meta and bool(torch.isfinite(t).all())
