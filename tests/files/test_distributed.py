"""Distributed checkpoints: from two processes into one, and back, also after cuts; a run that resumes goes on alike."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from plasticnet import (
    Budget,
    Growth,
    PlasticError,
    PlasticNet,
    Pressure,
    Schedule,
    Stage,
    load_distributed,
    save_distributed,
)
from tests.kit.networks import assert_same, mlp
from tests.kit.processes import everywhere, together
from tests.kit.shares import assert_near, everything

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from soak_kills import write_kill

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
if dist.is_available():
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel as DDP

Run = tuple[PlasticNet, nn.Module, Optimizer, Schedule]


class Buffered(nn.Module):
    """Units own entries of a buffer that no state dict holds, and features of the input are gated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 20), nn.Linear(20, 3)
        self.register_buffer("shift", torch.randn(20), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) + self.shift).tanh())


def started(way: str = "alone", model: Callable[[], nn.Module] = lambda: mlp(4, 20, 12, 3), **options: Any) -> Run:
    torch.manual_seed(0)
    net = PlasticNet(model().double(), (torch.randn(3, 4).double(),), **options)
    top = DDP(net) if way == "ddp" else net
    if way == "fsdp":
        fully_shard(net)
    optimizer = Adam(net.param_groups(1e-2))
    stages = [Stage(1), Stage(5, 7.0), Stage(1)]
    return net, top, optimizer, Schedule(net, optimizer, stages, budget=Budget(macs=0.4), hibernate=0.3)


def goes_on(run: Run, rank: int, epochs: int) -> list[list[int]]:
    """Train for some epochs, and return the sizes after each."""
    net, top, optimizer, schedule = run
    sizes = []
    for _ in range(epochs):
        generator = torch.Generator().manual_seed(10 * schedule.epoch + rank)
        for _ in range(4):
            x = torch.randn(6, 4, generator=generator).double()
            y = torch.arange(6) % 3
            top.train()
            optimizer.zero_grad()
            value = net.expected_loss(lambda x=x, y=y: F.cross_entropy(top(x), y, reduction="none"))
            (value + schedule.penalty()).backward()
            optimizer.step()
        schedule.step()
        sizes.append([len(s) for s in net.sites.values()])
    return sizes


# -- one process ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"inputs": ("*",)}, {"weights": ("last",)}])
def test_a_run_in_one_process_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    model = Buffered if options else lambda: mlp(4, 20, 12, 3)
    run = started(model=model, **options)
    goes_on(run, 0, 4)
    save_distributed(tmp_path / "a", run[0], run[2], run[3], extra={"epoch": 4, "best": torch.tensor([0.5])})
    before, sizes = everything(run[0], run[2]), goes_on(run, 0, 3)
    after = everything(run[0], run[2])
    assert sizes[-1] != [20, 12]
    again = started(model=model, **options)
    held = [id(p) for p in again[0].parameters()]
    torch.manual_seed(99)
    extra = load_distributed(tmp_path / "a", again[0], again[2], again[3])
    assert extra["epoch"] == 4
    assert float(extra["best"]) == 0.5
    assert [id(p) for p in again[0].parameters()] == held
    assert_near(everything(again[0], again[2]), before, 0)
    assert goes_on(again, 0, 3) == sizes
    assert_near(everything(again[0], again[2]), after, 0)


