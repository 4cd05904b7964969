"""The commands train and predict on the user's own data, as a user calls them."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from plasticnet import load
from plasticnet.apps.models import factory
from tests.kit.commands import fail, succeed

QUICK = ["--epochs", "6", "--batch", "32"]
GROWS = ["--epochs", "10", "--batch", "8"]  # growth judges units after 32 steps or more


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with data of the user's own."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 3)).astype(np.float32)
    colour = rng.choice(["red", "green", ""], 300)
    price = 1000 + 50 * (x[:, 0] - 2 * x[:, 1]) + 100 * (colour == "red")
    kind = np.where(price > 1030, "dear", "cheap")
    age = [f"{v:.3f}" if i % 7 else "" for i, v in enumerate(x[:, 0])]
    rows = zip(range(300), age, x[:, 1], x[:, 2], colour, price, kind, strict=True)
    with Path("own.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["key", "age", "b", "c", "colour", "price", "kind"], *rows])
    np.savez("own.npz", x=x, y=kind)
    Path("own_functions.py").write_text(
        "import numpy as np, torch\n"
        "def pair():\n    d = np.load('own.npz')\n    return d['x'], d['y']\n"
        "def batches():\n    x = torch.from_numpy(np.load('own.npz')['x'])\n"
        "    return [(part, part[:, 0] * 3 + 1) for part in x.split(64)]\n"
        "def small(num_classes=7):\n    return torch.nn.Sequential(\n"
        "        torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, num_classes))\n"
        "def wrong():\n    return small(1)\n"
    )
    sys.modules.pop("own_functions", None)


def summary(out: str = "run") -> dict[str, Any]:
    (found,) = json.loads(Path(out, "summary.json").read_text()).values()
    return found


def predictions(file: str) -> list[dict[str, str]]:
    with Path(file).open(newline="") as opened:
        return list(csv.DictReader(opened))


CSV = ["train", "--data", "own.csv", "--ignore", "key", "--out", "run", *QUICK]


def test_a_table_with_classes() -> None:
    """Of seven inputs: three numbers, where one has gaps, and two colours beside none."""
    text = succeed(*CSV, "--target", "kind", "--ignore", "price", "--model", "mlp:16-8")
    assert "classification of 'kind' into 2 classes (cheap, dear); --task says it" in text
    assert "6 epochs of 7 steps, batches of 32, on cpu" in text
    end = summary()
    assert (end["mode"], end["task"], end["score"]) == ("prune", "classification", "accuracy")
    assert end["test_score"] > 0.8
    assert f"accuracy {100 * end['test_score']:.2f} % on test" in text
    (line,) = (line for line in text.splitlines() if "prune = pn.load(" in line)
    names: dict[str, Any] = {}
    exec("import plasticnet as pn\nfrom plasticnet.apps.models import factory\n" + line.strip(), names)
    assert sum(p.numel() for p in names["prune"].parameters()) == end["parameters"]
    assert names["prune"](torch.zeros(2, 7)).shape == (2, 2)


def test_a_table_with_numbers_and_what_is_predicted() -> None:
    text = succeed(*CSV, "--target", "price", "--ignore", "kind", "--epochs", "30", "--start", "6")
    assert "regression of 'price', which is " in text
    end = summary()
    assert (end["mode"], end["task"], end["score"]) == ("grow", "regression", "R²")
    assert end["test_score"] > 0.8
    assert "root mean squared error of price: " in text
    assert "predict run --data new.csv" in text
    assert "written 300 predictions" in succeed("predict", "run", "--data", "own.csv", "--out", "all.csv")
    found = np.array([float(row["prediction"]) for row in predictions("all.csv")])
    price = np.array([float(row["price"]) for row in predictions("own.csv")])
    error = float(np.sqrt(np.mean((found - price) ** 2)))
    assert error == pytest.approx(end["test_rmse"], rel=0.7)  # in the unit of the price
    assert error < 0.5 * price.std()


@pytest.mark.slow
def test_predictions_are_those_of_the_network_for_each_row_by_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed(*CSV, "--target", "kind", "--ignore", "price", "--compare", "--model", "mlp:16-8", *GROWS)
    assert "name one of them" in fail(monkeypatch, capsys, "predict", "run", "--data", "own.csv")
    succeed("predict", "run", "--data", "own.csv", "--network", "dense", "--out", "all.csv")
    every = predictions("all.csv")
    assert set(every[0]) == {"prediction", "probability"}
    kinds = [row["kind"] for row in predictions("own.csv")]
    assert np.mean([row["prediction"] == kind for row, kind in zip(every, kinds, strict=True)]) > 0.8
    Path("new.csv").write_text("colour,c,b,age\nblue,0.1,0.2,0.3\n,0.1,0.2,\n")  # another order, and no target
    text = succeed("predict", "run", "--data", "new.csv", "--network", "dense")
    assert "the column 'colour' has 1 values that did not occur in training" in text
    assert len(predictions("predictions.csv")) == 2
    Path("new.csv").write_text("colour,c,b\nblue,0.1,0.2\n")
    assert "'age' is missing" in fail(monkeypatch, capsys, "predict", "run", "--data", "new.csv", "--network", "dense")


@pytest.mark.parametrize("source", ["own.npz", "own_functions:pair", "own.parquet", "photos", "own_functions:batches"])
def test_other_sources(source: str) -> None:
    options = ["--model", "mlp:8-6"]
    if source == "own.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = {"a": np.arange(200) / 100, "b": [None, 2.5] * 100, "y": [True, False] * 100}
        parquet.write_table(pyarrow.table(columns), source)
        options += ["--target", "y"]
    if source == "photos":
        for i in range(40):
            file = Path("photos", "cat" if i % 2 else "dog", f"{i}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (5 + i % 3, 5), 200 * (i % 2) + i).save(file)
        options += ["--image-size", "4", "--mean", "0.5", "--std", "0.5"]
    text = succeed("train", "--data", source, "--out", "run", *QUICK, *options)
    assert ("regression of 'y'" if source.endswith("batches") else "into 2 classes") in text
    assert summary()["parameters"] > 0
    if source == "photos":
        Image.open("photos/cat/1.png").convert("RGB").save("photos/cat/1.png")  # grey, as in training, once it is read
        succeed("predict", "run", "--data", "photos/cat")  # new images need no folders
        found = predictions("predictions.csv")
        assert {row["prediction"] for row in found} <= {"cat", "dog"}
        assert sorted(row["file"] for row in found) == sorted(p.name for p in Path("photos/cat").iterdir())


def test_predictions_replace_nothing_that_is_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    succeed("train", "--data", "own.npz", "--out", "run", *QUICK, "--model", "mlp:4-4")
    before = Path("own.npz").read_bytes(), Path("run/run.json").read_bytes()
    for out, message in (
        ("own.npz", "is --data, and would be replaced"),
        ("run/../own.npz", "is --data, and would be replaced"),
        ("run/run.json", "is a file of the run"),
        ("run", "is a folder"),
        ("no where/new.csv", "there is no folder no where"),
    ):
        assert message in fail(monkeypatch, capsys, "predict", "run", "--data", "own.npz", "--out", out)
    assert (Path("own.npz").read_bytes(), Path("run/run.json").read_bytes()) == before


def test_grey_images_for_a_model_of_colour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(12):
        file = Path("photos", "cat" if i % 2 else "dog", f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(file)
    Path("own_models.py").write_text(
        "from torch import nn\ndef colour(num_classes=7):\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), "
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))\n"
    )
    args = ["train", "--data", "photos", "--out", "run", *QUICK, "--model", "own_models:colour"]
    text = fail(monkeypatch, capsys, *args)
    assert "does not take inputs of the shape (1, 8, 8): --channels 3 makes grey images coloured" in text
    assert not Path("run").exists()
    succeed(*args, "--channels", "3")
    succeed("predict", "run", "--data", "photos")  # grey images again
    assert len(predictions("predictions.csv")) == 12


def test_a_price_that_leaves_nothing_is_told() -> None:
    args = ["train", "--data", "own.npz", *QUICK, "--model", "mlp:8-6"]
    assert "the price of 1000 has left a single unit in 1, 3; a smaller --price" in succeed(*args, "--price", "1000")
    assert "--price" not in succeed(*args, "--price", "0", "--out", "large")


def test_a_factory_gets_the_number_of_classes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "--data", "own.npz", "--out", "run", *QUICK, "--model"]
    assert "own_functions:small is built with num_classes=2" in succeed(*args, "own_functions:small")
    line = fail(monkeypatch, capsys, *args, "own_functions:wrong", "--overwrite", "--dense")
    assert "returns (2, 1) for two inputs, and (2, 2) is needed for a classification" in line


# -- a run.json ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--model", "mlp:8-6"], GROWS], ids=["prune", "grow"])
def test_a_run_can_be_run_again(options: list[str]) -> None:
    succeed(*CSV, "--target", "price", *options)
    (mode,) = json.loads(Path("run/summary.json").read_text())
    written = json.loads(Path("run/run.json").read_text())
    del written["record"]
    Path("copy.json").write_text(json.dumps(written))
    for number, file in enumerate(("run/run.json", "copy.json")):
        succeed("train", "--config", file, "--out", f"again{number}")
        name = f"{mode}/compact.safetensors"
        assert Path(f"again{number}", name).read_bytes() == Path("run", name).read_bytes()
        assert Path(f"again{number}/prepared.json").read_bytes() == Path("run/prepared.json").read_bytes()
    before = Path("run", mode, "compact.safetensors").read_bytes()
    Path("run/summary.json").unlink()
    succeed("train", "--config", "run/run.json", "--out", "run", "--resume")
    assert Path("run", mode, "compact.safetensors").read_bytes() == before


def test_what_a_config_may_not_say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    succeed(*CSV, "--target", "price", "--model", "mlp:8-6")
    again = ["train", "--config", "run.json", "--out", "new"]
    content = json.loads(Path("run/run.json").read_text())
    for change, message in (
        ({"modell": "mlp"}, "run.json does not hold the settings of a run: the field 'modell' is not known"),
        ({"config": {**content["config"], "lr": "fast"}}, "config.lr is 'fast', and must be a number"),
    ):
        Path("run.json").write_text(json.dumps({**content, **change}))
        assert message in fail(monkeypatch, capsys, *again)
    Path("run.json").write_text(json.dumps(content))
    line = fail(monkeypatch, capsys, *again, "--lr", "0.1", "--growth")
    assert "leave out --lr, --growth, or change a copy" in line
    assert "missing.json cannot be read" in fail(monkeypatch, capsys, "train", "--config", "missing.json")
    assert not Path("new").exists()


def test_other_data_under_the_same_name_are_not_resumed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*CSV, "--target", "price", "--model", "mlp:8-6"]
    succeed(*run)
    assert "target: price then, c now" in fail(monkeypatch, capsys, *run[:-4], "--target", "c", *run[-2:], "--resume")
    text = Path("own.csv").read_text().replace("red", "green", 20)
    Path("own.csv").write_text(text)
    assert "content of the data" in fail(monkeypatch, capsys, *run, "--resume")


# -- inspect, export, shrink ----------------------------------------------------------------------


def test_the_shape_is_that_of_the_data() -> None:
    succeed(*CSV, "--target", "kind", "--ignore", "price", "--model", "mlp:16-8")
    table = ["--data", "own.csv", "--target", "kind", "--ignore", "price", "--ignore", "key"]
    saved = "run/prune/compact.safetensors"
    assert "any batch size" in succeed("export", saved, "--model", "mlp:16-8", *table, "--out", "small.pt2")
    small = load(saved, factory("mlp:16-8", (7,), 2))
    x = torch.randn(3, 7)
    torch.testing.assert_close(torch.export.load("small.pt2").module()(x), small(x))
    found = json.loads(succeed("inspect", "mlp:16-8", *table, "--sensitivity", "--weights", saved, "--json"))
    assert found["sensitivity"]["loss"] == pytest.approx(
        json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])["val_loss"], rel=1e-4
    )
    assert json.loads(succeed("inspect", "mlp:4", "--data", "own.npz", "--json"))["parameters"] == 4 * 4 + 5 * 2


def test_a_trained_network_is_shrunk_with_the_preparation_of_its_table() -> None:
    succeed(*CSV, "--target", "kind", "--ignore", "price", "--model", "mlp:16-8", "--dense")
    model = load("run/dense/compact.safetensors", factory("mlp:16-8", (7,), 2))
    torch.save(model.state_dict(), "trained.pt")
    shrink = ["shrink", "mlp:16-8", "--weights", "trained.pt", "--data", "own.csv", "--ignore", "key"]
    options = ["--target", "kind", "--ignore", "price", "--budget", "macs=0.7", "--like", "run"]
    assert "written" in succeed(*shrink, *options, "--loss", "cross-entropy", "--epochs", "1", "--out", "small")


# -- devices --------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")
def test_on_cuda() -> None:
    args = [*CSV, "--target", "kind", "--ignore", "price", "--compare", "--model", "mlp:16-8", *GROWS]
    args += ["--device", "auto"]
    assert "on cuda" in succeed(*args)
    assert json.loads(Path("run/run.json").read_text())["device"] == "cuda"
    shutil.rmtree("run/grow")
    succeed(*args, "--resume")
    small = load("run/grow/compact.safetensors", factory("mlp:16-8", (7,), 2))
    assert small(torch.zeros(2, 7)).shape == (2, 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "torch finds no such device here" in fail(monkeypatch, capsys, *CSV, "--device", "cuda")
