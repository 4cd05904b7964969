"""The user's own data for the command line: tables, arrays, images, and what functions return."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from plasticnet.apps.loading import read_batches
from plasticnet.apps.own_data import Reading
from plasticnet.errors import PlasticError

HOW = Reading()


def joined(batches: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)


def test_arrays(tmp_path: Path) -> None:
    x, y = np.random.default_rng(0).normal(size=(10, 3, 2)), np.arange(10) % 3
    np.savez(tmp_path / "both.npz", x=x, y=y)
    found, labels = joined(read_batches(str(tmp_path / "both.npz"), HOW))
    torch.testing.assert_close(found, torch.from_numpy(x).float())
    assert labels.tolist() == y.tolist()
    np.savez(tmp_path / "one.npz", images=x.astype(np.float32))
    batches = list(read_batches(str(tmp_path / "one.npz"), HOW, 4))
    assert [len(b) for b in batches] == [4, 4, 2]
    for arrays, message in (
        ({"a": x, "b": y}, "must be named x"),
        ({"x": x, "y": y[:3]}, "10 rows, and y has 3"),
        ({"x": np.zeros((0, 3))}, "not a single input"),
        ({"x": np.array([{}], dtype=object)}, "allow_pickle"),
        ({"x": np.array(["a", "b"])}, "x does not hold numbers"),
        ({"x": np.array(3.0)}, "no rows"),
        ({"x": x, "y": np.array(3.0)}, "y has none"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(PlasticError, match=message):
            read_batches(str(tmp_path / "bad.npz"), HOW)
    np.savez(tmp_path / "named.npz", x=x, y=np.array(["dog", "cat"] * 5))
    assert joined(read_batches(str(tmp_path / "named.npz"), HOW))[1].tolist() == [1, 0] * 5
    whole = (tmp_path / "named.npz").read_bytes()
    for damaged in (b"no archive", b"", whole[:100], whole[: len(whole) // 2] + whole[len(whole) // 2 + 9 :]):
        (tmp_path / "broken.npz").write_bytes(damaged)
        with pytest.raises(PlasticError, match=r"broken\.npz: (it is no|the array . is damaged)"):
            read_batches(str(tmp_path / "broken.npz"), HOW)
    np.save(tmp_path / "single.npy", x)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(PlasticError, match=r"single\.npz: it is no \.npz file"):
        read_batches(str(tmp_path / "single.npz"), HOW)
    with pytest.raises(PlasticError, match="there is no such file or folder"):
        read_batches(str(tmp_path / "nowhere"), HOW)


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a, b,kind\n1,2.5,cat\n3,4,dog\n5,6,cat\n")
    x, y = joined(read_batches(str(path), Reading(target="kind"), 2))
    assert x.tolist() == [[1, 2.5], [3, 4], [5, 6]]
    assert y.tolist() == [0, 1, 0]
    path.write_text("a;b\n1;2.5\n3;4\n")
    (only,) = read_batches(str(path), HOW)
    assert only.shape == (2, 2)
    x, y = joined(read_batches(str(path), Reading(target="b")))
    assert y.dtype == torch.float32
    assert y.tolist() == [2.5, 4]
    for text, how, message in (
        ("a,b\n1,x\n", HOW, "column 'b' does not hold numbers only"),
        ("a,b\n1,\n", HOW, "column 'b' has gaps"),
        ("a,b\n1,2\n1\n", HOW, "line 3 has not 2 columns"),
        ("a,b\n", HOW, "the table has no rows"),
        ("a,b,a\n1,2,3\n", HOW, "the name 'a' stands over 2 columns"),
        ("a,b\n1,2\n", Reading(target="c"), "--target c: there is no such column, only a, b"),
        ("a,b\n1,2\n", Reading(ignore=("c",)), "--ignore c: there is no such column, only a, b"),
        ("a,b\n1,2\n", Reading(image_size=3), "--image-size says nothing about"),
        ("a\n1\n", Reading(target="a"), "no column beside the target"),
        ("0.5,-1.25\n1,2\n", HOW, "a head with the names"),
    ):
        path.write_text(text)
        with pytest.raises(PlasticError, match=message):
            read_batches(str(path), how)
    with pytest.raises(PlasticError, match="--batch 0"):
        read_batches(str(path), HOW, 0)
    with pytest.raises(PlasticError, match=r"--std 0\.0"):
        Reading(std=0.0)


def picture(path: Path, size: int = 6, mode: str = "RGB", value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size), value if mode == "L" else (value, 0, 255)).save(path)


def test_folders_of_images(tmp_path: Path) -> None:
    for name in ("cats/1.png", "cats/2.png", "dogs/1.PNG"):
        picture(tmp_path / name)
    x, y = joined(read_batches(str(tmp_path), Reading(mean=0.5, std=0.5)))
    assert x.shape == (3, 3, 6, 6)
    assert y.tolist() == [0, 0, 1]
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([100 / 255, 0, 1]) * 2 - 1)
    picture(tmp_path / "dogs" / "large.png", size=9)
    with pytest.raises(PlasticError, match="2 sizes, such as 6 by 6 and 9 by 9: train with --image-size"):
        read_batches(str(tmp_path), HOW)
    x, y = joined(read_batches(str(tmp_path), Reading(image_size=4)))
    assert x.shape == (4, 3, 4, 4)
    picture(tmp_path / "plain" / "a.png", mode="L")
    (batch,) = read_batches(str(tmp_path / "plain"), HOW)
    assert batch.shape == (1, 1, 6, 6)
    (tmp_path / "plain" / "b.png").write_bytes(b"no image")
    with pytest.raises(PlasticError, match=r"b\.png: it is no image, or damaged"):
        read_batches(str(tmp_path / "plain"), HOW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PlasticError, match="no images"):
        read_batches(str(tmp_path / "empty"), HOW)


def test_images_that_are_cut_off_or_bloated(tmp_path: Path) -> None:
    picture(tmp_path / "whole.png", size=40)
    content = (tmp_path / "whole.png").read_bytes()
    for damaged in (content[: len(content) // 2], content[:60] + b"\0" * 20 + content[80:], b""):
        (tmp_path / "whole.png").write_bytes(damaged)
        with pytest.raises(PlasticError, match=r"whole\.png: it is .*damaged.*: mend it, or remove it"):
            read_batches(str(tmp_path), HOW)


def test_grey_and_coloured_images(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", mode="L", value=51)
    picture(tmp_path / "b.png", value=51)
    (x,) = read_batches(str(tmp_path), HOW)
    assert x.shape == (2, 3, 6, 6)
    assert x[0].unique().tolist() == [pytest.approx(0.2)]  # the grey one has three equal channels
    (x,) = read_batches(str(tmp_path), Reading(channels=1))
    assert x.shape == (2, 1, 6, 6)
    (tmp_path / "b.png").unlink()
    (x,) = read_batches(str(tmp_path), Reading(channels=3))
    assert x.shape == (1, 3, 6, 6)
    with pytest.raises(PlasticError, match="--channels 2: 1 for grey, or 3 for colour"):
        Reading(channels=2)


@pytest.mark.parametrize("how", [HOW, Reading(image_size=4), Reading(channels=3)])
def test_sixteen_bits_are_not_clipped(tmp_path: Path, how: Reading) -> None:
    Image.fromarray(np.full((4, 4), 13107, np.uint16)).save(tmp_path / "deep.png")
    (x,) = read_batches(str(tmp_path), how)
    assert x.shape == (1, how.channels or 1, 4, 4)
    torch.testing.assert_close(x, torch.full_like(x, 13107 / 65535))


@pytest.mark.parametrize("mode", ["1", "LA"])
def test_other_grey_images_have_one_channel(tmp_path: Path, mode: str) -> None:
    Image.new("L", (5, 5), 255).convert(mode).save(tmp_path / "a.png")
    (x,) = read_batches(str(tmp_path), HOW)
    assert x.shape == (1, 1, 5, 5)
    assert (x == 1).all()


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": [1.0, 2.0], "b": [3, 4], "y": ["n", "m"]}), tmp_path / "t.parquet")
    x, y = joined(read_batches(str(tmp_path / "t.parquet"), Reading(target="y")))
    assert x.tolist() == [[1, 3], [2, 4]]
    assert y.tolist() == [1, 0]
    picture(tmp_path / "one.png")
    encoded = (tmp_path / "one.png").read_bytes()
    images = {"img": [{"bytes": encoded, "path": None}] * 3, "label": [2, 0, 1]}
    parquet.write_table(pyarrow.table(images), tmp_path / "i.parquet")
    x, y = joined(read_batches(str(tmp_path / "i.parquet"), HOW))
    assert x.shape == (3, 3, 6, 6)
    assert y.tolist() == [2, 0, 1]
    with pytest.raises(PlasticError, match="--target c: there is no such column"):
        read_batches(str(tmp_path / "i.parquet"), Reading(target="c"))
    # The name of a column is damaged, which pyarrow notices only when somebody asks for it.
    parquet.write_table(pyarrow.table({"size": [1.0]}), tmp_path / "name.parquet", store_schema=False)
    (tmp_path / "name.parquet").write_bytes((tmp_path / "name.parquet").read_bytes().replace(b"size", b"\x84ize"))
    with pytest.raises(PlasticError, match=r"name\.parquet"):
        read_batches(str(tmp_path / "name.parquet"), Reading())
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(PlasticError, match=r"bad\.parquet"):
        read_batches(str(tmp_path / "bad.parquet"), HOW)


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_batches.py").write_text(
        "import torch\ndef good(): return [torch.ones(3, 2)]\n"
        "def pair(): return torch.ones(3, 2), torch.arange(3)\ndef once(): return iter([1])\ndef fails(): 1 / 0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert read_batches("own_batches:good", HOW)[0].shape == (3, 2)  # pyright: ignore[reportIndexIssue]
    ((x, y),) = read_batches("own_batches:pair", HOW)
    assert (x.shape, y.tolist()) == ((3, 2), [0, 1, 2])
    for source, message in (
        ("own_batches:once", "only once"),
        ("own_batches:fails", "ZeroDivisionError"),
        ("own_batches:nothing", "AttributeError"),
        ("no_such_package:f", "ModuleNotFoundError"),
        ("nothing", "PACKAGE:FUNCTION"),
        ("nothing.csv", "no such file"),
    ):
        with pytest.raises(PlasticError, match=message):
            read_batches(source, HOW)
    sys.modules.pop("own_batches", None)


def test_known_data() -> None:
    x, y = joined(read_batches("digits", HOW))
    assert x.shape == (1077, 1, 8, 8)
    assert len(y) == 1077
