"""Fits that are stopped and go on, and averages of weights, in Lightning on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning.pytorch", reason="lightning is not installed: see `make integrations`")
pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed: see `make integrations`")

import lightning.pytorch as L

import plasticnet as pn
from plasticnet.lightning import PlasticCallback
from tests.integrations import task
from tests.integrations.kit_lightning import EPOCHS, Module, Scheduled, Stop, begin, checkpoints, fit, resumed

pytestmark = [
    pytest.mark.integration("Lightning", 1),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
]


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 5, 7, 9])
@pytest.mark.parametrize("at_the_end", [False, True], ids=["after validation", "after the epoch"])
def test_resumed(epoch: int, at_the_end: bool, tmp_path: Path) -> None:
    """A fit that was stopped and goes on ends in the same network to the bit, before and after cuts."""
    whole, went_on = resumed(
        tmp_path, epoch, lambda: checkpoints(tmp_path, save_on_train_epoch_end=at_the_end), Scheduled
    )
    task.assert_same_state(whole.net, went_on.net)
    task.assert_pruned(went_on.net)


@pytest.mark.slow
def test_resumed_growth(tmp_path: Path) -> None:
    """A fit that grows by its validation loss goes on to the bit: the state holds that loss."""

    def callback() -> PlasticCallback:
        return PlasticCallback(
            task.stages(), growth=pn.Growth.paper(), pressure=pn.Pressure(1e-4, "parameters"), monitor="val_loss"
        )

    def narrow() -> Module:
        module = Module()
        pn.narrow(module.net, 3)
        return module

    whole, went_on = resumed(tmp_path, 4, lambda: checkpoints(tmp_path, monitor="val_loss"), narrow, callback)
    task.assert_same_state(whole.net, went_on.net)
    assert sum(map(len, whole.net.sites.values())) != 6


def test_monitor_that_is_not_logged(tmp_path: Path) -> None:
    """A monitored loss that nobody logs is named."""
    callback = PlasticCallback(task.stages(), budget=pn.Budget(loss=0.1), monitor="loss_of_nobody")
    with pytest.raises(pn.PlasticError, match=r"loss_of_nobody.*val_loss"):
        fit(tmp_path, None, callback)


def test_resumed_within_an_epoch(tmp_path: Path) -> None:
    """A fit goes on from a checkpoint within an epoch, and ends within the budget."""
    begin()
    with pytest.raises(KeyError):
        fit(tmp_path, more=[Stop(6), checkpoints(tmp_path, every_n_train_steps=7)])
    start = max(tmp_path.glob("*.ckpt"), key=lambda p: int(p.stem.rpartition("=")[2]))
    assert int(start.stem.rpartition("=")[2]) % 10  # an epoch has ten steps
    module, callback, _ = fit(tmp_path, start=str(start))
    assert callback.schedule.epoch == EPOCHS
    task.assert_pruned(module.net)


def test_metrics_belong_to_the_weights(tmp_path: Path) -> None:
    """The best checkpoint, loaded into a whole network, has the validation loss that it was chosen by."""
    begin()
    saving = L.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=2)
    module, _, trainer = fit(tmp_path, more=[saving])
    for path, score in saving.best_k_models.items():
        best = Module.load_from_checkpoint(path)
        (found,) = trainer.validate(best, task.validation_loader(), verbose=False)
        assert found["val_loss"] == pytest.approx(float(score), rel=1e-5)
    size = task.parameters(module.net)
    trainer.validate(module, task.validation_loader(), ckpt_path="best", verbose=False)
    assert task.parameters(module.net) >= size


def test_a_checkpoint_without_the_callback(tmp_path: Path) -> None:
    """A checkpoint that was written without the callback's state is refused where its network is in another stage."""
    begin()
    with pytest.raises(KeyError):
        fit(tmp_path, more=[Stop(4), checkpoints(tmp_path)])
    (last,) = tmp_path.glob("epoch=3-*.ckpt")
    content = torch.load(last, weights_only=False)
    content["callbacks"].pop("PlasticCallback")
    torch.save(content, last)
    with pytest.raises(pn.PlasticError, match="holds no state of this callback"):
        fit(tmp_path, start=str(last))


