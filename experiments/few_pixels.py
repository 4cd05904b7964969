"""What is learned of the pixels that a small MLP for MNIST can afford, whatever the widths behind them.

The point "d" of lenet_targets.py asks 784-300-100 for 1.6 % error with 9,000 multiply-adds, which leave some hundred
pixels. Here networks are trained on the pixels that gates have kept, and on as many that lie evenly over the image
(every other one, row by row shifted by one): once with the widths that gates have found, and once with 300 and 100
hidden units and dropout. All learn from random weights, and from the outputs of the dense network of lenet_targets.py.
No image is moved. The errors are those of validation data, on its seeds for settings.

Ten minutes on one core: python experiments/few_pixels.py --data-dir DIR. Adds rows to results/few_pixels.json and goes
on from there; gates_table.py writes them into docs/gates.md.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from pathlib import Path

import torch
from common import known, write, written
from lenet_targets import GATE_RATE, POINTS, RATE, dense, one_cycle
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.apps.data import Data, load_data
from plasticnet.apps.scores import evaluate

NAME, SEEDS, EPOCHS, HIGHEST, BATCH = "few_pixels", (0, 1, 2), 30, 3e-3, 128
POINT, PLASTIC = POINTS["d"], 10  # the epochs in which gates learn
WIDE = (300, 100)


def kept(trained: nn.Module, outputs: Tensor, data: Data) -> tuple[Tensor, tuple[int, ...]]:
    """The numbers of the pixels that gates keep under the budget, and the widths of the hidden layers."""
    x, y = data.train.x, data.train.y
    net = pn.PlasticNet(copy.deepcopy(trained), (x[:2],), inputs=POINT.inputs)
    optimizer = torch.optim.AdamW(net.param_groups(RATE, GATE_RATE, weight_decay=0.0))
    schedule = pn.Schedule(net, optimizer, [pn.Stage(PLASTIC, 7.0), pn.Stage(1)], budget=pn.Budget(**POINT.budget))
    for _ in range(PLASTIC):
        net.train()
        for i in torch.randperm(len(x)).split(BATCH):
            loss = net.expected_loss(lambda i=i: losses(net(x[i]), outputs[i], y[i])) + schedule.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    small = net.compact()
    pixels = next(b for b in small.buffers() if not b.is_floating_point())
    weights = [p for p in small.parameters() if p.dim() == 2]
    return pixels, tuple(len(w) for w in weights[:2])


def evenly(count: int) -> Tensor:
    """The numbers of some pixels in the middle of the image, every other one of every other row, shifted in turn."""
    places = [28 * r + c for n, r in enumerate(range(4, 25, 2)) for c in range(5 - n % 2, 25, 2)]
    return torch.tensor(places[:count])


def losses(output: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """The losses of samples that learn from the dense network's outputs, too."""
    return pn.distillation(output, teacher, y, temperature=POINT.temperature, weight=POINT.teacher)


def error(pixels: Tensor, widths: tuple[int, ...], outputs: Tensor, data: Data) -> float:
    """The validation error in percent of a network of these widths on these pixels, trained from random weights."""
    x, held_out = (part.x.flatten(1)[:, pixels] for part in (data.train, data.val))
    drop = 0.25 if widths == WIDE else 0.0
    layers: list[nn.Module] = []
    for m, n in zip((len(pixels), *widths), widths, strict=False):
        layers += [nn.Linear(m, n), nn.ReLU(), nn.Dropout(drop)]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 10))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=POINT.decay)
    steps = EPOCHS * math.ceil(len(x) / BATCH)
    for epoch in range(EPOCHS):
        for n, i in enumerate(torch.randperm(len(x)).split(BATCH)):
            place = epoch * math.ceil(len(x) / BATCH) + n
            optimizer.param_groups[0]["lr"] = one_cycle(place, steps, HIGHEST)
            optimizer.zero_grad()
            losses(model(x[i]), outputs[i], data.train.y[i]).mean().backward()
            optimizer.step()
    with torch.no_grad():
        return 100 * float(model.eval()(held_out).argmax(1).ne(data.val.y).double().mean())


def main() -> None:
    """Measure the seeds that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in SEEDS:
        if known(NAME, seed=seed):
            continue
        data = load_data("mnist", options.data_dir, seed)
        trained, answers, _ = dense(POINT.network, data, seed)
        outputs = answers[0, 0]  # where no image is moved
        pixels, widths = kept(trained, outputs, data)
        whole = 100 * (1 - evaluate(trained, data.val)[1])
        rows = []
        for name, chosen in {"gates": pixels, "evenly": evenly(len(pixels))}.items():
            for hidden in (widths, WIDE):
                torch.manual_seed(seed)
                begun = time.process_time()
                sizes = (len(chosen), *hidden, 10)
                row = {"seed": seed, "pixels": name, "sizes": sizes, "wide": hidden == WIDE, "dense": whole}
                row |= {"macs": sum(a * b for a, b in itertools.pairwise(sizes))}
                row |= {"validation": error(chosen, hidden, outputs, data), "seconds": time.process_time() - begun}
                print(row, flush=True)
                rows.append(row)
        write(NAME, {"epochs": EPOCHS, "rate": HIGHEST, "plastic": PLASTIC}, [*written(NAME), *rows])


if __name__ == "__main__":
    main()
