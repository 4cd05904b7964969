"""The callback for Lightning on one process: what a fit leaves, and that one that goes on ends in the same network."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

L = pytest.importorskip("lightning.pytorch", reason="lightning is not installed: see `make integrations`")
PL = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed: see `make integrations`")

import plasticnet as pn
from plasticnet.lightning import PlasticCallback
from tests.integrations import task

pytestmark = [
    pytest.mark.integration("Lightning", 1),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
]
EPOCHS = 10


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning")]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield


class Module(L.LightningModule):
    """A module that knows nothing of schedules."""

    def __init__(self, rate: float = 5e-3) -> None:
        super().__init__()
        self.net, self.rate = task.network(), rate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        self.log("train_loss", losses.mean(), on_step=False, on_epoch=True)
        return losses

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.param_groups(self.rate))


class Stop(L.Callback):
    """Raises when an epoch begins."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyError("stopped by the test")


def fit(
    folder: Path,
    module: Any = None,
    callback: PlasticCallback | None = None,
    *,
    more: Any = (),
    start: str | None = None,
    family: Any = L,
    data: Any = None,
    **options: Any,
) -> tuple[Any, PlasticCallback, Any]:
    """Fit a module, and return it with its callback and the trainer."""
    module = Module() if module is None else module
    callback = callback or PlasticCallback(task.stages(), budget=task.budget())
    options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, **options}
    options.setdefault("enable_checkpointing", any(hasattr(c, "best_model_path") for c in more))
    trainer = family.Trainer(
        accelerator="cpu", devices=1, callbacks=[callback, *more], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip
    trainer.fit(module, data or task.loader(), task.validation_loader(), ckpt_path=start)
    return module, callback, trainer


def begin(seed: int = 0) -> None:
    torch.manual_seed(seed)


# -- one fit ----------------------------------------------------------------------------------


def test_a_fit_prunes_to_the_budget(tmp_path: Path) -> None:
    """A fit ends within the budget, as accurate as a plain loop with the same budget."""
    begin()
    module, callback, trainer = fit(tmp_path)
    task.assert_pruned(module.net)
    assert callback.schedule.epoch == EPOCHS
    assert module.net.sampler.samples_apart  # gates were drawn per sample, because the step returns (batch,)
    assert "training_step" not in vars(module)
    assert "log" not in vars(module)
    begin()
    loader = task.loader()
    epochs = [[(x, y) for x, y in loader] for _ in range(EPOCHS)]
    plain = task.plain_loop(lambda net: torch.optim.Adam(net.param_groups(5e-3)), epochs)
    assert abs(task.accuracy(plain) - task.accuracy(module.net)) <= 1.0
    assert task.accuracy(module.net) > 97


@pytest.mark.parametrize(("accumulate", "clip"), [(1, 0.0), (3, 0.0), (2, 0.5)])
def test_a_fit_is_a_plain_loop(accumulate: int, clip: float, tmp_path: Path) -> None:
    """On the same batches a fit is a plain loop to the bit, also with accumulation and gradient clipping."""
    data = task.fixed_loader()
    begin()
    module, _, _ = fit(tmp_path, data=data, accumulate_grad_batches=accumulate, gradient_clip_val=clip or None)
    begin()
    plain = task.plain_loop(
        lambda net: torch.optim.Adam(net.param_groups(5e-3)), EPOCHS * [list(data)], accumulate=accumulate, clip=clip
    )
    task.assert_same_state(module.net, plain)
    task.assert_pruned(module.net)


def test_bf16(tmp_path: Path) -> None:
    """Under bf16-mixed a fit prunes to the budget, and loses no accuracy."""
    begin()
    module, _, _ = fit(tmp_path, precision="bf16-mixed")
    task.assert_pruned(module.net)
    begin()
    single, _, _ = fit(tmp_path)
    assert abs(task.accuracy(module.net) - task.accuracy(single.net)) <= 1.0


class Scheduled(Module):
    """Rates fall with the epochs."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.param_groups(self.rate))
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)}


def test_rates_follow(tmp_path: Path) -> None:
    """A scheduler of learning rates goes on after changes of size, for the weights and for the gates."""
    begin()
    module, _, trainer = fit(tmp_path, Scheduled())
    (optimizer,) = trainer.optimizers
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([5e-3 / 4, 5e-2 / 4])
    assert {p for g in optimizer.param_groups for p in g["params"]} == set(module.net.parameters())
    task.assert_pruned(module.net)


@pytest.mark.parametrize("family", [L, PL], ids=["lightning", "pytorch_lightning"])
def test_both_packages(family: Any, tmp_path: Path) -> None:
    """The callback is one of both packages, and works in the Trainer of either."""

    kind = type("Own", (family.LightningModule,), {k: v for k, v in vars(Module).items() if k != "__init__"})
    begin()
    module = kind()
    module.net, module.rate = task.network(), 5e-3
    callback = PlasticCallback(task.stages(), budget=task.budget())
    assert isinstance(callback, family.Callback)
    fit(tmp_path, module, callback, family=family)
    task.assert_pruned(module.net)


@pytest.mark.parametrize(
    ("lines", "loaded", "not_loaded"),
    [
        ("import plasticnet", [], ["lightning", "pytorch_lightning", "transformers"]),
        ("import pytorch_lightning, plasticnet.lightning", ["pytorch_lightning"], ["lightning"]),
        ("import plasticnet.lightning", ["lightning"], ["pytorch_lightning"]),
    ],
)
def test_what_is_imported(lines: str, loaded: list[str], not_loaded: list[str]) -> None:
    """Nothing of Lightning is imported but what the user has."""
    check = f"{lines}; import sys; print([n for n in {[*loaded, *not_loaded]} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout
    assert found.strip().splitlines()[-1] == str(loaded)


# -- what a step returns, and logs ------------------------------------------------------------


class Returns(Module):
    """A module whose step returns what a function makes of the losses."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.made, self.runs = made, 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        self.runs += 1
        x, y = batch
        losses = F.cross_entropy(self.net(x), y, reduction="none")
        self.log("train_loss", losses.mean(), on_step=False, on_epoch=True)
        self.log_dict({"runs": 1.0}, on_step=False, on_epoch=True, reduce_fx="sum")
        return self.made(losses)


@pytest.mark.parametrize(
    ("made", "apart"),
    [
        (lambda f: f.mean(), False),
        (lambda f: {"loss": f.mean(), "more": 3}, False),
        (lambda f: {"loss": f.mean(), "losses": f}, True),
        (lambda f: {"losses": f}, True),
    ],
    ids=["mean", "mapping", "both", "losses"],
)
def test_what_a_step_may_return(made: Callable[[Tensor], Any], apart: bool, tmp_path: Path) -> None:
    """A step returns a loss or a mapping; it runs twice in plastic stages, and what it logs is logged once."""
    begin()
    module, callback, trainer = fit(tmp_path, Returns(made), max_epochs=7)
    steps = len(task.loader())
    assert module.net.sampler.samples_apart is apart
    assert module.runs >= steps * (1 + 6 * 2)
    assert float(trainer.callback_metrics["runs"]) == steps
    assert callback.schedule.epoch == 7
    assert 0 < float(trainer.callback_metrics["train_loss"]) < 1.5


def test_a_loss_that_is_not_the_mean(tmp_path: Path) -> None:
    """A step whose loss is another one than its losses is refused, and one that returns nothing of use is, too."""
    for made, words in (
        (lambda f: {"loss": 2 * f.mean(), "losses": f}, "not the mean"),
        (lambda f: {"logits": f}, "'loss'"),
        (lambda f: 3.0, "float"),
    ):
        module = Returns(made)
        with pytest.raises(pn.PlasticError, match=words):
            fit(tmp_path, module, max_epochs=EPOCHS)
        assert "training_step" not in vars(module)


def test_a_step_that_is_skipped(tmp_path: Path) -> None:
    """A step may skip a batch by returning None."""
    begin()
    module = Returns(lambda f: None if module.runs % 7 == 1 else f)
    with torch.random.fork_rng():
        before = [p.clone() for p in module.net.parameters()]
    fit(tmp_path, module, PlasticCallback([pn.Stage(2)]), max_epochs=2)
    assert any(not torch.equal(p, q) for p, q in zip(module.net.parameters(), before, strict=True))


class Expects(Module):
    """A module that takes the expected loss itself."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        x, y = batch
        return self.net.expected_loss(lambda: F.cross_entropy(self.net(x), y, reduction="none"))


def test_a_step_with_an_expected_loss(tmp_path: Path) -> None:
    """A step that takes the expected loss itself trains the same network, and must be announced."""
    begin()
    module, _, _ = fit(tmp_path)
    begin()
    own, _, _ = fit(tmp_path, Expects(), PlasticCallback(task.stages(), budget=task.budget(), expected=True))
    task.assert_same_state(module.net, own.net)
    with pytest.raises(pn.PlasticError, match="expected=True"):
        fit(tmp_path, Expects())
    with pytest.raises(pn.PlasticError, match=r"not called net\.expected_loss"):
        fit(tmp_path, None, PlasticCallback(task.stages(), budget=task.budget(), expected=True))


# -- what is refused --------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    """No network, two networks, and steps by hand are refused by name before anything is trained."""
    module = Module()
    module.net = module.net.model  # no longer gated
    with pytest.raises(pn.PlasticError, match="holds no PlasticNet"):
        fit(tmp_path, module)
    module = Module()
    module.other = task.network()
    with pytest.raises(pn.PlasticError, match=r"2 networks \(net, other\)"):
        fit(tmp_path, module)
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(pn.PlasticError, match="by hand"):
        fit(tmp_path, module)
    with pytest.raises(pn.PlasticError, match="no schedule yet"):
        _ = PlasticCallback(task.stages()).schedule
    with pytest.warns(UserWarning, match="ends after 2 epochs"):
        fit(tmp_path, max_epochs=2)


# -- checkpoints ------------------------------------------------------------------------------


def checkpoints(folder: Path, **options: Any) -> Any:
    return L.callbacks.ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **options)


def resumed(
    folder: Path,
    epoch: int,
    checkpoint: Callable[[], Any],
    module: Callable[[], Any] = Module,
    callback: Callable[[], PlasticCallback] = lambda: PlasticCallback(task.stages(), budget=task.budget()),
    more: Callable[[], list[Any]] = list,
) -> tuple[Any, Any]:
    """A module that was fitted at once, and one whose fit was stopped as an epoch began, and went on."""
    begin()
    whole, _, _ = fit(folder / "whole", module(), callback(), more=more())
    begin()
    with pytest.raises(KeyError):
        fit(folder, module(), callback(), more=[*more(), Stop(epoch), checkpoint()])
    (last,) = folder.glob(f"epoch={epoch - 1}-*.ckpt")
    begin(99)
    torch.rand(5)
    went_on, _, trainer = fit(folder, module(), callback(), more=[*more(), checkpoint()], start=str(last))
    assert trainer.current_epoch == EPOCHS
    return whole, went_on


@pytest.mark.parametrize("epoch", [1, 5, 7, 9])
@pytest.mark.parametrize("at_the_end", [False, True], ids=["after validation", "after the epoch"])
def test_resumed(epoch: int, at_the_end: bool, tmp_path: Path) -> None:
    """A fit that was stopped and goes on ends in the same network to the bit, before and after cuts."""
    whole, went_on = resumed(tmp_path, epoch, lambda: checkpoints(tmp_path, save_on_train_epoch_end=at_the_end), Scheduled)
    task.assert_same_state(whole.net, went_on.net)
    task.assert_pruned(went_on.net)


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
    module, callback, trainer = fit(tmp_path, more=[stopping])
    assert 0 < trainer.current_epoch < EPOCHS
    assert callback.schedule.epoch == trainer.current_epoch
    assert len(list(module.net.compact().parameters())) == 6


def test_fitted_twice(tmp_path: Path) -> None:
    """A second fit with the same callback goes on where the first one has ended."""
    begin()
    with pytest.warns(UserWarning, match="ends after 4 epochs"):
        module, callback, trainer = fit(tmp_path, max_epochs=4)
    assert callback.schedule.epoch == 4
    trainer.fit_loop.max_epochs = EPOCHS
    trainer.fit(module, task.loader(), task.validation_loader())
    assert callback.schedule.epoch == EPOCHS
    task.assert_pruned(module.net)


# -- averages ---------------------------------------------------------------------------------


def averages() -> dict[str, Any]:
    made = {"SWA": lambda: L.callbacks.StochasticWeightAveraging(5e-3, swa_epoch_start=2)}
    if hasattr(L.callbacks, "EMAWeightAveraging"):
        made["EMA"] = lambda: L.callbacks.EMAWeightAveraging(decay=0.9)
    return made


@pytest.mark.parametrize("name", averages())
@pytest.mark.parametrize("first", [True, False], ids=["average first", "average last"])
def test_averages(name: str, first: bool, tmp_path: Path) -> None:
    """An average of the weights begins anew with each change of size, and the network ends with it."""
    begin()
    average = averages()[name]()
    callback = PlasticCallback(task.stages(), budget=task.budget())
    module = Module()
    if first:
        trainer_callbacks = (average, [callback])
    else:
        trainer_callbacks = (callback, [average])
    fit(tmp_path, module, trainer_callbacks[0], more=trainer_callbacks[1])
    task.assert_pruned(module.net)
    assert task.accuracy(module.net) > 97


@pytest.mark.parametrize("name", averages())
def test_averages_resumed(name: str, tmp_path: Path) -> None:
    """A fit with an average of the weights goes on from a checkpoint."""
    _, went_on = resumed(tmp_path, 8, lambda: checkpoints(tmp_path), more=lambda: [averages()[name]()])
    task.assert_pruned(went_on.net)
    assert task.accuracy(went_on.net) > 97
