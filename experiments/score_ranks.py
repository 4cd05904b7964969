"""Do scores rank units as the loss does? The true loss of closing single units, without and with a repair of that cut.

One unit at a time is closed, and the loss and the divergence from the whole network's outputs are measured on training
inputs that neither scores nor repair read; then `pn.repair` refits what reads the unit, and both are measured again.
Every row holds one unit with all its scores, so that rank correlations follow from the file. The networks are LeNet-5
on 20,000 images of Fashion-MNIST and ResNet-20 on CIFAR-10, both as in repair.py, and the BERT of transformers_cut.py.
Of each site at most --most units are drawn.

For LeNet-5 the inputs to measure on are training images that it was not trained on, for BERT the validation part of
SST-2. ResNet-20 was trained on all training images by its authors, though not as they are encoded here.

About ten minutes a network on one core: python experiments/score_ranks.py --data-dir DIR --network lenet. A rerun goes
on where it was cut. Adds rows to results/score_ranks.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar import images, published
from common import write, written
from repair import fashion, prepared
from torch import Tensor, nn
from transformers_cut import TASKS, chosen, scored, sentences, trained

import plasticnet as pn

KINDS = ("magnitude", "taylor", "gate", "fisher, loss", "fisher", "repair")
NAME, BATCH = "score_ranks", 128
Part = tuple[Tensor, Tensor]  # inputs and labels


def lenet(folder: Path, _: Path) -> tuple[nn.Module, Part, Part]:
    """LeNet-5, what scores and repair read, and what the loss is measured on."""
    x, y = fashion(folder, train=True)
    model, *_ = prepared("lenet", folder)
    return model, (x[:2048], y[:2048]), (x[20_000:24_000], y[20_000:24_000])


def bert(folder: Path, cache: Path) -> tuple[nn.Module, Part, Part]:
    """The same for BERT."""
    data = sentences(folder, "dev")
    model, _ = trained("bert", 0, data, cache)
    i = chosen(data, TASKS["bert"].calibrate)
    return model, (data.x[i], data.y[i]), (data.test_x, data.test_y)


def resnet20(folder: Path, _: Path) -> tuple[nn.Module, Part, Part]:
    """The same for ResNet-20."""
    x, y = images(folder, "train", 1024)  # few, because it is the slowest of the three
    return published(20, folder), (x[:384], y[:384]), (x[384:], y[384:])


NETWORKS: dict[str, Callable[[Path, Path], tuple[nn.Module, Part, Part]]] = {
    "lenet": lenet, "bert": bert, "resnet20": resnet20,
}  # fmt: skip


@torch.no_grad()
def outputs(net: pn.PlasticNet, x: Tensor) -> Tensor:
    """The log-probabilities of all inputs, in double precision."""
    net.eval()
    return torch.cat([net(b) for b in x.split(256)]).double().log_softmax(-1)


def compared(now: Tensor, whole: Tensor, y: Tensor) -> dict[str, float]:
    """By how much the loss has grown, and the divergence from the whole network's outputs."""
    grown = F.nll_loss(now, y) - F.nll_loss(whole, y)
    return {
        "loss": float(grown), "divergence": float(F.kl_div(now, whole, log_target=True, reduction="batchmean"))
    }  # fmt: skip


@contextmanager
def closed(net: pn.PlasticNet, site: str, unit: int) -> Iterator[None]:
    """Close one unit in this context; afterwards the unit is open, and weights and statistics are what they were."""
    phi, before = net.sites[site].phi, {n: t.clone() for n, t in net.model.state_dict().items()}
    was = phi[unit].item()
    try:
        with torch.no_grad():
            phi[unit] = -1.0
        yield
    finally:
        with torch.no_grad():
            phi[unit] = was
            for n, t in net.model.state_dict().items():
                t.copy_(before[n])


def measure(name: str, most: int, folder: Path, cache: Path) -> None:
    """Measure the units of one network, and write their rows one by one."""
    torch.manual_seed(0)
    model, (x, y), (other_x, other_y) = NETWORKS[name](folder, cache)
    net = pn.PlasticNet(model, (x[:2],))
    found = {kind: scored(net, kind, x, y, BATCH) for kind in KINDS}
    whole = outputs(net, other_x)
    generator = torch.Generator().manual_seed(0)
    drawn = {n: torch.randperm(len(s), generator=generator)[:most].tolist() for n, s in net.sites.items()}
    done = {(r["network"], r["site"], r["unit"]) for r in written(NAME)}
    places = [(i, s, units[i]) for s, units in drawn.items() for i in range(len(units))]
    for _, site, unit in sorted(places):  # sites take turns, so that a run that is cut short has some units of each
        if (name, site, unit) in done:
            continue
        begun = time.process_time()
        with closed(net, site, unit):
            without = compared(outputs(net, other_x), whole, other_y)
            pn.repair(net, x.split(BATCH))
            repaired = compared(outputs(net, other_x), whole, other_y)
        new: dict[str, Any] = {
            "network": name, "seed": 0, "site": site, "unit": unit, "units": len(net.sites[site]),
            "scores": {kind: float(found[kind][site][unit]) for kind in KINDS},
            "closed": without, "repaired": repaired, "cpu_seconds": time.process_time() - begun,
            "calibrate": len(x), "measured_on": len(other_x),
        }  # fmt: skip
        print(site, unit, without, repaired, round(new["cpu_seconds"], 1), flush=True)
        write(NAME, {"batch": BATCH, "most": {**_most(), name: most}}, [*written(NAME), new])


def _most() -> dict[str, int]:
    """How many units of a site were drawn at most, for each network that was measured."""
    rows = written(NAME)
    return {n: max(_counts(rows, n).values()) for n in dict.fromkeys(r["network"] for r in rows)}


def _counts(rows: list[dict[str, Any]], name: str) -> dict[str, int]:
    """How many units of each site of a network were measured."""
    sites = [r["site"] for r in rows if r["network"] == name]
    return {site: sites.count(site) for site in dict.fromkeys(sites)}


def main() -> None:
    """Measure some networks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/transformers_cut"))
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--most", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.network:
        measure(name, options.most, options.data_dir, options.cache)


if __name__ == "__main__":
    main()
