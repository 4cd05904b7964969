"""What is read of a model's output: the rest freezes nothing, and is still returned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

import plasticnet as pn
from plasticnet import PlasticError, PlasticNet


@dataclass
class Result:
    logits: Tensor
    hidden: Tensor


class Backbone(nn.Module):
    """Three stages; what it returns of them is up to ``kind``."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.norm = nn.BatchNorm2d(12)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Any:
        a = self.a(x).relu()
        b = self.norm(self.b(a)).relu()
        c = self.c(b).relu()
        logits = self.head(c.mean((2, 3)))
        if self.kind == "dict":
            return {"features": [a, b, c], "logits": logits}
        if self.kind == "list":
            return [a, b, c]
        if self.kind == "object":
            return Result(logits, b)
        if self.kind == "training":
            return (logits, b.mean((2, 3))) if self.training else logits
        return torch.cat([logits, a.mean((2, 3))], 1)


READS: dict[str, Any] = {
    "dict": lambda out: out["logits"],
    "list": lambda out: out[-1],
    "object": lambda out: out.logits,
    "training": lambda out: out[0] if isinstance(out, tuple) else out,
    "joined": lambda out: out[:, :5],
}
X = torch.randn(4, 3, 16, 16)


@pytest.mark.parametrize("kind", READS)
def test_what_is_not_read_freezes_nothing(kind: str) -> None:
    torch.manual_seed(0)
    if kind in ("dict", "list"):
        with pytest.raises(PlasticError, match="reaches the model's output"):
            PlasticNet(Backbone(kind), (X,))
    else:
        assert not {"a", "b"} <= set(PlasticNet(Backbone(kind), (X,)).sites)
    net = PlasticNet(Backbone(kind), (X,), outputs=READS[kind])
    assert {"a", "b"} <= set(net.sites)
    assert ("c" in net.sites) == (kind != "list")
    net.resize({"a": [0, 2, 5], "b": range(1, 9)})
    small, now = net.compact(), net.eval()(X)
    torch.testing.assert_close(READS[kind](small(X)), READS[kind](now))
    if kind == "dict":
        assert [f.shape[1] for f in small(X)["features"]] == [3, 8, 16]


def test_masked_and_cut_agree_on_what_is_read() -> None:
    torch.manual_seed(0)
    net = PlasticNet(Backbone("dict").double(), (X.double(),), outputs=READS["dict"])
    for site in net.sites.values():
        with torch.no_grad():
            site.phi[::2] = -1.0
    net.k = 1e6
    kept = net.eval()(X.double())
    small = net.compact()
    assert small.a.out_channels == 4
    torch.testing.assert_close(small(X.double())["logits"], kept["logits"], rtol=1e-9, atol=1e-9)
    assert [f.shape[1] for f in kept["features"]] == [8, 12, 16]  # the network itself returns them whole


def test_a_step_of_training() -> None:
    net = PlasticNet(Backbone("training"), (X,), outputs=READS["training"])
    optimizer = Adam(net.param_groups(1e-3))
    net.k = 5.0
    y = torch.tensor([0, 1, 2, 3])
    loss = net.train().expected_loss(lambda: F.cross_entropy(net(X)[0], y, reduction="none"))
    (loss + net.penalty(1e-2)).backward()
    optimizer.step()
    assert all(g.phi.grad is not None for g in net.all_gates())


def test_trace_takes_it_too() -> None:
    found = pn.trace(Backbone("list"), (X,), outputs=lambda out: out[2])
    assert list(found.sites) == ["a", "b"]
    assert found.frozen["c"] == "reaches the model's output"


def test_several_inputs() -> None:
    other = torch.randn(2, 3, 24, 24)
    net = PlasticNet(Backbone("dict"), (X,), more_inputs=[(other,)], outputs=READS["dict"])
    net.resize({"b": [0, 1, 2]})
    torch.testing.assert_close(net.compact()(other)["logits"], net.eval()(other)["logits"])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ("logits", "not a function"),
        (lambda out: out["logit"], "KeyError.*'features', 'logits'"),
        (lambda out: out.logits, "AttributeError.*evaluation mode"),
        (lambda out: None, "without a tensor"),
        (lambda out: out["logits"].sum().item(), "without a tensor"),
        (lambda out: [], "list of length 0"),
    ],
)
def test_what_does_not_fit_is_refused(outputs: Any, message: str) -> None:
    model = Backbone("dict")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(PlasticError, match=message):
        PlasticNet(model, (X,), outputs=outputs)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    PlasticNet(model, (X,), outputs=READS["dict"])


def test_training_mode_must_fit_too() -> None:
    with pytest.raises(PlasticError, match="training mode \\(tuple of length 2\\)"):
        PlasticNet(Backbone("training"), (X,), outputs=lambda out: out.softmax(1))
