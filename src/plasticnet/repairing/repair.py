"""Refits the readers of closed units, so that the gated network computes what it did with all units open."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.layers.attention import unfused_layers
from plasticnet.repairing.norms import estimate_statistics, statistics_of
from plasticnet.repairing.paired import Paired, Unpaired
from plasticnet.repairing.readers import Reader, find_readers
from plasticnet.repairing.report import Repaired, RepairedReader
from plasticnet.repairing.ridge import Fit, refit
from plasticnet.surgery.undo import undone_on_error
from plasticnet.tools.batches import Calibration, Forward, calibration
from plasticnet.tools.gradients import with_gradients_if_needed
from plasticnet.tools.half import products_in_single
from plasticnet.tools.inputs import Outputs
from plasticnet.tools.precision import full_precision
from plasticnet.tools.sharding import refuse_sharded
from plasticnet.tools.snapshot import left_as_it_was


def repair(
    net: GatedModel,
    batches: Iterable[Any] | Calibration,
    *,
    forward: Forward | None = None,
    outputs: Outputs | None = None,
    calibrate: int = 2048,
    towards: Mapping[str, Tensor] | None = None,
) -> Repaired:
    """Refit what reads closed units, in place, so that the network computes what it did with all units open.

    Every layer that reads a closed unit is refitted by ridge regression, one after the other in execution order. Its
    inputs are those that it gets in the gated network, after the repair of the layers before it; what it should compute
    is what it computes with all units open. No labels are needed. A fifth of the inputs is held out: by it the strength
    of the ridge is chosen, and where the new weights are not better on it, the old ones stay. The statistics of
    BatchNorms are estimated anew, too, where that makes the error of the outputs on it smaller.

    It is called when units are closed and not yet cut: before `PlasticNet.prune` or `PlasticNet.compact`. The weights
    that read closed units stay as they are.

    Args:
        net: The network, at k = infinity. It runs in evaluation mode. Modes, hooks, random numbers and the parameters
            as objects stay as they were; only their values change.
        batches: The inputs, in a form that can be read again and again. A batch is a tensor; a tuple or list whose
            first element is the input, itself a tuple of arguments or a mapping where the model takes several; or a
            mapping, of which the keys that forward names are passed, but not "labels" and "label".
        forward: ``forward(net, batch)`` returns the output for a batch of another form.
        outputs: ``outputs(output)`` returns what counts in the output for the errors that are reported; by default all
            floating tensors.
        calibrate: The number of inputs at which reading stops.
        towards: Which units are open in the network that is to be imitated, shape (units,) of booleans, for each site,
            where it is not the one with all units open: ``{name: site.open.clone() for name, site in
            net.sites.items()}`` before units were closed.

    Returns:
        The errors before and after, of the outputs and of each reader, and what was left out.

    Raises:
        PlasticError: k is not infinity, a batch has none of these forms, the batches are a one-shot iterator, there is
            nothing to hold out, outputs are not finite, or ``towards`` does not fit the sites. Nothing was changed.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x = torch.randn(200, 4)
        >>> net = pn.PlasticNet(model, (x[:2],))
        >>> with torch.no_grad():
        ...     net.sites["0"].phi[:3] = -1.0
        >>> found = pn.repair(net, x.split(50))
        >>> [reader.name for reader in found.readers], found.after <= found.before
        (['2.weight'], True)
    """
    if not math.isinf(net.k):
        raise PlasticError(f"repair mends a network whose units are open or closed, at k = infinity; k is {net.k:g}")
    if type(calibrate) is not int or calibrate < 2:
        raise PlasticError(f"calibrate={calibrate!r}: the number of inputs to read, 2 or more")
    refuse_sharded(net, "repair")
    data = calibration(batches, calibrate)
    with net.lock:
        aim = None if towards is None else _checked(net, towards)
        with undone_on_error(net, [], []):
            found = with_gradients_if_needed(lambda: _repaired(net, data, forward, outputs, aim))
        if net.ranks.count > 1:
            net.ranks.broadcast([*net.model.parameters(), *net.model.buffers()])
    return found


def _checked(net: GatedModel, towards: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return which units are to be open, on the device of the network, or raise `PlasticError` if that is unclear."""
    sizes = {name: len(site) for name, site in net.sites.items()}
    found = {n: tuple(t.shape) if isinstance(t, Tensor) and t.dtype == torch.bool else t for n, t in towards.items()}
    wrong = {n: found.get(n, "nothing") for n in {**sizes, **found} if found.get(n) != (sizes.get(n),)}
    if wrong:
        name, got = next(iter(wrong.items()))
        wanted = (
            f"a boolean for each of its {sizes[name]} units" if name in sizes else "nothing, as there is no such site"
        )
        raise PlasticError(f"towards has {got} for {name}, and should have {wanted}")
    return {n: t.to(net.like.device) for n, t in towards.items()}


def _repaired(
    net: GatedModel,
    data: Calibration,
    forward: Forward | None,
    outputs: Outputs | None,
    towards: Mapping[str, Tensor] | None,
) -> Repaired:
    """Do what `repair` does, in a network that is locked."""
    pair = Paired(net, data, forward, outputs, towards)
    try:
        with left_as_it_was(net, training=False), _one_by_one(net), net.gating.folding_once():
            report = _refitted(pair)
            statistics = statistics_of(net.model)
            changed = {n: b.clone() for n, b in net.model.named_buffers() if n in pair.original or n in statistics}
        with torch.no_grad():
            for name, new in changed.items():  # which leaving the context has put back
                net.model.get_buffer(name).copy_(new)
    except BaseException:
        pair.put_back()
        raise
    return report


