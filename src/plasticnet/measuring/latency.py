"""Measures latency as a cost, module by module, on copies of the network that are cut at random.

The time of a module is fitted by least squares. It is a sum, with coefficients that are not negative, of a constant, of
the lengths of its tensors' gated dimensions, and of the products of two such dimensions of one tensor. Like the other
costs it is then multilinear in the gates, so that its expectation is cheap and differentiable. Some effects do not fit
into this sum: kernels may be faster for multiples of 8, for example. They show in the error of the prediction, which is
measured on networks that were not used for the fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from math import prod
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import nn

from plasticnet.cost.latency import Latency, Term
from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.site import INITIAL_LOGIT, set_logits
from plasticnet.layers.take import Take
from plasticnet.measuring.timing import Inputs, call, called_rows, device_of, one_thread, times_of
from plasticnet.surgery.compact import cut
from plasticnet.tools.inputs import batch_size, blaming_inputs, call_arguments, copy_inputs
from plasticnet.tools.progress import Progress
from plasticnet.tools.sharding import as_whole
from plasticnet.tools.snapshot import duplicate, left_as_it_was, sharing
from plasticnet.units import BlockUnits, Units

_HELD_OUT = 4  # every fourth network is left out of the fit, and is used to measure the error
_NARROWEST = 0.02  # the smallest share of a site's units that is measured


@dataclass(frozen=True)
class _Sample:
    """A network that was measured.

    Attributes:
        lengths: The shape of each parameter, by the name that it has in the whole network.
        times: The milliseconds of each module, by name.
    """

    lengths: Mapping[str, tuple[int, ...]]
    times: Mapping[str, float]

    @property
    def total(self) -> float:
        """The milliseconds of a forward pass."""
        return sum(self.times.values())


def measure_latency(net: GatedModel, example_inputs: Any, networks: int, repeats: int) -> Latency:
    """Measure networks that are cut at random, and fit the time of a forward pass to their sizes.

    `PlasticNet.measure_latency` calls this and makes the result a cost. The network is left as it was.

    Args:
        net: The network.
        example_inputs: A tuple of arguments or a dict of keyword arguments, with the batch size that counts.
        networks: How many networks are cut and measured, beside the whole one: 8 or more.
        repeats: How often each of them is run.

    Raises:
        PlasticError: A number is out of range, the network does not run on the inputs or when it is cut, or it lies on
            a device on which time is not measured.
    """
    if type(networks) is not int or networks < 2 * _HELD_OUT:
        raise PlasticError(f"networks={networks!r}: a whole number of networks to measure, {2 * _HELD_OUT} or more")
    if type(repeats) is not int or repeats < 1:
        raise PlasticError(f"repeats={repeats!r}: a whole number, 1 or more")
    inputs = args, kwargs = call_arguments(example_inputs)
    device = device_of(net, inputs)
    sites = {s.name: s.units for s in net.sites.values()}
    with as_whole(net):
        twin: Any = duplicate(net).eval()
    whole: nn.Module = twin.model
    with left_as_it_was(twin), one_thread(), Progress("measuring latency", networks + 1) as progress:
        _open(twin)
        with blaming_inputs(whole, args, kwargs):
            watched, row_of = called_rows(twin, whole, copy_inputs(inputs))
        timed = partial(_measured, whole, sites, list(watched), inputs, repeats, device)
        generator, samples = np.random.default_rng(0), list[_Sample]()
        for i in range(networks + 1):
            samples.append(timed(_gates(sites, generator) if i else {n: np.ones(u.size) for n, u in sites.items()}))
            progress.advance(f"network {i + 1} of {networks + 1}")
    held_out = samples[_HELD_OUT::_HELD_OUT]
    fitted = [s for i, s in enumerate(samples) if i == 0 or i % _HELD_OUT]
    gated = {(s.tensor, s.dim) for u in sites.values() for s in u.slices}
    terms: list[Term] = []
    for row in dict.fromkeys((*watched, "")):
        tensors = [t for t, r in row_of.items() if r == row]
        dims = {t: [d for d in range(len(samples[0].lengths[t])) if (t, d) in gated] for t in tensors}
        terms += _fit(row, dims, fitted)
    errors = [abs(_predicted(terms, s) / s.total - 1) for s in held_out]
    moving = {t.module for t in terms if t.dims}
    dtype = next(p.dtype for p in whole.parameters() if p.is_floating_point() or p.is_complex())
    return Latency(
        tuple(terms), tuple(row for row in watched if row not in moving), samples[0].total,
        float(np.mean(errors)), max(errors), len(fitted), len(held_out),
        device, str(dtype).removeprefix("torch."), batch_size(args, kwargs),
    )  # fmt: skip


def _open(net: Any) -> None:
    """Open all gates, those of blocks too, and make the network run without draws."""
    net.k = math.inf
    for site in net.sites.values():
        set_logits(site, slice(None), INITIAL_LOGIT)
        site.grace.zero_()  # Blocks that sleep are measured, too.


def _gates(sites: Mapping[str, Units], generator: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw which units of each site stay.

    All blocks stay. For every other site a random share of the units stays. The logarithm of the share is uniform, so
    that narrow sites are as frequent as wide ones. No site is cut to a single unit, because a model may squeeze an axis
    of length 1 away.

    Returns:
        Gates of 0 and 1, shape (units,), for each site.
    """
    gates: dict[str, np.ndarray] = {}
    for name, u in sites.items():
        share = 1.0 if isinstance(u, BlockUnits) else _NARROWEST ** generator.uniform()
        gates[name] = np.zeros(u.size)
        gates[name][generator.permutation(u.size)[: max(round(share * u.size), 2)]] = 1.0
    return gates


