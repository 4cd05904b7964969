"""CIFAR-10 ResNets pruned in one training, beside Torch-Pruning and the whole network with as much training.

The whole network is that of cifar_cut.py: published weights, trained on these JPEG files until it gets no better. All
ways have as many further epochs with augmentation, SGD, one cycle of the learning rate, and a loss in which half is the
divergence from the whole network's outputs. "gates" learns which channels stay for the first half of them, under the
budget; "shrink" begins with `pn.shrink`; "Torch-Pruning" with its group Taylor importance, over all layers or in each,
of which the better one on held-out images is taken after the cut, with BatchNorm estimated anew; "dense" is the whole
network. "gates, a quarter" are gates that learn for the first quarter. Test images are read once, at the end of each
training.

Ten epochs of ResNet-20 take three quarters of an hour on one core, for each way: python experiments/cifar_gates.py
--data-dir DIR --cache DIR. A training that was cut off goes on after its last epoch. Adds rows to
results/cifar_gates.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import BATCH, accuracy, augmented
from cifar_cut import prepared
from common import environment, known, write, written
from norms import reestimated
from pruning import cycle, operations, smallest_cut
from torch import Tensor, nn

import plasticnet as pn

NAME, CALIBRATE = "cifar_gates", 2048
RATE, GATE_RATE, PLASTIC_RATE = 0.02, 0.02, 0.005  # the highest rates of the weights, of gates, and while gates move
TEMPERATURE, TEACHER, DECAY = 4.0, 0.5, 1e-4
PERIODS = 4  # steps of the schedule in an epoch
PLASTIC = {"gates": 0.5, "gates, a quarter": 0.25}  # the share of the epochs in which gates learn
WAYS = (*PLASTIC, "shrink", "Torch-Pruning", "dense")
Data = tuple[Tensor, Tensor]
Losses = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of a network, for images and labels


def taught(teacher: nn.Module) -> Losses:
    """The losses of images, from their labels and the whole network's outputs."""

    def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = teacher(x)
        return pn.distillation(model(x), wanted, y, temperature=TEMPERATURE, weight=TEACHER)

    return losses


class Training:
    """A training that is kept after every epoch, and that goes on from there.

    Args:
        losses: The losses that are made small.
        data: Images and labels to train on.
        epochs: The number of epochs.
        seed: The order and the augmentation follow from it.
        kept: The file.
    """

    def __init__(self, losses: Losses, data: Data, epochs: int, seed: int, kept: Path) -> None:
        self.losses, self.data, self.epochs, self.kept = losses, data, epochs, kept
        self.generator = torch.Generator().manual_seed(seed)
        self.done, self.seconds = 0, 0.0

    def run(
        self, parts: dict[str, Any], step: Callable[[Tensor, Tensor, float], None], end: Callable[[], None]
    ) -> None:
        """Run all epochs that are not over.

        Args:
            parts: What the training consists of, as objects with state dicts, by name.
            step: Called with images, labels, and the place in the training, from 0 to 1.
            end: Called at the end of each quarter of an epoch.
        """
        if self.kept.exists():
            state = pn.load_checkpoint(self.kept)
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.generator.set_state(state["generator"])
            torch.set_rng_state(state["random"])
            self.done, self.seconds = state["done"], state["seconds"]
        x, y = self.data
        for epoch in range(self.done, self.epochs):
            begun, order = time.process_time(), torch.randperm(len(x), generator=self.generator)
            for quarter, rows in enumerate(order.chunk(PERIODS)):
                batches = rows.split(BATCH)
                for n, i in enumerate(batches):
                    place = (epoch + (quarter + n / len(batches)) / PERIODS) / self.epochs
                    step(augmented(x[i], self.generator), y[i], place)
                end()
            self.done, self.seconds = epoch + 1, self.seconds + time.process_time() - begun
            states = {name: part.state_dict() for name, part in parts.items()}
            states |= {"generator": self.generator.get_state(), "random": torch.get_rng_state()}
            pn.save_checkpoint({**states, "done": self.done, "seconds": self.seconds}, self.kept)
            print(f"{self.kept.stem}: epoch {self.done} of {self.epochs}, {self.seconds:.0f} CPU s", flush=True)


