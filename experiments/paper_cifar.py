"""The paper's CIFAR experiments: ResNet-56 and WRN-28-10 on CIFAR-10 or CIFAR-100, pruned or grown (section 5.3).

The settings are those of the paper's public code: SGD with momentum 0.9 and rate 0.1, divided by 10 at epochs 60, 120
and 180, weight decay 5e-4, Adam with rate 1e-3 for the gates, k = 7, and 20, 180 and 20 epochs for the three stages. A
network that grows begins with half of the channels, in the last stages with 3 and with 2 of 10. Unlike the paper we
price parameters, validate on 5,000 training images, and grow by `pn.Growth` unless --paper asks for the paper's rule.

CIFAR is torchvision's; --download fetches it. A GPU is needed: some hours for ResNet-56, a day or two for WRN-28-10.
After each epoch everything is kept in --kept, from which the same command goes on:

    python experiments/paper_cifar.py --data-dir DIR --data cifar100 --network wrn-28-10 --mode prune --kept DIR/wrn

Adds a row to results/paper_cifar.json. --steps and --epochs are for trying it out.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import cifar
import torch
import torch.nn.functional as F
from cifar import accuracy, augmented
from common import write, written
from torch import Tensor, nn

import plasticnet as pn

NAME, BATCH, HELD_OUT = "paper_cifar", 128, 5000
STAGES, DROPS, K = (20, 180, 20), (60, 120, 180), 7.0
RATE, DECAY, GATE_RATE = 0.1, 5e-4, 1e-3
Data = tuple[Tensor, Tensor]


class WideBlock(nn.Module):
    """A block of a wide ResNet: BatchNorm and ReLU come before each convolution (arXiv 1605.07146)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(into), nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(into, out, 1, stride, bias=False) if into != out else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, into, h, w) to (batch, out, h / stride, w / stride)."""
        y = self.bn1(x).relu()
        z = self.conv2(self.bn2(self.conv1(y)).relu())
        return z + (x if self.short is None else self.short(y))


class WideResNet(nn.Module):
    """WRN-28-10, or a narrower one: (batch, 3, 32, 32) to (batch, classes).

    Args:
        classes: The number of classes.
        depth: The number of its layers, 4 more than a multiple of 6.
        width: How many times as wide as 16-32-64 it is.
    """

    def __init__(self, classes: int, depth: int = 28, width: int = 10) -> None:
        super().__init__()
        widths = [16, *(width * n for n in (16, 32, 64))]
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks = [
            WideBlock(out if j else into, out, 1 if j or out == widths[1] else 2)
            for into, out in itertools.pairwise(widths)
            for j in range((depth - 4) // 6)
        ]
        self.blocks, self.bn, self.linear = (
            nn.Sequential(*blocks),
            nn.BatchNorm2d(widths[-1]),
            nn.Linear(widths[-1], classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to (batch, classes)."""
        return self.linear(self.bn(self.blocks(self.conv(x))).relu().mean((2, 3)))


def resnet56(classes: int) -> nn.Module:
    """A ResNet-56 for this number of classes."""
    model = cifar.ResNet(56)
    model.linear = nn.Linear(64, classes)
    return model


NETWORKS = {"resnet56": resnet56, "wrn-28-10": WideResNet}


def images(name: str, folder: Path, train: bool, download: bool) -> Data:
    """Images of torchvision's CIFAR-10 or CIFAR-100, normalised, and labels."""
    from torchvision import datasets

    found = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name](str(folder), train, download=download)
    x = torch.from_numpy(found.data).float() / 255
    x = (x - torch.tensor(cifar.MEAN)) / torch.tensor(cifar.DEVIATION)
    return x.permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets)