def _measured(
    whole: nn.Module,
    sites: Mapping[str, Units],
    rows: Sequence[str],
    inputs: Inputs,
    repeats: int,
    device: str,
    gates: Mapping[str, np.ndarray],
) -> _Sample:
    """Cut a copy of the model to the units whose gate is 1, and measure it.

    Args:
        whole: The model, which is left as it was.
        sites: Its sites, by name.
        rows: The names of the modules to measure.
        inputs: What the model is run on.
        repeats: How often it is run.
        device: "cpu" or "cuda".
        gates: Gates of 0 and 1, shape (units,), for each site.

    Raises:
        PlasticError: The model does not run when it is cut like this.
    """
    small = sharing(whole)
    modules = {row: small.get_submodule(row) for row in rows}
    cut(small, sites, {name: torch.from_numpy(g) for name, g in gates.items()})
    takes = {m[1]: m for m in small.modules() if isinstance(m, nn.Sequential) and len(m) and isinstance(m[0], Take)}
    modules = {row: takes.get(m, m) for row, m in modules.items()}  # the time of a Take belongs to its consumer
    names = [name for name, _ in whole.named_parameters()]  # a Take changes the names, but not the order
    lengths = {name: tuple(p.shape) for name, p in zip(names, small.parameters(), strict=True)}
    run = partial(call, small)
    try:
        run(copy_inputs(inputs))  # the first run is slow, because it prepares kernels
    except Exception as error:
        widths = {name: int(g.sum()) for name, g in gates.items()}
        raise PlasticError(
            f"{type(whole).__name__} does not run when it is cut to {widths}: {error}. Leave a site that cannot be "
            "that narrow alone, with PlasticNet(exclude=...)"
        ) from error
    times = times_of(run, inputs, modules, repeats, device)
    total = times_of(run, inputs, {}, repeats, device)[None]
    share = total / sum(times.values())  # watching takes time too, so the times are scaled to a run without it
    before = times.pop(None, 0.0)  # the time before the first module starts, which belongs to the model itself
    times[""] = times.get("", 0.0) + before
    return _Sample(lengths, {row: times.get(row, 0.0) * share for row in (*rows, "")})


def _fit(row: str, dims: Mapping[str, Sequence[int]], samples: Sequence[_Sample]) -> list[Term]:
    """Fit terms to the time of a module.

    Args:
        row: The name of the module.
        dims: The gated dimensions of each of its parameters, by the parameter's name.
        samples: The networks to fit. The first is the whole network.

    Returns:
        The terms whose coefficient is not 0.
    """
    first = next(iter(dims), "")
    asked = [(first, ())] + [(t, c) for n in (1, 2) for t, owned in dims.items() for c in combinations(owned, n)]
    lengths = [[tuple(s.lengths[t][d] for d in c) for t, c in asked] for s in samples]
    products = np.array([[prod(n) for n in sample] for sample in lengths], dtype=np.float64)
    products /= products[0]
    # Equal columns are kept once: a bias and the rows of its weight, for example, have the same lengths.
    distinct = np.sort(np.unique(products.round(9), axis=1, return_index=True)[1])
    # All networks have the same weight in the fit, because the error counts relative to the time of each.
    weights = 1 / np.array([s.total for s in samples])
    times = np.array([s.times[row] for s in samples])
    found, _ = nnls(products[:, distinct] * weights[:, None], times * weights)
    fitted = [(*asked[i], lengths[0][i], float(ms)) for i, ms in zip(distinct, found, strict=True) if ms > 0]
    return [Term(row, tensor, which, n, ms) for tensor, which, n, ms in fitted]


def _predicted(terms: Sequence[Term], sample: _Sample) -> float:
    """Return the milliseconds that the terms predict for a network of these lengths."""
    return sum(t.rate * prod(sample.lengths[t.tensor][d] for d in t.dims) for t in terms)
