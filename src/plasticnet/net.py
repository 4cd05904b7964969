"""PlasticNet: a model with a gate on every unit."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plasticnet import distributed, objective, passes, pressure, resize, state
from plasticnet.candidates import grow_by_gradient
from plasticnet.check import self_check
from plasticnet.compact import compacted, lengths, to_keep
from plasticnet.cost import CostModel
from plasticnet.errors import PlasticError
from plasticnet.estimators import ESTIMATORS
from plasticnet.gates import Site, gate_key, mean_gates
from plasticnet.gating import Gating
from plasticnet.latency import Latency, measure
from plasticnet.optimizers import listed
from plasticnet.summary import Summary, summarise
from plasticnet.tracing import call_arguments, trace
from plasticnet.units import InputUnits
from plasticnet.weights import WeightSite, gateable, mean_weights, weight_key

Optimizers = Optimizer | Sequence[Optimizer] | None


class PlasticNet(nn.Module):
    """A model whose units open and close while it trains.

    The model is gated in place: its parameters are the ones that are trained, and `resize` replaces
    them. It starts as the model it is: k is infinity and every gate is open.

    Attributes: ``model``, the module; ``sites``, name to `Site`; ``weights``, parameter to `WeightSite`; ``frozen``,
    what cannot be gated and why; ``excluded``, sites left alone because of ``exclude``; ``checked``, whether the
    self-check ran (it cannot on the meta device). Other attributes are the model's.

    Raises `PlasticError` when the model rejects the example inputs or has nothing to gate.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        estimator: str = "bitflip-cv",
        gates: Literal["auto", "sample", "batch"] = "auto",
        inputs: Sequence[str] = (),
        exclude: Sequence[str] = (),
        residual: bool = False,
        blocks: Sequence[str] = (),
        weights: Sequence[str] = (),
    ) -> None:
        """``inputs`` are name patterns of consumers whose input features are gated one by one;
        ``exclude`` are name patterns of sites to leave alone; ``gates`` says whether gates are drawn
        per sample or per batch ("auto": per sample where that is unbiased). ``residual`` gates what
        LayerNorm, RMSNorm and their like normalise, and embeddings, too: the norms then take their
        statistics over the open units. ``blocks`` are name patterns of modules that are units as a
        whole: a closed one hands on its first input. ``weights`` are name patterns of modules whose weight gets a
        gate on every entry, shared by the batch."""
        super().__init__()
        if estimator not in ESTIMATORS:
            raise PlasticError(f"estimator={estimator!r}: choose one of {', '.join(ESTIMATORS)}")
        if gates not in ("auto", "sample", "batch"):
            raise PlasticError(f"gates={gates!r}: choose one of auto, sample, batch")
        if not isinstance(model, nn.Module) or any(isinstance(m, PlasticNet) for m in model.modules()):
            raise PlasticError(f"{type(model).__name__}: a plain nn.Module is needed, one that is not gated yet")
        args, kwargs = call_arguments(example_inputs)
        patterns = ((p,) if isinstance(p, str) else tuple(p) for p in (inputs, exclude, blocks, weights))
        inputs, exclude, blocks, weights = patterns
        traced = trace(model, example_inputs, inputs=inputs, residual=residual, blocks=blocks)
        for pattern in exclude:
            if not any(fnmatchcase(n, pattern) for n in traced.sites):
                raise PlasticError(f"exclude={pattern!r} matches none of the sites: {', '.join(traced.sites)}")
        self.excluded = tuple(n for n in traced.sites if any(fnmatchcase(n, p) for p in exclude))
        for name in self.excluded:
            del traced.sites[name]
        traced = self_check(model, traced, args, kwargs)
        tensors, ungated = gateable(model, weights, args, kwargs)
        if not traced.sites and not tensors:
            reasons = "; ".join(f"{n}: {r}" for n, r in [*ungated.items(), *traced.frozen.items()][:5])
            raise PlasticError(f"{type(model).__name__} has nothing to gate ({reasons or 'no units were found'})")
        self.model = model
        self._frozen = {**traced.frozen, **ungated}
        self._signature = inspect.signature(model.forward)
        self.checked = traced.checked
        self.estimator = estimator
        self.gates_mode = gates
        parameters = [p.real if p.is_complex() else p for p in model.parameters()]
        like = next(p for p in parameters if p.is_floating_point())
        self.gates = nn.ModuleDict({gate_key(n): Site(u, like) for n, u in traced.sites.items()})
        self.gates.update({weight_key(n): WeightSite(n, model.get_parameter(n)) for n in tensors})
        self._uses = traced.uses
        self._latency: Latency | None = None
        self._k = math.inf
        self._samples_apart: bool | None = None  # for "auto": whether per-sample draws are possible
        self._wrapper: Literal["none", "new", "current", "stale", "growing"] = "none"  # of DistributedDataParallel
        self._pass = passes.Pass()
        self._rows_apart: bool | None = None  # whether the network can be run on some of the samples
        self._mean: tuple[Any, Tensor, bool] | None = None
        self._mean_of_weights: tuple[Any, Mapping[str, Tensor] | None] | None = None
        self._gate_gradient: Tensor | None = None  # of the last step: a budget measures its pressure by its size
        self._refresh()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PlasticNet:
        super()._apply(fn, recurse)
        self._refresh()  # the readers' indices live on the parameters' device
        return self

    # -- reading ------------------------------------------------------------------------------

    @property
    def sites(self) -> Mapping[str, Site]:
        """Name to `Site`, in execution order."""
        return MappingProxyType({site.name: site for site in self._sites()})

    @property
    def frozen(self) -> Mapping[str, str]:
        """The name of whatever cannot be gated, to the reason."""
        return MappingProxyType(self._frozen)

    @property
    def weights(self) -> Mapping[str, WeightSite]:
        """The name of every parameter whose entries have gates, to these."""
        return MappingProxyType({w.name: w for w in self._weights()})

    def _sites(self) -> list[Site]:
        return [site for site in self.gates.values() if isinstance(site, Site)]

    def _weights(self) -> list[WeightSite]:
        return [w for w in self.gates.values() if isinstance(w, WeightSite)]

    def _gated(self) -> list[Site | WeightSite]:
        """The sites, and the weights behind them."""
        return list(self.gates.values())  # pyright: ignore[reportReturnType]

    def _phi(self) -> Tensor:
        """All logits in one vector: (units,), or (units + weights,)."""
        return torch.cat([g.phi.flatten() for g in self._gated()])

    @property
    def _like(self) -> Tensor:
        """Some logits, for their dtype and device."""
        return self._gated()[0].phi.detach()

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
            for g in self._gated():
                g.phi.grad = None

    def summary(self) -> Summary:
        """Units, parameters and multiply-adds: per site and in total, all and open. Prints as a table."""
        return summarise(self)

    def param_groups(
        self, lr: float, gate_lr: float | None = None, gate_betas: tuple[float, float] = (0.9, 0.99), **options: Any
    ) -> list[dict[str, Any]]:
        """Two groups for an optimizer: the model's parameters, with ``options`` (weight_decay, say), and the gates'
        logits, with their own rate (default: ten times ``lr``), no weight decay, and, for optimizers of Adam's
        family, their own betas. The second is lower than usual: the gradients of the first steps are large, and a
        long memory of them would hold the gates back."""
        rate = 10 * lr if gate_lr is None else gate_lr
        weights = {"params": list(self.model.parameters()), "lr": lr, **options}
        gates = {"params": [g.phi for g in self._gated()], "lr": rate, "weight_decay": 0.0, "betas": gate_betas}
        return [weights, gates]

    # -- running ------------------------------------------------------------------------------

    @property
    def forward(self) -> Callable[..., Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The model's forward, with its signature. In training at finite k the gates are drawn, in
        evaluation they are at their mean (pi where pi >= 1/2, else 0)."""
        run = partial(self._forward)
        run.__signature__ = self._signature  # pyright: ignore[reportAttributeAccessIssue]
        return run

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """`DistributedDataParallel` looks for this name."""
        return distributed.wrap(self)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training and self._pass.role == "free":  # `expected_loss` has done so for its passes
            distributed.enter(self)
        if self.training and not math.isinf(self._k):
            return passes.drawn(self, args, kwargs)
        z, all_open = self._mean_gates()
        self._pass.note(args, kwargs)
        return self._run(z, args, kwargs, all_open=all_open, weights=mean_weights(self))

    def _run(self, z: Tensor, args: Any, kwargs: Any, **options: Any) -> Any:
        best = {s.name: s.best for s in self._sites() if s.units.norms}
        return self._gating.run(z, args, kwargs, best, **options)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model in place, as `torch.nn.Module.compile` does, arguments included.

        Gates per batch, ordinary training and evaluation then run compiled; gates per sample and masked norms run
        as they were written. ``torch.compile(net)`` gives the same results, with random numbers of its own.
        """
        self.model.compile(*args, **kwargs)

    def _mean_gates(self) -> tuple[Tensor, bool]:
        """The gates at evaluation, and whether all are open. On a GPU this is kept until a gate changes:
        asking would mean waiting."""
        sites = self._sites()
        if not sites:
            return self._like.new_ones(1), True
        key = (
            (self._k, *((id(t), t._version) for s in sites for t in (s.phi, s.grace))) if sites[0].phi.is_cuda else None
        )
        if key is None or self._mean is None or self._mean[0] != key:
            self._mean = (key, *mean_gates(sites, self._k))
        return self._mean[1:]

    def expected_loss(self, closure: Callable[[], Tensor]) -> Tensor:
        """The training loss, a scalar whose backward also gives the gates their gradient.

        ``closure`` runs the network and returns the losses of the samples, shape (batch,), or their
        mean, a scalar. It is called once, and at finite k by most estimators twice or more, under the same
        random numbers and with BatchNorm's statistics updated once; it should have no other side effect.

        Raises `PlasticError` in evaluation mode, when the closure never calls the network or returns
        something else, and when a loss is not finite.
        """
        return objective.expected_loss(self, closure)

    def penalty(
        self, strength: float, cost: str | Mapping[str, float] = "units", scale: Literal["linear", "log"] = "linear"
    ) -> Tensor:
        """``strength`` times the expected cost (or its logarithm), a scalar differentiable in the gates.

        ``cost`` is "units", "parameters", "macs" (for one sample), "latency" (milliseconds: `measure_latency`), or
        a mapping of these to weights: a weighted sum, of the logarithms with scale "log". Logarithms keep the
        pressure relative to what is left (NPN, section 3, is linear).
        """
        return pressure.penalty(self, strength, cost, scale)

    def measure_latency(self, example_inputs: Any, *, networks: int = 24, repeats: int = 9) -> Latency:
        """Make "latency" a cost: milliseconds of a forward pass on the example inputs, as fitted to ``networks`` that
        are cut at random and run ``repeats`` times on the device at hand. It stays when sizes or the device
        change; a state dict does not hold it, but that of a `Schedule` does. Raises `PlasticError` as `profile` does.
        """
        latency = distributed.first(self, measure(self, example_inputs, networks, repeats))
        self._use_latency(latency)
        return latency

    def _use_latency(self, latency: Latency | None) -> None:
        self._latency = latency
        self._refresh()

    # -- changing size ------------------------------------------------------------------------

    def resize(
        self, sources: resize.Sources, optimizer: Optimizers = None, *, init: str = "preserve", grace: int = 0
    ) -> None:
        """Rebuild sites from lists of source indices: ``{"conv1": [0, 2, -1]}`` keeps units 0 and 2 of
        ``conv1`` and adds one. Kept units carry their optimizer state.

        ``optimizer`` is the one, or all of those, that hold the parameters. New units get random
        incoming weights, and outgoing ones of zero ("preserve") or random too ("random", and "paper",
        whose gates start at pi = 1/2); they are held open and unpriced for ``grace`` epochs of the
        schedule. In an input site -1 re-opens a closed feature.

        Raises `PlasticError`, and changes nothing, for an unknown site, an index out of range, a site
        left empty, or optimizers that do not hold every trainable parameter or cannot be resized.
        """
        resize.rebuild(self, sources, lengths(self.model), listed(optimizer), init, grace)

    def _adopt(self, planned: resize.Plan) -> None:
        for site in self._sites():
            site.units = planned.units[site.name]
            if isinstance(site.units, InputUnits):
                site.features = torch.from_numpy(site.units.features).to(site.phi.device)
        self._refresh()

    def limit(
        self, pattern: str, *, minimum: int | None = None, maximum: float = math.inf, strength: float = 1.0
    ) -> None:
        """Bound the sites whose name matches ``pattern``, anew: pruning leaves them ``minimum`` units (0: they may
        die, as a residual branch may; one unit stays, read with weights of zero), growth stops at ``maximum``,
        and the pressure on their gates is multiplied by ``strength``. `resize` and `grow` do as they are told.

        Raises `PlasticError` when no site matches, or the bounds contradict each other.
        """
        pressure.limit(self, pattern, minimum, maximum, strength)

    def grow(
        self,
        counts: Mapping[str, int],
        optimizer: Optimizers = None,
        init: str = "preserve",
        grace: int = 0,
        loss: Callable[[], Tensor] | None = None,
    ) -> None:
        """Add units: ``{"conv1": 2}``. See `resize`.

        ``init`` may also be "gradmax": outgoing weights of zero, and incoming ones for which the gradient of the
        outgoing ones is largest (Evci et al., arXiv 2201.05125). The gradient is that of ``loss``, a
        function without arguments that runs the network on some training data.
        """
        if any(type(n) is not int or n < 0 for n in counts.values()):
            raise PlasticError(f"{dict(counts)}: the units to add are whole numbers, 0 or more; to remove, use prune")
        unknown = [n for n in counts if n not in self.sites]
        if unknown:
            raise PlasticError(f"there is no site {unknown[0]!r}; the sites are: {', '.join(self.sites)}")
        if init == "gradmax":
            if loss is None:
                raise PlasticError('grow(init="gradmax") needs a loss to take the gradient of: loss=...')
            return grow_by_gradient(self, counts, loss, optimizer, grace=grace)
        sources = {n: [*range(len(self.sites[n])), *[-1] * count] for n, count in counts.items()}
        self.resize(sources, optimizer, init=init, grace=grace)

    def prune(self, below: float = 0.5, optimizer: Optimizers = None, multiple_of: int = 1) -> dict[str, int]:
        """Cut the units whose gate has a probability below ``below``, and those whose features are
        all cut; every site keeps at least one. Returns how many were cut per site.

        Where single weights have gates and k is infinity, so are units that only closed ones read.

        With ``multiple_of`` a site keeps the next likely units, too, so that its width in the tensors is
        a multiple of it. Sites that have not that many are cut as without, and so are those that a norm
        takes statistics over.
        """
        sources = to_keep(self, below, multiple_of)
        before = {n: len(s) for n, s in self.sites.items()}
        if sources:
            self.resize(sources, optimizer)
        return {n: before[n] - len(s) for n, s in self.sites.items() if before[n] != len(s)}

    def compact(self, multiple_of: int = 1) -> nn.Module:
        """A plain module, a copy in evaluation mode, with the outputs of ``net.eval()``: closed units
        are cut, and the mean gates of the open ones are multiplied into the weights that read them. Single weights
        that are closed are zeros.

        With ``multiple_of`` some closed units stay, read with weights of zero, so that widths are multiples
        of it; see `prune`.
        """
        return compacted(self, multiple_of)

    def _refresh(self) -> None:
        """Work out anew what depends on the sites' sizes."""
        units = {s.name: s.units for s in self._sites()}
        weights = [w.name for w in self._weights()]
        self._gating = Gating(units, self.model, weights)
        self._cost = CostModel(units, self.model, self._uses, self._latency, weights)
        self._mean = self._mean_of_weights = None

    # -- saving -------------------------------------------------------------------------------

    def get_extra_state(self) -> Tensor:
        """k, so that the state dict holds tensors only."""
        return torch.tensor(self._k, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore k."""
        self.k = float(state)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Resize to the sizes in ``state_dict``, then load it. The parameters stay the same objects, so
        optimizers may be built before or after (load their state too if they have any).

        Raises `PlasticError`, and changes nothing, when it belongs to another architecture.
        """
        state.compare_keys(self.state_dict().keys(), state_dict.keys())
        state.check_k(state_dict["_extra_state"])
        planned = state.plan_load(self, state_dict)
        before = [(p, p.shape) for p in self.parameters()]
        state.resize_in_place(self, planned)
        self._adopt(planned)
        keys = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if any(p is not q or p.shape != shape for (p, shape), q in zip(before, self.parameters(), strict=True)):
            distributed.outgrow(self)
        return keys