def test_several_optimizers_and_a_module_around_the_network(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, list[Optimizer]]:
        torch.manual_seed(0)
        net = PlasticNet(mlp(4, 6, 3), (torch.randn(3, 4),))
        task = nn.ModuleDict({"net": net, "head": nn.Linear(3, 3)})
        optimizers: list[Optimizer] = [
            Adam(net.param_groups(1e-2)),
            SGD(task["head"].parameters(), 1e-2, momentum=0.9),
        ]
        return task, optimizers

    def step(task: nn.Module, optimizers: list[Optimizer]) -> None:
        net: Any = task["net"]  # pyright: ignore[reportIndexIssue]
        net.k = 7.0
        task.zero_grad()
        torch.manual_seed(3)
        net.expected_loss(lambda: task["head"](net(torch.ones(2, 4))).square().mean(1)).backward()  # pyright: ignore[reportIndexIssue]
        for o in optimizers:
            o.step()

    task, optimizers = made()
    step(task, optimizers)
    task["net"].resize({"0": [0, 1, 5]}, optimizers[0])  # pyright: ignore[reportIndexIssue]
    optimizers[1].param_groups[0]["lr"] = 0.5
    save_distributed(tmp_path / "a", task, optimizers)
    other, its_optimizers = made()
    load_distributed(tmp_path / "a", other, its_optimizers)
    assert its_optimizers[1].param_groups[0]["lr"] == 0.5
    for t, o in ((task, optimizers), (other, its_optimizers)):
        step(t, o)
    assert_near(everything(other), everything(task), 0)


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    net, _, optimizer, _ = started()
    net.resize({"0": [0, 1]}, optimizer)
    save_distributed(tmp_path / "a", net, optimizer)
    with pytest.raises(PlasticError, match="holds a parameter that the module does not have"):
        save_distributed(tmp_path / "b", net, Adam([nn.Parameter(torch.zeros(2))]))
    with pytest.raises(PlasticError, match="cannot hold a set"):
        save_distributed(tmp_path / "b", net, extra={1})
    (tmp_path / "empty").mkdir()
    again = started()
    before = everything(again[0])
    wide = PlasticNet(mlp(4, 20, 12, 7), (torch.randn(3, 4),))
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("no distributed checkpoint can be read", lambda: load_distributed(tmp_path / "empty", again[0])),
        ("do not hold the parameters", lambda: load_distributed(tmp_path / "a", again[0], [again[2], again[2]])),
        ("do not hold the parameters", lambda: load_distributed(tmp_path / "a", again[0], Adam(again[0].parameters()))),
        ("has no schedule", lambda: load_distributed(tmp_path / "a", again[0], again[2], again[3])),
        ("belongs to another architecture: 4.weight", lambda: load_distributed(tmp_path / "a", wide)),
        ("belongs to another module", lambda: load_distributed(tmp_path / "a", nn.Linear(2, 3))),
    ]
    for message, call in calls:
        with pytest.raises(PlasticError, match=message):
            call()
    assert_near(everything(again[0]), before, 0)
    load_distributed(tmp_path / "a", again[0])
    assert len(again[0].sites["0"]) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="processes cannot be forked there")
def test_a_process_that_is_killed_while_it_writes_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    folder, net = tmp_path / "a", started()[0]
    save_distributed(folder, net, extra="old")
    old, ends = everything(net), []
    net.resize({"0": [0, 1, 5]})
    new = everything(net)
    (folder / "notes.txt").write_text("not of the checkpoint")
    for place in range(1, 100):
        number = os.fork()
        if not number:
            write_kill(folder, place)
            save_distributed(folder, net, extra="new")
            os._exit(0)
        ended = os.WIFEXITED(os.waitpid(number, 0)[1])
        found = started()[0]
        ends.append(load_distributed(folder, found))
        assert_near(everything(found), new if ends[-1] == "new" else old, 0)
        if ended:
            break
    assert ends[0] == "old"
    assert ends == sorted(ends, reverse=True)  # once it is new, it stays new
    assert ended
    assert len(ends) >= 4
    files = {p.name.partition(".")[2] for p in folder.iterdir()}
    assert files == {"metadata", "distcp", "txt"}
    assert len(list(folder.iterdir())) == 3


