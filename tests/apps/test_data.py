"""Data sets: the geometry of the moons, splits that do not overlap, and what is missing."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from plasticnet import PlasticError
from plasticnet.apps.data import DATASETS, Data, load_data, moons


def everything(data: Data) -> tuple[Tensor, Tensor]:
    splits = (data.train, data.val, data.test)
    assert all(len(s) == len(s.x) == len(s.y) for s in splits)
    return torch.cat([s.x for s in splits]), torch.cat([s.y for s in splits])


def test_moons_are_two_arcs_in_a_plane_of_100_dimensions() -> None:
    data = load_data("moons", seed=3)
    assert (len(data.train), len(data.val), len(data.test), data.shape, data.outputs) == (400, 100, 500, (100,), 2)
    x, y = everything(data)
    assert y.bincount().tolist() == [500, 500]
    assert abs(data.train.y.float().mean() - 0.5) < 0.1
    values = torch.linalg.svdvals(x.double())
    assert values[1] > 1
    assert values[2] < 1e-4 * values[1]


def test_moons_lie_on_circles_of_radius_one() -> None:
    """The lift is orthonormal, so distances are those of the plane."""
    x, y = everything(moons(torch.Generator().manual_seed(1), noise=0.0))
    x = x.double()
    gram = torch.linalg.svd(x[y == 0], full_matrices=False).Vh[:2]  # the arc about the origin
    flat, other = x[y == 0] @ gram.T, x[y == 1] @ gram.T
    assert torch.allclose(flat.norm(dim=1), torch.ones(500).double(), atol=1e-5)
    # The other one: equally far from a centre, which lies on the first circle.
    equations = torch.cat([2 * other, torch.ones(500, 1).double()], 1)
    a, b, c = torch.linalg.lstsq(equations, other.pow(2).sum(1)[:, None]).solution[:, 0].tolist()
    assert math.hypot(a, b) == pytest.approx(1, abs=1e-4)
    assert math.sqrt(c + a * a + b * b) == pytest.approx(1, abs=1e-4)
    for points in (flat, other - torch.tensor([a, b]).double()):  # 270 degrees: a quarter is empty
        angles = torch.atan2(points[:, 1], points[:, 0]).sort().values
        gap = torch.diff(torch.cat([angles, angles[:1] + 2 * math.pi])).max()
        assert gap == pytest.approx(math.pi / 2, abs=0.1)


def test_moons_noise_is_on_the_radius() -> None:
    x, y = everything(moons(torch.Generator().manual_seed(1)))
    assert x[y == 0].norm(dim=1).std() == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize("name", ["moons", "digits"])
def test_the_seed_makes_the_data(name: str) -> None:
    state = torch.get_rng_state()
    a, b, c = (load_data(name, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.train.x, b.train.x)
    assert torch.equal(a.test.y, b.test.y)
    assert not torch.equal(a.train.x, c.train.x)


def test_digits_are_split_and_none_is_lost() -> None:
    from sklearn.datasets import load_digits

    data = load_data("digits")
    assert (len(data.train), len(data.val), len(data.test)) == (1077, 360, 360)
    assert (data.shape, data.outputs) == ((1, 8, 8), 10)
    x, y = everything(data)
    assert (x.min(), x.max()) == (-1, 1)
    original = load_digits()

    def rows(images: Tensor, labels: Tensor) -> list[tuple[float, ...]]:
        return sorted(map(tuple, torch.cat([images.flatten(1), labels[:, None].float()], 1).tolist()))

    whole = rows(torch.from_numpy(original.data).float() / 8 - 1, torch.from_numpy(original.target))
    assert rows(x, y) == whole
    assert len(set(whole)) == len(whole)  # so that equal rows in two splits would be a leak


def test_unknown_names() -> None:
    with pytest.raises(PlasticError, match=r"unknown data 'nope'.*digits, moons, mnist, fashion"):
        load_data("nope")
    assert set(DATASETS) == {"digits", "moons", "mnist", "fashion"}


def test_missing_mnist(tmp_path: Path) -> None:
    for name, kind in (("mnist", "MNIST"), ("fashion", "FashionMNIST")):
        with pytest.raises(PlasticError, match=f"--data-dir, the folder that holds {kind}/raw"):
            load_data(name)
        with pytest.raises(PlasticError, match=f"no {kind} in {tmp_path}"):
            load_data(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x00\x00\x08\x03" + bytes([0, 0, 0, 5, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(99), id="truncated"),
        *[pytest.param(content, id=name) for name, content in (("empty", b""), ("of another format", b"abcdefgh" * 9))],
    ],
)
def test_damaged_mnist(content: bytes, tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (raw / f"{part}-{kind}-ubyte").write_bytes(content)
    with pytest.raises(PlasticError, match=str(tmp_path)):
        load_data("mnist", tmp_path)


def test_real_mnist() -> None:
    folder = os.environ.get("PLASTICNET_DATA")
    if not folder:
        pytest.skip("set PLASTICNET_DATA to the folder that holds MNIST/raw")
    data = load_data("mnist", folder)
    assert (len(data.train), len(data.val), len(data.test)) == (55_000, 5_000, 10_000)
    assert (data.shape, data.outputs) == ((1, 28, 28), 10)
    assert abs(data.train.x.mean()) < 0.01
    assert data.train.x.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_images_in_the_layout_of_torchvision(name: str, kind: str, tmp_path: Path) -> None:
    """Of 5,010 images ten are left for training; a white pixel is as many deviations above the mean as the set says."""
    raw = tmp_path / kind / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 5010), ("t10k", 20)):
        size = count.to_bytes(4, "big")
        image = b"\x00\x00\x08\x03" + size + (28).to_bytes(4, "big") * 2 + b"\xff" * (28 * 28 * count)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(image)
        labels = bytes(i % 10 for i in range(count))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + size + labels)
    data = load_data(name, tmp_path)
    assert (len(data.train), len(data.val), len(data.test), data.shape) == (10, 5000, 20, (1, 28, 28))
    white = {"mnist": (1 - 0.1307) / 0.3081, "fashion": (1 - 0.2860) / 0.3530}[name]
    assert data.test.x.mean() == pytest.approx(white, rel=1e-4)
