"""Weights that are computed from parameters before layers use them: masked, scaled, rounded, normalised, merged."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm

import plasticnet as pn
from tests.kit.adversarial_checks import check_exact, check_life, distance, precise

MASK = torch.ones(12, 16)


class Computed(nn.Module):
    """Three linear layers, of which the middle one uses its weight through a function."""

    mask: Tensor

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.function = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3), function
        self.down, self.up = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(12, 4))
        self.other = nn.Parameter(torch.randn(12, 16))
        self.scale = nn.Parameter(torch.rand(12, 1) + 0.5)
        self.columns = nn.Parameter(torch.rand(16) + 0.5)
        self.number = nn.Parameter(torch.tensor(0.0))
        self.register_buffer("mask", (torch.randn(12, 16) > -0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(F.linear(F.relu(self.a(x)), self.function(self, self.b.weight), self.b.bias)))


ELEMENTWISE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "as it is": lambda _, w: w,
    "times a number": lambda _, w: w * 0.5,
    "divided by a number": lambda _, w: w / 3,
    "masked by a buffer": lambda m, w: w * m.mask,
    "mask first": lambda m, w: m.mask * w,
    "clamped": lambda _, w: w.clamp(-0.3, 0.3),
    "rounded straight through": lambda _, w: w + ((8 * w).round() / 8 - w).detach(),
    "masked_fill": lambda m, w: w.masked_fill(m.mask < 1, 0.0),
    "where": lambda m, w: torch.where(m.mask > 0, w, 0.0),
    "unsqueezed and squeezed": lambda _, w: w.unsqueeze(0).squeeze(0),
    "as of a convolution": lambda _, w: w[:, :, None].squeeze(-1),
    "there and back": lambda _, w: w.t().contiguous().t().flatten().view(w.shape),
    "rows scaled by a parameter": lambda m, w: w * m.scale,
    "columns scaled by a parameter": lambda m, w: w * m.columns,
    "a sum of two": lambda m, w: w + m.other,
    "a product of two": lambda m, w: w * m.other,
    "fake quantisation": lambda _, w: torch.fake_quantize_per_tensor_affine(w, 0.01, 0, -128, 127),
    "odd function": lambda _, w: w.tanh(),
    "square": lambda _, w: w.pow(2),
    "sum with a low rank": lambda m, w: w + m.up @ m.down,
    "low rank alone": lambda m, w: m.up @ m.down + 0 * w,
    "stack of two": lambda m, w: torch.stack([w, m.other]).sum(0),
}
_COMPUTED = "a weight that is computed so that closed columns would not be zeros"
ROWS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "exponential": (lambda _, w: w.exp(), _COMPUTED),
    "plus a number": (lambda _, w: w + 0.1, _COMPUTED),
    "plus a parameter that is zero": (lambda m, w: w + m.number, _COMPUTED),
    "filled with ones": (lambda m, w: w.masked_fill(m.mask < 1, 1.0), _COMPUTED),
    "standardised": (lambda _, w: (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True), _COMPUTED),
    "normalised by hand": (lambda _, w: w / w.norm(dim=1, keepdim=True), "reduced over its channels"),
    "a constant of its size": (lambda _, w: w + torch.zeros_like(w).add(0.01), _COMPUTED),
}
FROZEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "scaled by the largest entry": (lambda _, w: w / w.abs().max(), "reduced over its channels"),
    "softmax over the rows": (lambda _, w: w.softmax(0), _COMPUTED),
    "a mask that is no buffer": (lambda _, w: w * MASK.to(w), "neither a parameter nor a buffer"),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name: str, tmp_path: Path) -> None:
    net = check_life(lambda: Computed(ELEMENTWISE[name]), (torch.randn(5, 6),), tmp_path)
    assert {"a", "b"} <= set(net.sites), dict(net.frozen)
    per_sample_like_per_batch(net, torch.randn(5, 6).double())


@pytest.mark.parametrize("name", ROWS)
def test_rows_only(name: str, tmp_path: Path) -> None:
    """The units that are born in the weight are gated, and those that it reads are frozen."""
    function, reason = ROWS[name]
    net = check_life(lambda: Computed(function), (torch.randn(5, 6),), tmp_path)
    assert "b" in net.sites
    assert re.search(reason, net.frozen["a"])


@pytest.mark.parametrize("name", FROZEN)
def test_frozen(name: str) -> None:
    function, reason = FROZEN[name]
    with pytest.raises(pn.PlasticError, match=f"nothing to gate.*a: .*{reason}"):
        pn.PlasticNet(Computed(function), (torch.randn(5, 6),))


def per_sample_like_per_batch(net: pn.PlasticNet, x: Tensor) -> None:
    """Gates of samples, which act on inputs, do what the same gates of the batch do, which act on weights."""
    net.k = math.inf
    with torch.no_grad():
        for site in net.sites.values():
            site.phi.copy_(torch.where(torch.rand(len(site)) < 0.5, -1.0, 1.0))
            site.phi[0] = 1.0
    z = net.mean_gates()[0]
    assert distance(net.eval().run(z, (x,), {}), net.run(z.expand(len(x), -1), (x,), {})) <= 1e-9


class Half(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w / 2


Change = Callable[[nn.Module], object]


def linears(change: Change, bias: bool = True) -> nn.Module:
    sizes = ((8, 32), (32, 16), (16, 3))
    layers = [nn.Linear(a, b, bias) for a, b in sizes]
    for layer in layers:
        change(layer)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def convolutions(change: Change) -> nn.Module:
    model = nn.Sequential(
        nn.Conv1d(3, 8, 3, padding=1), nn.Tanh(), nn.ConvTranspose1d(8, 12, 4, stride=2, padding=1), nn.Tanh(),
        nn.Conv1d(12, 12, 3, padding=1, groups=4), nn.Conv1d(12, 6, 3, padding=1), nn.Tanh(),
        nn.ConvTranspose1d(6, 8, 2, groups=2), nn.Flatten(), nn.Linear(8 * 17, 2),
    )  # fmt: skip
    for layer in model:
        if next(layer.parameters(), None) is not None:
            change(layer)
    return model


def last(layer: Any) -> nn.Module:
    """Weight_norm over all dimensions but the last one, as wav2vec 2.0 has it."""
    return parametrizations.weight_norm(layer, dim=layer.weight.dim() - 1)


def half(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Half())


MODULES: dict[str, Change] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm as it was": old_weight_norm,
    "weight_norm over all but the last": last,
    "pruned at random": lambda m: prune.l1_unstructured(m, "weight", 0.3),
    "pruned by rows": lambda m: prune.ln_structured(m, "weight", 0.25, n=2, dim=0),
    "pruned with bias": lambda m: (prune.l1_unstructured(m, "weight", 0.3), prune.random_unstructured(m, "bias", 0.5)),
    "halved": half,
    "half of a weight_norm": lambda m: half(parametrizations.weight_norm(m)),
    "halved bias": lambda m: parametrize.register_parametrization(m, "bias", Half()),
}
MODULES_FROZEN: dict[str, tuple[Change, str]] = {
    "spectral_norm": (parametrizations.spectral_norm, "a number that depends on the whole weight"),
    "spectral_norm as it was": (nn.utils.spectral_norm, "a number that depends on the whole weight"),
    "weight_norm over all": (lambda m: parametrizations.weight_norm(m, dim=None), "reduced over its channels"),
    "orthogonal": (parametrizations.orthogonal, "a weight that is computed"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, tmp_path: Path) -> None:
    net = check_life(lambda: linears(MODULES[name]), (torch.randn(4, 8),), tmp_path)
    assert set(net.sites) == {"0", "2"}
    per_sample_like_per_batch(net, torch.randn(4, 8).double())


@pytest.mark.parametrize("name", MODULES)
def test_convolutions(name: str, tmp_path: Path) -> None:
    net = check_life(lambda: convolutions(MODULES[name]), (torch.randn(4, 3, 8),), tmp_path)
    assert set(net.sites) == {"0", "2", "5"}
    per_sample_like_per_batch(net, torch.randn(4, 3, 8).double())


@pytest.mark.parametrize("name", MODULES_FROZEN)
def test_modules_that_are_frozen(name: str) -> None:
    change, reason = MODULES_FROZEN[name]
    with pytest.raises(pn.PlasticError, match=f"nothing to gate.*0: .*{reason}"):
        pn.PlasticNet(linears(change), (torch.randn(4, 8),))


@pytest.mark.parametrize("change", [parametrizations.weight_norm, old_weight_norm, last])
def test_weight_norm_whose_columns_are_all_closed(change: Change) -> None:
    """A direction of zeros has no norm, and the weight is zero all the same."""
    net = pn.PlasticNet(precise(linears(change)), (torch.randn(4, 8).double(),))
    x = torch.randn(4, 8).double()
    with torch.no_grad():
        net.sites["2"].phi.fill_(-1.0)
    out = net.eval()(x)
    assert out.isfinite().all()
    assert distance(out, net.compact()(x)) <= 1e-9


def test_weight_norm_of_units_that_are_all_new() -> None:
    """New units are read with weights of zero, so that a direction may have zeros only; it must learn all the same."""
    net = pn.PlasticNet(precise(linears(parametrizations.weight_norm)), (torch.randn(4, 8).double(),))
    net.resize({"2": [-1, -1]})
    x = torch.randn(4, 8).double()
    out = net(x)
    assert out.isfinite().all()
    out.square().sum().backward()
    gradients = [p.grad for name, p in net.model.named_parameters() if name.startswith("4.")]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert any(bool((g != 0).any()) for g in gradients if g is not None and g.dim() == 2)


def test_a_resize_keeps_what_a_weight_norm_computes() -> None:
    model = precise(linears(parametrizations.weight_norm))
    net = pn.PlasticNet(model, (torch.randn(4, 8).double(),))
    before = net.model[2].weight.detach().clone()
    net.resize({"0": [*range(1, 20, 2), -1], "2": [0, 3, 5, -1]})
    assert (net.model[2].weight[:3, :10] - before[[0, 3, 5]][:, 1:20:2]).abs().max() <= 1e-12
    assert (net.model[2].weight[:3, 10] == 0).all()


class Uses(nn.Module):
    """One weight that several layers use, each in its own way."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c, self.how = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 3), how

    def forward(self, x: Tensor) -> Tensor:
        h, w = F.relu(self.a(x)), self.b.weight
        if self.how == "as it is and computed":
            h = F.linear(h, w) + F.linear(h, w.clamp(-0.2, 0.2), self.b.bias.tanh())
        elif self.how == "tied":
            h = F.linear(F.linear(h, w * 0.5).relu(), w.tanh(), self.b.bias)
        else:
            h = F.linear(F.linear(h, w).relu(), (w * 0.5).t(), self.b.bias)
        return self.c(h.relu())


