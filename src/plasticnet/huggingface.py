"""Trains a network in the Trainer of Hugging Face under a schedule; import this where transformers is installed.

What the Trainer calls when is in its documentation: https://huggingface.co/docs/transformers/main_classes/callback.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.generic import can_return_loss, find_labels

from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError
from plasticnet.files.checkpoints import load_checkpoint, save_checkpoint
from plasticnet.growing.rule import GrowthRule
from plasticnet.integrations.late import LateSchedule
from plasticnet.integrations.loss import training_loss
from plasticnet.integrations.network import find_network
from plasticnet.learning.pressure import Pressure
from plasticnet.net import PlasticNet
from plasticnet.training.schedule import Schedule
from plasticnet.training.stages import Stage

# This file in a checkpoint's folder holds the state of the schedule.
_FILE = "plasticnet.safetensors"


class PlasticCallback(TrainerCallback):
    """The schedule of a `PlasticTrainer`.

    The schedule's step for an epoch is taken when the next epoch begins, or when the training ends. So every checkpoint
    has the weights from before the step, to which its metrics belong. It also holds the state of the schedule, in the
    file ``plasticnet.safetensors``. When the network hardens, the search for the best model begins anew, because
    earlier ones do not have the size that was asked for. A training that ends before the stages do warns.

    The arguments are those of `Schedule`, and these:

    Args:
        stages: The stages. Let ``num_train_epochs`` be the sum of their epochs.
        gate_lr: The learning rate of the gates' logits. By default it is ten times that of the weights.
        monitor: The name of the validation loss among the metrics, for budgets and growths that need it.

    Attributes:
        schedule: The `Schedule`, once a Trainer has the callback.

    Raises:
        PlasticError: When a Trainer gets the callback: its model holds no network or several, or as `Schedule` raises
            it. Later: an optimizer lacks a parameter, or as `Schedule.step` raises it.

    Example:
        >>> import plasticnet as pn
        >>> from plasticnet.huggingface import PlasticCallback
        >>> stages = [pn.Stage(1), pn.Stage(8, k=7.0), pn.Stage(3)]
        >>> callback = PlasticCallback(stages, budget=pn.Budget(macs=0.5))
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        pressure: Pressure | None = None,
        budget: Budget | None = None,
        growth: GrowthRule | None = None,
        multiple_of: int = 1,
        repair: Iterable[Any] | None = None,
        on_resize: Callable[[PlasticNet], object] | None = None,
        on_change: Callable[[dict[str, float]], object] | None = None,
        gate_lr: float | None = None,
        monitor: str = "eval_loss",
    ) -> None:
        self._stages = stages
        self._options: dict[str, Any] = {
            "pressure": pressure, "budget": budget, "growth": growth, "multiple_of": multiple_of, "repair": repair,
            "on_resize": on_resize, "on_change": on_change,
        }  # fmt: skip
        self.gate_lr, self._monitor = gate_lr, monitor
        self._late: LateSchedule | None = None

    @property
    def schedule(self) -> Schedule:
        """The schedule.

        Raises:
            PlasticError: No Trainer has the callback.
        """
        return self._known().schedule

    def _known(self) -> LateSchedule:
        if self._late is None:
            raise PlasticError("the callback has no schedule yet: give it to a PlasticTrainer, as callbacks=[callback]")
        return self._late

    def build(self, model: nn.Module) -> None:
        """Build the schedule of the network in a model, unless there is one; checkpoints are loaded later.

        Raises:
            PlasticError: The model holds no network or several, or as `Schedule` raises it.
        """
        net = find_network(model)
        if self._late is None or self._late.net is not net:
            self._late = LateSchedule(net, self._stages, **self._options)

    def resume(self, folder: str) -> None:
        """Read the state of the schedule from the folder of a checkpoint; the training restores it when it begins.

        Raises:
            PlasticError: The folder has no such state.
        """
        path = os.path.join(folder, _FILE)
        if not os.path.exists(path):
            raise PlasticError(f"{folder} has no {_FILE}: it was written without this callback, so go on from another")
        self._known().load_state_dict(load_checkpoint(path))

    def advance(self, epoch: float) -> bool:
        """Take the step of the last epoch that is over, unless it was taken.

        Args:
            epoch: How many epochs are over.

        Returns:
            Whether the network has hardened.
        """
        late = self._known()
        plastic = late.schedule.stage.plastic
        late.advance(_over(epoch))
        return plastic and not late.schedule.stage.plastic

    # -- what the Trainer calls ---------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the schedule its optimizers, and the state that was loaded."""
        self.build(kwargs["model"])
        self._known().attach(unwrapped(kwargs["optimizer"]))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step of the epoch before."""
        if self.advance(state.epoch or 0.0):
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        self._known().announce(state.num_train_epochs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the validation loss."""
        if self._monitor in (metrics := kwargs.get("metrics") or {}):
            self._known().observe(float(metrics[self._monitor]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state of the schedule into the checkpoint."""
        if args.should_save:
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
            save_checkpoint(self._known().state_dict(), os.path.join(folder, _FILE))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the step of the last epoch."""
        self._known().finish(_over(state.epoch))


class PlasticTrainer(Trainer):
    """A Trainer whose training steps take the expected loss over the gates, with the penalty of a schedule.

    Give it a `PlasticNet` as its model, or a module that holds one, and a `PlasticCallback` among its callbacks. To
    have the same of another Trainer, derive from both: ``class Own(PlasticTrainer, Seq2SeqTrainer)``. Its optimizer,
    unless you give one, has the logits of the gates in a group of their own, without weight decay. Under
    ``load_best_model_at_end`` the network takes the size of the best model.

    Raises:
        PlasticError: There is no `PlasticCallback`, or several; or as `PlasticNet.expected_loss` raises it.

    Example:
        >>> import tempfile, torch, plasticnet as pn
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> from plasticnet.huggingface import PlasticCallback, PlasticTrainer
        >>> small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        >>> model = BertForSequenceClassification(BertConfig(vocab_size=50, **small))
        >>> ids = torch.randint(50, (8, 6))
        >>> net = pn.PlasticNet(model, {"input_ids": ids[:2], "labels": torch.tensor([0, 1])})
        >>> data = [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids]
        >>> callback = PlasticCallback([pn.Stage(1, k=7.0), pn.Stage(1)], budget=pn.Budget(macs=0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = TrainingArguments(folder, num_train_epochs=2, report_to=[], disable_tqdm=True, use_cpu=True)
        ...     trainer = PlasticTrainer(net, args, train_dataset=data, callbacks=[callback])
        ...     result = trainer.train()
        {'train_runtime': ...}
        >>> callback.schedule.epoch
        2
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.model, PlasticNet):  # The Trainer has asked its class, which may be given anything.
            kind = type(self.model.model)
            self.can_return_loss = can_return_loss(kind)
            if self.args.label_names is None:
                self.label_names = find_labels(kind)
        if self.model is not None:
            self.plastic.build(self.model)

    @property
    def plastic(self) -> PlasticCallback:
        """The one `PlasticCallback` among the callbacks.

        Raises:
            PlasticError: There is none, or there are several.
        """
        found = [c for c in self.callback_handler.callbacks if isinstance(c, PlasticCallback)]
        if len(found) != 1:
            raise PlasticError(f"a PlasticTrainer needs one PlasticCallback in callbacks=[...], and has {len(found)}")
        return found[0]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train the network, or go on from a checkpoint, as `Trainer.train` does."""
        if resume_from_checkpoint:
            last = resume_from_checkpoint is True
            folder = get_last_checkpoint(str(self.args.output_dir)) if last else str(resume_from_checkpoint)
            if folder is not None:  # If not, the Trainer says so.
                held: Any = self.model
                self.plastic.build(held)
                self.plastic.resume(folder)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> Optimizer:
        """Build the optimizer that the arguments name, with the logits of the gates in a group of their own."""
        if self.optimizer is None:
            held: Any = self.model if model is None else model
            gates = find_network(held).param_groups(self.args.learning_rate, self.plastic.gate_lr)[1]
            logits, decayed = {id(phi) for phi in gates["params"]}, set(self.get_decay_parameter_names(held))
            named = [(n, p) for n, p in held.named_parameters() if p.requires_grad and id(p) not in logits]
            groups = [
                {"params": [p for n, p in named if n in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
                gates,
            ]
            kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, held)
            if not (isinstance(kind, type) and issubclass(kind, Optimizer)) or "params" in options:
                raise PlasticError(
                    f"optim={self.args.optim!r} groups the parameters by itself, so that the gates get no group: give "
                    "the Trainer optimizers=(torch.optim.AdamW(net.param_groups(lr)), None)"
                )
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss; in training it is the expected loss over the gates, with the penalty.

        The loss itself is that of the next class, such as `Trainer`: of the model, or of ``compute_loss_func``. Where
        it is one for each sample, shape (batch,), gates are drawn per sample.
        """
        loss_of = super().compute_loss
        if not (model.training and torch.is_grad_enabled()):
            return loss_of(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        outputs: list[Any] = []
        schedule = self.plastic.schedule

        def losses() -> Tensor:
            # It takes the labels out of what it is given.
            found = loss_of(model, dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch)
            if schedule.net.sampler.running.role == "training":
                outputs[:] = [found[1]]
            return found[0]

        loss = training_loss(schedule, losses, batches=self._batches(num_items_in_batch))
        return (loss, outputs[0]) if return_outputs else loss

    def _batches(self, num_items_in_batch: Any) -> int:
        """Return by what the losses are divided already: the batches that are accumulated, or 1 if the Trainer will."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_items = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or self.compute_loss_func is not None
        return self.current_gradient_accumulation_steps if scaled else 1

    # -- checkpoints --------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        """Save the state of the model. Tensors that are shared are copied, because the file's format refuses them."""
        held: Any = self.model
        state = held.state_dict() if state_dict is None else state_dict
        first: set[int] = set()
        copied = {}
        for name, value in state.items():
            shared = value.untyped_storage().data_ptr() in first
            first.add(value.untyped_storage().data_ptr())
            copied[name] = value.clone() if shared else value.contiguous()
        super()._save(output_dir, state_dict=copied)

    def _load_best_model(self) -> None:
        """Take the step of the last epoch, and then load the best model, which may have another size."""
        self.plastic.advance(self.state.epoch or 0.0)
        sizes = self.plastic.schedule.net.sizes
        super()._load_best_model()
        if self.plastic.schedule.net.sizes is not sizes and self.optimizer is not None:
            unwrapped(self.optimizer).state.clear()  # It belongs to other sizes.


def _over(epoch: float | None) -> int:
    """Return how many epochs are over; the Trainer counts in fractions, which are not exact."""
    return int((epoch or 0.0) + 1e-6)


def unwrapped(optimizer: Any) -> Optimizer:
    """Return the optimizer that a wrapper of Accelerate holds, or the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)
