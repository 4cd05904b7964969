"""Trainings that are stopped and go on, and the best model, in the Trainer of Hugging Face on one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed: see `make integrations`")

import transformers
from transformers import BertConfig, BertForMaskedLM, TrainingArguments

import plasticnet as pn
from plasticnet.huggingface import PlasticCallback, PlasticTrainer
from tests.integrations import task
from tests.integrations.kit_huggingface import EPOCHS, Rows, Stop, begin, network, trainer

pytestmark = pytest.mark.integration("Hugging Face Trainer", 1)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_trainings_that_are_too_short(tmp_path: Path) -> None:
    """A training that ends before the stages do says so, where it begins or where it stops early."""
    begin()
    found = trainer(tmp_path, num_train_epochs=2)
    with pytest.warns(UserWarning, match="ends after 2 of the 10 epochs"):
        found.train()
    assert found.plastic.schedule.epoch == 2

    class Early(transformers.TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.epoch > 2.5

    with pytest.warns(UserWarning, match="ended after 3 of the 10 epochs.*has not hardened"):
        trainer(tmp_path, more=[Early()]).train()


def test_trained_again_after_an_interruption(tmp_path: Path) -> None:
    """After an interruption a second call of train, which counts its epochs from 0, goes on with the schedule."""
    begin()
    found = trainer(tmp_path, more=[Stop(4)])
    with pytest.raises(KeyError):
        found.train()
    found.remove_callback(Stop)
    found.args.num_train_epochs = EPOCHS - found.plastic.schedule.epoch
    found.train()
    assert found.plastic.schedule.epoch == EPOCHS
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
    """The best model of a plastic stage may be larger than the last one; a further training works."""
    begin()
    callback = PlasticCallback([pn.Stage(8, k=7.0)], pressure=pn.Pressure(3.0, "parameters", "log"))
    found = trainer(
        tmp_path, None, callback, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch",
        num_train_epochs=8, metric_for_best_model="size", greater_is_better=True,
    )  # fmt: skip
    found.compute_metrics = lambda _: {"size": task.parameters(found.model)}
    found.train()
    sizes = [row["eval_size"] for row in found.state.log_history if "eval_size" in row]
    assert task.parameters(found.model) == found.state.best_metric == sizes[0] > sizes[-1]
    x, y = task.points(32, 4)
    found.model.train()
    F.cross_entropy(found.model(x)["logits"], y).backward()
    found.optimizer.step()


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


def test_resumed_once_more(tmp_path: Path) -> None:
    """A training that goes on after a cut ends in the same network to the bit."""
    begin()
    trainer(tmp_path, save_strategy="epoch").train()
    last = sorted(tmp_path.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    begin(99)
    whole, went_on = network(), trainer(tmp_path / "again")
    went_on.train(resume_from_checkpoint=str(last[5]))
    again = trainer(tmp_path / "whole", whole, num_train_epochs=EPOCHS)
    again.train(resume_from_checkpoint=str(last[7]))
    task.assert_same_state(whole, went_on.model)
    task.assert_pruned(whole)