def _refitted(pair: Paired) -> Repaired:
    """Refit the readers of closed units one by one, and report it."""
    readers, left_out = find_readers(pair.net, pair.look())
    first = pair.error()
    if not math.isfinite(first):
        raise PlasticError(
            "the outputs on the batches to repair on are not finite (NaN or infinite): look for such numbers in the "
            "inputs and the weights; where some outputs are infinite by design, let outputs= choose others"
        )
    tried = list[RepairedReader]()
    for reader in readers:
        try:
            tried.append(_refit(pair, reader))
        except Unpaired:
            left_out[reader.place.tensor] = "it reads something else when all units are open"
        except _NotFinite:
            left_out[reader.place.tensor] = "what it reads is not finite (NaN or infinite) on some inputs"
    after = pair.error()
    if not after <= first:
        pair.put_back()
        tried = [RepairedReader(r.name, r.before, r.before, None, None) for r in tried]
        after = first
    norms, after = estimate_statistics(pair, after)
    return Repaired(first, after, tuple(tried), left_out, norms, pair.data.inputs)


class _NotFinite(Exception):
    """Says that a reader cannot be refitted, because numbers that it reads are not finite."""


def _refit(pair: Paired, reader: Reader) -> RepairedReader:
    """Refit one reader, if that makes its error smaller."""
    name, constant = reader.place.tensor, reader.bias or reader.shift
    fitted, held = pair.sums(reader)
    if not all(bool(torch.isfinite(t).all()) for sums in (fitted, held) for t in (sums.xx, sums.ee)):
        raise _NotFinite
    counts = reader.outputs.double() * held.weight.expand(reader.outputs.numel()).view(reader.outputs.shape)
    had = float((held.error() * counts).sum()) if held.n else 0.0
    if not (fitted.n and had):
        return RepairedReader(name, had, had, None, None)
    several = len(reader.inputs) > 1
    fit = refit(
        fitted,
        held,
        constant=constant is not None,
        double=pair.net.model.get_parameter(name).dtype == torch.float64,
        valid=reader.inputs if several else None,
        counts=counts,
    )
    variance = float((held.variance() * counts).sum()) or had
    if fit is None or not _apply(pair, reader, fit):
        return RepairedReader(name, had / variance, had / variance, None, None)
    now = float((fit.error * counts).sum())
    return RepairedReader(name, had / variance, now / variance, fit.strength, constant.tensor if constant else None)


def _apply(pair: Paired, reader: Reader, fit: Fit) -> bool:
    """Add a fit to the weights of a reader, and return whether it stays.

    The inputs of recurrent weights change with them, so that their fit is to inputs that will be others. It is taken
    back unless it makes the error of the outputs smaller.
    """
    if not reader.recurrent:
        _add_fit(pair, reader, fit)
        return True
    constant = reader.bias or reader.shift
    tensors = [pair.tensor(p.tensor) for p in (reader.place, constant) if p is not None]
    old, before = [t.clone() for t in tensors], pair.error()
    _add_fit(pair, reader, fit)
    if pair.error() < before:
        return True
    with torch.no_grad():
        for tensor, values in zip(tensors, old, strict=True):
            tensor.copy_(values)
    return False


def _add_fit(pair: Paired, reader: Reader, fit: Fit) -> None:
    """Add a fit to the weights of a reader, and its constant to the bias or, with the other sign, to a running mean."""
    view = reader.place.of(pair.tensor(reader.place.tensor))
    matrices = reader.place.matrices(view.clone())
    change = (fit.change * reader.outputs[:, None]).to(matrices.dtype)
    if len(reader.inputs) == 1:
        matrices = matrices.index_add(1, reader.inputs[0].nonzero()[:, 0], change)
    else:
        matrices = matrices + change
    with torch.no_grad():
        view.copy_(reader.place.operand(matrices))
        if fit.constant is not None:
            constant = (fit.constant * reader.outputs).reshape(-1)
            if reader.bias is not None:
                _add(reader.bias.of(pair.tensor(reader.bias.tensor)), constant)
            elif reader.shift is not None:
                _add(reader.shift.of(pair.tensor(reader.shift.tensor)), -constant)


def _add(vector: Tensor, constant: Tensor) -> None:
    """Add a constant to a vector of another precision, in place."""
    vector.add_(constant.to(vector.dtype))


@contextmanager
def _one_by_one(net: GatedModel) -> Iterator[None]:
    """Let torch compute products one by one in this context, where it may run a whole layer at once."""
    recurrent = any(isinstance(m, nn.RNNBase) for m in net.model.modules())
    cudnn, (mkldnn, *_) = torch.backends.cudnn.enabled, torch.backends.mkldnn.set_flags(_enabled=not recurrent)
    torch.backends.cudnn.enabled = cudnn and not recurrent
    try:
        with (
            unfused_layers(), torch.compiler.set_stance("force_eager"), full_precision(net.like.device.type),
            products_in_single(net.model),
        ):  # fmt: skip
            yield
    finally:
        torch.backends.cudnn.enabled = cudnn
        torch.backends.mkldnn.set_flags(_enabled=mkldnn)
