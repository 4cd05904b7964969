"""Two processes train one network to a third of its multiply-adds; then one process goes on with what they have saved.

Run it with ``python examples/distributed.py``, and with ``--ddp`` for `DistributedDataParallel` in the place of FSDP2
(``fully_shard``). It runs on CPUs, and takes half a minute on two cores.
"""

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import plasticnet as pn

images, classes = load_digits(return_X_y=True)
x, y = torch.tensor(images).float() / 8 - 1, torch.tensor(classes)
stages = [pn.Stage(2), pn.Stage(6, k=7.0), pn.Stage(4)]


def build(way: str) -> tuple[pn.PlasticNet, nn.Module, torch.optim.Optimizer, pn.Schedule]:
    """The network, what is called in training, the optimizer and the schedule."""
    torch.manual_seed(0)  # the same weights in all processes
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    net = pn.PlasticNet(model, (x[:2],))
    top: nn.Module = net
    if way == "ddp":
        top = DDP(net)
    if way == "fsdp":
        fully_shard(model[0])  # layer by layer, as usual
        fully_shard(model[2])
        fully_shard(net)  # and what is left
    optimizer = torch.optim.Adam(net.param_groups(lr=5e-3))  # after fully_shard
    return net, top, optimizer, pn.Schedule(net, optimizer, stages, budget=pn.Budget(macs=1 / 3))


def train(
    net: pn.PlasticNet,
    top: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: pn.Schedule,
    epochs: int,
    share: Tensor,
) -> None:
    for _ in range(epochs):
        top.train()
        for i in share[torch.randperm(len(share))].split(64):
            loss = net.expected_loss(lambda i=i: F.cross_entropy(top(x[i]), y[i], reduction="none"))
            optimizer.zero_grad()
            (loss + schedule.penalty()).backward()
            optimizer.step()
        schedule.step()


def work(rank: int, way: str, folder: str) -> None:
    """What each of the two processes does."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if Path("/sys/class/net/lo").exists() else "lo0")
    dist.init_process_group("gloo", init_method=Path(folder, "meeting").as_uri(), rank=rank, world_size=2)
    net, top, optimizer, schedule = build(way)
    torch.manual_seed(rank)  # other gates and other data in each process
    train(net, top, optimizer, schedule, 5, torch.arange(rank, 1437, 2))
    pn.save_distributed(Path(folder, "checkpoint"), net, optimizer, schedule, extra={"by": way})
    small = net.compact()  # a plain module, in every process
    if rank == 0:
        print(f"after {schedule.epoch} epochs: {[len(s) for s in net.sites.values()]} units, {small[0]}")
    del top
    dist.destroy_process_group()


if __name__ == "__main__":
    way = "ddp" if "--ddp" in sys.argv else "fsdp"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (way, folder), nprocs=2)
        net, top, optimizer, schedule = build("alone")
        extra = pn.load_distributed(Path(folder, "checkpoint"), net, optimizer, schedule)
    train(net, top, optimizer, schedule, schedule.epochs - schedule.epoch, torch.arange(1437))
    small = net.compact()
    right = float((small(x[1437:]).argmax(1) == y[1437:]).float().mean())
    share = net.summary().open_macs / (64 * 128 + 128 * 64 + 64 * 10)
    print(
        f"saved under {extra['by']}: {[len(s) for s in net.sites.values()]} units, {share:.0%} of the multiply-adds, "
        f"{100 * right:.1f} % right"
    )
