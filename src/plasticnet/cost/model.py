"""Computes what a network costs: its units, parameters, multiply-adds or milliseconds, as an expectation over gates.

A tensor costs the product of the lengths of its dimensions. The expected length of a dimension is a sum over the sites
that own parts of it. So everything follows from one number for each site, the expected number of open units. The gates
are independent, except where two dimensions share a site: there the variance is added. A measured latency is a sum of
such products, too. In a weight whose entries have gates of their own, every entry costs its probability times those of
the units of its row and its column.

Every step of training asks for a cost, and a model may have hundreds of tensors. So all of them are computed at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from plasticnet.cost.entries import entries
from plasticnet.cost.latency import Latency
from plasticnet.cost.terms import Dim, Lengths, Places, Terms
from plasticnet.errors import PlasticError
from plasticnet.units import BlockUnits, Units


class CostModel:
    """The expected cost of a network, as a function of the probabilities of its gates.

    Args:
        sites: The units of each site by name, in execution order.
        model: The model, of its present size.
        uses: How often each entry of a parameter is multiplied for one sample, by the name of the parameter.
        latency: A measured latency, or None where none was measured.
        weights: The names of the parameters whose entries have gates.
        asleep: The units that sleep, as indices among all units. They cost nothing, and all costs of a whole network
            leave them out.

    Attributes:
        entries: The entries of the gated weights.
        awake: For every unit 1, or 0 if it sleeps, shape (units,).
    """

    def __init__(
        self,
        sites: Mapping[str, Units],
        model: nn.Module,
        uses: Mapping[str, float],
        latency: Latency | None = None,
        weights: Sequence[str] = (),
        asleep: Sequence[int] = (),
    ) -> None:
        meta = next(model.parameters()).is_meta  # a model without values can still be counted
        self.device = torch.device("cpu") if meta else next(model.parameters()).device
        self._places = Places(sites, self.device)
        self._blocks = {name for name, u in sites.items() if isinstance(u, BlockUnits)}
        self.awake = torch.ones(self._places.one, dtype=torch.float64, device=self.device)
        self.awake[list(asleep)] = 0.0
        self._lengths = Lengths(self._places)
        tensors, timed, ungated = (Terms(self._places) for _ in range(3))
        self._terms = {"parameters": tensors, "macs": tensors, **({} if latency is None else {"latency": timed})}
        self._ungated = ungated
        self._collect(model, uses, latency, weights)
        self.entries = entries(sites, model, weights)
        self._entry_sizes = [e.shape.numel() for e in self.entries]
        self._entry_costs = {"parameters": [1.0] * len(weights), "macs": [uses.get(name, 0.0) for name in weights]}
        for part in (self._lengths, tensors, timed, *([ungated] if weights else [])):
            part.freeze(self.device)
        self._full: dict[str, Tensor] = {}
        self._strengths: tuple[Sequence[float], Tensor | None] = ([], None)

    def _collect(
        self, model: nn.Module, uses: Mapping[str, float], latency: Latency | None, weights: Sequence[str]
    ) -> None:
        """Add a term for every parameter, and for every term of a measured latency."""
        owners: dict[tuple[str, int], dict[str, int]] = {}
        for name, u in self._places.sites.items():
            for s in u.slices:
                owners.setdefault((s.tensor, s.dim), {})[name] = s.index.shape[1]
        place: dict[tuple[str, int], Dim] = {}
        for tensor, p in model.named_parameters():
            owned = [d for d in range(p.dim()) if (tensor, d) in owners]
            for d in owned:
                place[tensor, d] = self._lengths.add(p.shape[d], owners[tensor, d]), owners[tensor, d]
            block, tensors = self._places.block_of(tensor), self._terms["parameters"]
            steady = self._places.sparse_experts(tensor)
            for costs in (("parameters", "macs"),) if steady is None else (("parameters",), ("macs",)):
                # Fewer experts that rows are shared among do the same work, so that it does not follow their gates.
                fewer = steady is not None and costs == ("macs",)
                dims = [d for d in owned if not (fewer and steady in owners[tensor, d])]
                fixed = prod(n for d, n in enumerate(p.shape) if d not in dims)
                counts = {"parameters": float(fixed), "macs": fixed * uses.get(tensor, 0.0)}
                counts = {cost: n if cost in costs else 0.0 for cost, n in counts.items()}
                for terms in (tensors,) if tensor in weights else (tensors, self._ungated):
                    terms.add([place[tensor, d] for d in dims], None if fewer else block, counts)
        for t in () if latency is None else latency.terms:
            if any((t.tensor, d) not in place for d in t.dims):
                raise PlasticError(f"the latency was measured on another network: no units lie along {t.tensor!r} here")
            dims = [place[t.tensor, d] for d in t.dims]
            self._terms["latency"].add(dims, self._places.block_of(t.tensor), {"latency": t.rate})

    def full(self, cost: str) -> Tensor:
        """Return the cost of the network with all units open that do not sleep, a scalar.

        Args:
            cost: "units", "parameters", "macs" or "latency".
        """
        if cost not in self._full:
            self._full[cost] = self.expected(self.awake.to(torch.get_default_dtype()), cost)
        return self._full[cost]

    def expected(self, pi: Tensor, cost: str) -> Tensor:
        """Return the expected cost, a scalar.

        Args:
            pi: The probabilities of the gates of all sites in order, shape (units,), or of those and the gated weights,
                shape (units + weights,). Without those of the weights, all their entries are open. "units" and
                "latency" do not depend on them.
            cost: "units", "parameters", "macs" or "latency".

        Raises:
            PlasticError: The latency was not measured.
        """
        weights: Sequence[Tensor] = ()
        if len(pi) > self._places.one:
            pi, *weights = pi.split([self._places.one, *self._entry_sizes])
        if cost == "units":
            return pi.sum()
        if cost not in self._terms:
            raise PlasticError(
                'cost="latency" is not known yet: call net.measure_latency(example_inputs) first, on the device and '
                "with the batch that count"
            )
        sums = pi.new_zeros(len(self._places.sizes)).index_add(0, self._places.site_of, pi)
        gates = torch.cat([pi, pi.new_ones(1)])
        lengths = self._lengths(sums, gates)
        if not weights or cost not in self._entry_costs:
            total = self._terms[cost].total(cost, pi, lengths, gates)
            # A latency may have constant terms only. Its gradient is then 0, and not missing.
            return total if total.requires_grad or not pi.requires_grad else total + 0 * pi.sum()
        total = self._ungated.total(cost, pi, lengths, gates)
        for e, each, own in zip(self.entries, self._entry_costs[cost], weights, strict=True):
            total = total + each * e.expected(own, gates)
        return total

    def unit_costs(self, cost: str) -> list[float]:
        """Return for each site what one unit costs in addition to all others.

        Blocks may differ in cost, so for them this is the mean over those that do not sleep.

        Args:
            cost: "units", "parameters", "macs" or "latency".
        """
        whole, found = float(self.expected(self.awake, cost)), []
        for (name, start), size in zip(self._places.starts.items(), self._places.sizes, strict=True):
            fewer, units = self.awake.clone(), size if name in self._blocks else 1
            fewer[start : start + units] = 0.0
            there = float(self.awake[start : start + units].sum())
            found.append((whole - float(self.expected(fewer, cost))) / max(there, 1.0))
        return found

    def entry_costs(self, cost: str) -> list[float]:
        """Return for each weight whose entries have gates what one entry costs; 0 where the cost does not know them."""
        return self._entry_costs.get(cost, [0.0] * len(self.entries))

    def reached(self, z: Tensor) -> Tensor:
        """Return which entries of the gated weights belong to open units, a mask of shape (weights,).

        Args:
            z: Which units are open, a boolean tensor of shape (units,).
        """
        z = torch.cat([z, z.new_ones(1)])
        return torch.cat([e.reached(z).expand(e.shape).flatten() for e in self.entries])

    def weighed(self, pi: Tensor, strengths: Sequence[float]) -> Tensor:
        """Return the same probabilities with a gradient that is scaled by one number for each site.

        Args:
            pi: The probabilities, shape (units,) or (units + weights,). The gradient of the weights is not scaled.
            strengths: The number for each site.
        """
        if self._strengths[0] != strengths:
            each = pi.new_tensor(strengths).index_select(0, self._places.site_of)
            self._strengths = strengths, None if all(s == 1 for s in strengths) else each
        each = self._strengths[1]
        if each is None:
            return pi
        each = each if len(each) == len(pi) else nn.functional.pad(each, (0, len(pi) - len(each)), value=1.0)
        return torch.lerp(pi.detach(), pi, each)
