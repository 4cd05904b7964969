"""Losses whose backward pass would be lost, or that have none, and logits that are no numbers, are refused by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from plasticnet import Budget, PlasticError, PlasticNet, Schedule, Stage
from tests.kit.networks import mlp

X = torch.randn(8, 4)


def network(k: float, **options: object) -> PlasticNet:
    net = PlasticNet(mlp(4, 8, 6, 3), (X,), **options)  # pyright: ignore[reportArgumentType]
    net.k = k
    return net.train()


def losses(net: PlasticNet) -> Tensor:
    return net(X).square().sum(1)


CHANGES: dict[str, Callable[[PlasticNet], object]] = {
    "resize": lambda net: net.resize({"0": [0, 1, 3, -1]}),
    "grow": lambda net: net.grow({"2": 1}),
    "load": lambda net: net.load_state_dict(PlasticNet(mlp(4, 7, 5, 3), (X,)).state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("estimator", ["bitflip-cv", "disarm", "disarm-mean"])
@pytest.mark.parametrize("k", [3.0, 0.0, math.inf])
def test_a_change_of_size_before_the_backward_pass(k: float, estimator: str, change: str) -> None:
    net = network(k, estimator=estimator)
    total = net.expected_loss(lambda: losses(net)) + net.penalty(0.1, "macs")
    CHANGES[change](net)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    net.k = k
    with pytest.raises(PlasticError, match=r"changed its size.*backward"):
        total.backward()
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    if change != "load":  # which keeps the parameters, and with them what accumulates their gradients in the old graph
        net.expected_loss(lambda: losses(net)).backward()
        assert all(p.grad is not None for p in net.model.parameters())


def test_a_change_of_size_before_the_backward_pass_of_a_penalty() -> None:
    net = network(3.0)
    optimizer = Adam(net.param_groups(1e-2))
    schedule = Schedule(net, optimizer, [Stage(1, k=7.0), Stage(1)], budget=Budget(macs=0.5))
    for penalty in (lambda: net.penalty(0.1), schedule.penalty):
        total = penalty()
        net.grow({"0": 1}, optimizer)
        with pytest.raises(PlasticError, match="changed its size"):
            total.backward()
        assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("k", [3.0, math.inf])
def test_what_leaves_the_sizes_alone_is_allowed(k: float) -> None:
    net = network(k)
    total = net.expected_loss(lambda: losses(net))
    net.prune(0.01)  # nothing to cut
    net.to("cpu")
    net.measure_latency((X,), networks=8, repeats=1)
    net.k = 5.0
    total.backward()
    assert all(p.grad is not None for p in net.model.parameters())


@pytest.mark.parametrize("k", [3.0, math.inf])
def test_sizes_do_not_change_within_a_closure(k: float) -> None:
    net = network(k)

    def closure() -> Tensor:
        found = losses(net)
        net.grow({"0": 1})
        return found

    with pytest.raises(PlasticError, match="closure"):
        net.expected_loss(closure)
    assert len(net.sites["0"]) == 8
    net.expected_loss(lambda: losses(net)).backward()


@pytest.mark.parametrize("k", [3.0, 0.0, math.inf])
def test_a_loss_without_a_graph(k: float) -> None:
    net = network(k)

    @torch.no_grad()
    def without() -> Tensor:
        return losses(net)

    for closure in (without, lambda: losses(net).detach()):
        with pytest.raises(PlasticError, match=r"no graph.*no_grad"):
            net.expected_loss(closure)
        with torch.no_grad():  # the caller wants none
            assert net.expected_loss(closure).isfinite()
    with torch.inference_mode():
        assert net.expected_loss(lambda: losses(net)).isfinite()
    net.model.requires_grad_(False)  # nothing but the gates could learn
    assert net.expected_loss(without).isfinite()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"gates": "batch"}, {"weights": ("2",)}])
def test_logits_that_are_no_numbers(options: dict[str, object], value: float) -> None:
    for k in (3.0, 0.0, math.inf):
        net = network(k, **options)
        gates = net.all_gates()[-1]
        with torch.no_grad():
            gates.phi.view(-1)[1] = value
        with pytest.raises(PlasticError, match=rf"'{gates.name}': its gates are not finite"):
            net.expected_loss(lambda net=net: losses(net))
        with pytest.raises(PlasticError, match="not finite"):
            net.train()(X)
        if math.isnan(value):
            with pytest.raises(PlasticError, match=rf"'{gates.name}'.*NaN"):
                net.eval()(X)
        else:  # an infinite logit means what it says
            assert net.eval()(X).isfinite().all()


class Graphs(nn.Module):
    """Sums over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(4, 8, 3)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return x.new_zeros(int(graph.max()) + 1, 3).index_add(0, graph, self.body(x))


