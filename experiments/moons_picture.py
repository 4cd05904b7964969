"""The picture at the top of the README: two moons, learned from 3-3 units and from 100-80, epoch by epoch.

Both networks have two inputs, two layers, and the same price of a parameter. The left one grows and is then pruned, the
right one is only pruned. It takes a minute: python experiments/moons_picture.py. It writes docs/moons.gif and
results/moons_picture.json.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from common import write
from PIL import Image
from torch import Tensor

import plasticnet as pn
from plasticnet.apps.data import Split
from plasticnet.apps.loop import train_epoch
from plasticnet.apps.models import MLP
from plasticnet.apps.preparing import Training
from plasticnet.apps.settings import Config

mpl.use("Agg")
import matplotlib.pyplot as plt

PICTURE = Path(__file__).parent.parent / "docs" / "moons.gif"
PRICE, SEED, POINTS, BATCH = 2e-4, 0, 600, 16
EPOCHS, HARDENED, BEFORE, K = 60, 10, 3, 7.0
MILLISECONDS, LAST = 160, 2500  # for which each frame is shown, and the last one


def moons(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on two half circles that reach into each other, with noise: shapes (n, 2) and (n,)."""
    angle = torch.pi * torch.rand(n, generator=generator)
    y = torch.arange(n) % 2
    x = torch.stack([angle.cos() + y, angle.sin() * (1 - 2 * y) + 0.5 * y], 1)
    return (x - torch.tensor([0.5, 0.25])) * 1.5 + 0.22 * torch.randn(n, 2, generator=generator), y


class Run:
    """One of the two trainings.

    Args:
        start: The units of both layers at first.
        data: Points to train on, and their moons.
    """

    def __init__(self, start: tuple[int, int], data: tuple[Tensor, Tensor]) -> None:
        torch.manual_seed(SEED)
        self.x, self.y = data
        grows = start == (3, 3)
        self.net = pn.PlasticNet(MLP([2, 100, 80, 2]), (self.x[:2],))
        if grows:
            pn.narrow(self.net, 3)
        self.optimizer = torch.optim.Adam(self.net.param_groups(lr=1e-2, gate_lr=0.1))
        before = 0 if grows else BEFORE
        self.schedule = pn.Schedule(
            self.net,
            self.optimizer,
            [pn.Stage(before), pn.Stage(EPOCHS - HARDENED - before, k=K), pn.Stage(HARDENED)],
            growth=pn.Growth() if grows else None,
            pressure=pn.Pressure(PRICE, "parameters"),
        )
        self.random = torch.get_rng_state()
        self.widths = [self.present()]

    def present(self) -> tuple[int, int]:
        """How many units of the two layers are open."""
        first, second = (int(s.open.sum()) for s in self.net.sites.values())
        return first, second

    def epoch(self) -> None:
        """Train for one epoch, with random numbers of its own."""
        torch.set_rng_state(self.random)
        train_epoch(Training(self.net, self.optimizer, self.schedule), Split(self.x, self.y), Config(batch=BATCH))
        self.schedule.step()
        self.random = torch.get_rng_state()
        self.widths.append(self.present())

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> float:
        """The share of right answers, in percent."""
        return 100 * self.net.eval()(x).argmax(1).eq(y).float().mean().item()


@torch.no_grad()
def frame(runs: list[Run], epoch: int, test: tuple[Tensor, Tensor]) -> Image.Image:
    """The picture of one epoch."""
    figure, axes = plt.subplots(2, 2, figsize=(6.4, 4.3), height_ratios=[3, 1], dpi=80)
    a, b = torch.linspace(-3, 3, 90), torch.linspace(-2.2, 2.2, 70)
    grid = torch.cartesian_prod(b, a).flip(1)
    for run, (upper, lower), title in zip(runs, axes.T, ("from 3-3", "from 100-80"), strict=True):
        shares = run.net.eval()(grid).softmax(1)[:, 1].view(70, 90)
        upper.contourf(a, b, shares, levels=[0, 0.1, 0.3, 0.5, 0.7, 0.9, 1], cmap="coolwarm", alpha=0.6)
        upper.contour(a, b, shares, levels=[0.5], colors="black", linewidths=1)
        shown = slice(0, 250)
        upper.scatter(*run.x[shown].T, c=["#2040a0" if c == 0 else "#a02020" for c in run.y[shown]], s=4)
        upper.set(xticks=[], yticks=[], xlim=(-3, 3), ylim=(-2.2, 2.2))
        first, second = run.widths[-1]
        right = run.accuracy(*test)
        upper.set_title(f"{title}: {first}-{second} units, {right:.1f} %", fontsize=10, family="monospace")
        for layer, colour in enumerate(("#333333", "#999999")):
            lower.plot([w[layer] for w in run.widths], color=colour, label=f"layer {layer + 1}")
        lower.set(xlim=(0, EPOCHS), ylim=(0.8, 130), yscale="log", yticks=[1, 10, 100], yticklabels=["1", "10", "100"])
        lower.tick_params(labelsize=7)
    axes[1][0].set_ylabel("open units", fontsize=8)
    axes[1][1].legend(fontsize=7, loc="upper right")
    figure.text(0.5, 0.01, f"epoch {epoch}", ha="center", fontsize=9)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return Image.open(buffer).convert("RGB").quantize(48, dither=Image.Dither.NONE)


def main() -> None:
    """Train both, and draw every epoch."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(SEED)
    train, test = moons(POINTS, generator), moons(2000, generator)
    runs = [Run((3, 3), train), Run((100, 80), train)]
    frames = [frame(runs, 0, test)]
    for epoch in range(1, EPOCHS + 1):
        for run in runs:
            run.epoch()
        frames.append(frame(runs, epoch, test))
    times = [MILLISECONDS] * EPOCHS + [LAST]
    frames[0].save(PICTURE, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
    results: list[dict[str, Any]] = [
        {
            "from": "-".join(map(str, run.widths[0])),
            "to": "-".join(map(str, run.widths[-1])),
            "widths": run.widths,
            "accuracy": run.accuracy(*test),
        }
        for run in runs
    ]
    settings = {"price": PRICE, "seed": SEED, "points": POINTS, "batch": BATCH, "epochs": EPOCHS, "hardened": HARDENED}
    write("moons_picture", settings, results)
    print([{k: v for k, v in r.items() if k != "widths"} for r in results], PICTURE.stat().st_size)


if __name__ == "__main__":
    main()
