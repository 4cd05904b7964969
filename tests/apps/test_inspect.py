"""The command line's inspect: what it prints of a model of any origin."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plasticnet import save
from plasticnet.apps.data import Split, load_data
from plasticnet.apps.models import factory
from plasticnet.apps.scores import evaluate
from tests.kit.commands import fail, succeed


def test_inspect_json() -> None:
    found = json.loads(succeed("inspect", "lenet5", "--input", "1,1,28,28", "--json"))
    sites = {s["name"]: s for s in found["sites"]}
    assert list(sites) == ["conv1", "conv2", "fc1"]
    assert [s["units"] for s in found["sites"]] == [20, 50, 500]
    assert sites["conv1"]["unit_parameters"] == 26 + 50 * 25
    assert sites["conv1"]["unit_macs"] == 24 * 24 * 25 + 50 * 25 * 8 * 8
    assert sites["conv1"]["consumers"] == ["conv2"]
    assert found["parameters"] == 431_080
    assert found["k"] == "inf"
    assert "fc2" in found["frozen"]


def test_inspect_with_input_sites() -> None:
    found = json.loads(succeed("inspect", "lenet5", "--inputs", "fc*", "--json"))
    assert {s["name"]: s["units"] for s in found["sites"]}["fc1.input"] == 800


def test_inspect_table() -> None:
    text = succeed("inspect", "torchvision:resnet18", "--input", "1,3,64,64")
    rows = {(words := line.split())[0]: words[1:] for line in text.splitlines() if line.strip()}
    assert rows["layer1.[0-1].conv1"] == ["64", "1,154", "294,912", "conv2"]
    assert rows["layer3"] == []  # a heading
    assert "frozen fc: reaches the model's output" in text
    assert "11,689,512 parameters" in text
    assert "unchecked" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:resnet18", "transformers:bert"])
def test_inspect_by_name(name: str) -> None:
    pytest.importorskip(name.partition(":")[0])
    text = succeed("inspect", name)
    assert re.search(r"\[0-\s*1\]", text)  # a narrow terminal breaks the line
    found = json.loads(succeed("inspect", name, "--json"))
    assert found["checked"]
    assert 0 < found["prunable_parameters"] < found["parameters"]


def test_inspect_with_a_profile() -> None:
    found = json.loads(succeed("inspect", "lenet5", "--profile", "--json"))
    assert found["profile"]["macs"] == found["macs"] == 2_293_000
    rows = {row["name"]: row for row in found["profile"]["rows"]}
    assert {site["name"]: rows[site["name"]]["sites"] for site in found["sites"]} == {
        "conv1": ["conv1"], "conv2": ["conv2"], "fc1": ["fc1"],
    }  # fmt: skip
    assert rows["fc2"]["sites"] == []
    assert "profile" not in json.loads(succeed("inspect", "lenet5", "--json"))


def test_inspect_prints_a_profile() -> None:
    plain, text = succeed("inspect", "lenet5"), succeed("inspect", "lenet5", "--profile")
    assert text.startswith(plain)
    (row,) = (line.split() for line in text[len(plain) :].splitlines() if line.split()[:1] == ["fc1"])
    assert row[:3] == ["fc1", "400,500", "400,000"]
    assert re.search(r"a forward pass of 1 takes [\d.]+ KiB for activations at its peak, and [\d.]+ ms \(CPU", text)


def test_inspect_cannot_measure_without_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "leave out one of them" in fail(monkeypatch, capsys, "inspect", "lenet5", "--meta", "--profile")


def test_inspect_without_memory() -> None:
    text = succeed("inspect", "torchvision:vgg16", "--meta")  # half a gigabyte otherwise
    assert "138,357,544 parameters" in text
    assert "unchecked" in text
    assert not json.loads(succeed("inspect", "lenet5", "--meta", "--json"))["checked"]


def test_inspect_of_a_transformer_in_its_own_size() -> None:
    pytest.importorskip("transformers")
    text = succeed("inspect", "transformers:bert", "--full", "--meta")
    assert re.search(r"encoder\.layer\.\[0-\s*11\]", text)


def test_inspect_names_what_is_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first names for each reason, or all."""
    (tmp_path / "heads_here.py").write_text(HEADS)
    monkeypatch.syspath_prepend(tmp_path)
    args = ["inspect", "heads_here:Heads", "--input", "2,4"]
    frozen = json.loads(succeed(*args, "--json"))["frozen"]
    assert [f"heads.{i}" in frozen for i in range(5)] == [True] * 5
    assert "frozen heads.0, heads.1, heads.2 and 2 more: reaches" in succeed(*args)
    assert "frozen heads.0, heads.1, heads.2, heads.3, heads.4: reaches" in succeed(*args, "--all")


