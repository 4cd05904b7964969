"""DistributedDataParallel: gates, sizes and decisions are the same on all ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim import SGD, Adam, Optimizer

from plasticnet import Budget, Growth, PlasticError, PlasticNet, Pressure, Schedule, Stage, narrow
from tests.kit.networks import ConvNet, assert_same, images, mlp, small
from tests.kit.processes import everywhere, start, together
from tests.kit.shares import Shares, assert_near, everything

INF = math.inf
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    start(tmp_path, 0, 1)
    yield
    dist.destroy_process_group()


def loss(net: PlasticNet, ddp: nn.Module, x: Tensor) -> Tensor:
    y = torch.arange(len(x)) % 3
    return net.expected_loss(lambda: F.cross_entropy(ddp(x), y, reduction="none")) + net.penalty(1e-2)


def step(net: PlasticNet, ddp: nn.Module, optimizer: Optimizer, x: Tensor) -> None:
    ddp.train()
    optimizer.zero_grad()
    loss(net, ddp, x).backward()
    optimizer.step()


# -- one process ------------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_a_changed_network_stays_wrapped() -> None:
    """DDP watches what the network has now, after a resize and after a state dict of another size."""
    net, optimizer = small()
    net.k = 7.0
    x = torch.randn(6, 4)
    ddp = DDP(net)
    step(net, ddp, optimizer, x)
    state = copy.deepcopy(net.state_dict())
    net.resize({"0": [0, 1, -1]}, optimizer)
    step(net, ddp, optimizer, x)
    assert ddp.eval()(x).shape == net.compact()(x).shape == (6, 3)
    net.train().load_state_dict(state)
    optimizer = Adam(net.param_groups(1e-2))
    step(net, ddp, optimizer, x)
    assert len(net.sites["0"]) == 6


@pytest.mark.usefixtures("alone")
def test_what_is_taken_out_of_the_hands_of_ddp() -> None:
    model = ConvNet()
    model._ddp_params_and_buffers_to_ignore = ["fc2.bias"]  # pyright: ignore[reportArgumentType]
    net = PlasticNet(model, (images(),), inputs=("fc1",))
    ddp = DDP(net)
    reduced = {id(p) for p in ddp._module_parameters}
    gates = {id(s.phi) for s in net.sites.values()}
    assert reduced == {id(p) for p in net.parameters()} - gates - {id(model.fc2.bias)}
    assert list(ddp.modules_buffers) == []


# -- two processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    together(
        tmp_path,
        gradients_are_the_mean_of_both,
        schedule_keeps_both_alike,
        growth_is_alike,
        budget_is_filled_alike,
        batch_norm,
        features_wake_alike,
        gates_begin_as_on_rank_0,
        accumulation,
        skipped_blocks,
        deep_within_what_is_wrapped,
        gradients_deep_within,
        normalised_deep_within,
        states_of_another_size,
    )


@pytest.mark.slow
def test_two_ranks_are_as_one_process(tmp_path: Path) -> None:
    together(tmp_path, as_one_process, built_after_a_cut)


def assert_alike(net: PlasticNet) -> None:
    assert_same(*everywhere(net.state_dict()))


def gradients_are_the_mean_of_both(rank: int) -> None:
    net = PlasticNet(mlp(4, 6, 5, 3).double(), (torch.randn(2, 4).double(),), inputs=("0",))
    net.k = 7.0
    torch.manual_seed(rank + 1)
    x = torch.randn(6, 4).double()
    with torch.no_grad():
        for site in net.sites.values():
            site.phi.copy_(torch.linspace(-0.2, 0.4, len(site)))
    alone, ddp = copy.deepcopy(net), DDP(net.train())
    draws = torch.get_rng_state()
    loss(alone.train(), alone, x).backward()
    torch.set_rng_state(draws)
    loss(net, ddp, x).backward()
    for (name, p), q in zip(net.named_parameters(), alone.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        first, second = everywhere(q.grad)
        assert not torch.equal(first, second), name  # each rank has data and gates of its own
        torch.testing.assert_close(p.grad, (first + second) / 2, rtol=1e-9, atol=1e-12)


def schedule_keeps_both_alike(rank: int) -> None:
    net = PlasticNet(mlp(4, 6, 5, 3), (torch.randn(2, 4),))
    optimizer = Adam(net.param_groups(1e-2))
    wrapped = [DDP(net)]
    growth = Growth.paper()
    stages = [Stage(1), Stage(5, 7.0), Stage(1)]
    schedule = Schedule(
        net, optimizer, stages, growth=growth, on_resize=lambda net: wrapped.append(DDP(net)), hibernate=0.05
    )
    torch.manual_seed(rank + 1)
    grown = cut = 0
    for epoch in range(schedule.epochs):
        for _ in range(3):
            step(net, wrapped[-1], optimizer, torch.randn(6, 4))
        if epoch == 4:
            with torch.no_grad():
                net.sites["0"].phi[[1, 3]] = -5.0
        # Alone, rank 0 would stop at once, and rank 1 go on.
        change = schedule.step(1.0 if rank == 0 else 1.0 - 0.2 * min(epoch, 3))
        grown, cut = grown + sum(change.grown.values()), cut + sum(change.cut.values())
        assert_alike(net)
        assert len(set(everywhere((change.cut.get("0"), change.grown.get("0"), net.k)))) == 1
    assert grown >= 6
    assert cut >= 2
    assert len(wrapped) > 3
    step(net, wrapped[-1], optimizer, torch.randn(6, 4))
    net.resize({"0": [0, -1]}, optimizer)
    step(net, wrapped[-1], optimizer, torch.randn(6, 4))
    assert_alike(net)


def growth_is_alike(rank: int) -> None:
    """Each rank measures on data of its own, and all of them grow by the mean."""
    net = PlasticNet(mlp(4, 6, 5, 3), (torch.randn(2, 4),))
    narrow(net, 2)
    optimizer = Adam(net.param_groups(1e-2))
    wrapped = [DDP(net)]
    schedule = Schedule(
        net,
        optimizer,
        [Stage(8, 7.0), Stage(1)],
        growth=Growth(),
        pressure=Pressure(1e-6),
        on_resize=lambda net: wrapped.append(DDP(net)),
    )
    torch.manual_seed(rank + 1)
    grown = 0
    for _ in range(schedule.epochs):
        for _ in range(33):
            x = torch.randn(6, 4)
            y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
            ddp = wrapped[-1].train()
            value = net.expected_loss(lambda x=x, y=y, ddp=ddp: F.cross_entropy(ddp(x), y, reduction="none"))
            optimizer.zero_grad()
            (value + schedule.penalty()).backward()
            optimizer.step()
        change = schedule.step()
        grown += sum(change.grown.values())
        assert_alike(net)
        assert len(set(everywhere(tuple(change.grown.items())))) == 1
    assert grown > 4


def budget_is_filled_alike(rank: int) -> None:
    """Also with units that are added when the network hardens."""
    net = PlasticNet(mlp(4, 20, 12, 3), (torch.randn(2, 4),))
    optimizer = Adam(net.param_groups(1e-2))
    wrapped = [DDP(net)]
    schedule = Schedule(
        net,
        optimizer,
        [Stage(2, 7.0), Stage(1)],
        budget=Budget(macs=0.5),
        on_resize=lambda net: wrapped.append(DDP(net)),
    )
    torch.manual_seed(rank + 1)
    step(net, wrapped[-1], optimizer, torch.randn(6, 4))
    schedule.step()
    net.resize({name: range(4) for name in net.sites}, optimizer)
    wrapped.append(DDP(net))
    step(net, wrapped[-1], optimizer, torch.randn(6, 4))
    change = schedule.step()
    assert sum(change.grown.values()) > 2
    assert len(set(everywhere(tuple(change.grown.items())))) == 1
    assert_alike(net)
    step(net, wrapped[-1], optimizer, torch.randn(6, 4))
    assert_alike(net)


def batch_norm(rank: int) -> None:
    """One draw per batch and rank; statistics are those of rank 0, and the backward pass accepts that."""
    net = PlasticNet(ConvNet(), (images(),), gates="batch")
    optimizer = SGD(net.param_groups(1e-2), momentum=0.9)
    net.k = 7.0
    ddp = DDP(net)
    torch.manual_seed(rank + 1)
    for i in range(4):
        if i == 2:
            net.prune(net.sites["conv3"].probability(7.0).sort().values[1].item() + 1e-6, optimizer)
            net.grow({"conv1": 1}, optimizer, init="random")
            assert_same(*everywhere(dict(net.named_parameters())))
            ddp = DDP(net)
        step(net, ddp, optimizer, images(6))
        assert_same(*everywhere(dict(net.named_parameters())))
    with torch.no_grad():
        net.model.bn1.running_mean.fill_(100.0 * rank)
    ddp(images(6))
    assert float(net.model.bn1.running_mean.abs().max()) < 10  # 0, and a tenth of this batch's
    assert not torch.equal(*everywhere(net.model.bn1.running_mean))


def features_wake_alike(rank: int) -> None:
    net = PlasticNet(mlp(40, 6, 3), (torch.randn(2, 40),), inputs=("*",))
    optimizer = Adam(net.param_groups(1e-2))
    net.k = 7.0
    net.resize({"0.input": list(range(5))}, optimizer)
    ddp = DDP(net)
    torch.manual_seed(rank + 1)
    step(net, ddp, optimizer, torch.randn(6, 40))
    state = torch.get_rng_state()
    net.resize({"0.input": [0, 1, 2, *[-1] * 10], "0": [0, 1, -1, -1]}, optimizer, init="random")
    assert_alike(net)
    assert not torch.equal(*everywhere(torch.get_rng_state()))  # each goes on with its own numbers
    assert not torch.equal(state, torch.get_rng_state())
    step(net, DDP(net), optimizer, torch.randn(6, 40))
    assert_alike(net)
    # Built with other seeds, the features differ.
    net.resize({"0.input": [0, 1, 2, 3]} if rank else {"0.input": [1, 2, 3, 4]}, optimizer)
    with pytest.raises(PlasticError, match=r"'0.input' has other features than on rank 0"):
        DDP(net)(torch.randn(6, 40))


def gates_begin_as_on_rank_0(rank: int) -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),))
    optimizer = Adam(net.param_groups(1e-2))
    net.k = 7.0
    with torch.no_grad():
        net.sites["0"].phi.fill_(0.1 + rank)
    step(net, DDP(net), optimizer, torch.randn(6, 4))
    assert_alike(net)
    assert float(net.sites["0"].phi.detach().max()) < 0.5


def accumulation(rank: int) -> None:
    net = PlasticNet(mlp(4, 6, 3), (torch.randn(2, 4),))
    optimizer = Adam(net.param_groups(1e-2))
    net.k = 7.0
    ddp = DDP(net)
    torch.manual_seed(rank + 1)
    for _ in range(3):
        optimizer.zero_grad()
        with ddp.no_sync():
            loss(net, ddp, torch.randn(6, 4)).backward()
        loss(net, ddp, torch.randn(6, 4)).backward()
        optimizer.step()
        assert_alike(net)


def skipped_blocks(rank: int) -> None:
    """What one rank skips, another may run."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([mlp(4, 8, 4) for _ in range(3)])
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    net = PlasticNet(Deep(), (torch.randn(2, 4),), blocks=("blocks.?",))
    optimizer = Adam(net.param_groups(1e-2))
    net.k = 7.0
    with torch.no_grad():
        for site in net.sites.values():
            site.phi.zero_()
    ddp = DDP(net, find_unused_parameters=True)
    torch.manual_seed(rank + 1)
    for _ in range(4):
        step(net, ddp, optimizer, torch.randn(6, 4))
        assert_alike(net)


