"""The command shrink: what it reads, what it writes, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from plasticnet import load
from plasticnet.apps.models import factory
from tests.kit.commands import fail, succeed


@pytest.fixture(autouse=True)
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with data of the user's own, and the weights of a model for them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(100, 4)).astype(np.float32), rng.integers(0, 3, 100)
    np.savez("data.npz", x=x, y=y)
    rows = [",".join([*map(str, row), "xyz"[label]]) for row, label in zip(x, y, strict=True)]
    Path("data.csv").write_text("\n".join(["a,b,c,d,kind", *rows]) + "\n")
    torch.manual_seed(0)
    torch.save(factory("mlp:32-16", (4,), 3)().state_dict(), "trained.pt")


MODEL = ["shrink", "mlp:32-16", "--weights", "trained.pt"]


@pytest.mark.parametrize("data", [["data.npz"], ["data.csv", "--target", "kind"]])
def test_what_it_writes(data: list[str]) -> None:
    out = succeed(*MODEL, "--data", *data, "--budget", "macs=0.5", "--epochs", 1, "--out", "out")
    assert "epoch 1" in out
    report = json.loads(Path("out/report.json").read_text())
    assert report["steps"][-1]["macs"] <= 0.5 * report["steps"][0]["macs"]
    small = load("out/compact.safetensors", factory("mlp:32-16", (4,), 3))
    assert sum(p.numel() for p in small.parameters()) == report["steps"][-1]["parameters"]


def test_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, budget in enumerate(("loss=0.01", "latency_ms=1000", "params=0.5,units=0.9")):
        out = succeed(*MODEL, "--data", "data.npz", "--budget", budget, "--out", f"out{number}")
        assert "random" not in out
    out = succeed("shrink", "mlp:32-16", "--data", "data.npz", "--budget", "macs=0.5", "--out", "out")
    assert "the weights of mlp:32-16 are random" in out
    Path("own_shrunk.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3))\n"
    )
    monkeypatch.syspath_prepend(".")
    out = succeed("shrink", "own_shrunk:build", "--data", "data.npz", "--budget", "macs=0.5", "--out", "own")
    assert "the weights of own_shrunk:build are as it makes them" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "data.npz", "--budget", "half"], "macs=0.3"),
        (["--data", "data.csv", "--budget", "macs=0.5"], "--target"),
        (["--data", "data.npz", "--budget", "macs=0.5", "--loss", "best"], "imitate, cross-entropy, squared"),
        (["--data", "missing.npz", "--budget", "macs=0.5"], "no such file"),
        (["--data", "digits", "--budget", "macs=0.5"], "trained.pt does not fit"),
        (["--data", "data.npz", "--budget", "macs=0.5", "--weights", "data.csv"], "data.csv"),
        (["--data", "data.npz", "--budget", "latency_ms=1e-9"], "cannot be met"),
        (["--data", "data.npz", "--budget", "macs=0.5", "--batch", "0"], "--batch 0"),
    ],
)
def test_what_is_wrong(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fail(monkeypatch, capsys, *MODEL, *options)
    assert not Path("runs").exists()


def test_nothing_is_replaced_unasked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*MODEL, "--data", "data.npz", "--budget", "macs=0.5", "--out", "out"]
    succeed(*command)
    assert "--overwrite" in fail(monkeypatch, capsys, *command)
    succeed(*command, "--overwrite")
