"""What each part of `pn.shrink` brings: scores, their division by costs, repair, distillation, and learned gates.

A LeNet-5 is trained on 20,000 images of Fashion-MNIST, as in gates_from_scores.py, and cut to a share of its
multiply-adds. The plain way is a cut by "magnitude", which is not divided by costs, and nothing else. Each part is
added to it alone; and each part is taken away from `pn.shrink(model, batches, budget, epochs=5)`, which has them all. A
score is taken away by "magnitude" in its place. Since scores and their division by costs belong together, the two are
also added together, and taken away together. Two ways learn gates in the place of the cut:

- "plain, gates" has labels, and neither scores, repair nor distillation: two plastic epochs to the budget, from
  pi = 0.95 everywhere, and one epoch more of what is left.
- "everything, gates" is "gates from scores" of gates_from_scores.py: scores per cost say where gates start, what is
  closed as the network hardens is repaired, and all three epochs imitate the network as it was.

"plain, labels" is the plain cut with as many epochs of labels as the others have of distillation. Test images are read
at the end of a row and decide nothing.

    python experiments/shrink_ablation.py --data-dir DIR

takes about an hour on one core that nothing else uses. It adds rows to results/shrink_ablation.json; what is there is
not run again.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import accuracy
from cifar_cut import cached
from common import known, write, written
from gates_from_scores import AFTER, DENSE, EPOCHS, GATE_RATE, PLASTIC, RATE, K, divided, gates
from gates_from_scores import row as from_scores
from repair import BATCH, CALIBRATE, fashion, trained
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.apps.models import LeNet5
from plasticnet.tools.batches import calibration

NAME = "shrink_ablation"


@dataclass(frozen=True)
class Way:
    """Which parts a way has.

    Attributes:
        scores: The kind of score.
        cost: Whether scores are divided by costs.
        repair: Whether what reads closed units is refitted.
        training: What is trained on after the cut: "imitation", "labels", or nothing.
    """

    scores: str = "magnitude"
    cost: bool = False
    repair: bool = False
    training: str = ""


WAYS = {
    "plain": Way(),
    "plain, Fisher scores": Way(scores="fisher"),
    "plain, repair scores": Way(scores="repair"),
    "plain, per cost": Way(cost=True),
    "plain, Fisher scores per cost": Way(scores="fisher", cost=True),
    "plain, repair scores per cost": Way(scores="repair", cost=True),
    "plain, repair": Way(repair=True),
    "plain, distillation": Way(training="imitation"),
    "plain, labels": Way(training="labels"),
    "everything": Way("repair", True, True, "imitation"),
    "everything but scores": Way("magnitude", True, True, "imitation"),
    "everything but cost": Way("repair", False, True, "imitation"),
    "everything but scores and cost": Way("magnitude", False, True, "imitation"),
    "everything but repair": Way("repair", True, False, "imitation"),
    "everything but distillation": Way("repair", True, True),
}
GATES = ("plain, gates", "everything, gates")


class Shuffled:
    """Batches of images and labels, in another order at each reading, as of a DataLoader that shuffles."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        """The number of batches."""
        return -(-len(self.x) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of an epoch."""
        return ((self.x[i], self.y[i]) for i in torch.randperm(len(self.x)).split(BATCH))


def dense(x: Tensor, y: Tensor, seed: int, cache: Path) -> nn.Module:
    """The trained network, from the cache where it is there."""

    def train() -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return trained(x, y, DENSE).state_dict()

    model = LeNet5()
    model.load_state_dict(cached(cache / f"lenet-{seed}.pt", train))
    return model.eval()


