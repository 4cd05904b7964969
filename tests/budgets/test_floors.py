import pytest
import torch
from torch import nn

import plasticnet as pn


def mlp(width: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU(), nn.Linear(width, outputs))


@pytest.mark.parametrize(
    ("width", "outputs", "least"), [(64, 10, 4), (64, 1, 1), (64, 2, 2), (64, 100, 7), (16, 100, 2), (7, 100, 1)]
)
def test_what_the_output_layer_reads_keeps_the_digits_that_number_the_outputs(width, outputs, least):
    net = pn.PlasticNet(mlp(width, outputs), (torch.randn(2, 4),))
    assert [site.minimum for site in net.sites.values()] == [1, least]


def test_a_budget_leaves_them_at_once():
    net = pn.PlasticNet(mlp(64, 10), (torch.randn(2, 4),))
    worthless = {"0": torch.ones(32), "2": torch.zeros(64)}
    pn.prune_once(net, pn.Budget(units=8), scores=worthless, per_cost=False)
    assert [len(site) for site in net.sites.values()] == [4, 4]


def test_a_schedule_leaves_them():
    torch.manual_seed(0)
    net = pn.PlasticNet(mlp(64, 10), (torch.randn(2, 4),))
    optimizer = torch.optim.Adam(net.param_groups(1e-3, 0.5))
    schedule = pn.Schedule(net, optimizer, [pn.Stage(6, 7.0), pn.Stage(1)], budget=pn.Budget(units=6))
    x = torch.randn(64, 4)
    while schedule.epoch < schedule.epochs:
        for _ in range(20):
            loss = net.expected_loss(lambda: net(x).square().mean(1)) + schedule.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    first, last = net.compact()[0], net.compact()[2]
    assert last.out_features >= 4
    assert first.out_features + last.out_features <= 6


def test_whoever_wants_less_says_so():
    net = pn.PlasticNet(mlp(64, 10), (torch.randn(2, 4),))
    net.limit("2", minimum=1)
    pn.prune_once(net, pn.Budget(units=4), scores={"0": torch.ones(32), "2": torch.zeros(64)}, per_cost=False)
    assert len(net.sites["2"]) == 1
    net.limit("2")
    assert net.sites["2"].minimum == 4


def test_a_budget_below_is_refused():
    net = pn.PlasticNet(mlp(64, 10), (torch.randn(2, 4),))
    with pytest.raises(pn.PlasticError, match="units that each site must keep, costs 5 units"):
        pn.prune_once(net, pn.Budget(units=4))


def test_channels_that_a_convolution_reads_for_the_output():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 21, 1))
    assert pn.PlasticNet(model, (torch.randn(2, 3, 8, 8),)).sites["0"].minimum == 5
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.ConvTranspose2d(64, 21, 2))
    assert pn.PlasticNet(model, (torch.randn(2, 3, 8, 8),)).sites["0"].minimum == 5


def test_a_network_that_begins_narrow_may_stay_so():
    net = pn.PlasticNet(mlp(64, 10), (torch.randn(2, 4),))
    pn.narrow(net, 3)
    assert [site.minimum for site in net.sites.values()] == [1, 1]
    net = pn.PlasticNet(mlp(64, 10), (torch.randn(2, 4),))
    for least in (5, 4):  # also where it is what would be usual before
        net.limit("2", minimum=least)
        pn.narrow(net, 3)
        assert net.sites["2"].minimum == least
