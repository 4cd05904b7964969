"""Growth by what the newest units are worth, against the price under which the network will be pruned."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from plasticnet.errors import PlasticError
from plasticnet.growing.depth import growing_sites, is_depth, only_depth
from plasticnet.growing.moves import Moves, even_out, grow_together
from plasticnet.growing.paper import PaperGrowth
from plasticnet.growing.rule import LATE, GrowthRule, Turnover
from plasticnet.growing.verdicts import Verdict, beyond_chance, verdicts
from plasticnet.learning.missed import Missed, in_turn, sizes_of
from plasticnet.net import PlasticNet
from plasticnet.surgery.optimizers import Optimizers

# Units are judged after so many training steps or more, at the end of an epoch.
STEPS = 32
# At least so many units of a site are judged, as far as there are so many.
FEWEST = 4
# Blocks have so many turns together for each turn of a unit.
BLOCKS = 1.0
# Growth stops after so many judgements in a row by which nothing grows, and when this share of the plastic epochs has
# brought none.
PATIENCE = 4
WAIT = 0.1
# A network whose units were never missed doubles, as long as it then costs less than this share of its loss.
CHEAP = 0.1
# For so many epochs after growth, units are still held open and unpriced.
GRACE = 2


class Growth(GrowthRule):
    """A rule by which a network grows for as long as its newest units are worth more than they cost.

    The price is that of the schedule: a `Pressure`, or a `Budget`. While the network grows, all units are held open and
    unpriced. In every training step, `PlasticNet.expected_loss` closes one of the newest units in each sample (or one
    in the batch, where the batch must share its gates), without gradients, and notes by how much the loss is higher.
    The mean of that is what the unit is worth. The newest units are those that came with the last growth, but at least
    four of each site; at first, all units are.

    When: at the end of an epoch, once 32 training steps or more have measured the newest units.

    How much: the newest units of all sites together are worth r times their price. Worth falls with about the fourth
    power of the width, so sites grow by a factor of r to the power of 1/4, and at most to twice their units. They grow
    together, because the units of a site are worth little as long as the next one is narrow. A site waits if its own
    newest units are worth less than r/16 times their price.

    Who leaves: a newest unit is worthless if it is worth less than a sixteenth of its price by two standard errors.
    Worthless units leave when others come, and when growth stops. In a site that waits, as many new ones take their
    place.

    Until when: where the newest units do not pay, they are judged anew after the next epoch, when they have learned
    more. After four judgements in a row and a tenth of the plastic epochs without growth, or where no site has room
    (see `PlasticNet.limit`), growth stops for good, and the pressure begins two epochs later. It also stops when half
    of the epochs of the plastic stages that follow each other are over, and then the pressure begins at once. It
    removes the units that do not pay. Only `Schedule.wake` begins growth anew.

    Budgets on costs leave the price open, so that only the ratios of sites count. All units are judged. While there is
    room, which is 1.25 times the budget, sites grow, at most to twice their units at once, and those faster whose units
    are worth more for what they cost. Then sites whose units are worth less lose those that are missed least, and the
    others get new ones for the same cost. Growth stops when no width would change by a factor of 1.2, or when half of
    the plastic epochs are over. With a budget of loss, the price of a unit is its share of the loss that may come.

    Under a price, a network of which all units were judged, and are not missed by more than two standard errors
    together, has not learned anything yet: it is too small, or its units are dead. It doubles, up to four times in a
    row, as long as its whole price is then at most a tenth of its loss.

    Depth: blocks that sleep (see `narrow`) open one after the other, each as the identity. The newest blocks of a site
    are judged as units are, by a price that is the mean of the blocks beside them. Each site of blocks grows by what
    its own newest blocks are worth, once the newest blocks of all sites together are missed beyond chance. Blocks do
    not leave by growth.

    New units begin with random weights. The losses that the closure of `expected_loss` returns must not be divided, as
    for the accumulation of gradients, because the price is not either: divide the sum of both.

    Attributes:
        newest: How many units came last, or blocks opened last, for each site.
        failed: How many judgements in a row were against growth.
        grown_at: The share of the plastic epochs that was over when the network last grew.
        judged: Whether units were ever judged.

    Example:
        >>> import torch, plasticnet as pn
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 4)
        >>> y = (x[:, 0] * x[:, 1] > 0).long()
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> net = pn.PlasticNet(model, (x,))
        >>> optimizer = torch.optim.Adam(net.param_groups(lr=0.01))
        >>> pressure = pn.Pressure(1e-4, cost="parameters")
        >>> schedule = pn.Schedule(net, optimizer, [pn.Stage(12, k=7.0)], pressure=pressure, growth=pn.Growth())
        >>> for epoch in range(schedule.epochs):
        ...     for i in torch.randperm(256).split(8):
        ...         loss = net.expected_loss(
        ...             lambda: torch.nn.functional.cross_entropy(net(x[i]), y[i], reduction="none")
        ...         )
        ...         optimizer.zero_grad()
        ...         (loss + schedule.penalty()).backward()
        ...         optimizer.step()
        ...     change = schedule.step()
        >>> len(net.sites["0"]) > 2
        True
    """

    needs_price = True
    deeper = True

    def __init__(self) -> None:
        super().__init__()
        self.newest: dict[str, int] = {}
        self.failed = 0
        self.grown_at = 0.0
        self.judged = False
        self._missed: Missed | None = None

    @classmethod
    def paper(cls) -> PaperGrowth:
        """Return the rule of the paper (NPN, section 4.2); see `PaperGrowth`."""
        return PaperGrowth()

    def reset(self) -> None:
        super().reset()
        self.newest, self.failed, self.grown_at, self.judged, self._missed = {}, 0, 0.0, False, None

    def hold(self, net: PlasticNet) -> None:
        """Keep every unit open and unpriced, and ask for what the newest ones are worth, unless growth has stopped."""
        if not self.stopped:
            for site in net.sites.values():
                held = site.grace.clamp(min=GRACE + 1)
                site.grace.copy_(torch.where(site.asleep, site.grace, held))
            if self._missed is None or not self._missed.fits(net):
                units = self._judged_units(net)
                self._missed = Missed(torch.tensor(units, dtype=torch.int64), sizes_of(net))
                self.stopped = not units  # All blocks have opened, and nothing else can grow.
        self.attend(net)

    def attend(self, net: PlasticNet) -> None:
        net.sampler.missed = None if self.stopped else self._missed

    def _judged_units(self, net: PlasticNet) -> list[int]:
        """Return the units that are judged, counted over all sites that can grow, in the order of their turns.

        They are the newest ones, and under a budget on costs all, whose worth is only compared between the sites.
        """
        units: list[range] = []
        blocks: list[list[int]] = []
        growing, start = growing_sites(net), 0
        for name, site in net.sites.items():
            newest = len(site) if self.priced.relative else self.newest.get(name, len(site))
            if name in growing and is_depth(site):
                there = (~site.asleep).nonzero()[:, 0].tolist()
                blocks.append([start + i for i in there[max(0, len(there) - newest) :]])
            elif name in growing:
                count = min(max(newest, FEWEST), len(site))
                units.append(range(start + len(site) - count, start + len(site)))
            start += len(site)
        # There are few blocks beside all these units, and each says whether a whole block pays.
        times = max(1, round(BLOCKS * sum(map(len, units)) / max(1, sum(map(len, blocks)))))
        return in_turn([*((some, 1) for some in units), *((some, times) for some in blocks)])

    def check(self, net: PlasticNet, penalties: int) -> None:
        """Raise `PlasticError` if the epoch that ends has measured nothing, or its gates have felt no pressure."""
        if self.stopped or self._missed is None:
            return
        if not penalties:
            raise PlasticError(
                "growth waits for its price, but the gates feel no pressure: this epoch has never called "
                "schedule.penalty(). Add it to the loss of every training step: "
                "(net.expected_loss(closure) + schedule.penalty()).backward()"
            )
        if not self._missed.steps:
            raise PlasticError(
                "growth measures what new units are worth within net.expected_loss(closure), which this epoch has "
                "never called. Compute the training loss with it"
            )

    def step(self, net: PlasticNet, optimizer: Optimizers, *, val_loss: float, over: float) -> Turnover:
        missed, changes = self._missed, Turnover()
        if over >= LATE and not self.stopped:
            self._end(net, missed)
        elif missed is not None and missed.steps >= STEPS and missed.fits(net) and not self.stopped:
            changes = self._judge(net, optimizer, missed, over)
        self.hold(net)
        return changes

    def _end(self, net: PlasticNet, missed: Missed | None) -> None:
        """Stop growth because it is late, so that the pressure begins at once; say so if nothing was ever judged."""
        self.stop()
        for site in net.sites.values():
            site.grace.clamp_(max=0)
        if not self.judged:
            steps = 0 if missed is None else missed.steps
            warnings.warn(
                "growth has ended before it began: it may take half of the plastic epochs, and judges units at the end "
                f"of an epoch, after {STEPS} training steps. There was no such epoch in this half, which had {steps} "
                "steps. Give the plastic stages more epochs",
                stacklevel=2,
            )

    def _judge(self, net: PlasticNet, optimizer: Optimizers, missed: Missed, over: float) -> Turnover:
        """Judge units, and let the network grow if they pay; return what was changed."""
        found, relative = self.verdicts(net), self.priced.relative
        pays = beyond_chance(found)
        # Where only the newest units were judged, older ones may have learned something.
        some = any(len(v.ranked) < len(net.sites[name]) for name, v in found.items() if not v.depth)
        learned = relative or bool(pays) or some
        if relative:
            moves = even_out(net, found, self.priced)
        elif pays:
            moves = grow_together(net, pays)
        else:
            moves = Moves() if learned else self._twice(net, missed)
        moves = moves.allowed(net)
        if moves.added and learned:
            self.failed, self.grown_at = 0, over
        else:
            self.failed += 1
        full = not any(site.room for site in growing_sites(net).values())
        # Widths that are even stay so, while units that do not pay may do so when they have learned more.
        patient = self.failed < PATIENCE or over - self.grown_at < WAIT
        self.stopped = full or not (moves if relative else patient)
        self.judged = True
        if self.stopped and learned and not moves:
            spare = {name: max(0, len(site) - site.least) for name, site in net.sites.items()}
            moves = Moves(leaving={name: v.worthless[: spare[name]] for name, v in found.items()}).allowed(net)
        changes = self._move(net, optimizer, moves)
        if not learned:
            self.newest = {}
        self._missed = missed.anew() if missed.fits(net) and not only_depth(net, moves.added) else None
        return changes

    def _move(self, net: PlasticNet, optimizer: Optimizers, moves: Moves) -> Turnover:
        """Let units leave, add others and open blocks, and note which are the newest now."""
        sources, blocks = moves.sources(net), only_depth(net, moves.added)
        for name, site in net.sites.items():
            left, new = moves.leaving.get(name, ()), moves.added.get(name, 0)
            before = min(self.newest.get(name, site.awake), site.awake)
            self.newest[name] = new or before - sum(unit >= len(site) - before for unit in left)
        net.resize(sources, optimizer, init="random", grace=GRACE + 1)
        if blocks:
            asleep = [name for name, site in net.sites.items() if not site.awake]
            net.grow(blocks, optimizer, grace=GRACE + 1)
            self.newest.update({name: len(net.sites[name]) for name in asleep if net.sites[name].awake})
        return Turnover({n: len(left) for n, left in moves.leaving.items()}, moves.added)

    def _twice(self, net: PlasticNet, missed: Missed) -> Moves:
        """Return how a network that has learned nothing doubles its widths, where that is cheap.

        Depth stays as long as a width has room, because a block costs many units, and dead ones beside it stay dead.
        """
        loss = net.ranks.mean(float(missed.loss) / missed.steps, net.like.device)
        growing = growing_sites(net)
        wider = any(site.room for site in growing.values() if not is_depth(site))
        stay = {name for name, site in growing.items() if wider and is_depth(site)}
        counts = {name: site.awake for name, site in net.sites.items() if name not in stay}
        prices = self.priced.unit_prices(net)
        # The cost of weights between two sites quadruples.
        whole = 2 * sum(prices[name] * n for name, n in counts.items())
        return Moves(counts) if whole <= CHEAP * abs(loss) and self.failed < PATIENCE else Moves()

    def verdicts(self, net: PlasticNet) -> dict[str, Verdict]:
        """Return what the units that are judged are worth, for the sites of which some were measured.

        Args:
            net: The network.
        """
        assert self._missed is not None
        return verdicts(net, self._missed, self.priced)

    def state_dict(self) -> dict[str, Any]:
        missed = None if self._missed is None else self._missed.state_dict()
        numbers = {"failed": self.failed, "grown_at": self.grown_at, "judged": self.judged, "stopped": self.stopped}
        return {"newest": dict(self.newest), **numbers, "missed": missed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            PlasticError: The state is not one of this rule. Nothing was changed.
        """
        try:
            newest = {str(name): int(n) for name, n in state["newest"].items()}
            failed, stopped, missed = int(state["failed"]), state["stopped"], state["missed"]
            judged, grown_at = bool(state["judged"]), float(state["grown_at"])
            found = None if missed is None else Missed.from_state(missed)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise PlasticError(
                "the state of growth has newest, failed, grown_at, judged, stopped and missed, and fits none of them: "
                f"{error!r}"
            ) from error
        if type(stopped) is not bool:
            raise PlasticError(f"the state of growth says in stopped whether it has stopped; this is {stopped!r}")
        self.newest, self.failed, self.grown_at, self._missed = newest, failed, grown_at, found
        self.judged, self.stopped = judged, stopped
