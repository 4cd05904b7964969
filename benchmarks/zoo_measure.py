"""What is measured of one model of the zoo, in its own process."""

from __future__ import annotations

import copy
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from zoo_models import MODELS

import plasticnet as pn
from plasticnet import export
from plasticnet.tools.difference import relative_difference

CLOSED_SHARES = (0.3, 0.8)
TOLERANCE = 1e-9  # of compact against evaluation, in double precision
_Inputs = tuple[Any, ...] | dict[str, Any]


def build(name: str, seed: int) -> tuple[Callable[[], nn.Module], nn.Module, _Inputs]:
    """Factory, model and example inputs, all from one seed."""
    torch.manual_seed(seed)
    factory, inputs = MODELS[name]()
    return factory, factory(), inputs


def run(model: nn.Module, inputs: _Inputs) -> list[Tensor]:
    """The floating-point outputs of a model, on copies of the inputs."""
    inputs = tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, inputs)
    out = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


def double(inputs: _Inputs) -> _Inputs:
    """The inputs in double precision, where they are not integers."""
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def randomise(model: nn.Module) -> None:
    """Random parameters and running statistics: layers that start at zero would hide errors."""
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.dim() > 1:
                p.normal_(0, (p.shape[0] / max(p.numel(), 1)) ** 0.5)
            elif p.is_floating_point():
                p.uniform_(0.5, 1.5)
        for name, b in model.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                b.uniform_(0.5, 1.5)


def first_line(error: BaseException) -> str:
    """One line that names an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def measure(
    name: str, seed: int, report: Callable[[dict[str, Any]], None], onnx: bool = True, residual: bool = False
) -> None:
    """Fill one row; ``report`` gets what is known so far after each step, so that a crash or a time
    limit in a later one loses nothing."""
    factory, model, inputs = build(name, seed)
    row: dict[str, Any] = {"name": name, "seed": seed, "parameters": sum(p.numel() for p in model.parameters())}
    report(row)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        net = pn.PlasticNet(model, inputs, residual=residual)
    except pn.PlasticError as error:
        nothing = "has nothing to gate" in str(error)
        row["status"] = f"nothing to gate: {error}" if nothing else f"refused: {error}"
        report(row)
        return
    except Exception as error:
        row["status"] = f"crash: {first_line(error)}"
        report(row)
        raise
    row["seconds"], row["cpu_seconds"] = time.perf_counter() - wall, time.process_time() - cpu
    row |= inventory(net)
    report(row)
    steps: dict[str, Callable[[], dict[str, Any]]] = {"compact": lambda: comparisons(net, inputs, factory, seed)}
    if onnx:
        steps["onnx"] = lambda: {"onnx": onnx_verdict(net, inputs, seed)}
    for step, function in steps.items():
        try:
            row |= function()
        except Exception as error:
            row["status"] = f"crash in {step}: {first_line(error)}"
            report(row)
            raise
        report(row)
    row["status"] = verdict(row)
    report(row)


def verdict(row: Mapping[str, Any]) -> str:
    """The word ok, or what is wrong."""
    wrong = [f"error {e:.1e} at {s} closed" for s, e in row["error"].items() if not e <= TOLERANCE]
    wrong += [f"output not moved at {s} closed" for s, moved in row["moved"].items() if not moved]
    wrong += [] if row["gradients"] is True else [f"gradients: {row['gradients']}"]
    wrong += [f"ONNX: {row['onnx']}"] if row.get("onnx", "").startswith("failed") else []
    wrong += [] if row["save_load"] is True else [f"save and load: {row['save_load']}"]
    return "; ".join(wrong) or "ok"


def inventory(net: pn.PlasticNet) -> dict[str, Any]:
    """Sites, units, the share of the parameters that can be pruned, and what is frozen with the reasons."""
    return {
        "sites": len(net.sites),
        "units": sum(len(site) for site in net.sites.values()),
        "prunable": prunable_share(net),
        "frozen": dict(net.frozen),
        "not_growable": [n for n, site in net.sites.items() if not site.units.growable],
        "checked": net.checked,
    }


def prunable_share(net: pn.PlasticNet) -> float:
    """The share of all parameter entries that lie in a position which some unit owns."""
    owned: dict[tuple[str, int], set[int]] = {}
    for site in net.sites.values():
        for s in site.units.slices:
            owned.setdefault((s.tensor, s.dim), set()).update(np.asarray(s.index).reshape(-1).tolist())
    total = fixed = 0
    for name, p in net.model.named_parameters():
        total += p.numel()
        fixed += math.prod(n - len(owned.get((name, d), ())) for d, n in enumerate(p.shape))
    return 1 - fixed / total


def close_gates(net: pn.PlasticNet, share: float) -> None:
    """Close a random ``share`` of the units of every site, never all; at k = infinity phi's sign decides."""
    net.k = math.inf
    for site in net.sites.values():
        closed = min(round(share * len(site)), len(site) - 1)
        site.phi.data.fill_(1.0)
        site.phi.data[torch.randperm(len(site))[:closed]] = -1.0


