"""The checkpoints of a run: which are kept, and which one a run goes on from when some are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plasticnet import Budget, PlasticError, load_checkpoint
from plasticnet.apps.checkpoints import Checkpoints
from plasticnet.apps.data import Data, Split, load_data
from plasticnet.apps.loop import Result, train_run
from plasticnet.apps.models import MLP
from plasticnet.apps.settings import Config, Mode
from plasticnet.apps.stopping import Interrupted, Stop

CONFIG = Config(epochs=6, price=0.3, batch=16, lr=3e-3, gate_lr=6e-2, start=2)
BUDGET = replace(CONFIG, price=0.0, budget=Budget(params=0.6))
LOSS = replace(CONFIG, price=0.0, budget=Budget(loss=0.1))
STEPS = 10  # of an epoch
DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x55" + path.read_bytes()[-8:]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.fixture(scope="module")
def data() -> Data:
    torch.set_num_threads(1)
    moons = load_data("moons")
    return Data(Split(moons.train.x[:160], moons.train.y[:160]), moons.val, moons.test)


def train(data: Data, config: Config, mode: Mode, **options: Any) -> Result:
    torch.manual_seed(0)
    return train_run(MLP([100, 8, 5, 2]), data, config, mode, **options)


class StopAt(Stop):
    """Asks to stop after so many steps, as a signal does."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def signal(self) -> int | None:  # type: ignore[override]
        self.left -= 1
        return 15 if self.left == 0 else None

    def check(self) -> None:
        if self.left == 0:
            raise Interrupted(15)


def equal(first: Result, second: Result) -> bool:
    a, b = first.net.state_dict(), second.net.state_dict()
    return a.keys() == b.keys() and all(torch.equal(v, b[n]) for n, v in a.items())


# -- within an epoch ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:growth has ended before it began")
@pytest.mark.parametrize("config", [CONFIG, BUDGET, LOSS], ids=["price", "params", "loss"])
@pytest.mark.parametrize("mode", ["dense", "prune", "grow"])
def test_a_run_that_stops_within_epochs_ends_as_one_that_never_stops(
    mode: Mode, config: Config, data: Data, tmp_path: Path
) -> None:
    """At the first step, at the last one of an epoch, in the middle, again and again, and in every stage."""
    whole_records: list[dict[str, Any]] = []
    whole = train(data, config, mode, on_epoch=whole_records.append)
    checkpoint, stops = tmp_path / "checkpoint", 0
    for steps in (1, STEPS - 1, 1, 14, 3, 7, 11):
        torch.manual_seed(99)  # what was drawn before must not matter
        with pytest.raises(Interrupted):
            train(data, config, mode, checkpoint=checkpoint, resume=True, stop=StopAt(steps))
        stops += steps
        saved = load_checkpoint(checkpoint)
        assert len(saved["history"]) == (stops - 1) // STEPS
        assert saved["place"]["step"] == (stops - 1) % STEPS + 1
    records: list[dict[str, Any]] = []
    again = train(data, config, mode, checkpoint=checkpoint, resume=True, on_epoch=records.append)
    assert equal(again, whole)
    assert [r["loss"] for r in records] == [r["loss"] for r in whole_records]
    assert [r["val_loss"] for r in records] == [r["val_loss"] for r in whole_records]
    assert all(r["cpu_seconds"] > 0 for r in records)


def test_long_epochs_are_saved_within(data: Data, tmp_path: Path) -> None:
    places: list[int | None] = []
    write = Checkpoints.write

    def noting(checkpoints: Checkpoints, state: Any, *, best: bool) -> None:
        places.append(None if state["place"] is None else state["place"]["step"])
        write(checkpoints, state, best=best)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "write", noting)
        train(data, replace(CONFIG, epochs=1), "dense", checkpoint=tmp_path / "checkpoint", seconds=0)
        assert places == [*range(1, STEPS + 1), None]
        places.clear()
        train(data, replace(CONFIG, epochs=2), "dense", checkpoint=tmp_path / "other")
        assert places == [None, None]  # by default they are not as long as that


# -- what is kept -------------------------------------------------------------------------------


