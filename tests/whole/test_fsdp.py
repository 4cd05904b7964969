"""FSDP2, `fully_shard`: the same as one process on the whole batch, through changes of size."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.utils.checkpoint import checkpoint

from plasticnet import (
    ESTIMATORS,
    Budget,
    Growth,
    PlasticError,
    PlasticNet,
    Pressure,
    Schedule,
    Stage,
    narrow,
    prune_once,
    repair,
    save_checkpoint,
    sensitivity,
)
from tests.kit.networks import ConvNet, images, mlp, randomise_gates
from tests.kit.processes import everywhere, together
from tests.kit.shares import Shares, assert_near, everything, gradients, whole

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.slow,
]
if dist.is_available():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel as DDP

INF = math.inf


# -- networks ---------------------------------------------------------------------------------


class Task(nn.Module):
    """What a trainer shards: a module that holds the network and other parameters."""

    def __init__(self, net: PlasticNet) -> None:
        super().__init__()
        self.net = net
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


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


class Checkpointed(nn.Module):
    """Runs its blocks again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = mlp(6, 8, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = cast(Tensor, checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=False))
        return self.last(cast(Tensor, checkpoint(self.second, x, use_reentrant=False)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.rnn = nn.GRU(6, 5, batch_first=True)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.rnn(self.first(x[:, None].expand(-1, 3, -1)).tanh())[0][:, -1])


def built(model: Callable[[], nn.Module] | None = None, x: Tensor | None = None, **options: Any) -> PlasticNet:
    torch.manual_seed(0)
    net = PlasticNet(
        (model or (lambda: mlp(4, 6, 5, 3)))().double(), (torch.randn(3, 4) if x is None else x).double(), **options
    )
    randomise_gates(net)
    return net


def layers(net: PlasticNet) -> None:
    """A call for each layer, and one for the network."""
    for module in net.model.modules():
        if module is not net.model and list(module.parameters(recurse=False)):
            fully_shard(module)
    fully_shard(net)


def in_pairs(net: PlasticNet) -> None:
    """Layers that are gathered together."""
    found = [m for m in net.model if list(m.parameters())]  # pyright: ignore[reportGeneralTypeIssues]
    fully_shard(found[:2])
    fully_shard(net)


WAYS: dict[str, Callable[[PlasticNet], object]] = {
    "network": fully_shard,
    "model": lambda net: fully_shard(net.model),
    "layers": layers,
    "in pairs": in_pairs,
    "kept after the forward": lambda net: fully_shard(net, reshard_after_forward=False),
    "freed after the forward": lambda net: fully_shard(net.model, reshard_after_forward=True),
}


def resharded(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that the network keeps, not those that FSDP2 has gathered."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return list(net.parameters())


def loss(net: PlasticNet, x: Tensor, top: nn.Module | None = None) -> Tensor:
    y = torch.arange(len(x)) % 3
    return net.expected_loss(lambda: F.cross_entropy((top or net)(x), y, reduction="none")) + net.penalty(1e-2)


def batches(n: int, width: int = 4, size: int = 6) -> list[list[Tensor]]:
    """For every step the shares of both ranks."""
    generator = torch.Generator().manual_seed(5)
    return [[torch.randn(size, width, generator=generator).double() for _ in range(2)] for _ in range(n)]


# -- gradients --------------------------------------------------------------------------------


def test_two_ranks(tmp_path: Path) -> None:
    """All in one pair of processes, because each has to import torch."""
    together(
        tmp_path,
        gradients_of_every_estimator,
        gradients_of_many_networks,
        within_a_larger_module,
        accumulated,
        sharded_before_the_network_was_made,
        trained_as_in_one_process,
        to_a_budget_as_under_ddp,
        grown_as_under_ddp,
        statistics_of_norms,
        resized_wherever_it_stands,
        in_half_precision,
        uneven_shards,
        states_load,
        what_needs_the_whole,
        orders_that_are_refused,
        other_meshes,
        undone,
    )


def same_gradients(rank: int, make: Callable[[], PlasticNet], shard: Callable[[PlasticNet], object]) -> None:
    """Twice, because the first step finds out how to draw."""
    both, own = make().train(), make().train()
    both.k = own.k = 7.0
    shard(own)
    one, two = Shares(0, 1), Shares(rank)
    for data in batches(2):
        for net, shares in ((both, one), (own, two)):
            net.zero_grad()
            shares.backward(lambda x, net=net: loss(net, x), data)
        assert_near(gradients(own), gradients(both))
        assert not any(isinstance(g.phi, DTensor) for g in own.all_gates())
        assert isinstance(next(own.model.parameters()), DTensor) or not isinstance(own.model, FSDPModule)


def gradients_of_every_estimator(rank: int) -> None:
    for estimator in ESTIMATORS:
        same_gradients(rank, lambda e=estimator: built(estimator=e), layers)
    for shard in WAYS.values():
        same_gradients(rank, built, shard)


def gradients_of_many_networks(rank: int) -> None:
    """Gates of single weights, of features, in norms, over blocks, under checkpoints and in recurrent layers."""
    layered = lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
    makers = [
        lambda: built(weights=("2",)),
        lambda: built(inputs=("*",), gates="batch"),
        lambda: built(layered, residual=True),
        lambda: built(Deep, blocks=("blocks.?",)),
        lambda: built(Checkpointed),
        lambda: built(Checkpointed, gates="batch", estimator="disarm"),
        lambda: built(Recurrent, gates="batch"),
    ]
    for make, shard in zip(makers, cycle((WAYS["network"], WAYS["model"])), strict=False):
        same_gradients(rank, make, shard)
    for make in (makers[0], makers[1], makers[2], makers[4], makers[5]):
        same_gradients(rank, make, layers)

    def block_by_block(net: PlasticNet) -> None:
        for block in cast(Deep, net.model).blocks:
            fully_shard(block)
        fully_shard(net)

    same_gradients(rank, makers[3], block_by_block)
    net = built(Deep, blocks=("blocks.?",)).train()
    layers(net)
    with pytest.raises(PlasticError, match=r"fully_shard was called for blocks.0.0, which lies in the block blocks.0"):
        net(torch.randn(3, 4).double())


def within_a_larger_module(rank: int) -> None:
    """It is sharded, and neither it nor the network knows of the other."""
    torch.manual_seed(0)
    own = Task(built()).double().train()
    both = copy.deepcopy(own)
    fully_shard(own.net.model[0])
    fully_shard(own)
    own.net.k = both.net.k = 7.0
    one, two = Shares(0, 1), Shares(rank)
    optimizers = [Adam(t.parameters(), 1e-2) for t in (own, both)]
    for i, data in enumerate(batches(4)):
        for task, shares, optimizer in ((own, two, optimizers[0]), (both, one, optimizers[1])):
            optimizer.zero_grad()
            shares.backward(lambda x, task=task: loss(task.net, x, task), data)
            optimizer.step()
            if i == 1:
                shares.alike()
                task.net.resize({"0": [0, 2, 3, -1], "2": [1, 2]}, optimizer, init="random")
        assert_near(everything(own, optimizers[0]), everything(both, optimizers[1]))


def accumulated(rank: int) -> None:
    """Two batches for a step, with and without a reduction for each, and a clipped norm."""
    for synchronised in (True, False):
        own, both = built().train(), built().train()
        fully_shard(own)
        own.k = both.k = 7.0
        optimizers = [SGD(n.param_groups(1e-1), momentum=0.9) for n in (own, both)]
        one, two = Shares(0, 1), Shares(rank)
        data = batches(6)
        for first, second in zip(data[::2], data[1::2], strict=True):
            for net, shares, optimizer in ((own, two, optimizers[0]), (both, one, optimizers[1])):
                optimizer.zero_grad()
                if isinstance(net, FSDPModule):
                    net.set_requires_gradient_sync(synchronised)
                shares.backward(lambda x, net=net: loss(net, x) / 2, first)
                if isinstance(net, FSDPModule):
                    net.set_requires_gradient_sync(True)
                shares.backward(lambda x, net=net: loss(net, x) / 2, second)
                norm = nn.utils.clip_grad_norm_(net.model.parameters(), 0.1)
                assert float(whole(norm)) > 0.1
                optimizer.step()
        assert_near(everything(own, optimizers[0]), everything(both, optimizers[1]))


def sharded_before_the_network_was_made(rank: int) -> None:
    both = built().train()
    torch.manual_seed(0)
    model = mlp(4, 6, 5, 3).double()
    fully_shard(model[2])
    fully_shard(model)
    own = PlasticNet(model, (torch.randn(3, 4).double(),)).train()
    assert list(own.sites) == list(both.sites)
    assert own.frozen == both.frozen
    own.load_state_dict(both.state_dict())
    own.k = both.k = 7.0
    one, two = Shares(0, 1), Shares(rank)
    (data,) = batches(1)
    two.backward(lambda x: loss(own, x), data)
    one.backward(lambda x: loss(both, x), data)
    assert_near(gradients(own), gradients(both))


# -- sizes ------------------------------------------------------------------------------------


def trained_as_in_one_process(rank: int) -> None:
    """Units that hibernate are cut, and others are added; Adam's moments go with them."""
    for shard in (fully_shard, layers):
        own, both = (PlasticNet(mlp(4, 12, 9, 3).double(), (torch.randn(3, 4).double(),)) for _ in range(2))
        both.load_state_dict(own.state_dict())
        shard(own)
        found = []
        for net, shares in ((own, Shares(rank)), (both, Shares(0, 1))):
            optimizer = Adam(net.param_groups(1e-2))
            pressure = Pressure(0.3, cost="parameters", scale="log")
            schedule = Schedule(net, optimizer, [Stage(1), Stage(6, 7.0), Stage(2)], pressure=pressure, hibernate=0.3)
            data, sizes = iter(batches(40)), []
            for epoch in range(schedule.epochs):
                for _ in range(4):
                    net.train()
                    optimizer.zero_grad()
                    shares.backward(lambda x, net=net, s=schedule: _plain(net, x) + s.penalty(), next(data))
                    optimizer.step()
                net.eval()
                net(torch.randn(3, 4).double())  # leaves the parameters gathered
                schedule.step()
                if epoch == 3:
                    shares.alike()
                    net.resize({"0": [*range(len(net.sites["0"])), -1, -1]}, optimizer, init="random")
                sizes.append([len(s) for s in net.sites.values()])
            found.append((sizes, everything(net, optimizer)))
        assert found[0][0] == found[1][0]
        assert found[0][0][-1] != found[0][0][0]
        assert_near(found[0][1], found[1][1])


def _plain(net: PlasticNet, x: Tensor, top: nn.Module | None = None) -> Tensor:
    y = torch.arange(len(x)) % 3
    return net.expected_loss(lambda: F.cross_entropy((top or net)(x), y, reduction="none"))


def to_a_budget_as_under_ddp(rank: int) -> None:
    found = []
    for shard in (layers, DDP):
        torch.manual_seed(0)
        net = PlasticNet(mlp(4, 20, 12, 3).double(), (torch.randn(3, 4).double(),))
        top = shard(net) or net
        optimizer = Adam(net.param_groups(1e-2))
        resized = []
        schedule = Schedule(
            net, optimizer, [Stage(1), Stage(5, 7.0), Stage(1)], budget=Budget(macs=0.4), hibernate=0.3,
            on_resize=lambda net, found=resized: found.append([len(s) for s in net.sites.values()]),
        )  # fmt: skip
        torch.manual_seed(rank + 1)
        for _ in range(schedule.epochs):
            for data in batches(4):
                top.train()
                optimizer.zero_grad()
                (_plain(net, data[rank], top) + schedule.penalty()).backward()
                optimizer.step()
            schedule.step()
        assert net.summary().open_macs <= 0.4 * (4 * 20 + 20 * 12 + 12 * 3)
        assert resized
        found.append((resized, everything(net, optimizer), schedule.state_dict()))
    assert found[0][0] == found[1][0]
    assert_near(found[0][1], found[1][1], 1e-7)
    first, second = everywhere(found[0][0])
    assert first == second


def grown_as_under_ddp(rank: int) -> None:
    found = []
    for shard in (fully_shard, DDP):
        torch.manual_seed(0)
        net = PlasticNet(mlp(4, 6, 5, 3).double(), (torch.randn(3, 4).double(),))
        if shard is fully_shard:
            top = shard(net)
            narrow(net, 2)
        else:
            with net.ranks.alike(torch.device("cpu")):
                narrow(net, 2)
            top = shard(net)
        assert [len(s) for s in net.sites.values()] == [2, 2]
        optimizer = Adam(net.param_groups(1e-2))
        schedule = Schedule(net, optimizer, [Stage(6, 7.0), Stage(1)], growth=Growth(), pressure=Pressure(1e-6))
        torch.manual_seed(rank + 1)
        grown = 0
        for _ in range(schedule.epochs):
            for data in batches(33):
                x = data[rank]
                y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
                top.train()
                optimizer.zero_grad()
                value = net.expected_loss(lambda x=x, y=y, top=top: F.cross_entropy(top(x), y, reduction="none"))
                (value + schedule.penalty()).backward()
                optimizer.step()
            grown += sum(schedule.step().grown.values())
            first, second = everywhere({n: whole(t) for n, t in net.state_dict().items()})
            assert_near(first, second, 0)
        found.append(grown)
    assert min(found) > 4


def statistics_of_norms(rank: int) -> None:
    """BatchNorm's are those of rank 0."""
    torch.manual_seed(0)
    net = PlasticNet(ConvNet(), (images(),), gates="batch")
    fully_shard(net)
    optimizer = SGD(net.param_groups(1e-2), momentum=0.9)
    net.k = 7.0
    torch.manual_seed(rank + 1)
    for i in range(4):
        if i == 2:
            net.prune(net.sites["conv3"].probability(7.0).sort().values[1].item() + 1e-6, optimizer)
            net.grow({"conv1": 1}, optimizer, init="random")
        net.train()
        optimizer.zero_grad()
        loss(net, images(6)).backward()
        optimizer.step()
    with torch.no_grad():
        net.model.bn1.running_mean.fill_(100.0 * rank)
    net(images(6))
    assert float(net.model.bn1.running_mean.abs().max()) < 10
    x = images(5) if rank == 0 else torch.zeros(5, 3, 4, 4)
    out = net.eval()(x)
    small = net.compact()
    torch.testing.assert_close(small(x), out, rtol=1e-4, atol=1e-5)


def resized_wherever_it_stands(rank: int) -> None:
    """Before a forward, after one that has left the parameters gathered, with gradients, and without an optimizer."""
    x = batches(1)[0][rank]
    for shard in WAYS.values():
        net = built()
        shard(net)
        net.resize({"0": [0, 1, 2, 4]})
        assert net.train()(x).shape == (6, 3)
        net.resize({"0": [0, 1, 2, -1]})
        optimizer = Adam(net.param_groups(1e-2))
        loss(net, x).backward()
        before = gradients(net)
        net.resize({"0": [0, 2, 3]}, optimizer)
        name = "model.0.weight"
        assert before[name] is not None
        assert torch.equal(cast(Tensor, gradients(net)[name]), cast(Tensor, before[name])[[0, 2, 3]])
        optimizer.step()
        value = loss(net, x)
        net.resize({"0": [0, 2]}, optimizer)
        with pytest.raises(PlasticError, match="changed its size"):
            value.backward()
        for module in net.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def in_half_precision(rank: int) -> None:
    torch.manual_seed(0)
    net = PlasticNet(mlp(4, 20, 12, 3), (torch.randn(3, 4),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for m in net.model:
        if list(m.parameters()):
            fully_shard(m, mp_policy=policy)
    fully_shard(net, mp_policy=policy)
    optimizer = Adam(net.param_groups(1e-2))
    schedule = Schedule(net, optimizer, [Stage(3, 7.0), Stage(1)], budget=Budget(macs=0.4))
    torch.manual_seed(rank + 1)
    for _ in range(schedule.epochs):
        for data in batches(3):
            net.train()
            optimizer.zero_grad()
            (_plain(net, data[rank].float()) + schedule.penalty()).backward()
            optimizer.step()
        schedule.step()
    assert net.summary().open_macs <= 0.4 * (4 * 20 + 20 * 12 + 12 * 3)
    assert all(p.dtype == torch.float32 and bool(whole(p).isfinite().all()) for p in net.parameters())
    first, second = everywhere({n: whole(t) for n, t in net.state_dict().items()})
    assert_near(first, second, 0)


def uneven_shards(rank: int) -> None:
    """One unit over two processes, and parameters that are sharded along another dimension."""
    x = batches(1)[0][rank]
    net = built()
    fully_shard(net)
    optimizer = Adam(net.param_groups(1e-2))
    for sources in ({"0": [3], "2": [1]}, {"0": [0, -1, -1], "2": [0, -1]}):
        net.resize(sources, optimizer)
        loss(net.train(), x).backward()
        optimizer.step()
        out = net.eval()(x)
        torch.testing.assert_close(net.compact()(x), out)
    net = built()
    fully_shard(net, shard_placement_fn=lambda p: Shard(1) if p.shape == (5, 6) else None)
    optimizer = Adam(net.param_groups(1e-2))
    loss(net.train(), x).backward()
    optimizer.step()
    before = everything(net, optimizer)
    with pytest.raises(PlasticError, match=r"2.weight is sharded along dimension 1 .* length would become 3"):
        net.resize({"0": [0, 1, 2]}, optimizer)
    assert_near(everything(net, optimizer), before, 0)
    net.resize({"0": [0, 1, 2, 4]}, optimizer)
    assert torch.equal(whole(net.model[2].weight), before["model.2.weight"][:, [0, 1, 2, 4]])
    loss(net.train(), x).backward()
    optimizer.step()


# -- everything else --------------------------------------------------------------------------


def states_load(rank: int) -> None:
    """Whole and sharded states, of another size, into sharded and plain networks; the parameters stay the same."""
    x = batches(1)[0][0]
    source = built()
    source.resize({"0": [0, 2, 5], "2": [0, 1, 3, 4]})
    expected = source.eval()(x)
    sharded = built()
    fully_shard(sharded)
    sharded.resize({"0": [0, 2, 5], "2": [0, 1, 3, 4]})
    sharded.load_state_dict(source.state_dict())
    for state, shard, assign in product((source, sharded), (fully_shard, layers, None), (False, True)):
        net = built()
        if shard is not None:
            shard(net)
        optimizer = Adam(net.param_groups(1e-2))
        loss(net.train(), x).backward()
        optimizer.step()
        held = [id(p) for p in resharded(net)]
        net.load_state_dict({k: v.clone() for k, v in state.state_dict().items()}, assign=assign)
        assert [len(s) for s in net.sites.values()] == [3, 4]
        torch.testing.assert_close(net.eval()(x), expected)
        if not assign:
            assert [id(p) for p in resharded(net)] == held
            optimizer = Adam(net.param_groups(1e-2))
            loss(net.train(), x).backward()
            optimizer.step()
        with pytest.raises(PlasticError, match="belongs to another architecture"):
            net.load_state_dict({"model.0.weight": torch.zeros(1)})


def what_needs_the_whole(rank: int) -> None:
    x = batches(1)[0][0]
    for shard in WAYS.values():
        net = built()
        shard(net)
        net.k = 7.0
        loss(net.train(), x).backward()
        out = net.eval()(x)
        small = net.compact()
        assert type(small) is nn.Sequential
        assert not any("fsdp" in type(m).__name__.lower() or m._forward_pre_hooks for m in small.modules())
        assert all(type(p) is nn.Parameter for p in small.parameters())
        torch.testing.assert_close(small(x), out)
        copy.deepcopy(small)
        torch.testing.assert_close(net(x), out)
        assert net.summary().parameters == 4 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3
        latency = net.measure_latency((x,))
        assert latency == net.latency
        loss(net.train(), x).backward()  # is still sharded
    net.k = INF
    optimizer = Adam(net.param_groups(1e-2))
    before = everything(net)
    whole_needed = {
        "repair": lambda: repair(net, x.split(2)),
        "scores='magnitude'": lambda: prune_once(net, Budget(macs=0.5), optimizer),
        r'grow\(init="gradmax"\)': lambda: net.grow({"0": 1}, optimizer, init="gradmax", loss=lambda: net(x).sum()),
        "a schedule with repair=": lambda: Schedule(net, optimizer, [Stage(1)], repair=[x]),
    }
    for name, call in (*whole_needed.items(), ("scores='magnitude'", lambda: sensitivity(net, lambda _: 1.0))):
        with pytest.raises(PlasticError, match=f"{name} needs all parameters in one process.*net.compact()"):
            call()
    with pytest.raises(PlasticError, match=r"is a DTensor.*save_distributed"):
        save_checkpoint(net.state_dict(), "nowhere.safetensors")
    assert_near(everything(net), before, 0)


def orders_that_are_refused(rank: int) -> None:
    x = batches(1)[0][rank]
    net = built()
    optimizer = Adam(net.param_groups(1e-2))
    schedule = Schedule(net, optimizer, [Stage(1, 7.0), Stage(1)])
    fully_shard(net)
    for call in (
        lambda: net.resize({"0": [0, 1]}, optimizer),
        lambda: Schedule(net, optimizer, [Stage(1)]),
        schedule.step,
    ):
        with pytest.raises(PlasticError, match=r"build them after fully_shard, from net\.param_groups"):
            call()
    assert len(net.sites["0"]) == 6
    net = built()
    fully_shard(net.model[0])
    with pytest.raises(PlasticError, match=r"0.weight|2.weight is in none of them.*for the network itself"):
        net.train()(x)
    net = built()
    fully_shard(net.gates["site/0"])
    fully_shard(net)
    with pytest.raises(PlasticError, match=r"has sharded the gates.*ignored_params=set\(net.gates.parameters"):
        net.train()(x)


def other_meshes(rank: int) -> None:
    x = batches(1)[0][rank]
    net = built()
    fully_shard(net, mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")))
    for call in (lambda: net.train()(x), lambda: net.resize({"0": [0]})):
        with pytest.raises(PlasticError, match=r"mesh of 2 dimensions \(HSDP\).*1D mesh"):
            call()
    net = built()
    mesh = init_device_mesh("cpu", (2,))
    net.model[0].weight = nn.Parameter(distribute_tensor(net.model[0].weight.detach(), mesh, [Shard(0)]))
    parallel = mlp(4, 6, 5, 3)
    parallel[0].weight = nn.Parameter(distribute_tensor(parallel[0].weight.detach(), mesh, [Shard(0)]))
    for call in (lambda: net.resize({"0": [0]}), lambda: PlasticNet(parallel, (torch.randn(3, 4),)), net.compact):
        with pytest.raises(PlasticError, match=r"0.weight is a DTensor that fully_shard has not made.*parallelism"):
            call()
    flat = FullyShardedDataParallel(net := built(), device_id=torch.device("cpu"))
    for call in (lambda: flat.train()(x), lambda: net.resize({"0": [0]}), lambda: PlasticNet(flat, (x,))):
        with pytest.raises(PlasticError, match=r"\(FSDP1\) makes one flat tensor.*use fully_shard|not gated yet"):
            call()
    net = built()
    fully_shard(net, mesh=mesh)
    loss(net.train(), x).backward()
    net.resize({"0": [0, 1]})
    assert len(net.sites["0"]) == 2


def undone(rank: int) -> None:
    """A schedule whose state does not fit leaves the network as it was, and FSDP2 knows it."""
    x = batches(1)[0][rank]
    net = built()
    layers(net)
    optimizer = Adam(net.param_groups(1e-2))
    schedule = Schedule(net, optimizer, [Stage(1, 7.0), Stage(1)])
    loss(net.train(), x).backward()
    optimizer.step()
    before = everything(net, optimizer)
    with pytest.raises(PlasticError):
        schedule.load_state_dict({**schedule.state_dict(), "pressure": {"steps": 1}})
    assert_near(everything(net, optimizer), before, 0)
    net.resize({"0": [0, 1, 3]}, optimizer)
    loss(net.train(), x).backward()
    optimizer.step()
