"""Routers that multiply in other ways than a linear layer, and experts that lie in a dict or serve several routers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from tests.kit.networks import randomise_gates

E = 3  # the number of experts


class Mixture(nn.Module):
    """Three experts that all have a part in every answer.

    Args:
        router: How the logits are computed.
        held: In what the experts lie, and how they are found there.
        tasks: How many routers there are over the same experts, each for an answer of its own.
    """

    def __init__(self, router: str = "linear", held: str = "list", tasks: int = 1) -> None:
        super().__init__()
        self.router, self.held = router, held
        self.stem = nn.Linear(4, 6)
        routers = [nn.Linear(6, E, bias=router == "linear") for _ in range(tasks)]
        named = held == "by name"
        self.routers = nn.ModuleDict(dict(zip("xyz", routers, strict=False))) if named else nn.ModuleList(routers)
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(tasks))
        experts = [nn.Linear(6, 6) for _ in range(E)]
        names = "abc" if named else "012"
        self.experts = (
            nn.ModuleList(experts) if held == "list" else nn.ModuleDict(dict(zip(names, experts, strict=True)))
        )

    def logits(self, x: Tensor, task: int) -> Tensor:
        layer = list(self.routers.children())[task]
        w: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
        match self.router:
            case "einsum, turned":
                return torch.einsum("ed, bd -> eb", [w, x]).t()
            case "einsum, implicit":
                return torch.einsum("bd,ed", x, w)
            case "cosine":
                return F.linear(F.normalize(x, dim=-1), F.normalize(w, dim=-1)) * 9
            case "cosine by hand":
                return x / x.norm(dim=1, keepdim=True) @ (w / w.norm(dim=1, keepdim=True)).T * 9
            case "cosine_similarity":
                return F.cosine_similarity(x[:, None], w[None], dim=-1) / 0.1
            case "bounded":
                return torch.einsum("bd,ed->be", x, w).clamp(-5, 5)
            case "over the experts":
                return F.linear(x, F.normalize(w, dim=0))
            case _:
                return layer(x)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        return tuple(head(x + self.mixed(x, task)) for task, head in enumerate(self.heads))

    def mixed(self, x: Tensor, task: int) -> Tensor:
        weights = self.logits(x, task).softmax(-1)
        if self.held == "by number" and isinstance(self.experts, nn.ModuleDict):
            experts = [self.experts[str(i)] for i in range(weights.shape[1])]
        else:
            experts = self.experts.values() if isinstance(self.experts, nn.ModuleDict) else self.experts
        every = torch.stack([expert(x).relu() for expert in experts], 1)
        return (weights[:, :, None] * every).sum(1)


def gated(*what: object) -> pn.PlasticNet:
    torch.manual_seed(0)
    model = Mixture(*what).double()  # pyright: ignore[reportArgumentType]
    return pn.PlasticNet(model, (torch.randn(9, 4, dtype=torch.float64),), experts="experts").eval()


@pytest.mark.parametrize(
    "what",
    [
        ("einsum, implicit", "by name"),
        ("einsum, turned",),
        ("cosine by hand",),
        ("cosine_similarity",),
        ("cosine", "list", 2),
        ("linear", "by name", 2),
    ],
)
def test_a_closed_expert_is_never_chosen_and_cut_exactly(what: tuple[object, ...], tmp_path: Path) -> None:
    net = gated(*what)
    x = torch.randn(9, 4, dtype=torch.float64)
    whole = net(x)
    for closed in ([0], [1, 2]):
        randomise_gates(net)
        with torch.no_grad():
            net.sites["experts.members"].phi.fill_(1.0)[closed] = -1.0
        small = net.compact()
        assert len(small.get_submodule("experts")) == E - len(closed)  # pyright: ignore[reportArgumentType]
        assert all(len(m.weight) == E - len(closed) for m in small.get_submodule("routers").children())  # pyright: ignore
        torch.testing.assert_close(small(x), net(x), rtol=1e-9, atol=1e-9)
        assert not torch.allclose(net(x)[0], whole[0])
    pn.save(small, tmp_path / "small.safetensors")
    again = pn.load(tmp_path / "small.safetensors", lambda: Mixture(*what).double())  # pyright: ignore
    torch.testing.assert_close(again(x), small(x))


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (("linear", "by number"), r"KeyError\('\d'\).*by \.items\(\) or \.values\(\)"),
        (("bounded",), "changes the output"),
        (("over the experts",), "changes the output"),
    ],
)
def test_what_cannot_be_exact_is_frozen(what: tuple[object, ...], reason: str) -> None:
    net = gated(*what)
    assert "experts.members" not in net.sites
    assert re.search(reason, net.frozen["experts.members"])


def test_gates_of_experts_that_several_routers_share_have_slopes() -> None:
    net = gated("linear", "list", 2)
    net.k = 2.0
    with torch.no_grad():
        net.sites["experts.members"].phi.zero_()
    net.train()
    x = torch.randn(9, 4, dtype=torch.float64)
    net.expected_loss(lambda: sum(y.square().mean(1) for y in net(x))).backward()  # pyright: ignore
    slopes = net.sites["experts.members"].phi.grad
    assert slopes is not None
    assert bool(slopes.isfinite().all())
    assert bool(slopes.any())
