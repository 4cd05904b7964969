"""Weights of trained models: state dicts of torch and of safetensors, wrapped and nested as people save them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from plasticnet.errors import PlasticError
from plasticnet.files.weights import load_weights
from tests.kit.networks import mlp


def test_forms_of_state_dicts(tmp_path: Path) -> None:
    trained = nn.Sequential(*mlp(4, 6, 3), nn.BatchNorm1d(3))
    state = trained.state_dict()
    path = tmp_path / "w.pt"
    forms: list[Any] = [
        state,
        {"state_dict": state, "epoch": 3},
        {"model": state},
        {f"module.{n}": t for n, t in state.items()},
        {"state_dict": {f"_orig_mod.module.{n}": t for n, t in state.items()}},
        {"model": {f"model.{n}": t for n, t in state.items()}},
    ]
    for form in forms:
        torch.save(form, path)
        model = load_weights(nn.Sequential(*mlp(4, 6, 3), nn.BatchNorm1d(3)), path)
        assert not model.training
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    save_file(state, tmp_path / "w.safetensors")
    model = load_weights(nn.Sequential(*mlp(4, 6, 3), nn.BatchNorm1d(3)), tmp_path / "w.safetensors")
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


def test_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(mlp(4, 6, 3).state_dict(), path)
    for other, message in (
        (mlp(4, 7, 3), r"shape \(6, 4\) in the file"),
        (mlp(4, 6, 5, 3), r"only the model has [^\]]*\]$"),
    ):
        before = {n: t.clone() for n, t in other.state_dict().items()}
        with pytest.raises(PlasticError, match=message):
            load_weights(other, path)
        assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    for broken, message in (
        (torch.ones(3), "no state dict, but a Tensor"),
        ({"a": 1}, "no state dict"),
        (mlp(4, 6, 3), "more than tensors"),
    ):
        torch.save(broken, path)
        with pytest.raises(PlasticError, match=message):
            load_weights(mlp(4, 6, 3), path)
    path.write_bytes(pickle.dumps({"weight": print}))
    with pytest.raises(PlasticError, match="more than tensors"):
        load_weights(mlp(4, 6, 3), path)
    with pytest.raises(PlasticError, match="there is no such file"):
        load_weights(mlp(4, 6, 3), tmp_path / "none.pt")
    with pytest.raises(PlasticError, match=r"none\.safetensors"):
        load_weights(mlp(4, 6, 3), tmp_path / "none.safetensors")
