"""The ``feature_info`` of timm's models follows the cut."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import PlasticError, PlasticNet

X = torch.randn(2, 3, 16, 16)


class Info:
    """Holds the list as timm's FeatureInfo does."""

    def __init__(self, info: list[dict[str, Any]], out_indices: tuple[int, ...]) -> None:
        self.info, self.out_indices = info, out_indices

    def channels(self) -> list[int]:
        return [self.info[i]["num_chs"] for i in self.out_indices]


class Backbone(nn.Module):
    """Three stages, of which the second concatenates what two convolutions find."""

    def __init__(self, named: bool = True, wrapped: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.left, self.right, self.join = nn.Conv2d(8, 6, 3, 2, 1), nn.Conv2d(8, 10, 3, 2, 1), nn.Identity()
        self.last = nn.Conv2d(16, 20, 3, 2, 1)
        names = ("stem", "join", "last") if named else ("a", "b", "c")
        info = [
            {"num_chs": n, "reduction": 2 ** (i + 1), "module": name}
            for i, (n, name) in enumerate(zip((8, 16, 20), names, strict=True))
        ]
        self.feature_info: Any = Info(info, (0, 1, 2)) if wrapped else info

    def forward(self, x: Tensor) -> list[Tensor]:
        a = self.stem(x)
        b = self.join(torch.cat([self.left(a), self.right(a)], 1))
        return [a, b, self.last(b)]


def widths(model: nn.Module) -> list[int]:
    value = model.feature_info
    return [entry["num_chs"] for entry in getattr(value, "info", value)]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("named", "wrapped"), [(True, True), (True, False), (False, True)])
def test_it_follows_cuts_growth_and_files(named: bool, wrapped: bool, tmp_path: Path) -> None:
    given = Backbone(named, wrapped)
    original = given.feature_info
    net = PlasticNet(given, (X,), outputs=lambda out: out[-1])
    assert widths(net.model) == [8, 16, 20]
    net.resize({"stem": [0, 1, 5], "left": [0, 1, 2, 3, 4, 5, -1], "right": [2, 3]})
    small = net.compact()
    assert widths(small) == widths(net.model) == [t.shape[1] for t in small(X)] == [3, 9, 20]
    assert original is not net.model.feature_info  # an object that others hold, too, stays as it was
    pn.save(small, tmp_path / "small.safetensors")
    again = pn.load(tmp_path / "small.safetensors", lambda: Backbone(named, wrapped))
    assert widths(again) == [3, 9, 20]
    assert type(again.feature_info) is type(original)
    if wrapped:
        assert small.feature_info.channels() == [3, 9, 20]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def test_without_it_nothing_is_promised_and_nothing_breaks() -> None:
    for broken in (None, "none", [], [{"num_chs": "8"}], [{"module": "stem"}], [{"num_chs": 7, "module": "stem"}]):
        model = Backbone()
        model.feature_info = broken
        net = PlasticNet(model, (X,), outputs=lambda out: out[-1])
        net.resize({"stem": [0, 1, 5]})
        assert net.compact().feature_info == broken


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    pn.save(Backbone(), tmp_path / "plain.safetensors")
    assert widths(pn.load(tmp_path / "plain.safetensors", Backbone)) == [8, 16, 20]
    net = PlasticNet(Backbone(), (X,), outputs=lambda out: out[-1])
    net.resize({"stem": [0, 1, 5]})
    pn.save(net.compact(), tmp_path / "small.safetensors")

    def other() -> nn.Module:
        model = Backbone()
        model.feature_info = copy.copy(model.feature_info)
        model.feature_info.info = model.feature_info.info[:2]
        return model

    with pytest.raises(PlasticError, match="feature_info"):
        pn.load(tmp_path / "small.safetensors", other)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "hrnet_w18_small", "repvgg_a0"])
@pytest.mark.parametrize("features_only", [True, False])
def test_models_of_timm(name: str, features_only: bool) -> None:
    timm = pytest.importorskip("timm")
    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model(name, features_only=features_only, pretrained=False).eval()
    net = PlasticNet(model, (x,), outputs=(lambda found: found[-1]) if features_only else None)
    before = widths(model)
    net.resize({site: range(0, len(s), 2) for site, s in net.sites.items()})
    small = net.compact()
    if features_only:
        assert small.feature_info.channels() == [t.shape[1] for t in small(x)]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert widths(small)[1] < before[1] or name == "hrnet_w18_small"
