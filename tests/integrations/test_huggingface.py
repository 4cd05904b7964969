"""The Trainer of Hugging Face on one process."""

from __future__ import annotations

import json
import math

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed: see `make integrations`")

from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, TrainerCallback, TrainingArguments

import plasticnet as pn
from plasticnet.huggingface import PlasticCallback, PlasticTrainer
from tests.integrations import task

pytestmark = pytest.mark.integration("Hugging Face Trainer", 1)
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


@pytest.mark.parametrize("epoch", [1, 5, 7, 9])
def test_resumed(epoch: int, tmp_path: Path) -> None:
    """A training that was stopped and goes on ends in the same network to the bit, before and after cuts."""
    options = {"save_strategy": "epoch", "lr_scheduler_type": "linear"}
    begin()
    whole = trainer(tmp_path / "whole", **{**options, "save_strategy": "no"})
    whole.train()
    begin()
    with pytest.raises(KeyError):
        trainer(tmp_path, more=[Stop(epoch)], **options).train()
    begin(99)
    went_on = trainer(tmp_path, **options)
    went_on.train(resume_from_checkpoint=True)
    assert went_on.state.epoch == EPOCHS
    task.assert_same_state(whole.model, went_on.model)
    task.assert_pruned(went_on.model)


def test_resumed_within_an_epoch(tmp_path: Path) -> None:
    """A training goes on from a checkpoint within an epoch, to the bit."""
    options = {"save_strategy": "steps", "save_steps": 7, "save_total_limit": 1}
    begin()
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    begin()
    with pytest.raises(KeyError):
        trainer(tmp_path, more=[Stop(6)], **options).train()
    (folder,) = tmp_path.glob("checkpoint-*")
    assert folder.name == "checkpoint-56"
    begin(99)
    went_on = trainer(tmp_path, **options)
    went_on.train(resume_from_checkpoint=str(folder))
    task.assert_same_state(whole.model, went_on.model)
    task.assert_pruned(went_on.model)


def test_resumed_growth(tmp_path: Path) -> None:
    """A training that grows by its validation loss goes on to the bit: the checkpoint holds that loss."""

    def made(folder: Path, **options: Any) -> Any:
        net = network()
        pn.narrow(net, 3)
        callback = PlasticCallback(
            task.stages(), growth=pn.Growth.paper(), pressure=pn.Pressure(1e-4, "parameters"), gate_lr=0.02
        )
        return trainer(folder, net, callback, eval_strategy="epoch", save_strategy="epoch", **options)

    begin()
    whole = made(tmp_path / "whole")
    whole.train()
    begin()
    with pytest.raises(KeyError):
        made(tmp_path, more=[Stop(4)]).train()
    begin(99)
    went_on = made(tmp_path)
    went_on.train(resume_from_checkpoint=True)
    task.assert_same_state(whole.model, went_on.model)
    assert sum(map(len, went_on.model.sites.values())) != 6


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


def test_the_best_model(tmp_path: Path) -> None:
    """The best model is one that has hardened, and its metric is that of the weights that were saved."""
    begin()
    found = trainer(
        tmp_path, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch", learning_rate=1e-2
    )
    found.train()
    task.assert_pruned(found.model)
    assert found.plastic.schedule.epoch == EPOCHS
    assert found.state.best_global_step > 10 * 7
    assert found.evaluate()["eval_loss"] == pytest.approx(found.state.best_metric, rel=1e-5)
    early = network()
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_names=["labels"])
    state = transformers.Trainer(early, arguments)
    state._load_from_checkpoint(str(tmp_path / "checkpoint-30"))
    logged = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())["log_history"]
    (loss,) = [row["eval_loss"] for row in logged if row.get("epoch") == 3 and "eval_loss" in row]
    state.eval_dataset = Rows(256, 2)
    assert state.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_the_best_model_of_another_size(tmp_path: Path) -> None:
    """The best model of a plastic stage may have another size than the last one; a further training works."""
    begin()
    stages = [pn.Stage(8, k=7.0)]
    callback = PlasticCallback(stages, pressure=pn.Pressure(3.0, "parameters", "log"))
    found = trainer(tmp_path, None, callback, load_best_model_at_end=True, eval_strategy="epoch",
                    save_strategy="epoch", num_train_epochs=8)  # fmt: skip
    found.train()
    best = json.loads((Path(found.state.best_model_checkpoint) / "trainer_state.json").read_text())
    assert best["epoch"] < 8
    assert found.evaluate()["eval_loss"] == pytest.approx(found.state.best_metric, rel=1e-5)
    assert not found.optimizer.state or all(
        v.shape in ((), p.shape) for p, s in found.optimizer.state.items() for v in s.values()
    )


def test_shared_tensors_are_saved(tmp_path: Path) -> None:
    """A model whose embeddings are its output weights is saved and goes on."""
    begin()
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ids = torch.randint(50, (16, 6))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def made() -> Any:
        model = BertForMaskedLM(BertConfig(vocab_size=50, **small))
        net = pn.PlasticNet(model, {"input_ids": ids[:2], "labels": ids[:2]})
        callback = PlasticCallback([pn.Stage(2, k=7.0), pn.Stage(1)], budget=pn.Budget(macs=0.8))
        args = TrainingArguments(
            str(tmp_path), num_train_epochs=3, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="epoch"
        )
        return PlasticTrainer(net, args, train_dataset=rows, callbacks=[callback])

    first = made()
    first.train()
    second = made()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    task.assert_same_state(first.model, second.model)
    model = second.model.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


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
