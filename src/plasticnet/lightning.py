"""Trains the network of a LightningModule under a schedule; import this where Lightning is installed.

It works with both of Lightning's packages, ``lightning`` and ``pytorch_lightning``. The hooks and their order are those
of Lightning's own documentation: https://lightning.ai/docs/pytorch/stable/common/lightning_module.html#hooks.
"""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError
from plasticnet.growing.rule import GrowthRule
from plasticnet.integrations.chance import random_state, restore_random
from plasticnet.integrations.late import LateSchedule
from plasticnet.integrations.loss import losses_within, training_loss, with_loss
from plasticnet.integrations.network import find_network
from plasticnet.learning.pressure import Pressure
from plasticnet.net import PlasticNet
from plasticnet.training.schedule import Schedule
from plasticnet.training.stages import Stage

_FAMILIES = ("lightning.pytorch", "pytorch_lightning")
# Random numbers are no state of the callback alone: each rank has its own.
_RANDOM = "plasticnet_random"
_AVERAGES = ("WeightAveraging", "StochasticWeightAveraging")
_SHARDING = ("FSDP", "DeepSpeed", "ModelParallel", "XLA")


def _bases() -> tuple[type, ...]:
    """Return the class `Callback` of every Lightning that was imported, or else of the one that is installed."""
    names = [name for name in _FAMILIES if name in sys.modules]
    if not names:
        names = [name for name in _FAMILIES if find_spec(name.partition(".")[0]) is not None][:1]
    if not names:
        raise ImportError("plasticnet.lightning needs Lightning: pip install lightning, or pytorch-lightning")
    return tuple(importlib.import_module(name).Callback for name in names)


