"""Narrow: every site is cut and begins anew, what does not train is left alone, and what is no width is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from plasticnet import PlasticError, PlasticNet, narrow
from plasticnet.units import InputUnits
from tests.kit.networks import ConvNet, images, mlp


def sizes(net: PlasticNet) -> dict[str, int]:
    return {n: len(s) for n, s in net.sites.items()}


def test_narrow_cuts_every_site_and_initialises_for_the_new_width() -> None:
    model = mlp(4, 400, 2, 3)
    net = PlasticNet(model, (torch.randn(2, 4),))
    wide = model[2].weight.detach().abs().max()
    assert wide <= 400**-0.5
    narrow(net, 4)
    assert sizes(net) == {"0": 4, "2": 2}  # a site that is narrower stays
    assert (model[0].out_features, model[2].in_features) == (4, 4)
    assert model[2].weight.abs().max() > 2 * wide  # drawn for 4 inputs, not for 400
    assert model[2].weight.abs().max() <= 0.5
    assert net(torch.randn(5, 4)).shape == (5, 3)
    assert all(s.open.all() for s in net.sites.values())


def test_narrow_spreads_over_the_features() -> None:
    kept = set()
    for seed in range(6):
        torch.manual_seed(seed)
        net = PlasticNet(ConvNet(), (images(),), inputs=("fc1",))
        narrow(net, 3)
        units = net.sites["fc1.input"].units
        assert isinstance(units, InputUnits)
        assert set(sizes(net).values()) == {3}
        assert units.full == 4 * 6
        assert net.fc1.weight.shape == (3, 3)
        kept.add(tuple(units.features.tolist()))
        assert net(images()).shape == (4, 3)
    assert len(kept) > 1


@pytest.mark.parametrize("units", [0, -1, 2.5, None, "3", True])
def test_what_is_no_width_is_refused(units: Any) -> None:
    net = PlasticNet(mlp(4, 3, 3, 2), (torch.randn(2, 4),))
    with pytest.raises(PlasticError, match="at least 1"):
        narrow(net, units)
    assert sizes(net) == {"0": 3, "2": 3}
    with pytest.raises(PlasticError, match="PlasticNet"):
        narrow(net.model, 2)  # pyright: ignore[reportArgumentType]


def test_layers_that_do_not_train_keep_their_weights() -> None:
    model = mlp(4, 6, 5, 3)
    for p in model[4].parameters():
        p.requires_grad_(False)
    before = model[4].bias.clone()
    net = PlasticNet(model, (torch.randn(2, 4),))
    narrow(net, 2)
    assert torch.equal(model[4].bias, before)  # pyright: ignore[reportArgumentType]
    assert model[4].weight.shape == (3, 2)