def network(model: nn.Module, x: Tensor, mode: str) -> pn.PlasticNet:
    """The network with gates, narrow where it is to grow."""
    net = pn.PlasticNet(model, (x[:2],))
    if mode == "grow":
        for name, site in net.sites.items():
            net.limit(name, maximum=len(site))
        shares = [0.5, 0.5, 0.3, 0.2]
        counts = {
            n: max(1, round(shares[4 * i // len(net.sites)] * len(s))) for i, (n, s) in enumerate(net.sites.items())
        }
        net.resize({name: range(n) for name, n in counts.items()})
    return net


def rate(epoch: int, epochs: int) -> float:
    """The learning rate of the weights, which falls at the same shares of the training as in the paper."""
    return RATE * 0.1 ** sum(epoch >= drop * epochs / sum(STAGES) for drop in DROPS)


class Run:
    """A training that is kept after each epoch.

    Args:
        options: The options of the command line.
        train: Images and labels to train on.
        held_out: Those to validate on.
        classes: The number of classes.
    """

    def __init__(self, options: argparse.Namespace, train: Data, held_out: Data, classes: int) -> None:
        torch.manual_seed(options.seed)
        self.options, self.train, self.held_out = options, train, held_out
        model = NETWORKS[options.network](classes)
        self.whole = sum(p.numel() for p in model.parameters())
        self.net = network(model.to(options.device), train[0].to(options.device), options.mode)
        weights, gates = list(self.net.model.parameters()), list(self.net.gates.parameters())
        self.optimizers = [
            torch.optim.SGD(weights, RATE, momentum=0.9, weight_decay=DECAY),
            torch.optim.Adam(gates, GATE_RATE),
        ]
        epochs = [max(1, round(n * options.epochs / sum(STAGES))) for n in STAGES]
        stages = [pn.Stage(epochs[0]), pn.Stage(epochs[1], K), pn.Stage(epochs[2])]
        growth = None if options.mode == "prune" else pn.Growth.paper() if options.paper else pn.Growth()
        pressure = pn.Pressure(options.price, "parameters")
        self.schedule = pn.Schedule(self.net, self.optimizers, stages, growth=growth, pressure=pressure)
        self.generator, self.history, self.seconds = (
            torch.Generator().manual_seed(options.seed),
            list[dict[str, Any]](),
            0.0,
        )

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds the state of."""
        return {"net": self.net, "schedule": self.schedule, "sgd": self.optimizers[0], "adam": self.optimizers[1]}

    def epoch(self) -> None:
        """Train for one epoch, and end it."""
        begun, device = time.process_time(), self.options.device
        self.optimizers[0].param_groups[0]["lr"] = rate(self.schedule.epoch, self.schedule.epochs)
        x, y = self.train
        batches = torch.randperm(len(x), generator=self.generator).split(BATCH)
        self.net.train()
        for i in itertools.islice(batches, self.options.steps):
            a, b = augmented(x[i], self.generator).to(device), y[i].to(device)
            loss = self.net.expected_loss(lambda a=a, b=b: F.cross_entropy(self.net(a), b, reduction="none"))
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            (loss + self.schedule.penalty()).backward()
            for optimizer in self.optimizers:
                optimizer.step()
        self.net.eval()
        with torch.no_grad():
            parts = [F.cross_entropy(self.net(a.to(device)), b.to(device), reduction="sum") for a, b in self.held()]
        val_loss = float(torch.stack(parts).sum()) / len(self.held_out[0])
        self.schedule.step(val_loss)
        self.seconds += time.process_time() - begun
        size = self.net.summary()
        row = {"epoch": self.schedule.epoch, "val_loss": val_loss, "parameters": size.open_parameters}
        self.history.append({**row, "macs": size.open_macs, "units": [s.open for s in size.sites]})

    def held(self) -> Any:
        """The batches to validate on."""
        return zip(*(part.split(500) for part in self.held_out), strict=True)

    def keep(self, path: Path) -> None:
        """Write everything into a file."""
        states = {name: part.state_dict() for name, part in self.parts().items()}
        states |= {"generator": self.generator.get_state(), "random": torch.get_rng_state()}
        pn.save_checkpoint({**states, "history": self.history, "seconds": self.seconds}, path)

    def restore(self, path: Path) -> None:
        """Go on from what `keep` wrote."""
        state = pn.load_checkpoint(path)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["random"])
        self.history, self.seconds = state["history"], state["seconds"]


def main(arguments: list[str] | None = None) -> None:
    """One training, from where it was left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--kept", type=Path, required=True, help="the file that the training is kept in")
    parser.add_argument("--data", choices=["cifar10", "cifar100"], default="cifar10")
    parser.add_argument("--network", choices=NETWORKS, default="resnet56")
    parser.add_argument("--mode", choices=["prune", "grow"], default="prune")
    parser.add_argument("--paper", action="store_true", help="grow by the paper's rule")
    parser.add_argument("--price", type=float, default=2e-7, help="of a parameter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=sum(STAGES))
    parser.add_argument("--steps", type=int, help="of an epoch; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--download", action="store_true")
    options = parser.parse_args(arguments)
    x, y = images(options.data, options.data_dir, True, options.download)
    held = min(HELD_OUT, len(x) // 10)
    run = Run(options, (x[held:], y[held:]), (x[:held], y[:held]), 100 if options.data == "cifar100" else 10)
    if options.kept.exists():
        run.restore(options.kept)
    while run.schedule.epoch < run.schedule.epochs:
        run.epoch()
        run.keep(options.kept)
        print(run.history[-1], flush=True)
    small = run.net.compact().cpu()
    test = images(options.data, options.data_dir, False, options.download)
    row = {n: getattr(options, n) for n in ("data", "network", "mode", "paper", "price", "seed", "epochs", "steps")}
    row |= {"test": accuracy(small, *test), "held out": accuracy(small, x[:held], y[:held]), "whole": run.whole}
    row |= {"parameters": sum(p.numel() for p in small.parameters()), "seconds": run.seconds, "history": run.history}
    settings = {"stages": STAGES, "drops": DROPS, "k": K, "rate": RATE, "decay": DECAY, "gate rate": GATE_RATE}
    write(NAME, settings, [*written(NAME), row])
    options.kept.unlink()


if __name__ == "__main__":
    main()
