"""Trains models in a short reference loop. A run trains one model on one data set in one mode: dense, prune or grow."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.apps.checkpoints import Checkpoints
from plasticnet.apps.data import Data, Split, Task
from plasticnet.apps.finite import Guard, check_gradients, check_loss, named, naming_output
from plasticnet.apps.identity import describe_model, identity
from plasticnet.apps.preparing import Training, prepare_run
from plasticnet.apps.saving import SECONDS, Keeper, Place, resume_run
from plasticnet.apps.scores import SCORES, evaluate, losses
from plasticnet.apps.settings import Config, Mode
from plasticnet.apps.stopping import Stop
from plasticnet.errors import PlasticError
from plasticnet.gates.site import transition
from plasticnet.measuring.profiling import profile
from plasticnet.measuring.timing import one_thread
from plasticnet.net import PlasticNet

_PROFILES = 10  # the most profiles of a run while it trains; each of them takes as long as about twenty steps


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes:
        mode: What the run did: "dense", "prune" or "grow".
        net: The network, hardened and in evaluation mode.
        compact: The compact module.
        summary: How the run ended, as plain data: scores, sizes, times and profiles.
    """

    mode: Mode
    net: PlasticNet
    compact: nn.Module
    summary: dict[str, Any]


def train_epoch(
    training: Training,
    train: Split,
    config: Config,
    task: Task = "classification",
    *,
    place: Place | None = None,
    after_step: Callable[[Place], None] | None = None,
) -> float:
    """Train for one epoch over shuffled batches, or for what is left of it.

    Args:
        training: The network, its optimizer, and its schedule, whose penalty is added to the loss where k is finite.
        train: The training data.
        config: The settings, of which the size of a batch counts here.
        task: What kind of answer the data ask for.
        place: Where in the epoch the training stands, which moves on; by default it begins.
        after_step: Called with the place after each step.

    Returns:
        The mean training loss, without the pressure.

    Raises:
        PlasticError: The loss, the pressure or a gradient of a step is not finite; the message names the first output
            or the first parameter. The network has then not made this step.
    """
    net, optimizer, schedule = training
    net.train()
    place = begin_epoch(train) if place is None else place
    batches = place.order.to(train.x.device).split(config.batch)
    for index in batches[place.step :]:
        started, step = time.process_time(), place.step + 1
        x, y = train.x[index], train.y[index]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            return losses(net(x), y, task)

        with named(f"step {step} of {len(batches)}"), naming_output(net, x):
            loss = net.expected_loss(closure)
            total = place.total + loss.detach() * len(index)
            if not math.isinf(net.k):
                loss = loss + schedule.penalty()
            if not math.isfinite(loss.item()):
                raise PlasticError("the loss with the pressure on the gates is not finite (NaN or infinite)")
        optimizer.zero_grad()
        loss.backward()
        with named(f"step {step} of {len(batches)}"):
            check_gradients(net)
        optimizer.step()
        place.step, place.total = step, total
        place.seconds += time.process_time() - started
        if after_step is not None:
            after_step(place)
    return float(place.total / len(train))


def begin_epoch(train: Split) -> Place:
    """Return the place before the first step of an epoch, whose order is drawn."""
    return Place(torch.randperm(len(train)), torch.zeros((), device=train.x.device))


def train_epochs(
    training: Training,
    data: Data,
    config: Config,
    guard: Guard,
    place: Place | None,
    after_step: Callable[[Place], None],
) -> Iterator[dict[str, Any]]:
    """Train to the end of the schedule, and yield the record of each epoch as plain data.

    At most ten times in a run, the record also holds a profile of the network. It is taken before the schedule
    cuts or grows anything after that epoch.

    Args:
        training: The network, its optimizer and its schedule.
        data: The data.
        config: The settings.
        guard: Says whether all numbers are finite.
        place: Where in the first of these epochs the training stands, or None where it stands before it.
        after_step: Called with the place after each step.

    Raises:
        PlasticError: A loss, a weight, a gate or something that the optimizer remembers has become NaN or infinite. The
            message names the epoch, the step where it is known, and the first such tensor in the order of the modules.
    """
    schedule = training.schedule
    while schedule.epoch < schedule.epochs:
        place = begin_epoch(data.train) if place is None else place
        with named(f"epoch {schedule.epoch + 1}"), guard.naming():
            record = _one_epoch(training, data, config, guard, place, after_step)
        yield record
        place = None


