"""The authors' moons task: prune from 100-80 and grow from 3-3, gates on the 100 inputs and 80 hidden units.

About 2 minutes on one core. Adds rows to results/moons.json, and goes on from there.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from common import known, write, written

from plasticnet.apps.data import load_data
from plasticnet.apps.loop import train_run
from plasticnet.apps.models import MLP
from plasticnet.apps.settings import Config

# On 400 training rows the price is 1e-4 of the mean loss for a parameter.
CONFIG = Config(
    epochs=600, k=7.0, price=0.04, cost="parameters", inputs=("*",), batch=32, lr=1e-2, gate_lr=1e-1
)  # fmt: skip


def main() -> None:
    """Three seeds, both directions."""
    torch.set_num_threads(1)
    for seed in range(3):
        config = Config(**{**asdict(CONFIG), "seed": seed})
        data = load_data("moons", seed=seed)
        for mode in ("prune", "grow"):
            if known("moons", seed=seed, mode=mode):
                continue
            torch.manual_seed(seed)
            model = MLP([100, 80, 2])
            full = sum(p.numel() for n, p in model.named_parameters() if n.endswith("weight"))
            history: list[dict] = []
            result = train_run(model, data, config, mode, on_epoch=history.append)
            weights = sum(p.numel() for n, p in result.compact.named_parameters() if n.endswith("weight"))
            grown_last = max((r["epoch"] for r in history if r["grown"]), default=None)
            summary = {k: v for k, v in result.summary.items() if k not in ("profile", "test_score", "val_score")}
            summary |= {f"{part}_accuracy": result.summary[f"{part}_score"] for part in ("test", "val")}
            row = {"seed": seed, **summary, "weights": weights, "weights_gone": 1 - weights / full}
            row |= {"last_growth_epoch": grown_last}
            print(row, flush=True)
            write("moons", asdict(CONFIG), [*written("moons"), row])


if __name__ == "__main__":
    main()
