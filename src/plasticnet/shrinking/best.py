"""Keeps the weights of the best of several steps of training."""

from __future__ import annotations

import copy

from torch import nn

from plasticnet.shrinking.report import Milestone


class Best:
    """The step of training with the smallest error, and the weights that the network had after it.

    Args:
        network: The network.
        step: The step before the training.
        judged: Whether errors say what counts. If not, the last step is the best one.
    """

    def __init__(self, network: nn.Module, step: Milestone, judged: bool) -> None:
        self._network, self._judged = network, judged
        self._step = step
        self._state = copy.deepcopy(network.state_dict()) if judged else {}

    def see(self, step: Milestone) -> None:
        """Note what the network is after a step."""
        if not self._judged:
            self._step = step
        elif step.error <= self._step.error:
            self._step, self._state = step, copy.deepcopy(self._network.state_dict())

    def restore(self) -> str:
        """Make the network what it was after the best step, and return the name of that."""
        if self._judged:
            self._network.load_state_dict(self._state)
        return self._step.name