def test_early_stopping(tmp_path: Path) -> None:
    """A fit that stops early has taken the step of its last epoch."""
    begin()
    stopping = L.callbacks.EarlyStopping("val_loss", patience=1, stopping_threshold=1.2)
    with pytest.warns(UserWarning, match="has not hardened"):
        module, callback, trainer = fit(tmp_path, more=[stopping])
    assert 0 < trainer.current_epoch < EPOCHS
    assert callback.schedule.epoch == trainer.current_epoch
    assert len(list(module.net.compact().parameters())) == 6


def test_fitted_twice(tmp_path: Path) -> None:
    """A second fit with the same callback goes on where the first one has ended."""
    begin()
    with pytest.warns(UserWarning, match="ends after 4 of the 10 epochs"):
        module, callback, trainer = fit(tmp_path, max_epochs=4)
    assert callback.schedule.epoch == 4
    trainer.fit_loop.max_epochs = EPOCHS
    trainer.fit(module, task.loader(), task.validation_loader())
    assert callback.schedule.epoch == EPOCHS
    task.assert_pruned(module.net)


def test_another_trainer_goes_on(tmp_path: Path) -> None:
    """After an interruption another Trainer, which counts its epochs from 0, goes on with the same callback."""
    begin()
    module, callback = Module(), PlasticCallback(task.stages(), budget=task.budget())
    with pytest.raises(KeyError):
        fit(tmp_path, module, callback, more=[Stop(4)])
    assert callback.schedule.epoch == 4
    fit(tmp_path, module, callback, max_epochs=EPOCHS - 4)
    assert callback.schedule.epoch == EPOCHS
    task.assert_pruned(module.net)


def test_searches_begin_anew(tmp_path: Path) -> None:
    """The best checkpoint is one of a network that has hardened, and only those count for early stopping."""
    begin()
    saving = L.callbacks.ModelCheckpoint(tmp_path, monitor="size", mode="max", filename="{epoch}")
    stopping = L.callbacks.EarlyStopping("size", mode="max", patience=EPOCHS - 1)

    class Sized(Module):
        def on_validation_epoch_end(self) -> None:
            self.log("size", float(task.parameters(self.net)))

    module, _, trainer = fit(tmp_path, Sized(), more=[saving, stopping])
    assert Path(saving.best_model_path).name == "epoch=7.ckpt"
    assert float(saving.best_model_score) == float(stopping.best_score) == task.parameters(module.net) <= task.most()
    assert stopping.wait_count == 2
    assert trainer.current_epoch == EPOCHS


# -- averages ---------------------------------------------------------------------------------


def averages() -> dict[str, Any]:
    made = {"SWA": lambda: L.callbacks.StochasticWeightAveraging(5e-3, swa_epoch_start=2)}
    if hasattr(L.callbacks, "EMAWeightAveraging"):
        made["EMA"] = lambda: L.callbacks.EMAWeightAveraging(decay=0.9)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", averages())
@pytest.mark.parametrize("first", [True, False], ids=["average first", "average last"])
def test_averages(name: str, first: bool, tmp_path: Path) -> None:
    """An average of the weights begins anew with each change of size, and the network ends with it."""
    begin()
    average = averages()[name]()
    callback = PlasticCallback(task.stages(), budget=task.budget())
    module = Module()
    callbacks: list[Any] = [average, callback] if first else [callback, average]
    fit(tmp_path, module, callbacks[0], more=callbacks[1:])
    task.assert_pruned(module.net)
    assert task.accuracy(module.net) > 97


@pytest.mark.slow
@pytest.mark.parametrize("name", averages())
def test_averages_resumed(name: str, tmp_path: Path) -> None:
    """A fit with an average of the weights goes on from a checkpoint."""
    _, went_on = resumed(tmp_path, 8, lambda: checkpoints(tmp_path), more=lambda: [averages()[name]()])
    task.assert_pruned(went_on.net)
    assert task.accuracy(went_on.net) > 97


def test_resumed_once_more(tmp_path: Path) -> None:
    """A fit that goes on after a cut ends in the same network to the bit."""
    whole, went_on = resumed(tmp_path, 6, lambda: checkpoints(tmp_path))
    task.assert_same_state(whole.net, went_on.net)
    task.assert_pruned(went_on.net)
