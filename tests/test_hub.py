"""Compact modules in folders and repositories: what is written, what comes back, and what is refused."""

from __future__ import annotations

import doctest
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml  # pyright: ignore
from torch import nn

import plasticnet.hub as pn_hub
from plasticnet import PlasticError, PlasticNet, Skip
from tests.kit.networks import ConvNet


def small_one(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = PlasticNet(ConvNet(), (torch.randn(2, 3, 4, 4),), **options)
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[: len(site) // 2] = -1.0
    return net.compact()


@pytest.mark.parametrize("function", [pn_hub.save_pretrained, pn_hub.push_to_hub, pn_hub.from_pretrained])
def test_examples_run(function: Any) -> None:
    (found,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs={})
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0


def test_a_folder_holds_everything_that_a_module_needs(tmp_path: Path) -> None:
    small, x = small_one(), torch.randn(2, 3, 4, 4)
    pn_hub.save_pretrained(small, tmp_path / "deep" / "small")
    assert sorted(f.name for f in (tmp_path / "deep" / "small").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    again = pn_hub.from_pretrained(tmp_path / "deep" / "small", ConvNet)
    assert not again.training
    assert torch.equal(again(x), small.eval()(x))


def test_inputs_that_are_taken_and_the_sizes_before_and_after(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    net = PlasticNet(build(), (torch.randn(3, 6),), inputs=("0",))
    net.resize({"0": [0, 1, 5], "0.input": [1, 2]})
    pn_hub.save_pretrained(net.compact(), tmp_path, factory=build, example=(torch.randn(3, 6),))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["widths"] == {"0": [8, 3]}
    assert config["before"] == {"parameters": 6 * 8 + 8 + 8 * 2 + 2, "macs": 6 * 8 + 8 * 2}
    assert config["after"] == {"parameters": 2 * 3 + 3 + 3 * 2 + 2, "macs": 2 * 3 + 3 * 2}
    assert config["factory"] is None  # a local function cannot be imported
    pn_hub.from_pretrained(tmp_path, build)


def test_the_card_says_how_large_the_module_is_and_how_it_is_loaded(tmp_path: Path) -> None:
    small = small_one()
    pn_hub.save_pretrained(small, tmp_path / "small", factory=ConvNet, license="mit", tags=("digits",))
    text = (tmp_path / "small" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "plasticnet", "license": "mit", "tags": ["plasticnet", "pruning", "safetensors", "digits"],
    }  # fmt: skip
    before, after = (sum(p.numel() for p in m.parameters()) for m in (ConvNet(), small))
    assert f"| parameters | {before:,} | {after:,} |" in body
    assert "multiply-adds" not in body  # no example was given
    assert "from tests.kit.networks import ConvNet" in body
    code = body.split("```python\n")[1].split("```")[0].replace('"small"', repr(str(tmp_path / "small")))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert isinstance(scope["model"], ConvNet)


def test_a_card_of_ones_own_is_kept(tmp_path: Path) -> None:
    pn_hub.save_pretrained(small_one(), tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nTrained on my own cats.\n")
    pn_hub.save_pretrained(ConvNet(), tmp_path)
    text = card.read_text()
    assert text.endswith("\nTrained on my own cats.\n")
    assert f"{sum(p.numel() for p in ConvNet().parameters()):,}" in text
    card.write_text("# Mine\n")
    pn_hub.save_pretrained(small_one(), tmp_path)
    assert card.read_text() == "# Mine\n"
    (tmp_path / "none").mkdir()
    pn_hub.save_pretrained(small_one(), tmp_path / "none", card=False)
    assert not (tmp_path / "none" / "README.md").exists()


def test_names_cannot_break_the_card(tmp_path: Path) -> None:
    def build(n: int = 8) -> nn.Module:
        model = nn.Sequential()
        model.add_module("a|b<script>\n", nn.Linear(4, n))
        model.add_module("last", nn.Linear(n, 2))
        return model

    pn_hub.save_pretrained(build(3), tmp_path, factory=build, license='mit"\nfoo: bar', tags=("a: b",))
    text = (tmp_path / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert set(head) == {"library_name", "license", "tags"}
    assert "a: b" in head["tags"]
    (row,) = (line for line in text.splitlines() if "script" in line)
    assert "<script" not in row.replace("\\<", "")
    assert row.replace("\\|", "").count("|") == 4


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(change(config)))

    return apply


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors cannot be read: No such file"),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read: No such file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "config.json is damaged"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff"), "config.json is damaged"),
        (edited(lambda config: [config]), "not one that plasticnet wrote"),
        (edited(lambda config: {**config, "library_name": "timm"}), "not one that plasticnet wrote"),
        (edited(lambda config: {**config, "sha256": 0}), "write both anew"),
    ],
)
def test_damage_is_refused(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    pn_hub.save_pretrained(small_one(), tmp_path)
    damage(tmp_path)
    with pytest.raises(PlasticError, match=message):
        pn_hub.from_pretrained(tmp_path, ConvNet)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    pn_hub.save_pretrained(small_one(), tmp_path)
    with pytest.raises(PlasticError, match="another architecture"):
        pn_hub.from_pretrained(tmp_path, lambda: nn.Linear(2, 2))


def test_nothing_is_written_of_what_cannot_be_saved(tmp_path: Path) -> None:
    net = PlasticNet(ConvNet(), (torch.randn(2, 3, 4, 4),))
    with pytest.raises(PlasticError, match="plain module"):
        pn_hub.save_pretrained(net, tmp_path / "new")
    with pytest.raises(PlasticError, match="returned a str"):
        pn_hub.save_pretrained(small_one(), tmp_path / "new", factory=lambda: "no module")  # type: ignore
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(PlasticError, match="cannot be written"):
        pn_hub.save_pretrained(small_one(), tmp_path / "file")


def test_a_block_that_is_gone(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))

    small = build()
    small[1] = Skip()  # type: ignore
    pn_hub.save_pretrained(small, tmp_path, factory=build)
    assert json.loads((tmp_path / "config.json").read_text())["widths"] == {"1.0": [4, 0]}
    assert "| width of 1.0 | 4 | removed |" in (tmp_path / "README.md").read_text()


def test_a_repository_is_found_among_the_downloads(tmp_path: Path) -> None:
    """The folder of downloads has the layout that huggingface_hub documents."""
    pytest.importorskip("huggingface_hub")
    commit, repository = "a" * 40, tmp_path / "cache" / "models--me--small"
    pn_hub.save_pretrained(small_one(), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    cached: dict[str, Any] = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(pn_hub.from_pretrained("me/small", ConvNet, **cached)(x), small_one().eval()(x))
    pn_hub.from_pretrained("me/small", ConvNet, revision=commit, **cached)
    with pytest.raises(PlasticError, match="me/small is no folder, and cannot be downloaded"):
        pn_hub.from_pretrained("me/small", ConvNet, revision="v2", **cached)
    with pytest.raises(PlasticError, match="cannot be downloaded"):
        pn_hub.from_pretrained("no/such/name", ConvNet, **cached)


def test_what_is_pushed_is_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            asked["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            asked["create"] = options
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> Any:
            shutil.copytree(folder_path, tmp_path / repo_id)
            asked["upload"] = options
            return SimpleNamespace(commit_url="the commit")

    monkeypatch.setattr(hub, "HfApi", Api)
    url = pn_hub.push_to_hub(small_one(), "me/small", token="t", private=True, revision="dev", factory=ConvNet)
    assert url == "the commit"
    assert asked["token"] == "t"
    assert asked["create"] == {"private": True, "exist_ok": True}
    assert asked["upload"]["revision"] == "dev"
    assert 'from_pretrained("me/small", ConvNet)' in (tmp_path / "me/small/README.md").read_text()
    pn_hub.from_pretrained(tmp_path / "me/small", ConvNet)


def test_what_the_hub_refuses_is_passed_on() -> None:
    pytest.importorskip("huggingface_hub")
    with pytest.raises(PlasticError, match=r"no//name cannot be pushed: .*no//name"):
        pn_hub.push_to_hub(small_one(), "no//name")


def test_without_the_package_folders_still_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    pn_hub.save_pretrained(small_one(), tmp_path)
    pn_hub.from_pretrained(tmp_path, ConvNet)
    with pytest.raises(PlasticError, match=r"push_to_hub needs the package huggingface_hub.*plasticnet\[hub\]"):
        pn_hub.push_to_hub(small_one(), "me/small")
    with pytest.raises(PlasticError, match="needs the package huggingface_hub"):
        pn_hub.from_pretrained("me/small", ConvNet)
