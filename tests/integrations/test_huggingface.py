"""The Trainer of Hugging Face on one process: what a training leaves, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed: see `make integrations`")

import transformers
from transformers import TrainerCallback, TrainingArguments

import plasticnet as pn
from plasticnet.huggingface import PlasticCallback, PlasticTrainer
from tests.integrations import task
from tests.integrations.kit_huggingface import EPOCHS, Classifier, accuracy, begin, network, trainer

pytestmark = pytest.mark.integration("Hugging Face Trainer", 1)


def test_a_training_prunes_to_the_budget(tmp_path: Path) -> None:
    """A training ends within the budget, as accurate as a plain loop with the same budget."""
    begin()
    found = trainer(tmp_path)
    found.train()
    task.assert_pruned(found.model)
    assert found.plastic.schedule.epoch == EPOCHS
    begin()
    loader = task.loader()
    plain = task.plain_loop(
        lambda net: torch.optim.AdamW(net.param_groups(5e-3, weight_decay=0.0)),
        [[(x, y) for x, y in loader] for _ in range(EPOCHS)],
    )
    assert accuracy(found.model) > 97
    assert abs(accuracy(found.model) - task.accuracy(plain)) <= 1.0


class Items(Classifier):
    """A model that divides its loss by the number of items of all accumulated batches, as language models do."""

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
        logits = self.layers(x)
        if labels is None:
            return {"logits": logits}
        losses = F.cross_entropy(logits, labels, reduction="none")
        items = kwargs.get("num_items_in_batch")
        return {"loss": losses.mean() if items is None else losses.sum() / items, "logits": logits}


class Flat(transformers.Trainer):
    """A Trainer with a loss that no gate can change."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(*args, **{**kwargs, "return_outputs": True})
        return 0 * loss, outputs


class FlatPlastic(PlasticTrainer, Flat):
    pass


class Gradients(TrainerCallback):
    """Keeps the gradients of the gates, and those of the penalty."""

    def __init__(self, price: float) -> None:
        self.price, self.found = price, list[Tensor]()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        net = kwargs["model"]
        phi = [s.phi for s in net.sites.values()]
        expected = torch.autograd.grad(net.penalty(self.price, "parameters"), phi)
        self.found.append(torch.cat([p.grad - e for p, e in zip(phi, expected, strict=True)]))


@pytest.mark.parametrize("model", [Classifier, Items], ids=["the Trainer divides", "the model divides"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_penalty_is_scaled_as_the_loss(model: Any, accumulate: int, tmp_path: Path) -> None:
    """Under accumulation the penalty counts once a step, whether the Trainer or the model divides the loss."""
    x, y = task.points(2, 0)
    begin()
    net = pn.PlasticNet(model(), {"x": x, "labels": y}, outputs=lambda out: out["logits"])
    keeping = Gradients(1e-3)
    callback = PlasticCallback([pn.Stage(1, k=7.0)], pressure=pn.Pressure(1e-3, "parameters"))
    found = trainer(
        tmp_path, net, callback, more=[keeping], kind=FlatPlastic, num_train_epochs=1,
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    assert found.model_accepts_loss_kwargs is (model is Items)
    found.train()
    assert len(keeping.found) == math.ceil(10 / accumulate)
    for gradient in keeping.found:  # the last step of an epoch has fewer batches
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("model", [Classifier, Items])
def test_accumulation_and_clipping(model: Any, tmp_path: Path) -> None:
    """With accumulated and clipped gradients a training prunes to the budget."""
    begin()
    x, y = task.points(2, 0)
    net = pn.PlasticNet(model(), {"x": x, "labels": y}, outputs=lambda out: out["logits"])
    found = trainer(
        tmp_path, net, gradient_accumulation_steps=2, max_grad_norm=1.0, per_device_train_batch_size=16,
        weight_decay=0.01,
    )  # fmt: skip
    found.train()
    task.assert_pruned(net)
    assert accuracy(net) > 95


@pytest.mark.slow
def test_bf16(tmp_path: Path) -> None:
    """Under bf16 a training prunes to the budget, and loses no accuracy."""
    begin()
    found = trainer(tmp_path, bf16=True)
    found.train()
    task.assert_pruned(found.model)
    begin()
    single = trainer(tmp_path)
    single.train()
    assert abs(accuracy(found.model) - accuracy(single.model)) <= 1.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the Trainer ends after")
def test_gates_per_sample(tmp_path: Path) -> None:
    """Where the loss is one for each sample, gates are drawn per sample; a mean gives gates per batch."""
    begin()

    def losses(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return F.cross_entropy(outputs["logits"], labels, reduction="none")

    found = trainer(tmp_path, compute_loss_func=losses)
    found.train()
    assert found.model.sampler.samples_apart
    task.assert_pruned(found.model)
    begin()
    mean = trainer(tmp_path, num_train_epochs=3)
    mean.train()
    assert mean.model.sampler.samples_apart is False


def test_groups_and_rates(tmp_path: Path) -> None:
    """Gates have a group of their own, without decay; all rates follow the scheduler after changes of size."""
    begin()
    callback = PlasticCallback(task.stages(), budget=task.budget(), gate_lr=0.04)
    found = trainer(tmp_path, None, callback, weight_decay=0.1, lr_scheduler_type="linear", num_train_epochs=20)
    found.train()
    weights, biases, gates = found.optimizer.param_groups
    logits = [s.phi for s in found.model.sites.values()]
    assert {id(p) for p in gates["params"]} == {id(phi) for phi in logits}
    assert (weights["weight_decay"], biases["weight_decay"], gates["weight_decay"]) == (0.1, 0.0, 0.0)
    assert [g["initial_lr"] for g in found.optimizer.param_groups] == [5e-3, 5e-3, 0.04]
    assert [g["lr"] for g in found.optimizer.param_groups] == pytest.approx([0.0, 0.0, 0.0])
    held = {id(p) for g in found.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in found.model.parameters()}
    task.assert_pruned(found.model)


def test_another_trainer(tmp_path: Path) -> None:
    """A class that derives from PlasticTrainer and another Trainer takes the loss of that other Trainer."""

    class Halved(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss, outputs = super().compute_loss(*args, **{**kwargs, "return_outputs": True})
            return (loss / 2, outputs) if kwargs.get("return_outputs") else loss / 2

    class Own(PlasticTrainer, Halved):
        pass

    begin()
    found = trainer(tmp_path, kind=Own)
    found.train()
    task.assert_pruned(found.model)
    x, y = task.points(256, 2)
    whole = float(F.cross_entropy(found.model.eval()(x)["logits"], y))
    assert found.evaluate()["eval_loss"] == pytest.approx(whole / 2, rel=1e-4)


@pytest.mark.filterwarnings("ignore:the Trainer ends after")
def test_refusals(tmp_path: Path) -> None:
    """What cannot be trained is refused by name."""
    with pytest.raises(pn.PlasticError, match="needs one PlasticCallback"):
        PlasticTrainer(network(), TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    with pytest.raises(pn.PlasticError, match="holds no PlasticNet"):
        trainer(tmp_path, Classifier())
    with pytest.raises(pn.PlasticError, match="no schedule yet"):
        _ = PlasticCallback(task.stages()).schedule
    with pytest.raises(pn.PlasticError, match="Adafactor"):
        trainer(tmp_path, optim="adafactor").train()
    begin()
    first = trainer(tmp_path, save_strategy="epoch", num_train_epochs=1)
    first.train()
    (folder,) = tmp_path.glob("checkpoint-*")
    (folder / "plasticnet.safetensors").unlink()
    with pytest.raises(pn.PlasticError, match="written without this callback"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