def plainly(training: Training, model: nn.Module, rate: float = RATE) -> nn.Module:
    """Train a network in the ordinary way, with this highest learning rate."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=DECAY)

    def step(x: Tensor, y: Tensor, place: float) -> None:
        model.train()
        optimizer.param_groups[0]["lr"] = cycle(place, rate)
        optimizer.zero_grad()
        training.losses(model, x, y).mean().backward()
        optimizer.step()

    training.run({"model": model, "optimizer": optimizer}, step, lambda: None)
    return model.eval()


def with_gates(
    training: Training, model: nn.Module, share: float, rate: Callable[[float], float], plastic: int
) -> nn.Module:
    """Prune in one training: gates learn for its first epochs.

    Args:
        training: The training.
        model: The network, which is copied.
        share: The share of the multiply-adds that may stay.
        rate: The learning rate of the weights, from the place in the training.
        plastic: For how many epochs gates learn.
    """
    x, _ = training.data
    net = pn.PlasticNet(copy.deepcopy(model), (x[:2],))
    gates, weights = list(net.gates.parameters()), list(net.model.parameters())
    optimizers = [
        torch.optim.SGD(weights, RATE, momentum=0.9, weight_decay=DECAY),
        torch.optim.Adam(gates, GATE_RATE),
    ]
    stages = [pn.Stage(plastic * PERIODS, 7.0), pn.Stage((training.epochs - plastic) * PERIODS)]
    schedule = pn.Schedule(net, optimizers, stages, budget=pn.Budget(macs=share))

    def step(x: Tensor, y: Tensor, place: float) -> None:
        net.train()
        optimizers[0].param_groups[0]["lr"] = rate(place)
        loss = net.expected_loss(lambda: training.losses(net, x, y)) + schedule.penalty()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()

    parts = {"net": net, "schedule": schedule, "weights": optimizers[0], "gates": optimizers[1]}
    training.run(parts, step, schedule.step)
    return net.compact().eval()


def by_torch_pruning(dense: nn.Module, share: float, train: Data, held_out: Data, chosen: Tensor) -> nn.Module:
    """The whole network cut by group Taylor importance, in the scope that is better on held-out images.

    The shortcuts pad channels, which Torch-Pruning does not follow: it ends in an IndexError. So it is told to leave
    alone what the shortcuts carry, and cuts the channels within blocks.
    """
    from torch_pruning.pruner import BasePruner
    from torch_pruning.pruner.importance import GroupTaylorImportance

    slopes, x = copy.deepcopy(dense), train[0][chosen]
    carried = [n for n, m in dense.named_modules() if isinstance(m, nn.Conv2d) and not n.endswith(".conv1")]
    for i in chosen.split(BATCH):
        F.cross_entropy(slopes(train[0][i]), train[1][i]).backward()
    found = []
    for everywhere in (False, True):

        def pruned(ratio: float, everywhere: bool = everywhere) -> nn.Module:
            model = copy.deepcopy(dense)
            pruner = BasePruner(
                model, x[:2], importance=GroupTaylorImportance(), global_pruning=everywhere, pruning_ratio=ratio,
                max_pruning_ratio=0.95, ignored_layers=[model.get_submodule(name) for name in ("linear", *carried)],
            )  # fmt: skip
            for p, q in zip(model.parameters(), slopes.parameters(), strict=True):
                p.grad = None if q.grad is None else q.grad.clone()
            pruner.step()
            model.zero_grad(set_to_none=True)
            return model

        best = smallest_cut(pruned, lambda small: operations(small, x), share * operations(dense, x), 8)
        if best is not None:
            again = reestimated(best.eval(), x.split(BATCH), nn.Module.__call__) or best
            found.append((accuracy(again, *held_out), again))
    return max(found, key=lambda f: f[0])[1]


def trained(way: str, dense: nn.Module, share: float, data: tuple[Data, Data], training: Training) -> nn.Module:
    """The network of a way at the end of its training."""
    train, held_out = data
    chosen = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(training.generator.initial_seed()))
    chosen = chosen[:CALIBRATE]
    if way in PLASTIC:
        plastic = int(PLASTIC[way] * training.epochs)
        first = plastic / training.epochs

        def rate(place: float) -> float:
            return PLASTIC_RATE if place < first else cycle((place - first) / (1 - first), RATE)

        return with_gates(training, dense, share, rate, plastic)
    if way == "shrink":
        return plainly(training, pn.shrink(dense, train[0][chosen].split(BATCH), pn.Budget(macs=share))[0])
    if way == "Torch-Pruning":
        return plainly(training, by_torch_pruning(dense, share, train, held_out, chosen))
    return plainly(training, copy.deepcopy(dense))


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True, help="where decoded images and trainings are kept")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dense, train, held_out, test, _ = prepared(options.depth, options.data_dir, options.cache)
    x = train[0]
    for seed in options.seeds:
        for way in options.ways:
            key = {"depth": options.depth, "share": 1.0 if way == "dense" else options.share, "epochs": options.epochs}
            key |= {"way": way, "seed": seed}
            if known(NAME, **key):
                continue
            torch.manual_seed(seed)
            kept = options.cache / f"{way}-{options.depth}-{key['share']}-{options.epochs}-{seed}.safetensors"
            training = Training(taught(dense.eval()), train, options.epochs, seed, kept)
            small = trained(way, dense.eval(), options.share, (train, held_out), training)
            row = {**key, "held out": accuracy(small, *held_out), "test": accuracy(small, *test)}
            row |= {"before": accuracy(dense, *test), "macs": operations(small, x) / operations(dense, x)}
            row |= {"parameters": sum(p.numel() for p in small.parameters()), "seconds": training.seconds}
            row["commit"] = environment()["commit"]
            print(row, flush=True)
            settings = {"rate": RATE, "gate rate": GATE_RATE, "plastic rate": PLASTIC_RATE, "periods": PERIODS}
            settings |= {"temperature": TEMPERATURE, "teacher": TEACHER, "decay": DECAY, "calibrate": CALIBRATE}
            write(NAME, settings, [*written(NAME), row])
            kept.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
