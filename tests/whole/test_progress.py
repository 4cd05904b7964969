"""What may take long says how far it is: on a terminal, after two seconds, and nowhere else."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import plasticnet as pn
from tests.kit.networks import mlp


class Terminal(io.StringIO):
    """A stream that is a terminal, or none."""

    def __init__(self, live: bool) -> None:
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


def network() -> pn.PlasticNet:
    return pn.PlasticNet(mlp(4, 6, 3), (torch.zeros(2, 4),))


def example() -> Tensor:
    return torch.linspace(-1, 1, 20).reshape(5, 4)


WORK: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "gating Sequential": (lambda _: network(), ["closing and cutting units", "adding units", "100%"]),
    "measuring latency": (
        lambda _: network().measure_latency((example(),), networks=8, repeats=1), ["network 2 of 9", "100%"],
    ),
    "measuring sensitivity": (
        lambda _: pn.sensitivity(network(), lambda net: float(net(example()).square().mean()), (0.5,)),
        ["0 without 3 of 6", "100%"],
    ),
    "exporting model.pt2": (
        lambda folder: pn.export(mlp(4, 6, 3), folder / "model.pt2", (example(),)), ["writing", "comparing", "100%"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WORK)
@pytest.mark.parametrize("live", [True, False])
def test_it_shows_on_a_terminal(what: str, live: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, ticks = Terminal(live), itertools.count(0, 3)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))  # three seconds later at each look
    work, shown = WORK[what]
    work(tmp_path)
    written = stream.getvalue()
    if not live:
        assert what not in written
        return
    assert all(part in written for part in [what, *shown])
    last = written.rsplit("\r", 2)[-2:]
    assert last[0].strip() == last[1] == ""  # the line is gone in the end


def test_what_is_done_at_once_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal(True)
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    network()
    assert stream.getvalue() == ""
