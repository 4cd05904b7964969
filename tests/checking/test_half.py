"""The self-check of models in half precision, or with parts in it: the sites are those of single precision."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from plasticnet import PlasticNet
from plasticnet.checking.twins import random_twin
from plasticnet.tools.inputs import Call
from tests.kit.networks import mlp

HALF = [torch.float16, torch.bfloat16]


class Residual(nn.Module):
    """A stack of residual layers, deep enough that rounding in half precision grows to percents."""

    def __init__(self, depth: int, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(mlp(width, hidden, width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, x.shape[-1:]))
        return self.head(x)


class HardCoded(Residual):
    """One of its layers uses its width in a way that no trace can see."""

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            y = layer[1](layer[0](nn.functional.rms_norm(x, x.shape[-1:])))
            if i == 5:
                y = y * y.shape[-1] / 2048
            x = x + layer[2](y)
        return self.head(x)


class Around(nn.Module):
    """Does something before and after an MLP."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = mlp(6, 16, 12, 3)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(self.before(x)))


class Autocast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = Residual(12, 24, 48), dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype):
            return self.body(x)


class Mixed(nn.Module):
    """Norms in single precision within a model in half, as large models keep them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)
        self.first.to(dtype)
        self.last.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).float()).to(self.last.weight.dtype))


class Stubborn(nn.Module):
    """Runs in its own precision only."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.body, self.dtype = Residual(12, 24, 48).to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        if self.body.head.weight.dtype != self.dtype:
            raise TypeError(f"weights in {self.dtype} are expected")
        return self.body(x)


def sites(model: nn.Module, x: Tensor, **options: object) -> dict[str, int]:
    net = PlasticNet(model, (x,), **options)  # pyright: ignore[reportArgumentType]
    return {name: len(site) for name, site in net.sites.items()}


@pytest.mark.slow
def test_large_models() -> None:
    dtype, model = torch.bfloat16, Residual(13, 1024, 2048)
    assert sum(p.numel() for p in model.parameters()) > 50_000_000
    expected = sites(copy.deepcopy(model), torch.randn(2, 1024))
    assert len(expected) == 13
    with torch.autocast("cpu", dtype):
        assert sites(copy.deepcopy(model), torch.randn(2, 1024)) == expected
    assert sites(model.to(dtype), torch.randn(2, 1024).to(dtype)) == expected


@pytest.mark.slow
def test_large_models_whose_width_is_hard_coded_in_one_layer() -> None:
    net = PlasticNet(HardCoded(13, 1024, 2048).bfloat16(), (torch.randn(2, 1024).bfloat16(),))
    assert set(net.sites) == {f"layers.{i}.0" for i in range(13) if i != 5}
    assert "layers.5.0" in net.frozen


@pytest.mark.parametrize("dtype", HALF)
def test_parts_in_single_precision(dtype: torch.dtype) -> None:
    assert sites(Mixed(dtype), torch.randn(4, 6).to(dtype), residual=True) == {"first": 16}


@pytest.mark.parametrize("dtype", HALF)
def test_outputs_and_inputs_that_are_cast(dtype: torch.dtype) -> None:
    for before, after in (
        (lambda x: x, lambda y: y.to(dtype)),
        (lambda x: x.to(dtype).float(), lambda y: y),
        (lambda x: x.float(), lambda y: y.to(dtype).double()),
    ):
        for given in (torch.float32, dtype):
            x = torch.randn(4, 6).to(given)
            model = Around(before, after).to(given) if before(x).dtype == given else Around(before, after)
            assert sites(model, x) == {"body.0": 16, "body.2": 12}


@pytest.mark.parametrize("dtype", HALF)
def test_autocast_within_the_model(dtype: torch.dtype) -> None:
    assert len(sites(Autocast(dtype), torch.randn(4, 24))) == 12


@pytest.mark.parametrize("dtype", HALF)
def test_attached_under_autocast(dtype: torch.dtype) -> None:
    x = torch.randn(4, 24)
    with torch.autocast("cpu", dtype):
        net = PlasticNet(Residual(12, 24, 48), (x,))
        assert len(net.sites) == 12
        assert len(sites(Residual(12, 24, 48).to(dtype), x)) == 12  # autocast brings inputs and weights together
        assert len(sites(Residual(12, 24, 48), x.to(dtype))) == 12
    net.resize({"layers.0.0": [0, 5, 7]})
    torch.testing.assert_close(net.compact()(x), net.eval()(x))


@pytest.mark.parametrize("dtype", HALF)
def test_models_that_refuse_every_other_precision(dtype: torch.dtype) -> None:
    assert len(sites(Stubborn(dtype), torch.randn(4, 24).to(dtype))) == 12


@pytest.mark.parametrize("dtype", HALF)
def test_it_stays_in_its_precision(dtype: torch.dtype) -> None:
    model = Residual(3, 12, 16).to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    net = PlasticNet(model, (torch.randn(4, 12).to(dtype),))
    assert all(torch.equal(p, before[name]) and p.dtype == dtype for name, p in net.model.named_parameters())
    assert all(p.dtype == dtype for p in net.compact().parameters())


@pytest.mark.parametrize("dtype", HALF)
def test_the_parameters_of_the_copy_are_drawn_in_the_precision_of_the_model(dtype: torch.dtype) -> None:
    call = Call((torch.randn(2, 6).to(dtype),), {})
    twin, (wide,) = random_twin(mlp(6, 16, 3).to(dtype), [call], seed=3)
    assert wide.args[0].dtype == torch.float32
    for p in twin.parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, p.to(dtype).float())
