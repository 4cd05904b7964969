"""Notices a plastic stage in which no gate has moved although the steps were there to move them."""

from __future__ import annotations

import warnings

from plasticnet.net import PlasticNet


class Stillness:
    """Compares the logits at the begin and at the end of every epoch, so that a stage without any change is noticed.

    Only the optimizer moves logits between two calls of `Schedule.step`. What is kept are sums over the logits.

    Args:
        net: The network, at the begin of an epoch.
    """

    def __init__(self, net: PlasticNet) -> None:
        self._asked = self._moved = False
        self.begin(net)

    def begin(self, net: PlasticNet) -> None:
        """Begin an epoch, after everything else that changes logits."""
        self._steps, self._sums = net.sampler.estimates, _sums(net)

    def end(self, net: PlasticNet, ends_stage: bool) -> None:
        """End a plastic epoch, before anything else changes logits.

        It warns at the end of the stage if the gradients of gates were estimated in it, and no logit has moved. Gates
        that are held open get no gradient, so that an epoch in which all are does not count.

        Args:
            net: The network.
            ends_stage: Whether this is the last epoch of the stage.
        """
        free = bool(net.weights) or any(bool((s.grace == 0).any()) for s in net.sites.values())
        self._asked |= free and net.sampler.estimates > self._steps
        self._moved |= _sums(net) != self._sums
        if not ends_stage:
            return
        if self._asked and not self._moved:
            warnings.warn(
                "no gate has moved in this plastic stage, so that what is cut was not learned. Likely reasons: the "
                "optimizer that steps does not hold the gates (use net.param_groups), a GradScaler has skipped every "
                "step (its scale falls, and gradients are infinite or NaN), or gate_lr is 0",
                UserWarning,
                stacklevel=5,
            )
        self._asked = self._moved = False


def _sums(net: PlasticNet) -> list[tuple[int, float, float]]:
    """Return for each site and weight how many logits there are, their sum and that of their squares."""
    logits = [g.phi.detach().double() for g in net.all_gates()]
    return [(phi.numel(), float(phi.sum()), float(phi.square().sum())) for phi in logits]