@pytest.mark.parametrize(
    ("how", "sites"), [("as it is and computed", {"a", "b"}), ("tied", {"a"}), ("transposed", set[str]())]
)
def test_one_weight_used_twice(how: str, sites: set[str], tmp_path: Path) -> None:
    if not sites:
        with pytest.raises(pn.PlasticError, match="both produces and consumes"):
            pn.PlasticNet(Uses(how), (torch.randn(5, 6),))
        return
    assert set(check_life(lambda: Uses(how), (torch.randn(5, 6),), tmp_path).sites) == sites


def test_new_units_are_not_pruned() -> None:
    net = pn.PlasticNet(linears(MODULES["pruned with bias"]), (torch.randn(4, 8),))
    net.resize({"0": [*range(32), -1, -1]})
    buffers = dict(net.model.named_buffers())
    assert all((buffers[name][-2:] == 1).all() for name in ("0.weight_mask", "0.bias_mask"))
    assert (buffers["2.weight_mask"][:, -2:] == 1).all()
    assert not (buffers["0.weight_mask"] == 1).all()


@pytest.mark.parametrize(("name", "sites"), [("weight_norm", {"0.input", "0", "2"}), ("pruned at random", {"0", "2"})])
def test_input_sites(name: str, sites: set[str]) -> None:
    """Features are gated one by one where no mask of the weight would have to follow."""
    x = torch.randn(4, 8).double()
    net = pn.PlasticNet(precise(linears(MODULES[name])), (x,), inputs=("*",))
    assert set(net.sites) == sites
    check_exact(net, (x,), net.eval()(x))
    per_sample_like_per_batch(net, x)
