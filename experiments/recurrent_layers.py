"""What it brings that each layer of an LSTM has its own width: a network is shrunk with tied and with split ones.

Three LSTM layers read the rows of the 8x8 digits one after the other, and the last state of the last layer says which
digit it was. The trained network is shrunk by `pn.shrink` as it is, where the three layers lose the same units, and
after `pn.split_recurrent`: at once, and with epochs in which it imitates itself. Without labels in either case.

About 5 minutes on one core: python experiments/recurrent_layers.py. Adds rows to results/recurrent_layers.json; those
that are there are skipped.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from common import known, write, written
from torch import Tensor, nn

import plasticnet as pn
from plasticnet.apps.data import load_data

SETTINGS = {
    "layers": 3, "hidden": 64, "epochs": 40, "batch": 32, "lr": 3e-3, "imitate": 5, "split": 0,
}  # fmt: skip
SEEDS, SHARES = range(5), (0.5, 0.3)


class Rows(nn.Module):
    """LSTM layers that read the rows of an image, and a layer that reads the last state of the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, SETTINGS["hidden"], num_layers=SETTINGS["layers"], batch_first=True)
        self.out = nn.Linear(SETTINGS["hidden"], 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images of shape (batch, 8, 8)."""
        _, (h, _) = self.lstm(x)
        return self.out(h[-1])


def trained(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """A network that was trained as usual."""
    torch.manual_seed(seed)
    model, s = Rows(), SETTINGS
    optimizer = torch.optim.Adam(model.parameters(), s["lr"])
    for _ in range(s["epochs"]):
        for i in torch.randperm(len(x)).split(s["batch"]):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that a network gets right."""
    return float((model.eval()(x).argmax(1) == y).double().mean())


def widths(model: nn.Module) -> list[int]:
    """The width of each layer."""
    lstm = model.get_submodule("lstm")
    if isinstance(lstm, pn.RecurrentStack):
        return [int(layer.hidden_size) for layer in lstm.layers]  # pyright: ignore
    return [int(lstm.hidden_size)] * SETTINGS["layers"]  # pyright: ignore


def main() -> None:
    """Train a network for each seed, and shrink it in both ways."""
    torch.set_num_threads(1)
    data, s = load_data("digits", seed=SETTINGS["split"]), SETTINGS
    (x, y), (x_test, y_test) = ((part.x.reshape(-1, 8, 8), part.y) for part in (data.train, data.test))
    for seed in SEEDS:
        todo = [
            (share, way)
            for share in SHARES
            for way in ("tied", "split")
            if not known("recurrent_layers", seed=seed, share=share, way=way)
        ]
        model = trained(x, y, seed) if todo else None
        for share, way in todo:
            row = {"seed": seed, "share": share, "way": way, "accuracy": {"whole": accuracy(model, x_test, y_test)}}
            begun = time.process_time()
            for step, epochs in (("repaired", 0), ("imitated", s["imitate"])):
                torch.manual_seed(seed)
                start = pn.split_recurrent(model) if way == "split" else model
                small, _ = pn.shrink(start, x.split(s["batch"]), pn.Budget(macs=share), epochs=epochs)
                row["accuracy"][step] = accuracy(small, x_test, y_test)
                row["widths"] = widths(small)
            row["seconds"] = time.process_time() - begun
            print(row, flush=True)
            write("recurrent_layers", {**s, "seeds": list(SEEDS)}, [*written("recurrent_layers"), row])


if __name__ == "__main__":
    main()
