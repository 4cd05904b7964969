"""`GatedModel`: a model and the gates of its units. All that the library knows of a network lies here.

It has no methods that train or change the network. Those are functions of `surgery`, `learning`, `measuring` and
`budgets`, which take a `GatedModel`. `PlasticNet` derives from it and has a method for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from plasticnet.cost.latency import Latency
from plasticnet.cost.model import CostModel
from plasticnet.errors import PlasticError
from plasticnet.gates.living import check_free, register
from plasticnet.gates.run import Gating
from plasticnet.gates.site import (
    Gates,
    Site,
    WeightSite,
    buffer_key,
    gate_key,
    mean_gates,
    refuse_nan,
    weight_key,
)
from plasticnet.gates.structure import Structure
from plasticnet.gates.tiers import Tiers
from plasticnet.tools.gradients import outside_inference_mode
from plasticnet.tools.locks import Lock
from plasticnet.tools.ranks import Ranks
from plasticnet.tools.reals import real, shown
from plasticnet.tools.sharding import checked_mesh
from plasticnet.tools.torch_private import buffers_of, buffers_stay_shared, unsaved_buffers, version
from plasticnet.units import BlockUnits, Units


@dataclass(eq=False)
class Sizes:
    """The sizes that a network has for a time.

    Attributes:
        past: Whether the parameters have been replaced by others since.
    """

    past: bool = False


_Mode = tuple[float, bool]  # k, and whether the inference mode of torch is on
_Versions = tuple[tuple[Tensor, int], ...]  # tensors, each with how often it had been changed in place


class GatedModel(nn.Module):
    """A model with gates on its units, and what is known of both.

    In every vector of all gates, the gates of single weights come after those of units.

    Args:
        model: The module.
        sites: The units of each site by name, in execution order.
        weights: The names of the parameters whose entries get gates.
        uses: How often each entry of a parameter is multiplied for one sample, by the name of the parameter.
        frozen: Why something cannot be gated, by its name.
        excluded: The names of the sites that were left alone on request.
        checked: Whether the self-check ran.

    Attributes:
        gates: The gates, one module for each site or weight, under the keys of `gate_key` and `weight_key`.
        latency: The latency that was measured, or None.
        multiple_of: What widths were last pruned to multiples of, by `PlasticNet.prune` or a `Schedule`; 1 at first.
        gating: How gates enter a run of the model, for the present sizes of the sites.
        cost: What the network is expected to cost, for the present sizes of the sites.
        lock: What a thread holds while it runs or changes the network.
        tiers: Which runs of a model that was compiled in place run compiled.
        sizes: The present sizes, to tell whether they are still those of an earlier moment.
        structure: The modules that the model had when it was gated.
        resized: Whether units were ever cut or added, so that unsaved buffers may have other entries than at first.

    Raises:
        PlasticError: Another network that lives has gates on some of the parameters.
    """

    @outside_inference_mode()
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
        super().__init__()
        self.model = model
        parameters = [p.real if p.is_complex() else p for p in model.parameters()]
        like = next(p for p in parameters if p.is_floating_point())
        self.gates = Gates({gate_key(n): Site(u, like) for n, u in sites.items()})
        self.gates.update({weight_key(n): WeightSite(n, model.get_parameter(n)) for n in weights})
        self._sites = {g.name: g for g in self.gates.values() if isinstance(g, Site)}
        self._weights = {g.name: g for g in self.gates.values() if isinstance(g, WeightSite)}
        self.excluded, self.checked, self.uses = tuple(excluded), checked, uses
        self.latency: Latency | None = None
        self.multiple_of = 1
        self.resized = False
        self._ranks = Ranks()
        self.lock, self.sizes = Lock(), Sizes()
        self.structure = Structure(model)
        self.tiers = Tiers(0.0)
        self._frozen = dict(frozen)
        self._k = math.inf
        self._means: tuple[_Mode, _Versions, tuple[Tensor, bool]] | None = None
        self._means_of_weights: tuple[_Mode, _Versions, Mapping[str, Tensor] | None] | None = None
        self.refresh()
        check_free(self)
        register(self)

    @outside_inference_mode()
    def refresh(self) -> None:
        """Compute anew what depends on the sizes of the sites; this must be called after every change of them."""
        with self.lock:
            units = {s.name: s.units for s in self.sites.values()}
            weights = list(self.weights)
            before = self.gating if "gating" in vars(self) else None
            self.gating = Gating(units, self.model, weights, self.lock, self.tiers)
            self.cost = CostModel(units, self.model, self.uses, self.latency, weights, self.asleep())
            self._means = self._means_of_weights = None
            if before is not None and not self.gating.holds_what(before):
                self.sizes.past, self.sizes = True, Sizes()
                self.tiers.renew()

    def use_latency(self, latency: Latency | None) -> None:
        """Let a measured latency be the cost "latency"; None takes this cost away."""
        self.latency = latency
        self.refresh()

    @outside_inference_mode()
    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        with buffers_stay_shared(self):
            super()._apply(fn, recurse)
        self.refresh()  # because the indices of the readers lie on the device of the parameters
        return self

    @property
    def ranks(self) -> Ranks:
        """The processes that train the network together.

        Raises:
            PlasticError: Its parameters are distributed in a way that cannot follow a change of size, or its gates are.
        """
        if not self._ranks.sharded and (mesh := checked_mesh(self)) is not None:
            self._ranks.shard(mesh)
        return self._ranks

    def check(self, values: bool = True) -> None:
        """Raise `PlasticError` where the network holds something else than what was gated.

        Args:
            values: Whether the values of gates are needed, which there are none of on the meta device.
        """
        try:
            self.structure.check()
        except PlasticError:
            checked_mesh(self)  # FSDP1 takes parameters away, too, and has a message of its own
            raise
        for site in self._sites.values():
            if site.phi.shape != (len(site),):
                raise PlasticError(
                    f"{site.name!r}: phi was replaced by logits of shape {tuple(site.phi.shape)}, and the site has "
                    f"{len(site)} units. Write into the old ones (net.sites[...].phi.data[:] = ...); net.resize "
                    "changes how many there are"
                )
        if values and self.like.is_meta:
            raise PlasticError(
                "the network lies on the meta device, where its gates have no values: bring it to a real device by "
                'net.to_empty(device="cpu"), and load a state dict'
            )

    # -- gates --------------------------------------------------------------------------------

    @property
    def sites(self) -> Mapping[str, Site]:
        """The sites by name, in execution order."""
        return MappingProxyType(self._sites)

    @property
    def weights(self) -> Mapping[str, WeightSite]:
        """The gates of single weights, by the name of the parameter whose entries they are for."""
        return MappingProxyType(self._weights)

    @property
    def frozen(self) -> Mapping[str, str]:
        """Why something cannot be gated, by its name."""
        return MappingProxyType(self._frozen)

    def asleep(self) -> list[int]:
        """Return the units that sleep, as indices among all units."""
        graces = [s.grace for s in self.sites.values()]
        if not any(isinstance(s.units, BlockUnits) for s in self.sites.values()) or graces[0].is_meta:
            return []  # Only blocks sleep, and what is within them.
        return (torch.cat(graces) < 0).nonzero()[:, 0].tolist()

    def all_gates(self) -> list[Site | WeightSite]:
        """Return all sites, followed by all gated weights."""
        return [*self._sites.values(), *self._weights.values()]

    def phi(self) -> Tensor:
        """Return all logits in one vector, shape (units,), or (units + weights,) where single weights have gates."""
        return torch.cat([g.phi.flatten() for g in self.all_gates()])

    @property
    def like(self) -> Tensor:
        """Some of the logits, to read the dtype and the device of all gates from."""
        return self.all_gates()[0].phi.detach()

    @property
    def k(self) -> float:
        """How plastic the gates are, a number from 0 to infinity.

        The probability of a gate is sigmoid(k phi). At 0 this is dropout with probability 1/2. At infinity it is
        ordinary training of the open units. At both ends the gates get no gradient, and setting k there removes the
        gradients that they have.

        Raises:
            PlasticError: On setting, the value is negative or not a number.
        """
        return self._k

    @k.setter
    def k(self, value: float) -> None:
        k = real(value)
        if k is None or not k >= 0:
            raise PlasticError(f"k={shown(value)}: k is a number from 0 (dropout) to infinity (ordinary training)")
        with self.lock:
            self._k = k
            if self._k == 0 or math.isinf(self._k):
                for g in self.all_gates():
                    g.phi.grad = None

    @property
    def _mode(self) -> _Mode:
        """What the mean gates depend on beside the logits: k, and whether `torch.inference_mode` is on."""
        return self._k, torch.is_inference_mode_enabled()

    def mean_gates(self) -> tuple[Tensor, bool]:
        """Return the gates of units at evaluation.

        On a GPU the result is kept until a gate changes, because asking whether all are open means waiting for it.

        Returns:
            The gates, shape (units + 1,), with a constant 1 at the end; and whether all of them are 1.
        """
        sites = list(self.sites.values())
        if not sites:
            return self.like.new_ones(1), True
        if not sites[0].phi.is_cuda:
            return mean_gates(sites, self._k)
        now = _versions([t for s in sites for t in (s.phi, s.grace)])
        if self._means is None or self._means[0] != self._mode or not _unchanged(self._means[1], now):
            self._means = (self._mode, now, mean_gates(sites, self._k))
        return self._means[2]

    def mean_weights(self) -> Mapping[str, Tensor] | None:
        """Return the gates of single weights at evaluation, by the name of the parameter, or None where all are 1.

        On a GPU the result is kept until a gate changes.
        """
        weights = list(self.weights.values())
        if not weights:
            return None
        now = _versions([w.phi for w in weights])
        kept = self._means_of_weights
        if not self.like.is_cuda or kept is None or kept[0] != self._mode or not _unchanged(kept[1], now):
            refuse_nan(weights)
            all_open = math.isinf(self._k) and all(bool(w.open.all()) for w in weights)
            found = None if all_open else {w.name: w.mean_gate(self._k) for w in weights}
            self._means_of_weights = kept = (self._mode, now, found)
        return kept[2]

    def acted_on(self) -> dict[str, Tensor]:
        """Return the parameters that gates act on, or that a resize replaces, by name."""
        units = [s.units for s in self.sites.values()]
        names = {s.tensor for u in units for s in u.slices} | set(self.weights)
        blocks = [u for u in units if isinstance(u, BlockUnits)]
        held = self.model.named_parameters()
        return {n: p for n, p in held if n in names or any(u.inside(n) is not None for u in blocks)}

    def unsaved(self) -> dict[str, Tensor]:
        """Return the buffers, by name, in which units own entries, and which the model leaves out of state dicts.

        The state dict of the network holds them, since nothing else would say which of the entries are left.
        """
        owned = {s.tensor for site in self.sites.values() for s in site.units.slices}
        named = {n: b for n, b in self.model.named_buffers() if n in owned}
        held = [(b, leaf in unsaved_buffers(m)) for m in self.model.modules() for leaf, b in buffers_of(m).items()]
        saved = {id(b) for b, unsaved in held if not unsaved} if named else set[int]()
        return {n: b for n, b in named.items() if id(b) not in saved}

    def open_weights(self) -> np.ndarray:
        """Return which of the single weights that have gates are open, a boolean mask of shape (weights,)."""
        masks = [w.open.flatten().cpu().numpy() for w in self.weights.values()]
        return np.concatenate([np.zeros(0, dtype=bool), *masks])

    # -- running ------------------------------------------------------------------------------

    def run(self, z: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], **options: Any) -> Any:
        """Run the model under the given gates and return its output.

        Where too few units of a site with a norm are open, the norm takes its statistics over the best ones.

        Args:
            z: The gates of the units, shape (units + 1,) or (rows, units + 1), with a constant 1 at the end.
            args: The positional arguments for the model.
            kwargs: The keyword arguments for the model.
            options: The keyword arguments of `Gating.run`.

        Raises:
            PlasticError: Gradient checkpointing is reentrant, and so would run layers again without their gates.
        """
        best = {name: s.best for name, s in self.sites.items() if s.units.norms}
        ranks = self.ranks if self.ranks.sharded else None
        return self.gating.run(z, args, kwargs, best, ranks=ranks, **options)

    # -- from several threads -----------------------------------------------------------------

    # Other threads wait while one runs or changes the network, so that they never see it in the middle of a resize.

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Return an iterator over the names and the parameters, as `torch.nn.Module.named_parameters` does."""
        with self.lock:
            return iter(list(super().named_parameters(prefix, recurse, remove_duplicate)))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the state, as `torch.nn.Module.state_dict` does; for the arguments see there."""
        with self.lock:
            return super().state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as `torch.nn.Module.train` does, but never in the middle of another thread's training step."""
        with self.lock:
            return super().train(mode)

    @outside_inference_mode()
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self.lock:
            memo[id(self)] = twin = type(self).__new__(type(self))
            twin.__setstate__(deepcopy(self.__getstate__(), memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register(self)

    # -- saving -------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, buffer in self.unsaved().items():
            destination[prefix + buffer_key(name)] = buffer if keep_vars else buffer.detach()

    def get_extra_state(self) -> Tensor:
        """Return k as a tensor, so that a state dict holds tensors only."""
        return torch.tensor(self._k, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Set k to the value in a state dict."""
        self.k = float(state)


def _versions(tensors: Sequence[Tensor]) -> _Versions:
    """Return the tensors, each with how often it was changed in place."""
    return tuple((t, version(t)) for t in tensors)


def _unchanged(before: _Versions, now: _Versions) -> bool:
    """Return whether these are the same tensors, and none was changed in between."""
    return len(before) == len(now) and all(t is u and v == w for (t, v), (u, w) in zip(before, now, strict=True))
