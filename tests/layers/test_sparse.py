"""Sparse layers give the outputs of the layers they come from, or say why they cannot be made."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import PlasticError, SparseLinear, sparsify
from plasticnet.layers.sparse import ENOUGH


def thinned(share: float, *widths: int) -> nn.Sequential:
    """Linear layers with this share of zeros."""
    model = nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(widths)))
    with torch.no_grad():
        for layer in model:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            weight[torch.rand_like(weight) < share] = 0.0
    return model


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 3, 8)])
def test_rows_of_nonzero_entries(shape: tuple[int, ...]) -> None:
    model = thinned(0.9, 8, 40, 6)
    small, converted = sparsify(model)
    assert converted == ("0", "1")
    x = torch.randn(shape)
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-6)
    assert [len(m.values) for m in small.modules() if isinstance(m, SparseLinear)] == [
        int((p != 0).sum()) for n, p in model.named_parameters() if n.endswith("weight")
    ]
    assert all(type(m) is nn.Linear for m in model)  # the module that was given stays


def test_a_sparse_module_is_a_module_as_others() -> None:
    small, _ = sparsify(thinned(0.9, 8, 20, 6))
    twin, x = copy.deepcopy(small), torch.randn(4, 8)
    assert torch.equal(twin(x), small(x))
    assert twin.double()(x.double()).dtype == torch.float64
    twin.load_state_dict(small.state_dict())
    assert "nonzero=" in str(small)


def test_no_bias_and_the_module_itself_a_layer() -> None:
    layer = nn.Linear(6, 5, bias=False)
    with torch.no_grad():
        layer.weight.mul_(torch.eye(5, 6))
    small, converted = sparsify(layer)
    assert converted == ("",)
    x = torch.randn(3, 6)
    torch.testing.assert_close(small(x), layer(x))


def test_only_layers_with_enough_zeros_and_a_matching_name() -> None:
    model = nn.Sequential(thinned(0.95, 30, 30), thinned(0.2, 30, 30), thinned(0.95, 30, 30))
    assert sparsify(model)[1] == ("0.0", "2.0")
    assert sparsify(model, layers="2.*")[1] == ("2.0",)
    with pytest.raises(PlasticError, match=r"80% zeros or more \(1.0 (1|2)"):
        sparsify(model, layers=("1.*",))
    with pytest.raises(PlasticError, match="there is none"):
        sparsify(nn.Sequential(nn.Conv1d(1, 1, 1)))
    with pytest.raises(PlasticError, match="choose one of csr, 2:4"):
        sparsify(model, "coo")  # pyright: ignore[reportArgumentType]


def of_four(nonzero: int, columns: int = 64) -> nn.Sequential:
    """So many of every four entries of a row are not zero; half of all are zeros at least."""
    model = nn.Sequential(nn.Linear(columns, 64))
    with torch.no_grad():
        model[0].weight.copy_(torch.ones(64, columns) * (torch.arange(columns) % 4 < 2))
        model[0].weight[3, :4] = (torch.arange(4) < nonzero).float()
        model[0].weight[4:6] = 0.0
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (of_four(3), "layer '0' of shape .* 3 of some 4 neighbours"),
        (of_four(2, 62), "62 entries, which are not a multiple of 4"),
        (of_four(2), "torch.float32 on cpu: it must be float16 or bfloat16, on a GPU"),
        (of_four(2).half(), "torch.float16 on cpu"),
    ],
)
def test_why_a_layer_cannot_be_semi_structured(model: nn.Module, reason: str) -> None:
    with pytest.raises(PlasticError, match=reason):
        sparsify(model, "2:4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 needs a GPU")
def test_semi_structured() -> None:
    model, x = of_four(2).half().cuda(), torch.randn(64, 64, dtype=torch.float16, device="cuda")
    small, converted = sparsify(model, "2:4")
    assert converted == ("0",)
    torch.testing.assert_close(small(x), model(x), rtol=1e-2, atol=1e-2)
    assert ENOUGH["2:4"] == 0.5


def test_saving_says_what_to_save(tmp_path: Path) -> None:
    model = thinned(0.9, 8, 20, 6)
    small, _ = sparsify(model)
    with pytest.raises(PlasticError, match="'0' is sparse; save what was given to sparsify"):
        pn.save(small, tmp_path / "small.safetensors")
    pn.save(model, tmp_path / "model.safetensors")
    x = torch.randn(4, 8)
    again, _ = sparsify(pn.load(tmp_path / "model.safetensors", lambda: thinned(0.0, 8, 20, 6)))
    assert torch.equal(again(x), small(x))