def labels(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of the samples of a batch."""
    return F.cross_entropy(output, batch[1], reduction="none")


def scored(model: nn.Module, way: Way, batches: Shuffled) -> str | dict[str, Tensor]:
    """The scores as `pn.shrink` takes them: by name where its way with them is the one that is asked for."""
    if way.cost == (way.scores != "magnitude"):
        return way.scores
    net = pn.PlasticNet(copy.deepcopy(model), (batches.x[:2],))
    found = dict(pn.scores(net, way.scores, batches=calibration(batches, CALIBRATE).fitted))
    return divided(net, found) if way.cost else found


def shrunk(
    model: nn.Module, way: Way, share: float, batches: Shuffled, epochs: int, seed: int
) -> tuple[nn.Module, float]:
    """The small network, and the processor seconds that it took; a seed always gives the same cut."""
    begun = time.process_time()
    torch.manual_seed(seed)
    worth = scored(model, way, batches)
    torch.manual_seed(seed)
    loss = labels if way.training == "labels" else None
    budget = pn.Budget(macs=share)
    small, _ = pn.shrink(model, batches, budget, epochs=epochs, scores=worth, repair=way.repair, loss=loss)
    return small, time.process_time() - begun


def row(
    model: nn.Module, way: Way, share: float, batches: Shuffled, seed: int, test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """The accuracy at once, and after training where there is any."""
    small, seconds = shrunk(model, way, share, batches, 0, seed)
    net = pn.PlasticNet(small, (batches.x[:2],))
    found = {
        "at once": {"accuracy": accuracy(small, *test), "seconds": seconds},
        "macs": net.summary().open_macs,
        "units": {name: len(site) for name, site in net.sites.items()},
    }
    if way.training:
        small, seconds = shrunk(model, way, share, batches, EPOCHS, seed)
        found["after"] = {"accuracy": accuracy(small, *test), "seconds": seconds}
    return found


def gated(
    model: nn.Module, way: str, share: float, batches: Shuffled, seed: int, test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    """The accuracy after gates were learned, in one of two ways."""
    torch.manual_seed(seed)
    if way == "everything, gates":
        found = from_scores(model, "gates from scores", share, batches.x, test)
        return {"after": {k: found[k] for k in ("accuracy", "seconds")}, "macs": found["macs"]}
    begun = time.process_time()
    net = pn.PlasticNet(copy.deepcopy(model), (batches.x[:2],))
    cross_entropy = torch.nn.CrossEntropyLoss(reduction="none")
    small = gates(net, share, batches.x, batches.y, cross_entropy, repair=False)
    seconds = time.process_time() - begun
    net = pn.PlasticNet(small, (batches.x[:2],))
    return {
        "after": {"accuracy": accuracy(small, *test), "seconds": seconds},
        "macs": net.summary().open_macs,
        "units": {name: len(site) for name, site in net.sites.items()},
    }


def main() -> None:
    """Measure all ways, shares and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument(
        "--cache", type=Path, default=Path("runs/shrink_ablation"), help="where whole networks are kept"
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=(*WAYS, *GATES), default=[*WAYS, *GATES])
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = (t[:20_000] for t in fashion(options.data_dir, train=True))
    test, batches = fashion(options.data_dir, train=False), Shuffled(x, y)
    for seed in options.seeds:
        model = dense(x, y, seed, options.cache)
        whole = accuracy(model, *test)
        for share in options.shares:
            for way in options.ways:
                key = {"way": way, "share": share, "seed": seed}
                if known(NAME, **key):
                    continue
                if way in WAYS:
                    found = row(model, WAYS[way], share, batches, seed, test)
                else:
                    found = gated(model, way, share, batches, seed, test)
                found = {**key, "dense": whole, **found}
                print({k: v for k, v in found.items() if k != "units"}, flush=True)
                epochs = {"dense": DENSE, "after the cut": EPOCHS, "plastic": PLASTIC, "after": AFTER}
                gate = {"k": K, "rate": RATE, "gate rate": GATE_RATE}
                settings = {"epochs": epochs, "gates": gate, "batch": BATCH, "calibrate": CALIBRATE}
                write(NAME, settings, [*written(NAME), found])


if __name__ == "__main__":
    main()
