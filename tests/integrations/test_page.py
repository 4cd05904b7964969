"""The code of docs/integrations.md runs as written, and needs as few lines as the page says."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

import plasticnet as pn

PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning:lightning")]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.integration("Lightning", 1)
def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of this page runs, for Lightning and then for Accelerate, with 3 lines and 5 lines of plasticnet."""
    pytest.importorskip("lightning.pytorch", reason="lightning is not installed: see `make integrations`")
    pytest.importorskip("accelerate", reason="accelerate is not installed: see `make integrations`")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    monkeypatch.chdir(tmp_path)
    first, _, last = blocks()[:3]
    assert [re.findall(r"# line (\d)", block)[-1] for block in (first, last)] == ["3", "5"]
    for block in (first, last):
        names: dict[str, object] = {}  # each can be copied by itself
        exec(compile(block, str(PAGE), "exec"), names)
        net = names["module"].net if block is first else names["net"]
        assert isinstance(net, pn.PlasticNet)
        assert net.summary().macs <= 0.2 * (64 * 256 + 256 * 128 + 128 * 10)


@pytest.mark.integration("Hugging Face Trainer", 1)
def test_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for the Trainer runs, with 5 lines of plasticnet, and halves the multiply-adds of a BERT."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed: see `make integrations`")
    monkeypatch.chdir(tmp_path)
    block = blocks()[1]
    assert re.findall(r"# line (\d)", block) == ["1", "2", "3", "4", "5"]
    names: dict[str, object] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    net = names["net"]
    assert isinstance(net, pn.PlasticNet)
    whole = pn.PlasticNet(names["BertForSequenceClassification"](names["config"]), names["example"])  # pyright: ignore
    assert net.summary().macs <= 0.5 * whole.summary().macs
