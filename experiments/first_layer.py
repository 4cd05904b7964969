"""What is left of the first layer, from both sides: filters of LeNet-5, and pixels that an MLP reads.

LeNet-5 is pruned from 20-50-500 to a twentieth of its multiply-adds, and grown from 3-3-3 under the same budget, on
10,000 images of MNIST. An MLP of 300-100 with gates on its 784 pixels is pruned to a fiftieth of its multiply-adds, and
grown from 3-3 hidden units that may read all pixels under the same budget. One seed; ten minutes on one core:

    python experiments/first_layer.py --data-dir DIR

Writes results/first_layer.json, and the picture docs/first-layer.svg (--draw only draws it).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, known, publish, svg, write, written
from growth_price import BEFORE, K, trained
from growth_tasks import Task, task

import plasticnet as pn
from plasticnet.apps.models import MLP

NAME, START = "first_layer", 3
BUDGETS = {"LeNet-5": 0.05 * 2_293_000, "MLP": 0.02 * 266_200}  # multiply-adds
PICTURE = Path(__file__).parent.parent / "docs" / "first-layer.svg"
WAYS = ("pruned", "grown")


def network(model: torch.nn.Module, x: torch.Tensor, way: str, inputs: tuple[str, ...]) -> pn.PlasticNet:
    """The network, narrow where it is to grow."""
    net = pn.PlasticNet(model, (x[:2],), inputs=inputs)
    if way == "grown":
        for name, site in net.sites.items():
            net.limit(name, maximum=len(site))
        net.resize({name: range(START) for name in net.sites if not name.endswith(".input")})
    return net


def run(chosen: Task, name: str, way: str) -> dict[str, Any]:
    """One run, and what is left of its first layer."""
    torch.manual_seed(0)
    inputs = ("1",) if name == "MLP" else ()
    model = MLP([784, 300, 100, 10]) if name == "MLP" else chosen.model()
    net = network(model, chosen.parts[0][0], way, inputs)
    hardened, before = chosen.epochs // 5, 0 if way == "grown" else BEFORE
    stages = [pn.Stage(before), pn.Stage(chosen.epochs - hardened - before, k=K), pn.Stage(hardened)]
    growth, budget = pn.Growth() if way == "grown" else None, pn.Budget(macs=BUDGETS[name])
    result = trained(chosen, net, stages, growth, budget)
    row = {key: result[key] for key in ("units", "parameters", "macs", "test", "seconds")}
    if name == "MLP":
        site = net.sites["1.input"]
        return row | {"pixels": site.units.features[site.open.numpy()].tolist()}
    filters = net.compact().get_parameter("conv1.weight").detach().flatten(1)
    return row | {"filters": [[round(v, 4) for v in f] for f in filters.tolist()]}


def draw(rows: list[dict[str, Any]], figure: Any) -> None:
    """One row of pictures for each network and way."""
    parts = figure.subfigures(2, 2, width_ratios=[2, 1])
    for i, way in enumerate(WAYS):
        found = {r["network"]: r for r in rows if r["way"] == way}
        filters = found["LeNet-5"]["filters"]
        parts[i][0].suptitle(
            f"LeNet-5, {way}: {len(filters)} of 20 filters, {found['LeNet-5']['test']:.1f} % wrong", fontsize=10
        )
        for place, weights in zip(parts[i][0].subplots(2, 10).flat, filters + [None] * 20, strict=False):
            place.axis("off")
            if weights is not None:
                place.imshow(torch.tensor(weights).view(5, 5), cmap="coolwarm", vmin=-0.6, vmax=0.6)
        pixels = torch.zeros(784)
        pixels[found["MLP"]["pixels"]] = 1
        parts[i][1].suptitle(
            f"MLP, {way}: {int(pixels.sum())} of 784 pixels, {found['MLP']['test']:.1f} % wrong", fontsize=10
        )
        place = parts[i][1].subplots()
        place.imshow(pixels.view(28, 28), cmap="Greys", vmin=0, vmax=1)
        place.set_xticks([])
        place.set_yticks([])


def main() -> int:
    """Run what is not there yet, and draw the picture; or compare it with --check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (options.draw or options.check):
        for name in ("LeNet-5", "MLP"):
            chosen = task("MNIST", options.data_dir)
            if name == "MLP":
                chosen = replace(chosen, rate=2e-3)
            for way in WAYS:
                if not known(NAME, network=name, way=way):
                    row = {"network": name, "way": way, "seed": 0, **run(chosen, name, way)}
                    print({k: v for k, v in row.items() if k not in ("filters", "pixels")}, flush=True)
                    write(NAME, {"budgets": BUDGETS, "start": START}, [*written(NAME), row])
    rows = json.loads((RESULTS / f"{NAME}.json").read_text())["results"]
    return publish({PICTURE: svg(lambda figure: draw(rows, figure), (10, 5))})


if __name__ == "__main__":
    sys.exit(main())
