"""What one may do with losses, passes and gradients by mistake: it works, or is refused and changes nothing."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from plasticnet import Budget, PlasticError, PlasticNet, Schedule, Stage
from tests.kit.networks import assert_same, mlp

X = torch.randn(8, 4)


def network(**options: Any) -> PlasticNet:
    torch.manual_seed(0)
    net = PlasticNet(mlp(4, 8, 6, 3), (X,), **options)
    net.k = 3.0
    return net.train()


def losses(net: PlasticNet, x: Tensor = X) -> Tensor:
    return net(x).square().sum(1)


def gradients(net: PlasticNet) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def state(net: PlasticNet) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "net": net.state_dict(),
            "random": torch.get_rng_state(),
            "gradients": gradients(net),
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
            "role": net.sampler.running.role,
        }
    )


@pytest.mark.parametrize("estimator", ["bitflip-cv", "disarm", "disarm-mean"])
def test_two_losses_before_one_backward_pass(estimator: str) -> None:
    """Also of different closures: the gradients are those of one after the other."""
    one, two = network(estimator=estimator), network(estimator=estimator)
    torch.manual_seed(1)
    (one.expected_loss(lambda: losses(one)) + one.expected_loss(lambda: losses(one, X + 1).sqrt())).backward()
    torch.manual_seed(1)
    two.expected_loss(lambda: losses(two)).backward()
    two.expected_loss(lambda: losses(two, X + 1).sqrt()).backward()
    for a, b in zip(gradients(one), gradients(two), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("estimator", ["bitflip-cv", "disarm", "disarm-mean"])
def test_two_backward_passes_of_one_loss(estimator: str) -> None:
    net = network(estimator=estimator)
    loss = net.expected_loss(lambda: losses(net))
    loss.backward(retain_graph=True)
    once = gradients(net)
    loss.backward()
    for a, b in zip(once, gradients(net), strict=True):
        assert a is not None
        torch.testing.assert_close(2 * a, b)
    with pytest.raises(RuntimeError, match="second time"):  # as torch says it
        loss.backward()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_backward_pass_that_is_interrupted(error: type[BaseException]) -> None:
    net, twin = network(), network()

    def interrupt(_: Tensor) -> None:
        raise error

    def closure() -> Tensor:
        out = net(X)
        if out.requires_grad:
            out.register_hook(interrupt)
        return out.square().sum(1)

    with pytest.raises(error):
        net.expected_loss(closure).backward()
    net.zero_grad()
    for n in (net, twin):
        n.sampler.samples_apart = True
        torch.manual_seed(4)
        n.expected_loss(lambda n=n: losses(n)).backward()
    assert_same(state(net), state(twin))


def test_an_optimizer_that_fails_midway() -> None:
    """A part of the weights has moved, as without gates; the network goes on from there."""
    net = network()
    optimizer = SGD([{"params": [p], "lr": 0.1} for p in net.parameters()])
    net.expected_loss(lambda: losses(net)).backward()
    optimizer.param_groups[3]["lr"] = "fast"
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[3]["lr"] = 0.1
    optimizer.step()
    net.resize({"0": [0, 1, -1]}, optimizer)
    net.expected_loss(lambda: losses(net)).backward()
    torch.testing.assert_close(net.eval()(X), net.compact()(X))


@pytest.mark.parametrize("closure", [None, torch.ones(8), 3.0])
def test_what_is_no_function(closure: Any) -> None:
    net = network()
    before = state(net)
    with pytest.raises(PlasticError, match=r"takes a function.*lambda"):
        net.expected_loss(closure)
    assert_same(state(net), before)


@pytest.mark.parametrize(
    "closure",
    [
        lambda net: net(X),
        lambda net: net(X).sum().item(),
        lambda net: losses(net) * math.nan,
        lambda net: net.model(X).square().sum(1),
        lambda net: (net.eval(), losses(net.train()), net.eval())[1],
        lambda net: losses(copy.deepcopy(net)),
        lambda net: (net(X), torch.ones(8))[1],
    ],
)
def test_closures_that_are_refused_change_nothing(closure: Callable[[PlasticNet], Any]) -> None:
    net = network()
    net.expected_loss(lambda: losses(net))  # the first step asks whether gates may be drawn per sample
    before = state(net)
    with pytest.raises(PlasticError):
        net.expected_loss(lambda: closure(net))
    assert_same(state(net), before)
    net.train().expected_loss(lambda: losses(net)).backward()


def test_two_calls_in_a_closure() -> None:
    net = network()
    net.expected_loss(lambda: losses(net) + losses(net, X + 1)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_without_gradients() -> None:
    for context in (torch.no_grad, torch.inference_mode):
        net = network()
        with context():
            loss = net.expected_loss(lambda net=net: losses(net))
        assert not loss.requires_grad
        net.expected_loss(lambda net=net: losses(net)).backward()
        assert all(p.grad is not None for p in net.parameters())


def test_a_penalty_alone_moves_the_gates_only() -> None:
    net = network()
    net.penalty(0.1).backward()
    assert all(g.phi.grad is not None for g in net.all_gates())
    assert all(p.grad is None for p in net.model.parameters())


def test_weights_that_stop_to_train() -> None:
    net = network()
    weight = net.model[0].weight  # pyright: ignore[reportIndexIssue]
    loss = net.expected_loss(lambda: losses(net))
    weight.requires_grad_(False)
    loss.backward()
    assert weight.grad is None
    optimizer = Adam(net.param_groups(0.01))
    net.resize({"0": [0, 1, -1]}, optimizer)
    assert not net.model[0].weight.requires_grad  # pyright: ignore[reportIndexIssue]
    net.expected_loss(lambda: losses(net)).backward()
    optimizer.step()


def test_an_optimizer_that_lacks_the_gates_or_is_out_of_date() -> None:
    model = mlp(4, 8, 6, 3)
    early = Adam(model.parameters())
    net = PlasticNet(model, (X,))
    late = Adam(net.param_groups(0.01))
    for call in (
        lambda o: net.resize({"0": [0, 1]}, o),
        lambda o: net.grow({"0": 1}, o),
        lambda o: Schedule(net, o, [Stage(1, k=7.0)]),
    ):
        before = state(net)
        with pytest.raises(PlasticError, match=r"do not hold.*gates.*param_groups"):
            call(early)
        assert_same(state(net), before)
    net.resize({"0": [0, 1]})  # behind its back
    with pytest.raises(PlasticError, match=r"do not hold.*param_groups"):
        net.resize({"0": [0]}, late)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_of_schedules_and_compact_modules(twin: Callable[[Any], Any]) -> None:
    """The copy of a schedule has a network and optimizers of its own, which belong together."""
    net = network()
    schedule = Schedule(net, Adam(net.param_groups(0.01)), [Stage(2, k=7.0), Stage(1)], budget=Budget(units=0.5))
    other = twin(schedule)
    before = state(net)
    for _ in range(3):
        other.optimizers[0].zero_grad()
        (other.net.expected_loss(lambda: losses(other.net)) + other.penalty()).backward()
        other.optimizers[0].step()
        other.step()
    torch.set_rng_state(before["random"])
    assert_same(state(net), before)
    assert schedule.epoch == 0
    assert sum(len(s) for s in other.net.sites.values()) < sum(len(s) for s in net.sites.values())
    small = net.compact()
    assert torch.equal(twin(small)(X), small(X))


def test_a_compact_copy_stays_when_the_network_trains_on() -> None:
    net = network()
    small = net.compact()
    expected = small(X)
    optimizer = Adam(net.param_groups(0.1))
    net.expected_loss(lambda: losses(net)).backward()
    optimizer.step()
    net.resize({"0": [0]}, optimizer)
    assert torch.equal(small(X), expected)
    own = {p.data_ptr() for p in net.parameters()}
    assert not any(p.data_ptr() in own for p in small.parameters() if isinstance(p, nn.Parameter))


# -- what a network cannot run on ---------------------------------------------------------------


@pytest.mark.parametrize("k", [0.0, 3.0, math.inf])
@pytest.mark.parametrize("gates", ["auto", "sample", "batch"])
def test_a_batch_without_samples(gates: str, k: float) -> None:
    """The network runs on it, and a mean of no losses is refused; the next batch is treated as if it had been first."""
    net, other = network(gates=gates), network(gates=gates)
    net.k = other.k = k
    assert net(X[:0]).shape == (0, 3)
    assert net.expected_loss(lambda: losses(net, X[:0]).sum()) == 0
    net.sampler.samples_apart = None
    with pytest.raises(PlasticError, match=r"no losses \(shape \(0,\)\).*leave empty batches out"):
        net.expected_loss(lambda: losses(net, X[:0]))
    for n in (net, other):
        torch.manual_seed(1)
        n.expected_loss(lambda n=n: losses(n)).backward()
    assert_same(state(net), state(other))


CALLS: dict[str, Callable[[PlasticNet, Tensor], Any]] = {
    "expected_loss": lambda net, x: net.expected_loss(lambda: losses(net, x)),
    "training": lambda net, x: net(x),
    "evaluation": lambda net, x: net.eval()(x),
    "compact": lambda net, x: net.compact(),
    "prune": lambda net, x: net.prune(),
}


@pytest.mark.parametrize("call", CALLS)
def test_logits_of_another_length_are_refused(call: str) -> None:
    net = network()
    net.sites["0"].phi = nn.Parameter(torch.zeros(5))
    with pytest.raises(PlasticError, match=r"'0': phi .* shape \(5,\), and the site has 8 units"):
        CALLS[call](net, X)
    net.sites["0"].phi = nn.Parameter(torch.zeros(8))
    CALLS[call](net, X)


@pytest.mark.parametrize("call", CALLS)
def test_a_network_on_the_meta_device_runs_nowhere(call: str) -> None:
    net = network()
    values = net.state_dict()
    net.to("meta")
    with pytest.raises(PlasticError, match=r"on the meta device.*net\.to_empty"):
        CALLS[call](net, X.to("meta"))
    net.resize({"0": [0, 1, 2, -1]})  # needs no values
    net.to_empty(device="cpu").load_state_dict(values)
    CALLS[call](net, X)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_that_are_made_in_a_closure(copied: Callable[[PlasticNet], PlasticNet]) -> None:
    net, made = network(), list[PlasticNet]()

    def closure() -> Tensor:
        made.append(copied(net))
        found = losses(net)
        made.append(copied(net))
        return found

    net.expected_loss(closure).backward()
    for twin in made:
        twin.resize({"0": [0, 1]})
        twin.expected_loss(lambda twin=twin: losses(twin)).backward()