class Task(nn.Module):
    """What a trainer wraps: a module of the user's that holds the network, two modules deep."""

    def __init__(self, net: PlasticNet) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"net": net, "head": nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner["head"](self.inner["net"](x))}


def task_loss(net: PlasticNet, ddp: nn.Module, x: Tensor) -> Tensor:
    y = torch.arange(len(x)) % 3
    return net.expected_loss(lambda: F.cross_entropy(ddp(x)["logits"], y, reduction="none"))


def deep_within_what_is_wrapped(rank: int) -> None:
    """Trained to a budget, without being wrapped anew: equal sizes and weights, and the state loads from outside."""
    for unused, estimator in ((False, "bitflip-cv"), (True, "bitflip-cv"), (True, "disarm"), (False, "disarm")):
        torch.manual_seed(0)
        net = PlasticNet(mlp(4, 20, 12, 3), (torch.randn(2, 4),), estimator=estimator)
        ddp = DDP(Task(net), find_unused_parameters=unused)
        groups = [*net.param_groups(1e-2), {"params": list(ddp.module.inner["head"].parameters()), "lr": 1e-2}]
        optimizer = Adam(groups)
        schedule = Schedule(net, optimizer, [Stage(1), Stage(4, 7.0), Stage(1)], budget=Budget(macs=0.4), hibernate=0.3)
        torch.manual_seed(rank + 1)
        for _ in range(schedule.epochs):
            for _ in range(4):
                ddp.train()
                optimizer.zero_grad()
                (task_loss(net, ddp, torch.randn(6, 4)) + schedule.penalty()).backward()
                optimizer.step()
                assert_same(*everywhere(dict(ddp.module.named_parameters())))
            schedule.step()
            assert len(set(everywhere(tuple(len(s) for s in net.sites.values())))) == 1
        assert net.summary().open_macs <= 0.4 * (4 * 20 + 20 * 12 + 12 * 3)
        other = Task(PlasticNet(mlp(4, 20, 12, 3), (torch.randn(2, 4),)))
        other.load_state_dict(ddp.module.state_dict())
        x = torch.randn(5, 4)
        assert torch.equal(other.eval()(x)["logits"], ddp.module.eval()(x)["logits"])


