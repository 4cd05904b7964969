"""Estimators of the gradient of an expected loss over binary gates, as pure functions.

Notation of the papers: ``u`` uniform draws, ``z1 = 1[u < pi]``, ``z2`` the partner's gates, ``f1`` and
``f2`` the losses that they gave, ``pi = sigmoid(k phi)``. Shapes: ``u``, ``z1``, ``z2`` (draws, units);
``pi`` (units,); ``f1``, ``f2`` (draws,). Each returns (units,): the estimate of d E[f] / d phi,
averaged over the draws. All are unbiased if the loss of one draw does not depend on the gates of
another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def arm(u: Tensor, z1: Tensor, z2: Tensor, pi: Tensor, k: float, f1: Tensor, f2: Tensor) -> Tensor:
    """Augment-REINFORCE-merge (Yin & Zhou, arXiv 1807.11143): ``k (f2 - f1) (u - 1/2)``."""
    return k * ((f2 - f1)[:, None] * (u - 0.5)).mean(0)


def disarm(u: Tensor, z1: Tensor, z2: Tensor, pi: Tensor, k: float, f1: Tensor, f2: Tensor) -> Tensor:
    """DisARM (Dong et al., arXiv 2006.10680): ARM with u integrated out, never more variance:
    ``k/2 (f1 - f2) (z1 - z2) max(pi, 1 - pi)``."""
    return k * 0.5 * ((f1 - f2)[:, None] * (z1 - z2)).mean(0) * torch.maximum(pi, 1 - pi)


def ar(u: Tensor, z1: Tensor, z2: Tensor, pi: Tensor, k: float, f1: Tensor, f2: Tensor) -> Tensor:
    """Augment-REINFORCE (arXiv 1807.11143): one pass, high variance: ``k f1 (1 - 2u)``."""
    return k * (f1[:, None] * (1 - 2 * u)).mean(0)


def loorf(u: Tensor, z1: Tensor, z2: Tensor, pi: Tensor, k: float, f1: Tensor, f2: Tensor) -> Tensor:
    """Leave-one-out REINFORCE with two independent draws: ``k/2 (f1 - f2) (z1 - z2)``."""
    return k * 0.5 * ((f1 - f2)[:, None] * (z1 - z2)).mean(0)


@dataclass(frozen=True)
class Estimator:
    """An estimator and the partner pass that it needs."""

    gradient: Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor, Tensor], Tensor]
    partner: Literal["antithetic", "independent", "none"]


ESTIMATORS = {
    "arm": Estimator(arm, "antithetic"),
    "disarm": Estimator(disarm, "antithetic"),
    "ar": Estimator(ar, "none"),
    "loorf": Estimator(loorf, "independent"),
}


def partner_gates(partner: str, u: Tensor, v: Tensor | None, pi: Tensor) -> Tensor:
    """The gates of the partner pass: ``1[u > 1 - pi]``, or an independent draw ``1[v < pi]``.

    ``v`` is needed for an independent draw only. Shapes as `u`, (draws, units).
    """
    if partner == "independent":
        assert v is not None
        return (v < pi).to(u.dtype)
    return (u > 1 - pi).to(u.dtype)
