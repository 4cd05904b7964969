"""Growth by the gradient: nothing but the size changes, and the most promising candidates stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from plasticnet import PlasticError, PlasticNet, narrow
from plasticnet.surgery.candidates import aside, grow_by_gradient, outgoing_gradients
from tests.kit.networks import ConvNet, images, mlp


def sizes(net: PlasticNet) -> dict[str, int]:
    return {n: len(s) for n, s in net.sites.items()}


def problem(inputs: tuple[str, ...] = ()) -> tuple[PlasticNet, Callable[[], Tensor]]:
    torch.manual_seed(0)
    x, y = images(16), torch.arange(16) % 3
    net = PlasticNet(ConvNet(), (x,), inputs=inputs)
    return net, lambda: F.cross_entropy(net(x), y, reduction="none")


def promise(net: PlasticNet, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The norm of the gradient of what reads each unit."""
    with aside(net):
        _, total = outgoing_gradients(net, loss)
    parts = total[:-1].sqrt().split([len(s) for s in net.sites.values()])
    return dict(zip(net.sites, parts, strict=True))


def test_promise_is_the_norm_of_the_outgoing_gradient() -> None:
    net = PlasticNet(mlp(4, 5, 3), (torch.randn(2, 4),))
    x = torch.randn(7, 4)
    net.model(x).square().mean().backward()
    expected = net.model[2].weight.grad.norm(dim=0)  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(promise(net, lambda: net(x).square().mean())["0"].float(), expected)


@pytest.mark.parametrize("inputs", [(), ("fc1",)])
def test_only_the_size_changes(inputs: tuple[str, ...]) -> None:
    net, loss = problem(inputs)
    narrow(net, 4)
    optimizer = Adam(net.param_groups(1e-2))
    net.train()
    loss().mean().backward()
    optimizer.step()
    net.k = 7.0
    net.sites["conv1"].grace[1] = 5
    gradients = {n: p.grad.clone() for n, p in net.model.named_parameters() if p.grad is not None}
    moments = optimizer.state[net.model.conv1.weight]["exp_avg"].clone()  # pyright: ignore[reportArgumentType]
    x = images()
    before, buffers = net.eval()(x), {n: b.clone() for n, b in net.model.named_buffers()}
    state = torch.get_rng_state()
    counts = {"conv1": 3, "fc1": 2, **({"fc1.input": 5} if inputs else {})}
    had = sizes(net)
    net.grow(counts, optimizer, init="gradmax", grace=2, loss=loss)
    grown = {n: len(s) - had[n] for n, s in net.sites.items()}
    features = net.sites["fc1.input"].units.full if inputs else 0  # pyright: ignore[reportAttributeAccessIssue]
    came = features - 4 * (had["conv1"] + had["conv3"])  # with the new channels
    assert grown == {n: counts.get(n, 0) + (came if n == "fc1.input" else 0) for n in grown}
    assert not net.training
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)
    assert not torch.equal(state, torch.get_rng_state())  # the new weights are random
    for name, b in net.model.named_buffers():
        torch.testing.assert_close(b[: len(buffers[name])] if b.dim() else b, buffers[name])
    for name, g in gradients.items():
        p = net.model.get_parameter(name)
        assert p.grad is not None
        kept = p.grad[tuple(slice(n) for n in g.shape)]
        assert name.startswith("fc1.w") or torch.equal(kept, g)  # its features are interleaved
    assert torch.equal(optimizer.state[net.model.conv1.weight]["exp_avg"][:4], moments)  # pyright: ignore[reportArgumentType]
    assert net.sites["conv1"].grace.tolist() == [0, 5, 0, 0, 2, 2, 2]
    assert all(len(p) for g in optimizer.param_groups for p in g["params"] if p.dim())


def test_the_gradient_is_larger_than_that_of_random_weights() -> None:
    for site in ("conv1", "conv3", "fc1"):
        gains = []
        for ascend in (False, True):
            net, loss = problem()
            narrow(net, 3)
            torch.manual_seed(1)
            grow_by_gradient(net, {site: 4}, loss, ascend=ascend)
            gains.append(promise(net, loss)[site][3:].mean())
        assert gains[1] > 1.5 * gains[0], site