def gradients_deep_within(rank: int) -> None:
    """The gradients of all parameters, gates included, are the means of those that the ranks have alone."""
    for estimator in ("bitflip-cv", "disarm"):
        torch.manual_seed(0)
        net = PlasticNet(mlp(4, 6, 5, 3).double(), (torch.randn(2, 4).double(),), estimator=estimator)
        net.k = 7.0
        task = Task(net).double().train()
        alone, ddp = copy.deepcopy(task), DDP(task)
        torch.manual_seed(rank + 1)
        x = torch.randn(6, 4).double()
        draws = torch.get_rng_state()
        own = alone.inner["net"]
        (task_loss(own, alone, x) + own.penalty(1e-2)).backward()
        torch.set_rng_state(draws)
        (task_loss(net, ddp, x) + net.penalty(1e-2)).backward()
        for (name, p), q in zip(task.inner["net"].named_parameters(), own.parameters(), strict=True):
            assert p.grad is not None, name
            first, second = everywhere(q.grad)
            torch.testing.assert_close(p.grad, (first + second) / 2, rtol=1e-9, atol=1e-12)


def normalised_deep_within(rank: int) -> None:
    """A resize before the first step, and the statistics of norms."""
    net = PlasticNet(ConvNet(), (images(),), gates="batch")
    optimizer = SGD(net.param_groups(1e-2), momentum=0.9)
    net.k = 7.0
    task = nn.Sequential(net)
    ddp = DDP(task)
    net.resize({"conv1": [0, 1, 2, -1]}, optimizer, init="random")
    torch.manual_seed(rank + 1)
    for i in range(4):
        if i == 2:
            net.grow({"conv1": 1}, optimizer, init="random")
        step(net, ddp, optimizer, images(6))
        assert_same(*everywhere(dict(net.named_parameters())))