def comparisons(net: pn.PlasticNet, inputs: _Inputs, factory: Callable[[], nn.Module], seed: int) -> dict[str, Any]:
    """Compact against evaluation, gradients, and saving, on a randomised copy in double precision."""
    torch.manual_seed(seed)
    twin = copy.deepcopy(net).double().eval()
    inputs = double(inputs)
    randomise(twin.model)
    with torch.no_grad():
        whole = run(twin, inputs)
    row: dict[str, Any] = {"error": {}, "moved": {}, "left": {}, "finite": all(bool(o.isfinite().all()) for o in whole)}
    small = twin.model
    for share in CLOSED_SHARES:
        key = f"{share:.0%}".replace("%", " %")
        close_gates(twin, share)
        small = twin.compact()
        with torch.no_grad():
            masked = run(twin, inputs)
            row["error"][key] = relative_difference(masked, run(small, inputs))
        row["moved"][key] = relative_difference(whole, masked) > TOLERANCE
        row["left"][key] = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in twin.model.parameters())
    row["gradients"] = gradients_flow(twin.model, small, inputs)
    row["save_load"] = saves_equal(small, inputs, factory)
    return row


def _gradients(model: nn.Module, inputs: _Inputs) -> dict[str, Tensor | None]:
    outputs = [o for o in run(model, inputs) if o.requires_grad]
    sum((o.square().mean() for o in outputs), torch.zeros(())).backward()
    found = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def gradients_flow(model: nn.Module, small: nn.Module, inputs: _Inputs) -> bool | str:
    """Whether each parameter that gets a gradient in the whole model gets a finite one in the compact one."""
    before, after = _gradients(model, inputs), _gradients(small, inputs)
    for name, gradient in before.items():
        if gradient is None:
            continue
        if after.get(name) is None:
            return f"{name} gets none"
        if gradient.isfinite().all() and not after[name].isfinite().all():
            return f"that of {name} is not finite"
    return True


def saves_equal(small: nn.Module, inputs: _Inputs, factory: Callable[[], nn.Module]) -> bool | str:
    """Whether a compact module comes back from a file with the same tensors, bit by bit, and the same outputs
    (within 1e-12: memory lies differently, and sums may be taken in another order)."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = Path(folder) / "small.safetensors"
        try:
            pn.save(small, path)
            loaded = pn.load(path, lambda: factory().double())
        except Exception as error:
            return first_line(error)
        kept, found = small.state_dict(), loaded.state_dict()
        if kept.keys() != found.keys() or not all(torch.equal(kept[n], found[n]) for n in kept):
            return "the tensors differ"
        error = relative_difference(run(small, inputs), run(loaded, inputs))
    return error <= 1e-12 or f"the outputs differ by {error:.1e}"


def onnx_verdict(net: pn.PlasticNet, inputs: _Inputs, seed: int) -> str:
    """What became of the compact module, 30 % closed, in ONNX Runtime."""
    torch.manual_seed(seed)
    twin = copy.deepcopy(net).eval()
    randomise(twin.model)
    close_gates(twin, CLOSED_SHARES[0])
    try:
        return "equal" if exports_any_batch(twin.compact(), inputs) else "equal (one batch size)"
    except pn.PlasticError as error:
        trouble = re.sub(r"\S+/(?=small\.onnx)", "", first_line(error))
    try:
        exports_any_batch(twin.model, inputs)
    except pn.PlasticError:
        return f"n/a (the model itself does not export): {trouble}"
    return f"failed: {trouble}"


def exports_any_batch(module: nn.Module, inputs: _Inputs) -> bool:
    """Write an ONNX file, which compares its outputs with the module's; whether any batch size will do."""
    with tempfile.TemporaryDirectory() as folder:
        return export(module, Path(folder) / "small.onnx", inputs).dynamic_batch
