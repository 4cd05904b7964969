"""CIFAR-10 and its ResNets, for the experiments: images from Parquet files, networks with published weights, training.

The images need ``pyarrow`` and ``pillow``, the weights ``safetensors``.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 128


class Block(nn.Module):
    """Two convolutions with a shortcut that pads with zeros (option A)."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.more = out - into

    def forward(self, x: Tensor) -> Tensor:
        """(batch, into, h, w) to (batch, out, h / stride, w / stride)."""
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return (x + y).relu()


class ResNet(nn.Module):
    """A ResNet for CIFAR: (batch, 3, 32, 32) to (batch, 10).

    Args:
        depth: The number of its layers, 2 more than a multiple of 6.
    """

    def __init__(self, depth: int = 20) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for i, (into, out) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            count = range((depth - 2) // 6)
            blocks = [Block(out if j else into, out, 1 if j or i == 1 else 2) for j in count]
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) to (batch, 10)."""
        x = self.bn1(self.conv1(x)).relu()
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def published(depth: int, folder: Path) -> ResNet:
    """A ResNet with the weights of https://github.com/akamaster/pytorch_resnet_cifar10, in evaluation mode."""
    from safetensors.torch import load_file

    model = ResNet(depth)
    model.load_state_dict(load_file(folder / "weights" / f"resnet{depth}.safetensors"), strict=False)
    return model.eval()


def images(folder: Path, part: str, n: int) -> tuple[Tensor, Tensor]:
    """The first images, normalised, and their labels, from ``PART.parquet``."""
    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(folder / "cifar10" / f"{part}.parquet").slice(0, n).to_pydict()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(i["bytes"])).convert("RGB")) for i in table["img"]])
    x = (torch.from_numpy(pixels).float() / 255 - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
    return x.permute(0, 3, 1, 2).contiguous(), torch.tensor(table["label"])


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of right answers, in percent."""
    model.eval()
    return 100 * torch.cat([model(b).argmax(1) for b in x.split(500)]).eq(y).float().mean().item()


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images moved by up to four pixels, each in its own way, half of them mirrored, with channels last in memory."""
    return moved(x, 4, generator, mirrored=0.5)


def moved(x: Tensor, by: int, generator: torch.Generator | None = None, mirrored: float = 0.0) -> Tensor:
    """Images moved up or down, and left or right, each in its own way, with channels last in memory.

    Args:
        x: The images. Beyond their edge is zero.
        by: The most pixels they are moved by.
        generator: Of random numbers; by default torch's own.
        mirrored: The probability that an image is mirrored, too.
    """
    n, width = len(x), x.shape[3]
    down, right = moves(n, by, generator)
    columns = right[:, None] + torch.arange(width)
    if mirrored:
        columns = torch.where(torch.rand(n, 1, generator=generator) < mirrored, columns.flip(1), columns)
    return _taken(x, by, down, columns)


def moves(n: int, by: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """By how much n images are moved, down and to the right: from 0 to twice ``by``, which is in the middle."""
    down, right = (torch.randint(0, 2 * by + 1, (n, 1), generator=generator)[:, 0] for _ in range(2))
    return down, right


def shifted(x: Tensor, by: int, down: Tensor, right: Tensor) -> Tensor:
    """Images moved as ``moves`` says, with channels last in memory; beyond their edge is zero."""
    return _taken(x, by, down, right[:, None] + torch.arange(x.shape[3]))


def _taken(x: Tensor, by: int, down: Tensor, columns: Tensor) -> Tensor:
    rows = down[:, None] + torch.arange(x.shape[2])
    one = torch.arange(len(x))[:, None, None]
    return F.pad(x, (by,) * 4)[one, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def epochs(
    model: nn.Module, x: Tensor, y: Tensor, count: int, rate: float, seed: int, kept: Path | None = None
) -> Iterator[int]:
    """Train a model, and yield the number of each epoch after it; the learning rate falls to 0 along a cosine.

    SGD has momentum 0.9 and weight decay 1e-4. Weights and images are stored with channels last, which takes a fifth of
    the time off.

    Args:
        model: The model.
        x: Images.
        y: Their labels.
        count: The number of epochs.
        rate: The learning rate at first.
        seed: The order of the images and what is done to them follow from it.
        kept: A file in which the training is kept after each epoch, and from which it goes on; removed at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=1e-4)
    steps = count * math.ceil(len(x) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if kept is not None and kept.exists():
        state = torch.load(kept, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        done = state["done"]
    for epoch in range(done, count):
        model.train()
        for i in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(augmented(x[i], generator)), y[i]).backward()
            optimizer.step()
            schedule.step()
        if kept is not None:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**states, "generator": generator.get_state(), "done": epoch + 1}, kept)
        yield epoch + 1
    if kept is not None:
        kept.unlink(missing_ok=True)
    model.eval()