@pytest.mark.parametrize("estimator", ["bitflip-cv", "disarm"])
def test_losses_per_graph_token_or_pair(estimator: str) -> None:
    graph = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    for make, example, closure in (
        (Graphs, (X, graph), lambda net: net(X, graph).square().sum(1)),
        (lambda: mlp(4, 8, 3), (X,), lambda net: net(X[:, None].expand(-1, 5, -1)).square().sum(2).flatten()),
        (lambda: mlp(4, 8, 3), (X,), lambda net: torch.pdist(net(X))),
    ):
        found = []
        for gates in ("auto", "batch"):
            torch.manual_seed(0)
            net = PlasticNet(make(), example, gates=gates, estimator=estimator)  # pyright: ignore[reportArgumentType]
            for k in (math.inf, 3.0, 3.0):
                net.k = k
                torch.manual_seed(1)
                net.zero_grad()
                net.train().expected_loss(lambda net=net, closure=closure: closure(net)).backward()
            assert gates == "batch" or net.sampler.samples_apart is False
            found.append([p.grad for p in net.parameters()])
        for one, other in zip(*found, strict=True):
            assert one is not None
            assert one.any()
            torch.testing.assert_close(one, other)
        net = PlasticNet(make(), example, gates="sample", estimator=estimator)
        net.k = 3.0
        with pytest.raises(PlasticError, match='gates="batch"'):
            net.train().expected_loss(lambda net=net, closure=closure: closure(net))


def test_losses_that_stop_being_those_of_samples() -> None:
    """The probe has seen one loss for each sample; from then on there are others, which do not fit its answer."""
    net = network(3.0)
    net.expected_loss(lambda: losses(net))
    assert net.sampler.samples_apart is True
    for closure in (lambda: torch.pdist(net(X)), lambda: losses(net).mean()):
        net.zero_grad()
        net.sampler.samples_apart = True
        state = torch.get_rng_state()
        net.expected_loss(closure).backward()
        assert net.sampler.samples_apart is False
        assert not torch.equal(torch.get_rng_state(), state)
        assert all(p.grad is not None for p in net.parameters())


def test_losses_whose_number_depends_on_the_outputs() -> None:
    """The pairs that a closure looks at are chosen by what the network says, so that the passes differ in number."""
    net = network(3.0, gates="batch")

    def closure() -> Tensor:
        distances = torch.pdist(net(X))
        return distances[distances <= distances.detach().mean()]

    for _ in range(8):
        net.expected_loss(closure).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_no_losses_at_all() -> None:
    net = network(3.0, gates="batch")
    with pytest.raises(PlasticError, match=r"shape \(0,\)"):
        net.expected_loss(lambda: losses(net)[:0])


# -- what a closure must leave alone ----------------------------------------------------------


def _evaluating(net: PlasticNet) -> Tensor:
    net.eval()
    return losses(net)


def _evaluating_after(net: PlasticNet) -> Tensor:
    found = losses(net)
    net.eval()
    return found


def _at_another_k(net: PlasticNet) -> Tensor:
    found = losses(net)
    net.k = 5.0
    return found


def _at_infinity(net: PlasticNet) -> Tensor:
    net.k = math.inf
    return losses(net)


@pytest.mark.parametrize("closure", [_evaluating, _evaluating_after, _at_another_k, _at_infinity])
@pytest.mark.parametrize("estimator", ["bitflip-cv", "arm", "straight-through", "disarm-mean"])
def test_a_closure_that_changes_the_mode_or_k(closure: Callable[[PlasticNet], Tensor], estimator: str) -> None:
    net = network(7.0, estimator=estimator)
    with pytest.raises(PlasticError, match="changed the mode or the k"):
        net.expected_loss(lambda: closure(net))
    net.train()
    net.k = 7.0
    net.expected_loss(lambda: losses(net)).backward()


def test_a_closure_that_goes_back() -> None:
    net = network(7.0)

    def closure() -> Tensor:
        with torch.no_grad():
            wanted = net.eval()(X)
        net.train()
        return (net(X) - wanted).square().sum(1)

    net.expected_loss(closure).backward()
    assert all(g.phi.grad is not None for g in net.all_gates())


def test_a_second_plastic_network_in_a_closure() -> None:
    a, b = network(7.0), network(7.0)

    def both() -> Tensor:
        return (a(X) - b(X)).square().sum(1)

    with pytest.raises(PlasticError, match="another plastic network"):
        a.expected_loss(both)
    a.expected_loss(lambda: b.expected_loss(both)).backward()
    assert all(g.phi.grad is not None for net in (a, b) for g in net.all_gates())
    for k in (0.0, math.inf):
        b.k = k
        a.expected_loss(both).backward()
    b.k = 7.0
    b.eval()
    a.expected_loss(both).backward()
    b.train()

    def as_teacher() -> Tensor:
        with torch.no_grad():
            wanted = b(X)
        return (a(X) - wanted).square().sum(1)

    a.expected_loss(as_teacher).backward()
