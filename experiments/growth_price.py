"""Growing under the price that prunes: a trial of the rule that docs/design/growth.md calls "all sites together".

A network that starts with a few units a site is trained with all units open and without pressure. After each epoch,
every site is offered as many new units again as it has (growth_offers.py). They stay if the loss on other training
inputs falls at once by more than they cost together under the pressure; else half as many are tried, and a quarter.
The gain may be counted several times, since a unit is worth more once it is trained than at once. After six epochs in
a row without growth, it is over, and the pressure begins, as in pruning at the same price.

Pruning is run from several widths, and from the widest also with the pressure beginning when the network has been
trained: it has many resting points. All of them are compared by what they cost and what they lose.

Digits, 64-256-128-10, 60 epochs, Adam. A run takes half a minute: python experiments/growth_price.py. Adds rows to
results/growth_price.json; what is there is not run again.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from common import known, write, written
from growth_offers import add_best
from torch import Tensor

import plasticnet as pn
from plasticnet.apps.data import Data, load_data
from plasticnet.apps.loop import Config, evaluate, train_epoch
from plasticnet.apps.models import MLP

NAME = "growth_price"
CONFIG = Config(batch=32, lr=3e-3, gate_lr=0.1)
EPOCHS, HARDENED, K = 60, 12, 7.0
WIDE = (256, 128)
PRUNED = ((WIDE, 3), (WIDE, 20), ((64, 64), 3), ((40, 40), 3), ((24, 24), 3))  # widths, and epochs before the pressure
SHARES, PATIENCE, LAST = (1.0, 0.5, 0.25), 6, 24  # no growth after the epoch LAST
SAMPLES = 512  # the training inputs that offers are fitted on, and as many that they are judged on


def prune(data: Data, pressure: pn.Pressure, seed: int, widths: tuple[int, int], before: int) -> dict[str, Any]:
    """Prune a network, with the pressure from an epoch on."""
    torch.manual_seed(seed)
    net = pn.PlasticNet(MLP([64, *widths, 10]), (data.train.x[:2],))
    stages = [pn.Stage(before), pn.Stage(EPOCHS - HARDENED - before, k=K), pn.Stage(HARDENED)]
    return trained(net, data, pressure, stages)


def grow(data: Data, pressure: pn.Pressure, seed: int, start: int, worth: float) -> dict[str, Any]:
    """Grow from so many units a site, where units are worth so many times what they promise at once."""
    torch.manual_seed(seed)
    net = pn.PlasticNet(MLP([64, *WIDE, 10]), (data.train.x[:2],))
    pn.narrow(net, start)
    return trained(net, data, pressure, [pn.Stage(EPOCHS - HARDENED, k=K), pn.Stage(HARDENED)], worth)


def trained(
    net: pn.PlasticNet, data: Data, pressure: pn.Pressure, stages: list[pn.Stage], worth: float = 0.0
) -> dict[str, Any]:
    """Train a network to the end of its stages, and say what came of it; it grows if new units are worth anything."""
    optimizer = torch.optim.Adam(net.param_groups(CONFIG.lr, CONFIG.gate_lr))
    schedule = pn.Schedule(net, optimizer, stages, pressure=pressure)
    begun, offering, failed, peak, widths, growing = time.process_time(), 0.0, 0, 0, [], worth > 0
    while schedule.epoch < schedule.epochs:
        if growing:
            for site in net.sites.values():
                site.grace.clamp_(min=2)  # held open, and so unpriced
        train_epoch(net, optimizer, schedule, data.train, CONFIG)
        schedule.step()
        if growing:
            paused = time.process_time()
            failed = 0 if doubled(net, optimizer, data, pressure, worth) else failed + 1
            growing = failed < PATIENCE and schedule.epoch < LAST
            offering += time.process_time() - paused
        widths.append("-".join(str(s.open) for s in net.summary().sites))
        peak = max(peak, net.summary().open_parameters)
    size, seconds = net.summary(), time.process_time() - begun
    loss, accuracy = evaluate(net, data.test)
    return {
        "units": {s.name: s.open for s in size.sites},
        "parameters": size.open_parameters,
        "peak": peak,
        "accuracy": 100 * accuracy,
        "test loss": loss,
        "validation loss": evaluate(net, data.val)[0],
        "training loss": evaluate(net, data.train)[0],
        "seconds": {"all": seconds, "offers": offering},
        "widths": " ".join(widths),
    }


def doubled(
    net: pn.PlasticNet, optimizer: torch.optim.Optimizer, data: Data, pressure: pn.Pressure, worth: float
) -> bool:
    """Offer new units to all sites, and return whether some stay."""
    some = torch.randperm(len(data.train))[: 2 * SAMPLES]

    def losses(part: Tensor) -> Tensor:
        return F.cross_entropy(net(data.train.x[part]), data.train.y[part], reduction="none")

    fitted, others = some[:SAMPLES], some[SAMPLES:]
    old = {name: len(site) for name, site in net.sites.items()}
    (cost, price), *_ = pressure.prices.items()
    before = float(net.cost.full(cost))
    for share in SHARES:
        wanted = {name: math.ceil(share * n) for name, n in old.items()}
        offers = [
            add_best(net, optimizer, name, n, lambda: losses(fitted), lambda: losses(others))
            for name, n in wanted.items()
        ]
        if worth * sum(offers) > price * (float(net.cost.full(cost)) - before):
            return True
        net.resize({name: list(range(n)) for name, n in old.items()}, optimizer)
        if all(n == 1 for n in wanted.values()):
            break
    return False


def named(widths: tuple[int, int], before: int) -> str:
    """What a network is pruned from."""
    return f"{widths[0]}-{widths[1]}, pressure after {before} epochs"


def main() -> None:
    """Measure both directions at some prices."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prices", type=float, nargs="+", default=[2e-5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--starts", type=int, nargs="+", default=[3, 1, 10])
    parser.add_argument("--worth", type=float, nargs="+", default=[1.0, 3.0])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data("digits")
    for price in options.prices:
        for seed in options.seeds:
            pressure = pn.Pressure(price, "parameters")
            runs = [("pruned", named(*how), prune, how) for how in PRUNED]
            for worth in options.worth:
                title = "grown" if worth == 1 else f"grown, promises counted {worth:g} times,"
                runs += [(title, f"{start}-{start}", grow, (start, worth)) for start in options.starts]
            for way, begin, run, how in runs:
                key = {"way": way, "from": begin, "price": price, "seed": seed}
                if not known(NAME, **key):
                    row = {**key, **run(data, pressure, seed, *how)}
                    print({k: v for k, v in row.items() if k != "widths"}, flush=True)
                    settings = {"epochs": EPOCHS, "hardened": HARDENED, "k": K, "shares": SHARES, "samples": SAMPLES}
                    write(NAME, settings, [*written(NAME), row])


if __name__ == "__main__":
    main()
