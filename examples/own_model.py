"""Your own model and your own loop: prune a small convolutional network, save it, load it, compare.

Run it with ``python examples/own_model.py``; it takes some ten seconds on one core.
"""

import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import plasticnet as pn


class Net(nn.Module):
    """Nothing in here knows of plasticnet: (batch, 1, 8, 8) to (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2).flatten(1)
        return self.fc2(self.fc1(x).relu())


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x, x_test = (torch.tensor(images).float().reshape(-1, 1, 8, 8) / 8 - 1)[order].split([1437, 360])
    y, y_test = torch.tensor(labels)[order].split([1437, 360])

    net = pn.PlasticNet(Net(), (x[:2],))
    print(net.summary(), end="\n\n")
    optimizer = torch.optim.Adam(net.param_groups(lr=3e-3, gate_lr=0.1))
    stages = [pn.Stage(2, k=math.inf), pn.Stage(20, k=7.0), pn.Stage(6, k=math.inf)]
    schedule = pn.Schedule(net, optimizer, stages, pressure=pn.Pressure(0.2, cost="parameters", scale="log"))
    for epoch in range(schedule.epochs):
        net.train()
        for i in torch.randperm(len(x)).split(32):
            xs, ys = x[i], y[i]
            loss = net.expected_loss(lambda xs=xs, ys=ys: F.cross_entropy(net(xs), ys, reduction="none"))
            optimizer.zero_grad()
            (loss + schedule.penalty()).backward()
            optimizer.step()
        schedule.step()  # pruning decides by the gates alone; only growth needs a validation loss
        print(f"epoch {epoch + 1:2}  loss {loss.item():6.3f}  units {[len(s) for s in net.sites.values()]}")

    small = net.compact()
    with tempfile.TemporaryDirectory() as folder:
        pn.save(small, Path(folder) / "small.safetensors")
        loaded = pn.load(Path(folder) / "small.safetensors", Net)
    with torch.no_grad():
        expected, found = net.eval()(x_test), loaded(x_test)
    assert torch.allclose(expected, found, rtol=1e-4, atol=1e-4)
    print(f"\n{loaded}\n{sum(p.numel() for p in loaded.parameters()):,} parameters, test accuracy", end=" ")
    print(f"{(found.argmax(1) == y_test).float().mean():.2%}")


if __name__ == "__main__":
    main()
