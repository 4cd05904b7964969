"""Lightning and the Trainer in two processes on the CPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.integrations import task
from tests.integrations.processes import python, torchrun

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]


def ends(name: str, folder: Path, phase: str) -> list[dict[str, Any]]:
    """What both ranks end with."""
    torchrun("-m", "tests.integrations.two", name, str(folder), phase)
    return [torch.load(folder / f"{phase}-{rank}.pt") for rank in (0, 1)] if phase != "stopped" else []


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["state"].keys() == b["state"].keys()
    for key, value in a["state"].items():
        assert value.shape == b["state"][key].shape, key
        assert torch.equal(value, b["state"][key]), key


def assert_good(found: list[dict[str, Any]]) -> None:
    """Ranks are equal, the network has hardened within the budget, and the optimizers hold what it has."""
    assert_equal(*found)
    for end in found:
        assert math.isinf(end["k"])
        assert end["held"]
        assert 0.8 * task.most() <= end["parameters"] <= task.most()


def plain_accuracy() -> float:
    torch.manual_seed(0)
    loader = task.loader(32)
    epochs = [[(x, y) for x, y in loader] for _ in range(10)]
    return task.accuracy(task.plain_loop(lambda net: torch.optim.Adam(net.param_groups(5e-3)), epochs))


NAMES = [
    pytest.param("lightning", marks=pytest.mark.integration("Lightning", 2)),
    pytest.param("huggingface", marks=pytest.mark.integration("Hugging Face Trainer", 2)),
]


def need(name: str) -> None:
    packages = {"lightning": ("lightning", "pytorch_lightning"), "huggingface": ("transformers", "accelerate")}
    for package in packages[name]:
        pytest.importorskip(package, reason=f"{package} is not installed: see `make integrations`")


@pytest.mark.parametrize("name", NAMES)
def test_two_processes(name: str, tmp_path: Path) -> None:
    """Ranks end equal, within the budget, as accurate as a plain loop; going on is equal to the bit."""
    need(name)
    whole = ends(name, tmp_path / "whole", "whole")
    assert_good(whole)
    assert abs(whole[0]["accuracy"] - plain_accuracy()) <= 1.0
    ends(name, tmp_path, "stopped")
    went_on = ends(name, tmp_path, "resumed")
    assert_good(went_on)
    assert_equal(whole[0], went_on[0])


@pytest.mark.parametrize("name", NAMES)
def test_all_together(name: str, tmp_path: Path) -> None:
    """Accumulation, clipping, bf16, falling rates, and an average or the best model, all together."""
    need(name)
    found = ends(name, tmp_path, "rich")
    assert_good(found)
    assert found[0]["accuracy"] > 95


@pytest.mark.integration("Lightning", 2)
def test_spawned(tmp_path: Path) -> None:
    """With strategy="ddp_spawn" the network of the first process has the size that the others have found."""
    need("lightning")
    python("-m", "tests.integrations.two", "lightning", str(tmp_path), "spawn")
    end = torch.load(tmp_path / "spawn-0.pt")
    assert math.isinf(end["k"])
    assert 0.8 * task.most() <= end["parameters"] <= task.most()
    assert end["accuracy"] > 95
