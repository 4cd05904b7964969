"""A LightningModule, a fit, and a fit that is stopped and goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plasticnet.lightning import PlasticCallback
from tests.integrations import task

EPOCHS = 10
for name in ("lightning.pytorch", "pytorch_lightning"):
    logging.getLogger(name).setLevel(logging.ERROR)


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


class Scheduled(Module):
    """Rates fall with the epochs."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.net.param_groups(self.rate))
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)}


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