def test_a_disk_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = started()[0]
    save_distributed(tmp_path, net, extra="old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(PlasticError, match=r"cannot be written.*No space left.*older one"):
            save_distributed(tmp_path, net, extra="new")
    assert load_distributed(tmp_path, net) == "old"


# -- two processes ----------------------------------------------------------------------------


@pytest.mark.slow
def test_from_two_processes_into_one_and_back(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    together(tmp_path / "first", partial(saved_by_two, folder=tmp_path), partial(within_an_epoch, folder=tmp_path))
    for way in ("fsdp", "ddp"):
        net, _, optimizer, schedule = run = started()
        assert load_distributed(tmp_path / way, net, optimizer, schedule) == way
        assert_near(everything(net, optimizer), torch.load(tmp_path / f"{way}.pt"), 0)
        assert schedule.epoch == 4
        goes_on(run, 0, 1)
        save_distributed(tmp_path / f"{way} alone", net, optimizer, schedule)
        torch.save(everything(net, optimizer), tmp_path / f"{way} alone.pt")
    (tmp_path / "second").mkdir()
    together(tmp_path / "second", partial(loaded_by_two, folder=tmp_path))


def saved_by_two(rank: int, folder: Path) -> None:
    """After cuts; and a run that resumes is the same as one that was not stopped."""
    for way in ("fsdp", "ddp"):
        net, top, optimizer, schedule = run = started(way)
        torch.manual_seed(rank + 1)
        assert goes_on(run, rank, 4)[-1] != [20, 12]
        save_distributed(folder / way, top, optimizer, schedule, extra=way)
        state = everything(net, optimizer)
        if rank == 0:
            torch.save(state, folder / f"{way}.pt")
        sizes, after = goes_on(run, rank, 3), everything(net, optimizer)
        for other in ("fsdp", "ddp"):
            again = started(other)
            torch.manual_seed(5)
            load_distributed(folder / way, again[1], again[2], again[3])
            assert_near(everything(again[0], again[2]), state, 0)
            assert goes_on(again, rank, 3) == sizes
            assert_near(everything(again[0], again[2]), after, 0 if other == way else 1e-7)


def loaded_by_two(rank: int, folder: Path) -> None:
    for way in ("fsdp", "ddp"):
        net, top, optimizer, schedule = run = started(way)
        load_distributed(folder / f"{way} alone", top, optimizer, schedule)
        assert_near(everything(net, optimizer), torch.load(folder / f"{way} alone.pt"), 0)
        goes_on(run, rank, 2)


def within_an_epoch(rank: int, folder: Path) -> None:
    """Each rank has its own statistics of growth, those of norms are rank 0's, and the checkpoint is written over."""

    def begun() -> Run:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)).double()
        net = PlasticNet(model, (torch.randn(3, 4).double(),))
        optimizer = Adam(net.param_groups(1e-2))
        stages, pressure = [Stage(1), Stage(12, 7.0), Stage(1)], Pressure(1e-3)
        return net, DDP(net), optimizer, Schedule(net, optimizer, stages, growth=Growth(), pressure=pressure)

    def steps(run: Run, count: int) -> None:
        net, top, optimizer, schedule = run
        for _ in range(count):
            x, y = torch.randn(6, 4).double() + rank, torch.arange(6) % 3
            optimizer.zero_grad()
            value = net.expected_loss(lambda x=x, y=y: F.cross_entropy(top(x), y, reduction="none"))
            (value + schedule.penalty()).backward()
            optimizer.step()

    run = begun()
    torch.manual_seed(rank + 1)
    for _ in range(3):
        steps(run, 3)
        save_distributed(folder / "within", run[1], run[2], run[3], extra=["old", rank])
        run[3].step(1.0)
    steps(run, 2)
    own, norms = run[3].state_dict(), everywhere(run[0].state_dict()["model.1.running_mean"].tolist())
    assert norms[0] != norms[1]
    assert len({repr(g) for g in everywhere(own["growth"])}) == 2
    save_distributed(folder / "within", run[1], run[2], run[3], extra=["new", rank])
    again = begun()
    assert load_distributed(folder / "within", again[1], again[2], again[3]) == ["new", 0]
    assert again[0].state_dict()["model.1.running_mean"].tolist() == norms[0]
    assert_same(again[3].state_dict(), own)
    steps(again, 2)
    again[3].step(1.0)
    load_distributed(folder / "within", run[1], run[2], run[3])
    steps(run, 2)
    run[3].step(1.0)
    assert_near(everything(again[0], again[2]), everything(run[0], run[2]), 0)
