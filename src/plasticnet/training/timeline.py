"""Timeline: which stage of a schedule runs, and where it stands among the others. It knows no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from plasticnet.errors import PlasticError
from plasticnet.training.stages import Stage


class Timeline:
    """The stages of a schedule in their order, and how many of their epochs are over.

    Its attributes are ``stages``; ``epoch``, the epoch that is running, counted from 0; and ``rounds``, the place in
    ``stages`` of the first stage of each round. There is one round at first, and `add_round` adds one.

    Args:
        stages: The stages of the first round. Those without epochs are left out.

    Raises:
        PlasticError: There are no epochs, or one of the stages is no `Stage`.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if other := [s for s in stages if not isinstance(s, Stage)]:
            raise PlasticError(f"stages={other[0]!r}: a stage is a pn.Stage, such as pn.Stage(20, k=7.0)")
        self.stages = [s for s in stages if s.epochs]
        if not self.stages:
            raise PlasticError("a schedule needs at least one stage with epochs")
        self.epoch = 0
        self.rounds = [0]
        self._first = len(self.stages)  # the number of stages in the first round

    @property
    def epochs(self) -> int:
        """The number of epochs of all stages together."""
        return sum(s.epochs for s in self.stages)

    @property
    def over(self) -> bool:
        """Whether all epochs are over."""
        return self.epoch >= self.epochs

    @property
    def place(self) -> int:
        """The place in ``stages`` of the stage that is running, or of the last stage at the end."""
        end = 0
        for place, stage in enumerate(self.stages):
            end += stage.epochs
            if self.epoch < end:
                return place
        return len(self.stages) - 1

    @property
    def stage(self) -> Stage:
        """The stage that is running, or the last stage at the end."""
        return self.stages[self.place]

    @property
    def k(self) -> float:
        """The k of the epoch that is running, or of the last epoch at the end."""
        place = self.place
        stage = self.stages[place]
        return stage.k_of(min(self.epoch - self.begin(place), stage.epochs - 1))

    @property
    def ends_stage(self) -> bool:
        """Whether the epoch that is running is the last one of its stage."""
        return self.epoch + 1 == self.begin(self.place + 1)

    def begin(self, place: int) -> int:
        """Return the first epoch of the stage at a place."""
        return sum(s.epochs for s in self.stages[:place])

    def plastic_epochs(self) -> tuple[int, int]:
        """Return the first epoch of the plastic stages around the one that is running, and the first epoch after them.

        Only stages of the same round count.
        """
        first = last = self.place
        while first not in self.rounds and self.stages[first - 1].plastic:
            first -= 1
        while last + 1 < len(self.stages) and last + 1 not in self.rounds and self.stages[last + 1].plastic:
            last += 1
        return self.begin(first), self.begin(last + 1)

    def add_round(self, stages: Sequence[Stage] | None = None) -> None:
        """Append a round of stages.

        Args:
            stages: The stages; by default those of the first round from its first plastic one on.

        Raises:
            PlasticError: The timeline is not at its end, or there are no epochs to add. Nothing was changed.
        """
        if not self.over:
            raise PlasticError(f"wake: the schedule is at epoch {self.epoch} of {self.epochs}; wake it at its end")
        if stages is None:
            first = self.stages[: self._first]
            start = next((i for i, s in enumerate(first) if s.plastic), len(first))
            stages = first[start:]
        if not any(s.epochs for s in stages):
            raise PlasticError("wake: there is no plastic stage to repeat; give stages with epochs")
        self.rounds.append(len(self.stages))
        self.stages += [s for s in stages if s.epochs]

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: the epoch, and the rounds that were added with their stages.

        The stages of the first round are left out, because the constructor is given them again.
        """
        return {
            "epoch": self.epoch,
            "rounds": list(self.rounds),
            "woken": [list(astuple(s)) for s in self.stages[self._first :]],
        }

    def restored(self, state: Mapping[str, Any]) -> Timeline:
        """Return a timeline with the same first round that stands where a state says.

        Args:
            state: What `state_dict` returned.

        Raises:
            PlasticError: The state holds something else than stages or rounds, or there is no such epoch.
        """
        if not isinstance(state, Mapping):
            raise PlasticError(f"the state of a schedule is a mapping, not a {type(state).__name__}")
        try:
            woken = [Stage(*s) for s in state.get("woken", ())]
        except TypeError:
            raise PlasticError(f"the state has stages that are none: {state['woken']!r}") from None
        found = Timeline(self.stages[: self._first])
        found.stages += woken
        epoch, rounds = state.get("epoch"), state.get("rounds", [0])
        if type(epoch) is not int or not 0 <= epoch <= found.epochs:
            raise PlasticError(f"the state is at epoch {epoch!r}, but this schedule has {found.epochs}")
        if (
            not isinstance(rounds, list)
            or any(type(r) is not int for r in rounds)
            or rounds[:1] != [0]
            or rounds != sorted(set(rounds))
            or rounds[-1] >= len(found.stages)
        ):
            raise PlasticError(f"the state has rounds that are none: {rounds!r}")
        found.epoch, found.rounds = epoch, list(rounds)
        return found