HEADS = """
from torch import nn

class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(5))

    def forward(self, x):
        return [head(self.stem(x)) for head in self.heads]
"""


@pytest.mark.slow
def test_inspect_gates_what_it_is_asked_to() -> None:
    args = ["inspect", "torchvision:resnet18", "--input", "2,3,32,32", "--json"]
    before, after = (json.loads(succeed(*args, *more)) for more in ([], ["--blocks", "layer1.[01]"]))
    assert len(after["sites"]) == len(before["sites"]) + 1


MIXTURE = """
from torch import nn

class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 5)
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(5))
        self.attention, self.size = nn.Linear(4, 24), 4
        self.out = nn.Linear(8, 2)

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        q, k, v = (a[:, None] for a in self.attention(x).view(-1, 3, 2, self.size).transpose(1, 2).unbind(2))
        attended = self.out(((q * k).sum(-1, keepdim=True) * v).flatten(1))
        return attended + sum(weights[:, i, None] * expert(x) for i, expert in enumerate(self.experts))
"""


@pytest.mark.parametrize("command", ["inspect", "shrink"])
def test_experts_and_dimensions_of_heads(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library has as experts= and head_dims=, commands have as --experts and --head-dims."""
    (tmp_path / "mixtures.py").write_text(MIXTURE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32), y=np.zeros(40))
    options = ["--experts", "experts", "--head-dims", "attention"]
    if command == "inspect":
        found = json.loads(succeed("inspect", "mixtures:Mixture", "--input", "3,4", *options, "--json"))["sites"]
        sizes = {s["name"]: s["units"] for s in found}
    else:
        succeed("shrink", "mixtures:Mixture", "--data", "data.npz", "--budget", "params=0.8", *options, "--out", "out")
        sizes = {s["name"]: s["before"] for s in json.loads(Path("out/report.json").read_text())["sites"]}
    assert sizes == {"experts.members": 5, "attention": 4}


def test_inspect_says_how_much_each_site_can_lose(tmp_path: Path) -> None:
    """Of the weights in the file: the loss with all open is that of the module, and closing costs."""
    data = load_data("digits")
    model = factory("mlp:12-8", data.shape, data.outputs)()
    train(model, data.train)
    save(model, tmp_path / "compact.safetensors")
    args = ["inspect", "mlp:12-8", "--sensitivity", "--data", "digits"]
    found = json.loads(succeed(*args, "--weights", tmp_path / "compact.safetensors", "--json"))["sensitivity"]
    assert found["loss"] == pytest.approx(evaluate(model, data.val)[0], rel=1e-5)
    assert found["weights"].endswith("compact.safetensors")
    assert {s["name"]: (s["units"], s["closed"]) for s in found["sites"]} == {
        "1": (12, [1, 3, 6, 9, 11]), "3": (8, [1, 2, 4, 6, 7]),
    }  # fmt: skip
    assert all(s["losses"][-1] > 1.5 * found["loss"] for s in found["sites"])
    text = succeed(*args, "--weights", tmp_path / "compact.safetensors")
    (row,) = (line.split() for line in text.splitlines() if line.split()[:2] == ["3", "8"] and "." in line)
    assert row[2:] == [f"{loss:.4g}" for loss in found["sites"][1]["losses"]]
    assert "compact.safetensors" in text
    assert "random weights" not in text
    assert "random weights" in succeed(*args)


def train(model: nn.Module, split: Split) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(split.x), split.y).backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["lenet5", "--sensitivity"], "--data"),
        (["lenet5", "--sensitivity", "--data", "digits", "--meta"], "leave out one of them"),
        (["lenet5", "--weights", "none.safetensors", "--meta"], "leave out one of them"),
        (["lenet5", "--weights", "none.safetensors"], "none.safetensors"),
        (["lenet5", "--sensitivity", "--data", "digits"], "lenet5 reads images"),
        (["lenet5", "--sensitivity", "--data", "faces"], "--data faces: there is no such file or folder; give digits"),
    ],
)
def test_inspect_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert message in fail(monkeypatch, capsys, "inspect", *args)