def states_of_another_size(rank: int) -> None:
    """Loaded after wrapping, through the parent or not, before and after a step: the gradients of a DDP built then."""
    x = torch.randn(6, 4)

    def built(*kept: int) -> Task:
        torch.manual_seed(0)
        task = Task(PlasticNet(mlp(4, 8, 6, 3), (torch.randn(2, 4),)))
        if kept:
            cast(PlasticNet, task.inner["net"]).resize({"0": list(kept)})
        return task

    state = built(0, 2, 5).state_dict()
    for through_parent, assign in product((True, False), repeat=2):
        for stepped in (True, False):
            found = []
            for wrapped_first in (True, False):
                task = built()
                ddp = DDP(task) if wrapped_first else None
                net = next(m for m in task.modules() if isinstance(m, PlasticNet))
                kept_alive = []
                if ddp is not None and stepped:
                    net.k = 7.0
                    kept_alive.append(task_loss(net, ddp.train(), x))  # its graph remembers the old shapes
                    kept_alive[-1].backward()
                own = {
                    n.removeprefix(prefix): t
                    for prefix in [_prefix(task, net)]
                    for n, t in state.items()
                    if n.startswith(prefix)
                }
                given = state if through_parent else own
                given = {n: t.clone() for n, t in given.items()}
                (task if through_parent else net).load_state_dict(given, assign=assign)
                ddp = ddp or DDP(task)
                net.k = 7.0
                torch.manual_seed(rank + 1)
                task.zero_grad()
                task_loss(net, ddp.train(), x).backward()
                found.append({n: p.grad for n, p in net.named_parameters()})
                assert_same(*everywhere(found[-1]))
                assert len(net.sites["0"]) == 3
            for name, gradient in found[0].items():
                torch.testing.assert_close(gradient, found[1][name])