def test_incoming_weights_keep_their_norm() -> None:
    net, _ = problem()
    narrow(net, 3)
    norms = []
    for ascend in (False, True):
        torch.manual_seed(1)
        wide = PlasticNet(net.compact(), (images(),))
        grow_by_gradient(wide, {"fc1": 400}, loss_of(wide), ascend=ascend)
        norms.append(wide.model.fc1.weight[3:].norm(dim=1))  # pyright: ignore[reportIndexIssue]
    # The chosen ones differ, so that only the ranges can be compared.
    assert norms[1].max() <= norms[0].max() * 1.05
    assert norms[1].min() >= norms[0].min() * 0.95


def loss_of(net: PlasticNet) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(net(images(16)), torch.arange(16) % 3)


def test_an_input_site_reopens_the_features_that_matter() -> None:
    torch.manual_seed(0)
    net = PlasticNet(mlp(30, 6, 2), (torch.randn(2, 30),), inputs=("0",))
    net.resize({"0.input": list(range(10, 20))})
    x = torch.randn(200, 30)
    y = (x[:, 3] + x[:, 25] > 0).long()
    net.grow({"0.input": 8}, init="gradmax", loss=lambda: F.cross_entropy(net(x), y))
    units = net.sites["0.input"].units
    assert {3, 25} <= set(units.features.tolist())  # pyright: ignore[reportAttributeAccessIssue]
    assert len(units.features) == 18  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("bad", ["nothing", "no network", "raises"])
def test_a_bad_loss_changes_nothing(bad: str) -> None:
    net, _ = problem()
    before = {n: p.clone() for n, p in net.named_parameters()}

    def raises() -> Tensor:
        raise ValueError("mine")

    losses = {"nothing": None, "no network": lambda: torch.zeros(()), "raises": raises}
    with pytest.raises((PlasticError, ValueError)):
        net.grow({"conv1": 2}, init="gradmax", loss=losses[bad])
    assert {n: p.shape for n, p in net.named_parameters()} == {n: p.shape for n, p in before.items()}
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])


def test_layers_with_parameters_that_do_not_train() -> None:
    net, loss = problem()
    narrow(net, 3)
    net.model.conv1.requires_grad_(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    net.grow({"conv1": 1, "fc1": 1}, init="gradmax", loss=loss)
    assert isinstance(net.model.fc1, nn.Linear)
    assert (len(net.sites["conv1"]), len(net.sites["fc1"])) == (4, 4)


@pytest.mark.parametrize("bad", ["features", "not finite", "optimizer"])
def test_what_is_refused_changes_nothing(bad: str) -> None:
    net, loss = problem(inputs=("fc1",))
    narrow(net, 4)
    optimizer = Adam(net.param_groups(1e-2))
    net.sites["conv1"].grace[:] = 4
    before = {n: p.clone() for n, p in net.state_dict().items()}
    counts = {"fc1.input": 99} if bad == "features" else {"conv1": 2}
    with pytest.raises(PlasticError, match={"not finite": "finite", "optimizer": "do not hold"}.get(bad)):
        net.grow(
            counts, Adam(net.model.parameters()) if bad == "optimizer" else optimizer, init="gradmax",
            loss=(lambda: loss() * math.nan) if bad == "not finite" else loss,
        )  # fmt: skip
    after = net.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_a_frozen_consumer_promises_nothing() -> None:
    net, loss = problem()
    narrow(net, 3)
    net.model.fc2.requires_grad_(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    with torch.no_grad():  # a validation block
        net.grow({"fc1": 2, "conv1": 1}, init="gradmax", loss=loss)
    assert (len(net.sites["fc1"]), len(net.sites["conv1"])) == (5, 4)
    assert promise(net, loss)["fc1"].sum() == 0


def test_layers_in_evaluation_mode_stay_there() -> None:
    net, loss = problem()
    narrow(net, 3)
    net.train()
    norm = next(m for m in net.model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.eval()
    net.grow({"fc1": 2}, init="gradmax", loss=loss)
    assert net.training
    assert not norm.training