def test_the_last_two_and_the_best_are_kept(data: Data, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = []
    train(data, CONFIG, "prune", checkpoint=tmp_path / "c.safetensors", on_epoch=records.append)
    epochs = {path.name: len(load_checkpoint(path)["history"]) for path in tmp_path.iterdir()}
    losses = [r["val_loss"] for r in records]
    assert epochs == {
        "c.safetensors": 6, "c-before.safetensors": 5, "c-best.safetensors": losses.index(min(losses)) + 1,
    }  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_goes_on_from_the_checkpoint_before(
    damage: str, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, path = train(data, CONFIG, "prune"), tmp_path / "checkpoint"
    with pytest.raises(Interrupted):
        train(data, CONFIG, "prune", checkpoint=path, stop=StopAt(3 * STEPS + 4), seconds=1000)
    DAMAGE[damage](path)
    capsys.readouterr()
    seen: list[int] = []

    def on_epoch(record: dict[str, Any]) -> None:
        seen.append(record["epoch"])
        if len(seen) == 4:
            raise RuntimeError  # after the first checkpoint since

    with pytest.raises(RuntimeError):
        train(data, CONFIG, "prune", checkpoint=path, resume=True, on_epoch=on_epoch)
    (line,) = capsys.readouterr().out.splitlines()
    assert str(path) in line
    assert f"going on from {path}-before" in line
    assert len(load_checkpoint(Path(f"{path}-before"))["history"]) == 3  # the damaged one has not taken its place
    assert equal(train(data, CONFIG, "prune", checkpoint=path, resume=True), whole)
    assert capsys.readouterr().out == ""


def test_the_best_one_is_better_than_nothing(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, path = train(data, CONFIG, "prune"), tmp_path / "checkpoint"
    train(data, CONFIG, "prune", checkpoint=path)
    for name in ("checkpoint", "checkpoint-before"):
        DAMAGE["cut off"](tmp_path / name)
    capsys.readouterr()
    assert equal(train(data, CONFIG, "prune", checkpoint=path, resume=True), whole)
    assert f"going on from {path}-best" in capsys.readouterr().out


def test_where_none_can_be_read_all_are_named(data: Data, tmp_path: Path) -> None:
    train(data, replace(CONFIG, epochs=3), "prune", checkpoint=tmp_path / "checkpoint")
    names = sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        DAMAGE["flipped"](tmp_path / name)
    with pytest.raises(PlasticError, match="to start this run anew") as caught:
        train(data, replace(CONFIG, epochs=3), "prune", checkpoint=tmp_path / "checkpoint", resume=True)
    assert all(name in str(caught.value) for name in names)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_process_that_is_killed_while_names_change(
    stopped: int, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The new one is there under another name, and the run goes on from it."""
    whole, path = train(data, CONFIG, "prune"), tmp_path / "checkpoint"
    calls: list[int] = []

    def killed(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2 * 2 + stopped:  # the first epoch has one, the second two, and this is in the fourth
            raise KeyboardInterrupt
        original(*args)

    from plasticnet.apps import checkpoints

    original = checkpoints.move_file
    monkeypatch.setattr(checkpoints, "move_file", killed)
    with pytest.raises(KeyboardInterrupt):
        train(data, CONFIG, "prune", checkpoint=path)
    monkeypatch.undo()
    assert (tmp_path / "checkpoint-next").exists()
    assert path.exists() == (stopped == 2)
    capsys.readouterr()
    seen: list[int] = []
    again = train(data, CONFIG, "prune", checkpoint=path, resume=True, on_epoch=lambda r: seen.append(r["epoch"]))
    assert equal(again, whole)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().out == ""  # nothing was lost
    assert not (tmp_path / "checkpoint-next").exists()


def test_a_checkpoint_of_before_places_goes_on(data: Data, tmp_path: Path) -> None:
    """Those that earlier versions wrote do not say where in an epoch they stand, since they stand before one."""
    from plasticnet import save_checkpoint

    path = tmp_path / "checkpoint"
    train(data, CONFIG, "dense", checkpoint=path)
    saved = load_checkpoint(Path(f"{path}-before"))
    del saved["place"]
    save_checkpoint(saved, tmp_path / "old")
    assert equal(train(data, CONFIG, "dense", checkpoint=tmp_path / "old", resume=True), train(data, CONFIG, "dense"))
    assert json.dumps(saved["history"])  # plain data