def _prefix(parent: nn.Module, net: PlasticNet) -> str:
    return next(f"{name}." for name, module in parent.named_modules() if module is net)


# -- as one process on the whole batch --------------------------------------------------------


class Deep(nn.Module):
    """Blocks that can be skipped."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([mlp(4, 8, 4) for _ in range(3)])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def as_one_process(rank: int) -> None:
    """Weights, gates, moments and sizes, whatever DDP is asked for, through cuts and new units, and accumulated."""
    plain: Any = lambda: mlp(4, 12, 9, 3)  # noqa: E731
    ways: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (plain, {}, {}),
        (plain, {}, {"find_unused_parameters": True}),
        (plain, {}, {"gradient_as_bucket_view": True}),
        (plain, {}, {"static_graph": True}),
        (plain, {"weights": ("2",)}, {}),
        (Deep, {"blocks": ("blocks.?",), "gates": "batch"}, {"find_unused_parameters": True}),
    ]
    for (model, options, of_ddp), around, accumulated in product(ways, (False, True), (False, True)):
        if of_ddp.get("static_graph") and accumulated:  # torch has no static graph with no_sync
            continue
        if around == accumulated and (options or of_ddp) and "static_graph" not in of_ddp:  # one of both is enough
            continue
        found = []
        for ranks in ((rank,), (0, 1)):
            torch.manual_seed(0)
            net = PlasticNet(model().double(), (torch.randn(3, 4).double(),), **options)
            inner: nn.Module = Task(net).double() if around else net
            top = inner if len(ranks) > 1 else DDP(inner, **of_ddp)
            shares = Shares(*ranks)
            others = [] if not around else [{"params": list(cast(Task, inner).inner["head"].parameters()), "lr": 1e-2}]
            optimizer = Adam([*net.param_groups(1e-2), *others])
            pressure = Pressure(0.3, cost="parameters", scale="log")
            schedule = Schedule(net, optimizer, [Stage(1), Stage(3, 7.0), Stage(1)], pressure=pressure, hibernate=0.5)
            with torch.no_grad():  # some units hibernate
                for site in net.sites.values():
                    site.phi[1 : len(site) : 3] = -0.02
            sizes = []
            for epoch in range(schedule.epochs):
                for i in range(2):
                    generator = torch.Generator().manual_seed(10 * epoch + i)
                    data = [torch.randn(6, 4, generator=generator).double() for _ in range(4)]
                    top.train()
                    optimizer.zero_grad()

                    def step(x: Tensor, top: Any = top, net: Any = net, schedule: Any = schedule) -> Tensor:
                        y = torch.arange(len(x)) % 3
                        f = net.expected_loss(lambda: F.cross_entropy(_logits(top(x)), y, reduction="none"))
                        return f + schedule.penalty()

                    if accumulated:
                        with top.no_sync() if isinstance(top, DDP) else nullcontext():
                            shares.backward(step, data[2:])
                    shares.backward(step, data[:2])
                    optimizer.step()
                schedule.step()
                if epoch == 2 and "0" in net.sites:
                    shares.alike()
                    net.resize({"0": [*range(len(net.sites["0"])), -1]}, optimizer, init="random")
                sizes.append([len(s) for s in net.sites.values()])
            found.append((sizes, everything(inner, optimizer)))
        assert found[0][0] == found[1][0]
        assert model is Deep or found[0][0][0] != found[0][0][1]
        assert_near(*(state for _, state in found))


def _logits(output: Any) -> Tensor:
    return output["logits"] if isinstance(output, dict) else output


def built_after_a_cut(rank: int) -> None:
    """The network trains in a DDP, is cut, and trains in another one."""
    states = []
    for ranks in ((rank,), (0, 1)):
        torch.manual_seed(0)
        net = PlasticNet(mlp(4, 12, 9, 3).double(), (torch.randn(3, 4).double(),))
        optimizer = Adam(net.param_groups(1e-2))
        net.k, shares = 7.0, Shares(*ranks)
        for i in range(4):
            top = net if len(ranks) > 1 else DDP(net)
            generator = torch.Generator().manual_seed(i)
            data = [torch.randn(6, 4, generator=generator).double() for _ in range(2)]
            optimizer.zero_grad()
            shares.backward(lambda x, net=net, top=top: loss(net, top.train(), x), data)
            optimizer.step()
            net.resize({"0": range(len(net.sites["0"]) - 1)}, optimizer)
        states.append(everything(net, optimizer))
    assert_near(*states)
