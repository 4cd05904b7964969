"""A model for the Trainer, and a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

import plasticnet as pn
from plasticnet.huggingface import PlasticCallback, PlasticTrainer
from tests.integrations import task

EPOCHS = 10


class Classifier(nn.Module):
    """What the Trainer expects of a model."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        a, b, c, d = task.WIDE
        self.layers = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d))
        self.reduction = reduction

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels, reduction=self.reduction), "logits": logits}


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, n: int, seed: int) -> None:
        self.x, self.y = task.points(n, seed)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.y[i]}


def network(reduction: str = "mean") -> pn.PlasticNet:
    x, y = task.points(2, 0)
    return pn.PlasticNet(Classifier(reduction), {"x": x, "labels": y}, outputs=lambda out: out["logits"])


class Stop(TrainerCallback):
    """Raises when an epoch begins."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if int(state.epoch or 0) == self.epoch:
            raise KeyError("stopped by the test")


def trainer(
    folder: Path,
    net: Any = None,
    callback: PlasticCallback | None = None,
    *,
    more: Any = (),
    kind: Any = PlasticTrainer,
    compute_loss_func: Any = None,
    **options: Any,
) -> Any:
    """A trainer with a network."""
    options = {
        "num_train_epochs": EPOCHS, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 256,
        "learning_rate": 5e-3, "lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "logging_strategy": "no", "max_grad_norm": 0.0, "optim": "adamw_torch", **options,
    }  # fmt: skip
    net = network() if net is None else net
    callback = callback or PlasticCallback(task.stages(), budget=task.budget())
    return kind(
        net, TrainingArguments(str(folder), **options), train_dataset=Rows(320, 1), eval_dataset=Rows(256, 2),
        callbacks=[callback, *more], compute_loss_func=compute_loss_func,
    )  # fmt: skip


def accuracy(net: pn.PlasticNet) -> float:
    x, y = task.points(2000, 3)
    with torch.no_grad():
        return 100 * float((net.eval()(x)["logits"].argmax(1) == y).float().mean())


def begin(seed: int = 0) -> None:
    torch.manual_seed(seed)