class PlasticCallback(*_bases()):
    """Trains the one `PlasticNet` of a LightningModule under a `Schedule`.

    ``training_step`` stays as it is, and returns its loss: a tensor, or a mapping with it under "loss". Of that the
    callback makes `PlasticNet.expected_loss`, for which the step runs twice or more in plastic stages, and adds
    `Schedule.penalty`. What the step logs is logged once, with the values of the pass that trains the weights. Metrics
    that the step updates by themselves see every pass. Where the losses are those of the samples, shape (batch,),
    returned as such or under "losses", gates are drawn per sample.

    The schedule's step for an epoch is taken when the next epoch begins, or when the fit ends. So every checkpoint has
    the weights from before the step, to which its metrics belong. A checkpoint also holds the state of the schedule and
    all random numbers; a fit that goes on from it takes the step first. `StochasticWeightAveraging` and
    `WeightAveraging` begin a new average when the step has changed sizes or k. When the network hardens,
    `ModelCheckpoint` and `EarlyStopping` begin to search anew, because earlier networks do not have the size that was
    asked for; the files of earlier ones stay. A fit that ends before the stages do warns.

    The arguments are those of `Schedule`, and these:

    Args:
        stages: The stages. Let ``max_epochs`` of the Trainer be the sum of their epochs.
        monitor: The name of the validation loss in ``trainer.callback_metrics``, for budgets and growths that need it.
        expected: Whether ``training_step`` calls ``net.expected_loss`` itself, so that only the penalty is missing.

    Attributes:
        schedule: The `Schedule`, once a fit has begun.

    Raises:
        PlasticError: On beginning a fit: the module holds no network or several, optimizes by hand, or is sharded; an
            optimizer lacks a parameter; or as `Schedule` raises it. Later: as `Schedule.step` raises it.

    Example:
        >>> import lightning as L, plasticnet as pn  # doctest: +SKIP
        >>> from plasticnet.lightning import PlasticCallback  # doctest: +SKIP
        >>> stages = [pn.Stage(2), pn.Stage(20, k=7.0), pn.Stage(8)]  # doctest: +SKIP
        >>> callback = PlasticCallback(stages, budget=pn.Budget(macs=0.5))  # doctest: +SKIP
        >>> L.Trainer(max_epochs=30, callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
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
        monitor: str | None = None,
        expected: bool = False,
    ) -> None:
        super().__init__()
        self._stages = stages
        self._options: dict[str, Any] = {
            "pressure": pressure, "budget": budget, "growth": growth, "multiple_of": multiple_of, "repair": repair,
            "on_resize": on_resize, "on_change": on_change,
        }  # fmt: skip
        self._monitor, self._expected = monitor, expected
        self._late: LateSchedule | None = None
        self._fitting = False
        self._random: Mapping[str, Any] | None = None
        self._put_back: Callable[[], None] | None = None

    @property
    def schedule(self) -> Schedule:
        """The schedule.

        Raises:
            PlasticError: No fit has begun.
        """
        if self._late is None:
            raise PlasticError("the callback has no schedule yet: it is built when a fit begins")
        return self._late.schedule

    # -- the begin and the end of a fit -------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Build the schedule, before a checkpoint is loaded, which may make the network smaller."""
        self._fitting, self._random = stage == "fit", None
        if not self._fitting:
            return
        strategy = type(trainer.strategy).__name__
        if any(name in strategy for name in _SHARDING):
            raise PlasticError(
                f"{strategy} shards parameters or moves them between devices, so that the callback cannot change their "
                "sizes: train on one device, or with strategy='ddp'"
            )
        if not pl_module.automatic_optimization:
            raise PlasticError(
                f"{type(pl_module).__name__} optimizes by hand (automatic_optimization=False), so that the callback "
                "cannot add to its loss: use a Schedule in its training step, as in a loop of one's own"
            )
        if not any(isinstance(m, PlasticNet) for m in pl_module.modules()):
            pl_module.configure_model()  # It does nothing by itself, and may be called several times.
        net = find_network(pl_module)
        if self._late is None or self._late.net is not net:
            self._late = LateSchedule(net, self._stages, **self._options)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the schedule its optimizers and the state that was loaded, and wrap the training step."""
        self._known().attach(trainer.optimizers)
        self._wrap(pl_module)
        if self._random is not None:
            restore_random(self._random)

    def _known(self) -> LateSchedule:
        """Return the schedule that `setup` has built."""
        assert self._late is not None
        return self._late

    def _wrap(self, pl_module: Any) -> None:
        """Put a step that takes the expected loss in the place of the module's own, until the fit ends."""
        self._unwrap()
        step, own = pl_module.training_step, "training_step" in vars(pl_module)

        @functools.wraps(step)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._run(pl_module, functools.partial(step, *args, **kwargs))

        def put_back() -> None:
            if own:
                pl_module.training_step = step
            else:
                del pl_module.training_step

        pl_module.training_step, self._put_back = training_step, put_back

    def _unwrap(self) -> None:
        """Give the module its own step back."""
        if self._put_back is not None:
            self._put_back()
        self._put_back = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the step of the last epoch."""
        self._advance(trainer, pl_module)
        self._known().finish(trainer.current_epoch)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was."""
        self._unwrap()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        self._unwrap()
        self._fitting = False

    # -- epochs -------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the step of the epoch before."""
        self._begin_epoch(trainer, pl_module)
        self._known().announce(trainer.max_epochs)
        # Where a checkpoint was written before the end of its epoch, Lightning ends that epoch first, and then makes
        # new iterators over the data, which draw. Else it has made them before this hook.
        if self._random is not None and not getattr(trainer.fit_loop, "is_resuming", False):
            restore_random(self._random)
        self._random = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Take the step of the epoch before, where a fit goes on in the middle of an epoch."""
        self._begin_epoch(trainer, pl_module)
        self._random = None

    def _begin_epoch(self, trainer: Any, pl_module: Any) -> None:
        """Take the step of the epoch before; where the network has hardened, let searches for the best begin anew."""
        plastic = self.schedule.stage.plastic
        self._advance(trainer, pl_module)
        if plastic and not self.schedule.stage.plastic:
            _search_anew(trainer.callbacks)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the validation loss, before checkpoints are written."""
        if not trainer.sanity_checking:
            self._observe(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Note the validation loss where it is a metric of the training."""
        self._observe(trainer)

    def _observe(self, trainer: Any) -> None:
        """Note the monitored metric, where it is known."""
        if self._monitor is not None and self._monitor in trainer.callback_metrics:
            self._known().observe(float(trainer.callback_metrics[self._monitor]))

    def _advance(self, trainer: Any, pl_module: Any) -> None:
        """Take the step of the last epoch that is over, unless it was taken."""
        late = self._known()
        sizes, k = late.net.sizes, late.net.k
        if late.due(trainer.current_epoch) and self._monitor is not None and late.val_loss is None:
            known = ", ".join(map(str, trainer.callback_metrics)) or "none"
            raise PlasticError(
                f"monitor={self._monitor!r} is not among trainer.callback_metrics ({known}): log it in validation_step"
            )
        if late.advance(trainer.current_epoch) is not None and (late.net.sizes is not sizes or late.net.k != k):
            self._renew_averages(trainer, pl_module)

    def _renew_averages(self, trainer: Any, pl_module: Any) -> None:
        """Let averages of the weights begin anew, with copies of the network as it is now."""
        for callback in trainer.callbacks:
            if any(kind.__name__ in _AVERAGES for kind in type(callback).__mro__):
                callback.setup(trainer, pl_module, "fit")
                if isinstance(count := getattr(callback, "n_averaged", None), Tensor):
                    count.zero_()

    # -- steps --------------------------------------------------------------------------------

    def _run(self, pl_module: Any, step: Callable[[], Any]) -> Any:
        """Run a training step as often as its expected loss needs, and return what it returned with that loss."""
        net, found, log = self._known().net, _Found(), pl_module.log
        own = "log" in vars(pl_module)

        def losses() -> Tensor:
            found.begin(aside=not self._expected and net.sampler.running.role != "training")
            pl_module.log = found.log
            output = step()
            if output is None:
                raise _Skipped
            found.end(output)
            return losses_within(output)

        try:
            loss = training_loss(self.schedule, losses, expected=self._expected)
        except _Skipped:
            return None
        finally:
            if own:
                pl_module.log = log
            else:
                vars(pl_module).pop("log", None)
        for args, kwargs in found.logged:
            log(*args, **kwargs)
        return with_loss(found.output, loss)

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule, and the validation loss."""
        return {} if self._late is None else self._late.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state until the optimizers exist, if a fit is to go on."""
        if self._fitting:
            self._known().load_state_dict(state_dict)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the random numbers of all ranks; Lightning calls this on all of them."""
        if self._fitting:
            checkpoint[_RANDOM] = self._known().net.ranks.everywhere(random_state())

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the random numbers of this rank until the fit goes on."""
        states = checkpoint.get(_RANDOM)
        if self._fitting and isinstance(states, list) and len(states) == trainer.world_size:
            self._random = states[trainer.global_rank]


def _search_anew(callbacks: Iterable[Any]) -> None:
    """Let callbacks forget the best epoch so far, in which the network had not the size that was asked for."""
    for callback in callbacks:
        names = {kind.__name__ for kind in type(callback).__mro__}
        worst = torch.tensor(-math.inf if getattr(callback, "mode", "min") == "max" else math.inf)
        if "ModelCheckpoint" in names and callback.monitor is not None:
            callback.best_k_models, callback.kth_value, callback.kth_best_model_path = {}, worst, ""
            callback.best_model_path, callback.best_model_score = "", None
        if "EarlyStopping" in names:
            callback.best_score, callback.wait_count = worst, 0


class _Skipped(Exception):
    """Says that the training step returned None, by which it skips the batch."""


class _Found:
    """What the passes of one training step have returned and logged.

    Attributes:
        output: What the step returned in the pass that trains the weights.
        logged: The arguments of the calls of ``self.log`` in that pass.
    """

    def __init__(self) -> None:
        self.output: Any = None
        self.logged: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._aside = False

    def begin(self, *, aside: bool) -> None:
        """Begin a pass, which is put aside unless it trains the weights."""
        self._aside = aside
        if not aside:
            self.logged.clear()

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Note a call of ``self.log``."""
        if not self._aside:
            self.logged.append((args, kwargs))

    def end(self, output: Any) -> None:
        """Note what the step returned."""
        if not self._aside:
            self.output = output