def _one_epoch(
    training: Training,
    data: Data,
    config: Config,
    guard: Guard,
    place: Place,
    after_step: Callable[[Place], None],
) -> dict[str, Any]:
    """Train to the end of an epoch, let the schedule end it, and return its record, unless something is not finite."""
    net, schedule = training.net, training.schedule
    k = net.k
    training.optimizer.param_groups[0]["lr"] = config.rate(schedule.epoch)
    loss = train_epoch(training, data.train, config, data.task, place=place, after_step=after_step)
    started = time.process_time()
    if not math.isfinite(loss):  # a sum of finite losses
        raise PlasticError("the mean training loss is not finite (NaN or infinite)")
    steps = -(-len(data.train) // config.batch)
    guard.check(f"after step {steps} of {steps}")
    val_loss, val_score = evaluate(net, data.val, data.task)
    check_loss(val_loss, net, data.val, "validation", data.task)
    paused = time.process_time()
    measured = profile_dict(net, data, config) if schedule.epoch % -(-schedule.epochs // _PROFILES) == 0 else None
    started += time.process_time() - paused
    change = schedule.step(val_loss)
    guard.check("after cutting and growing")
    record = {
        "epoch": schedule.epoch,
        "k": "inf" if math.isinf(k) else k,
        "loss": loss,
        "val_loss": val_loss,
        "val_score": val_score,
        **_size(net),
        "cut": sum(change.cut.values()),
        "grown": sum(change.grown.values()),
        "cpu_seconds": place.seconds + time.process_time() - started,
    }
    return record if measured is None else {**record, "profile": measured}


def profile_dict(module: nn.Module, data: Data, config: Config) -> dict[str, Any]:
    """Return the profile of a module for a batch of training data, training included, as plain data."""
    return profile(module, (data.train.x[: config.batch],), repeats=5, training=True).as_dict()


def _size(net: PlasticNet) -> dict[str, Any]:
    """Return the part of a record that says how large the network is and how decided its gates are."""
    summary = net.summary()
    pi = torch.cat([s.probability(net.k).detach() for s in net.sites.values()])
    return {
        "units": {s.name: s.open for s in summary.sites},
        "parameters": summary.open_parameters,
        "macs": summary.open_macs,
        "histogram": torch.histc(pi, 20, 0, 1).int().tolist(),
        "transition": transition(pi),
    }


def train_run(
    model: nn.Module,
    data: Data,
    config: Config,
    mode: Mode,
    *,
    limited: bool = True,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    seconds: float = SECONDS,
    stop: Stop | None = None,
) -> Result:
    """Train one network to the end of its schedule.

    Args:
        model: The model, of which a copy is trained, on the device of the data.
        data: The data.
        config: The settings.
        mode: What the run does.
        limited: Whether a network that grows keeps to the widths of the model.
        on_epoch: Called with the record of each epoch. When a run is resumed, it is first called with the records of
            the epochs that are over.
        checkpoint: The file in which the state is saved after each epoch. Beside it are the state before that, and the
            best one by validation: see `Checkpoints`.
        resume: Whether to go on from the newest checkpoint that can be read, if there is one. The result is that of a
            run that was never interrupted.
        seconds: After so many seconds since the last time, the state is also saved within an epoch.
        stop: Says whether to stop after a step, when the state has been saved.

    Raises:
        PlasticError: The checkpoint is damaged, or belongs to a run with other settings, another mode, model or data,
            which are named; or the settings, the model and the data do not fit together; or something has become NaN or
            infinite, which is not saved: the checkpoint is then the last good one.
        Interrupted: It was asked to stop.
    """
    own = identity(data, describe_model(model), config, mode)
    torch.manual_seed(config.seed)
    model = copy.deepcopy(model).to(data.train.x.device)
    training = prepare_run(copy.deepcopy(model), data, config, mode, limited=limited)
    checkpoints = None if checkpoint is None else Checkpoints(checkpoint)
    history, place, guard = list[dict[str, Any]](), None, Guard(training.net, training.optimizer)
    if checkpoints is not None and resume:
        history, place = resume_run(checkpoints, training, own)
    for record in history:
        if on_epoch:
            on_epoch(record)
    before = profile_dict(model, data, config)
    keeper = Keeper(checkpoints, training, history, own, guard, seconds, stop or Stop())
    for record in train_epochs(training, data, config, guard, place, keeper.after_step):
        history.append(record)
        keeper.after_epoch()
        if on_epoch:
            on_epoch(record)
    small = training.net.compact()
    with named("after the last epoch"):
        summary = _summary(training.net, small, data, mode, history)
    summary["profile"] = {"before": before, "after": profile_dict(small, data, config)}
    if training.schedule.growth is not None:
        summary["growth_stopped"] = training.schedule.growth.stopped
    return Result(mode, training.net, small, summary)


def _summary(
    net: PlasticNet, small: nn.Module, data: Data, mode: Mode, history: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return how a run ended, as plain data; the test data are read here.

    Raises:
        PlasticError: The test loss is not finite.
    """
    val, test = evaluate(small, data.val, data.task), evaluate(small, data.test, data.task)
    check_loss(test.loss, small, data.test, "test", data.task)
    deviation = data.target.deviation
    errors = {"val_rmse": val.error * deviation, "test_rmse": test.error * deviation}
    size = net.summary()
    return {
        "mode": mode,
        "task": data.task,
        "score": SCORES[data.task],
        "test_score": test.score,
        "test_loss": test.loss,
        "val_score": history[-1]["val_score"] if history else None,
        **(errors if data.task == "regression" else {}),
        "units": {s.name: s.open for s in size.sites},
        "parameters": sum(p.numel() for p in small.parameters()),
        "macs": size.open_macs,
        "ms_per_1000": time_per_thousand(copy.deepcopy(small).cpu(), data.test.x[:1000].cpu()),
        "train_cpu_seconds": sum(r["cpu_seconds"] for r in history),
        "peak_parameters": max((r["parameters"] for r in history), default=0),
    }


@torch.no_grad()
def time_per_thousand(module: nn.Module, x: Tensor, repeats: int = 9) -> float:
    """Return the CPU time of a forward pass of 1,000 samples on one thread: milliseconds, the median of the repeats."""
    module.eval()
    x = x.repeat(-(-1000 // len(x)), *[1] * (x.dim() - 1))[:1000]
    times = []
    with one_thread():
        module(x)
        for _ in range(repeats):
            start = time.thread_time()
            module(x)
            times.append(1000 * (time.thread_time() - start))
    return sorted(times)[repeats // 2]
