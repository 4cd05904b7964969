"""`GatedModel`: a model and the gates of its units. All that the library knows of a network lies here.

It has no verbs. Functions of `surgery`, `learning`, `measuring` and `budgets` take it; `PlasticNet`
derives from it and adds a method for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.cost.latency import Latency
from plasticnet.cost.model import CostModel
from plasticnet.errors import PlasticError
from plasticnet.gates.run import Gating
from plasticnet.gates.site import Site, WeightSite, gate_key, mean_gates, weight_key
from plasticnet.tools.ranks import Ranks
from plasticnet.tools.torch_private import version
from plasticnet.units import Units

_Versions = tuple[tuple[Tensor, int], ...]  # tensors, and how often each had been changed


class GatedModel(nn.Module):
    """A model with gates on its units, and what is known of both.

    The gates lie in ``gates``, one module per site, under the keys of `gate_key` and `weight_key`; gates of
    single weights come after those of units in every vector of all gates.

    Attributes: ``model``, the module; ``excluded``, the sites left alone on request; ``checked``, whether the
    self-check ran; ``uses``, how often each entry of a parameter is multiplied for one sample; ``latency``, what
    was measured of it; ``ranks``, the processes that train it; ``gating``, how gates enter a run of the model, and
    ``cost``, what it is expected to cost, both for the sizes that the sites have now.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[str, Units],
        weights: Sequence[str],
        *,
        uses: Mapping[str, float],
        frozen: Mapping[str, str],
        excluded: Sequence[str],
        checked: bool,
    ) -> None:
        """``weights`` are the names of the parameters whose entries get gates."""
        super().__init__()
        self.model = model
        parameters = [p.real if p.is_complex() else p for p in model.parameters()]
        like = next(p for p in parameters if p.is_floating_point())
        self.gates = nn.ModuleDict({gate_key(n): Site(u, like) for n, u in sites.items()})
        self.gates.update({weight_key(n): WeightSite(n, model.get_parameter(n)) for n in weights})
        self._sites = {g.name: g for g in self.gates.values() if isinstance(g, Site)}
        self._weights = {g.name: g for g in self.gates.values() if isinstance(g, WeightSite)}
        self.excluded, self.checked, self.uses = tuple(excluded), checked, uses
        self.latency: Latency | None = None
        self.ranks = Ranks()
        self._frozen = dict(frozen)
        self._k = math.inf
        self._means: tuple[float, _Versions, tuple[Tensor, bool]] | None = None
        self._means_of_weights: tuple[float, _Versions, Mapping[str, Tensor] | None] | None = None
        self.refresh()

    def refresh(self) -> None:
        """Work out anew what depends on the sites' sizes. To be called after every change of them."""
        units = {s.name: s.units for s in self.sites.values()}
        weights = list(self.weights)
        self.gating = Gating(units, self.model, weights)
        self.cost = CostModel(units, self.model, self.uses, self.latency, weights)
        self._means = self._means_of_weights = None

    def use_latency(self, latency: Latency | None) -> None:
        """Make a measured latency (None: none) the one that counts as a cost."""
        self.latency = latency
        self.refresh()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.refresh()  # the readers' indices live on the parameters' device
        return self

    # -- gates --------------------------------------------------------------------------------

    @property
    def sites(self) -> Mapping[str, Site]:
        """Name to `Site`, in execution order."""
        return MappingProxyType(self._sites)

    @property
    def weights(self) -> Mapping[str, WeightSite]:
        """The name of every parameter whose entries have gates, to these."""
        return MappingProxyType(self._weights)

    @property
    def frozen(self) -> Mapping[str, str]:
        """The name of whatever cannot be gated, to the reason."""
        return MappingProxyType(self._frozen)

    def all_gates(self) -> list[Site | WeightSite]:
        """The sites, and after them the gated weights."""
        return [*self._sites.values(), *self._weights.values()]

    def phi(self) -> Tensor:
        """All logits in one vector: (units,), or (units + weights,)."""
        return torch.cat([g.phi.flatten() for g in self.all_gates()])

    @property
    def like(self) -> Tensor:
        """Some logits, for their dtype and device."""
        return self.all_gates()[0].phi.detach()

    @property
    def k(self) -> float:
        """How plastic the gates are: 0 is dropout, infinity ordinary training of what is open.

        Setting it to 0 or infinity drops the gates' gradients: they get none there.
        Raises `PlasticError` when it is negative or not a number.
        """
        return self._k

    @k.setter
    def k(self, value: float) -> None:
        if not isinstance(value, Real) or isinstance(value, bool) or not float(value) >= 0:
            raise PlasticError(f"k={value!r}: k is a number from 0 (dropout) to infinity (ordinary training)")
        self._k = float(value)
        if self._k == 0 or math.isinf(self._k):
            for g in self.all_gates():
                g.phi.grad = None

    def mean_gates(self) -> tuple[Tensor, bool]:
        """The gates of units at evaluation, shape (units + 1,) with a constant 1 at the end, and whether all are
        open. On a GPU this is kept until a gate changes: asking would mean waiting."""
        sites = list(self.sites.values())
        if not sites:
            return self.like.new_ones(1), True
        if not sites[0].phi.is_cuda:
            return mean_gates(sites, self._k)
        now = _versions([t for s in sites for t in (s.phi, s.grace)])
        if self._means is None or self._means[0] != self._k or not _unchanged(self._means[1], now):
            self._means = (self._k, now, mean_gates(sites, self._k))
        return self._means[2]

    def mean_weights(self) -> Mapping[str, Tensor] | None:
        """The gates of single weights at evaluation, by the parameter's name, or None where all are 1. On a GPU
        this is kept until a gate changes."""
        weights = list(self.weights.values())
        if not weights:
            return None
        now = _versions([w.phi for w in weights])
        kept = self._means_of_weights
        if not self.like.is_cuda or kept is None or kept[0] != self._k or not _unchanged(kept[1], now):
            all_open = math.isinf(self._k) and all(bool(w.open.all()) for w in weights)
            found = None if all_open else {w.name: w.mean_gate(self._k) for w in weights}
            self._means_of_weights = kept = (self._k, now, found)
        return kept[2]

    def open_weights(self) -> np.ndarray:
        """Which single weights are open, of all that have gates: a boolean mask, shape (weights,)."""
        masks = [w.open.flatten().cpu().numpy() for w in self.weights.values()]
        return np.concatenate([np.zeros(0, dtype=bool), *masks])

    # -- running ------------------------------------------------------------------------------

    def run(self, z: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any) -> Any:
        """Run the model under gates ``z``; see `Gating.run`, also for the options. Where all units of a site with a
        norm are closed, the norm counts the best one."""
        best = {name: s.best for name, s in self.sites.items() if s.units.norms}
        return self.gating.run(z, args, kwargs, best, **options)

    # -- saving -------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """k, so that the state dict holds tensors only."""
        return torch.tensor(self._k, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore k."""
        self.k = float(state)


def _versions(tensors: Sequence[Tensor]) -> _Versions:
    return tuple((t, version(t)) for t in tensors)


def _unchanged(before: _Versions, now: _Versions) -> bool:
    return len(before) == len(now) and all(t is u and v == w for (t, v), (u, w) in zip(before, now, strict=True))


@contextmanager
def at_k(net: GatedModel, k: float) -> Iterator[None]:
    """Within this context the network is at another k; afterwards it is at its own, and its gates have the gradients
    that they had."""
    before, gradients = net.k, [(g.phi, g.phi.grad) for g in net.all_gates()]
    net.k = k
    try:
        yield
    finally:
        net.k = before
        for phi, gradient in gradients:
            phi.grad = gradient
