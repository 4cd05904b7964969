"""A small vision transformer, trained on Fashion-MNIST by Lightning, and then cut to half of its multiply-adds by it.

Attention heads and the hidden units of the MLPs are pruned. DIR holds FashionMNIST in torchvision's layout:

    python examples/vit_in_lightning.py --data-dir DIR

It takes some five minutes on one core, on the first 12,000 images; the network has random weights at first.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import FashionMNIST
from torchvision.models import VisionTransformer

import plasticnet as pn
from plasticnet.lightning import PlasticCallback


class Classifier(L.LightningModule):
    """Whatever model it holds, it is trained in the same way."""

    def __init__(self, net: nn.Module, rate: float) -> None:
        super().__init__()
        self.net, self.rate = net, rate

    def training_step(self, batch, batch_idx) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y, reduction="none" if isinstance(self.net, pn.PlasticNet) else "mean")

    def configure_optimizers(self):
        plastic = isinstance(self.net, pn.PlasticNet)
        return torch.optim.Adam(self.net.param_groups(lr=self.rate) if plastic else self.net.parameters(), self.rate)


def images(folder: Path, train: bool, count: int) -> TensorDataset:
    """The first images, as three equal channels, which torchvision's transformer reads."""
    found = FashionMNIST(str(folder), train=train)
    x = (found.data[:count].float() / 255 - 0.286) / 0.353
    return TensorDataset(x[:, None].expand(-1, 3, -1, -1), found.targets[:count])


@torch.no_grad()
def accuracy(net: nn.Module, data: TensorDataset) -> float:
    """In percent."""
    net.eval()
    x, y = data.tensors
    return 100 * float(torch.cat([net(part).argmax(1) for part in x.split(500)]).eq(y).float().mean())


def fit(module: L.LightningModule, data: TensorDataset, epochs: int, callbacks: list[L.Callback]) -> None:
    """Train for some epochs."""
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, 64, shuffle=True))


def run(folder: Path, seed: int = 0, dense_epochs: int = 8, epochs: int = 12) -> dict[str, float]:
    """Train, prune and return what came of it: accuracies and multiply-adds, before and after."""
    L.seed_everything(seed)
    torch.set_num_threads(1)
    train, test = images(folder, True, 12_000), images(folder, False, 10_000)
    model = VisionTransformer(28, 7, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=256, num_classes=10)
    fit(Classifier(model, 1e-3), train, dense_epochs, [])
    before = accuracy(model, test)

    # The three lines of plasticnet: the network, its groups (in configure_optimizers above), and the callback.
    net = pn.PlasticNet(model, (train.tensors[0][:2],))
    macs = net.summary().macs
    callback = PlasticCallback(
        [pn.Stage(epochs // 2, k=7.0), pn.Stage(epochs - epochs // 2)], budget=pn.Budget(macs=0.5)
    )
    fit(Classifier(net, 1e-3), train, epochs, [callback])
    print(net.summary())
    return {
        "before": before, "after": accuracy(net.compact(), test), "macs before": macs, "macs after": net.summary().macs,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="the folder that holds FashionMNIST/raw")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = run(given.data_dir, given.seed)
    print(
        f"accuracy {found['before']:.1f} % before, {found['after']:.1f} % after, with "
        f"{found['macs after'] / found['macs before']:.0%} of the multiply-adds"
    )
