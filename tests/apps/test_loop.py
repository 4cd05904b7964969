"""The reference loop: a resumed run is the uninterrupted one; stages, evaluation and timing."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plasticnet import Budget, PlasticError, load, save, save_checkpoint
from plasticnet.apps import loop
from plasticnet.apps.data import Data, Split, load_data
from plasticnet.apps.loop import Result, time_per_thousand, train_run
from plasticnet.apps.models import MLP
from plasticnet.apps.scores import evaluate
from plasticnet.apps.settings import Config, Mode

# Small batches, so that growth decides within the few epochs; strong pressure, so that pruning does.
CONFIG = Config(epochs=12, price=0.3, batch=8, lr=3e-3, gate_lr=3e-2, inputs=("1",), start=2)
RUNS: dict[Mode, tuple[Config, list[int]]] = {
    "prune": (CONFIG, [100, 16, 8, 2]),
    # Grows, then stops, then is priced.
    "grow": (
        replace(CONFIG, epochs=15, batch=4, inputs=(), lr=1e-2, gate_lr=6e-2, price=0.016),
        [100, 3, 3, 2],  # so few units that a batch may not show whether gates can be drawn per sample
    ),
}


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def data() -> Data:
    torch.set_num_threads(1)  # sums depend on it; the fixture of each test comes too late for those of the module
    moons = load_data("moons")
    return Data(Split(moons.train.x[:160], moons.train.y[:160]), moons.val, moons.test)


def model(mode: Mode = "prune") -> nn.Module:
    torch.manual_seed(0)
    return MLP(RUNS[mode][1])


def timeless(record: Any) -> Any:
    """Without what was timed, wherever it lies: ..._seconds, ...milliseconds, ms_..."""
    if isinstance(record, list):
        return [timeless(r) for r in record]
    if isinstance(record, dict):
        return {k: timeless(v) for k, v in record.items() if "seconds" not in k and not k.startswith("ms_")}
    return record


@pytest.fixture(scope="module")
def whole(data: Data) -> dict[str, tuple[Result, list[dict[str, Any]]]]:
    runs: dict[str, tuple[Result, list[dict[str, Any]]]] = {}
    for mode in RUNS:
        seen: list[dict[str, Any]] = []
        runs[mode] = train_run(model(mode), data, RUNS[mode][0], mode, on_epoch=seen.append), seen
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["prune", "grow"])
def test_resuming_equals_never_stopping(mode: Mode, data: Data, whole: dict, tmp_path: Path) -> None:
    result, history = whole[mode]
    assert sum(r["cut"] for r in history) > 0  # or the test would say little
    assert (sum(r["grown"] for r in history) > 0) is (mode == "grow")
    torch.manual_seed(99)  # what was drawn before must not matter
    checkpoint = tmp_path / "checkpoint"
    for stop in (1, 5, 9, RUNS[mode][0].epochs):  # again and again

        def on_epoch(record: dict[str, Any], stop: int = stop) -> None:
            if record["epoch"] == stop:
                raise Interrupted

        with pytest.raises(Interrupted):
            train_run(model(mode), data, RUNS[mode][0], mode, on_epoch=on_epoch, checkpoint=checkpoint, resume=True)
    seen: list[dict[str, Any]] = []
    again = train_run(model(mode), data, RUNS[mode][0], mode, on_epoch=seen.append, checkpoint=checkpoint, resume=True)
    assert [timeless(r) for r in seen] == [timeless(r) for r in history]
    assert timeless(again.summary) == timeless(result.summary)
    a, b = again.net.state_dict(), result.net.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[n]) for n, v in a.items())
    assert torch.equal(again.compact(data.test.x), result.compact(data.test.x))


def test_a_run_is_decided_by_its_seed(data: Data, whole: dict) -> None:
    config = replace(CONFIG, epochs=3)
    first, second, other = (train_run(model(), data, replace(config, seed=s), "prune").summary for s in (0, 0, 1))
    assert timeless(first) == timeless(second)
    assert timeless(first) != timeless(other)


def test_dense_runs_are_ordinary_training_whose_rate_falls_at_the_end(data: Data) -> None:
    config = replace(CONFIG, epochs=8)
    result = train_run(model(), data, config, "dense").compact
    plain = model()
    torch.manual_seed(config.seed)
    optimizer = torch.optim.Adam(plain.parameters(), config.lr)
    for share in (1, 1, 1, 1, 1, 1, 1, 0.5):
        optimizer.param_groups[0]["lr"] = share * config.lr
        plain.train()
        for i in torch.randperm(len(data.train)).split(config.batch):
            optimizer.zero_grad()
            F.cross_entropy(plain(data.train.x[i]), data.train.y[i]).backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), result.parameters(), strict=True))


def test_without_resume_it_starts_anew(data: Data, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    config = replace(CONFIG, epochs=3)
    train_run(model(), data, config, "dense", checkpoint=checkpoint)
    for resume, expected in ((False, [0, 1, 2, 3]), (True, [0, 1, 2, 3])):
        seen = [0]
        train_run(model(), data, config, "dense", checkpoint=checkpoint, resume=resume,
            on_epoch=lambda r, seen=seen: seen.append(r["epoch"]))  # fmt: skip
        assert seen == expected


@pytest.mark.parametrize("mode", ["prune", "grow"])
def test_results(mode: Mode, data: Data, whole: dict, tmp_path: Path) -> None:
    result, history = whole[mode]
    assert [r["epoch"] for r in history] == list(range(1, RUNS[mode][0].epochs + 1))
    stages = RUNS[mode][0].stages(mode)
    assert [float(r["k"]) for r in history] == [s.k for s in stages for _ in range(s.epochs)]
    assert all(sum(r["histogram"]) == sum(r["units"].values()) or r["k"] == 7.0 for r in history)
    summary = result.summary
    assert summary["parameters"] == sum(p.numel() for p in result.compact.parameters()) == history[-1]["parameters"]
    assert summary["peak_parameters"] == max(r["parameters"] for r in history)
    assert math.isinf(result.net.k)
    assert not result.net.training
    assert evaluate(result.compact, data.test) == pytest.approx((summary["test_loss"], summary["test_score"]))
    assert evaluate(result.net, data.val)[1] == summary["val_score"] == history[-1]["val_score"]
    save(result.compact, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", lambda: model(mode))(data.test.x), result.compact(data.test.x))


@pytest.mark.parametrize("mode", ["prune", "grow"])
def test_profiles(mode: Mode, whole: dict) -> None:
    result, history = whole[mode]
    before, after = result.summary["profile"]["before"], result.summary["profile"]["after"]
    assert before["parameters"] == sum(p.numel() for p in model(mode).parameters())
    assert (after["parameters"], after["macs"]) == (result.summary["parameters"], result.summary["macs"])
    assert before["batch"] == after["batch"] == RUNS[mode][0].batch
    assert 0 < after["peak_bytes"] < math.inf  # a Take copies what it selects of the input, so it may be more
    assert 0 < after["kept_bytes"] < math.inf
    during = {r["epoch"]: r["profile"] for r in history if "profile" in r}
    assert list(during) == list(range(1, len(history) + 1, 2))  # ten at most
    assert (during[1]["parameters"] < before["parameters"]) is (mode == "grow")
    for previous, record in pairwise(history):
        if record["epoch"] in during:  # as the epoch before left it: with what is closed and not yet cut
            found = during[record["epoch"]]
            assert found["parameters"] >= previous["parameters"]
            assert found["parameters"] == previous["parameters"] or previous["k"] != "inf"
            assert found["macs"] >= previous["macs"]
    for found in (*during.values(), after):
        assert [row["name"].removesuffix(".1") for row in found["rows"]] == [row["name"] for row in before["rows"]]


def test_profiling_does_not_count_as_training(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    profiled: list[nn.Module] = []

    def slow(module: nn.Module, *_: Any) -> dict[str, Any]:
        now[0] += 1000
        profiled.append(module)
        return {}

    monkeypatch.setattr(loop, "profile_dict", slow)
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    result = train_run(model(), data, replace(CONFIG, epochs=3), "prune")
    assert len(profiled) == 1 + 3 + 1
    assert result.summary["train_cpu_seconds"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", RUNS)
def test_a_budget_is_met_in_the_place_of_a_price(mode: Mode, data: Data) -> None:
    """Its shares are those of the model that was given, also when growing begins with less."""
    config, widths = RUNS[mode]
    full = sum(p.numel() for p in MLP(widths).parameters())
    result = train_run(model(mode), data, replace(config, price=0.0, budget=Budget(params=0.6), k_end=14.0), mode)
    assert 0.1 * full < result.summary["parameters"] <= 0.6 * full


def test_the_model_given_is_left_alone(data: Data) -> None:
    module = model()
    before = [p.detach().clone() for p in module.parameters()]
    train_run(module, data, replace(CONFIG, epochs=3), "grow")
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


# -- a checkpoint of something else -----------------------------------------------------------


@pytest.fixture(scope="module")
def finished(data: Data, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    checkpoint = tmp_path_factory.mktemp("train") / "checkpoint"
    train_run(model(), data, replace(CONFIG, epochs=4), "prune", checkpoint=checkpoint)
    return checkpoint.read_bytes()


def resumed(content: bytes, folder: Path, *args: Any) -> None:
    (folder / "checkpoint").write_bytes(content)
    train_run(*args, checkpoint=folder / "checkpoint", resume=True)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"k": 5.0}, {"inputs": ()}, {"lr": 1e-2}, {"epochs": 5}, {"estimator": "ar"}]
)
def test_another_configuration_is_refused(change: dict, data: Data, finished: bytes, tmp_path: Path) -> None:
    config = replace(CONFIG, **{"epochs": 4, **change})
    with pytest.raises(PlasticError, match="another configuration"):
        resumed(finished, tmp_path, model(), data, config, "prune")
    assert (tmp_path / "checkpoint").read_bytes() == finished


def test_another_mode_is_refused(data: Data, finished: bytes, tmp_path: Path) -> None:
    with pytest.raises(PlasticError):
        resumed(finished, tmp_path, model(), data, replace(CONFIG, epochs=4), "grow")


def test_another_model_is_refused(data: Data, finished: bytes, tmp_path: Path) -> None:
    with pytest.raises(PlasticError):
        resumed(finished, tmp_path, MLP([100, 20, 9, 2]), data, replace(CONFIG, epochs=4), "prune")


def test_a_checkpoint_of_something_else_is_refused(data: Data, tmp_path: Path) -> None:
    save_checkpoint({"net": {}}, tmp_path / "other")
    with pytest.raises(PlasticError, match="checkpoint"):
        resumed((tmp_path / "other").read_bytes(), tmp_path, model(), data, CONFIG, "prune")


def test_a_damaged_checkpoint_is_refused(data: Data, finished: bytes, tmp_path: Path) -> None:
    with pytest.raises(PlasticError, match="damaged"):
        resumed(finished[:-20], tmp_path, model(), data, replace(CONFIG, epochs=4), "prune")


# -- the parts --------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [3, 4, 10, 60, 150])
def test_stages_fill_the_epochs(epochs: int) -> None:
    for mode in ("dense", "prune", "grow"):
        stages = Config(epochs=epochs).stages(mode)
        assert sum(s.epochs for s in stages) == epochs
        kinds = [s.k for s in stages if s.epochs]
        assert kinds == ([math.inf] if mode == "dense" else [math.inf, 7.0, math.inf])


def test_the_default_stages() -> None:
    assert [s.epochs for s in Config(epochs=60).stages("prune")] == [3, 42, 15]


@pytest.mark.parametrize(("mode", "epochs"), [("dense", 0), ("prune", 0), ("prune", -3), ("prune", 2), ("grow", 1)])
def test_too_few_epochs(epochs: int, mode: Mode, data: Data) -> None:
    with pytest.raises(PlasticError, match="epochs"):
        train_run(model(), data, replace(CONFIG, epochs=epochs), mode)


@pytest.mark.parametrize(
    "change",
    [
        {"k": -1.0},
        {"k": math.nan},
        {"start": 0},
        {"estimator": "magic"},
        {"gates": "row"},
        {"cost": "flops"},
        {"price": -1.0},
        {"batch": 0},
        {"lr": -1.0},
    ],
)
def test_bad_configurations(change: dict[str, Any], data: Data) -> None:
    with pytest.raises(PlasticError):
        train_run(model(), data, replace(CONFIG, **{"epochs": 3, **change}), "grow")


class Fixed(nn.Module):
    """Answers class 1 with a margin; counts the rows and refuses training mode."""

    rows = 0

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.rows += len(x)
        return torch.tensor([0.0, 2.0]).expand(len(x), 2)


def test_evaluate() -> None:
    split = Split(torch.zeros(7, 3), torch.tensor([1, 1, 0, 1, 1, 0, 1]))
    module = Fixed()
    loss, accuracy = evaluate(module, split, batch=3)  # an incomplete last batch
    assert module.rows == 7
    assert accuracy == pytest.approx(5 / 7)
    assert loss == pytest.approx((5 * math.log(1 + math.exp(-2)) + 2 * math.log(1 + math.exp(2))) / 7)


class Busy(nn.Module):
    """Takes a given time, and more for the first call."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.shapes = seconds, []

    def forward(self, x: Tensor) -> Tensor:
        end = time.thread_time() + (self.seconds if self.shapes else 0.1)
        while time.thread_time() < end:
            pass
        self.shapes.append(tuple(x.shape))
        return x


def test_time_per_thousand() -> None:
    busy = Busy(0.005)
    assert time_per_thousand(busy, torch.zeros(300, 2, 5), repeats=5) == pytest.approx(5, abs=2)
    assert set(busy.shapes) == {(1000, 2, 5)}
    assert len(busy.shapes) == 6
    assert time_per_thousand(Busy(0.015), torch.zeros(2500, 3), repeats=3) == pytest.approx(15, abs=4)
