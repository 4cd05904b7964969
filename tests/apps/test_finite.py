"""A run stops where a number is NaN or infinite, and keeps its last good state."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plasticnet import Budget, PlasticError, load_checkpoint, save_checkpoint
from plasticnet.apps.data import Data, Split, load_data
from plasticnet.apps.loop import train_run
from plasticnet.apps.models import MLP
from plasticnet.apps.preparing import prepare_run
from plasticnet.apps.scores import evaluate
from plasticnet.apps.settings import Config, Mode
from tests.kit.commands import fail, succeed

CONFIG = Config(epochs=4, price=0.05, batch=40, lr=3e-3, gate_lr=3e-2)
STEPS = 4  # of an epoch
Hurt = Callable[[list[nn.Parameter]], None]


@pytest.fixture(scope="module")
def data() -> Data:
    torch.set_num_threads(1)
    moons = load_data("moons")
    return Data(Split(moons.train.x[:160], moons.train.y[:160]), moons.val, moons.test)


def model() -> nn.Module:
    torch.manual_seed(0)
    return MLP([100, 8, 4, 2])


def entry(index: int, value: float) -> Hurt:
    """Sets the first entry of a parameter, of those of the optimizer."""

    def hurt(parameters: list[nn.Parameter]) -> None:
        with torch.no_grad():
            parameters[index].view(-1)[0] = value

    return hurt


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Hurt], None]:
    """Lets something happen to the parameters after a step of Adam, once."""
    step = torch.optim.Adam.step

    def arrange(number: int, hurt: Hurt) -> None:
        taken: list[int] = []

        def stepping(optimizer: torch.optim.Adam, *args: Any, **options: Any) -> Any:
            found = step(optimizer, *args, **options)
            taken.append(1)
            if len(taken) == number:
                hurt([p for group in optimizer.param_groups for p in group["params"]])
            return found

        monkeypatch.setattr(torch.optim.Adam, "step", stepping)

    return arrange


def stopped(*args: Any, **options: Any) -> str:
    with pytest.raises(PlasticError) as caught:
        train_run(*args, **options)
    return str(caught.value)


# -- weights and gates ------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:growth has ended before it began")  # 4 steps are too few for it
@pytest.mark.parametrize("mode", ["dense", "prune", "grow"])
def test_the_last_step_of_an_epoch(mode: Mode, value: float, data: Data, after_step: Callable, tmp_path: Path) -> None:
    """The loss of the epoch is finite. What was saved before stays, and the run goes on from it as if never stopped."""
    whole = train_run(model(), data, CONFIG, mode)
    after_step(3 * STEPS, entry(2, value))
    checkpoint, saved = tmp_path / "checkpoint", []
    line = stopped(model(), data, CONFIG, mode, checkpoint=checkpoint,
        on_epoch=lambda record: saved.append(checkpoint.read_bytes()))  # fmt: skip
    assert all(word in line for word in ("epoch 3", f"step {STEPS} of {STEPS}", "3.weight"))
    assert len(saved) == 2
    assert checkpoint.read_bytes() == saved[-1]
    again = train_run(model(), data, CONFIG, mode, checkpoint=checkpoint, resume=True)
    assert all(torch.equal(v, whole.net.state_dict()[n]) for n, v in again.net.state_dict().items())


@pytest.mark.parametrize("mode", ["dense", "prune"])
def test_the_last_epoch(mode: Mode, data: Data, after_step: Callable, tmp_path: Path) -> None:
    after_step(4 * STEPS, entry(0, math.inf))
    line = stopped(model(), data, CONFIG, mode, checkpoint=tmp_path / "checkpoint")
    assert "epoch 4" in line
    assert "1.weight" in line
    assert len(load_checkpoint(tmp_path / "checkpoint")["history"]) == 3


def test_the_first_epoch_leaves_no_checkpoint(data: Data, after_step: Callable, tmp_path: Path) -> None:
    after_step(1, entry(1, math.nan))
    assert "step 2 of 4" in stopped(model(), data, CONFIG, "dense", checkpoint=tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [None, Budget(params=0.6), Budget(loss=0.1)])
@pytest.mark.parametrize("step", [6, 2 * STEPS])
def test_the_logit_of_a_gate(step: int, budget: Budget | None, data: Data, after_step: Callable) -> None:
    """In the middle of an epoch the pressure or the loss shows it, and at the end only the gate itself."""
    after_step(step, entry(-1, math.nan))
    line = stopped(model(), data, replace(CONFIG, budget=budget), "prune")
    assert "epoch 2" in line
    assert "the logits of the gates of '3'" in line


def test_the_first_culprit_is_the_first_in_the_model(data: Data, after_step: Callable) -> None:
    def hurt(parameters: list[nn.Parameter]) -> None:
        for index in (-1, 4, 3):
            entry(index, math.nan)(parameters)

    after_step(STEPS, hurt)
    assert stopped(model(), data, CONFIG, "prune").endswith("3.bias")


def test_what_the_optimizer_remembers(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """A square of a gradient overflows: the weight stays finite, and would never change again."""
    step = torch.optim.Adam.step

    def stepping(optimizer: torch.optim.Adam, *args: Any, **options: Any) -> Any:
        gradient = optimizer.param_groups[0]["params"][0].grad
        gradient.view(-1)[0] = 1e30
        return step(optimizer, *args, **options)

    monkeypatch.setattr(torch.optim.Adam, "step", stepping)
    assert stopped(model(), data, CONFIG, "dense").endswith("exp_avg_sq of 1.weight")


class Masked(nn.Module):
    """Has a buffer that is infinite by design, and a BatchNorm."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(100, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.fc(x)).relu()) + self.mask.exp()


def test_a_buffer_that_is_infinite_by_design(data: Data, tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=1)
    for resume in (False, True):
        train_run(Masked(), data, config, "dense", checkpoint=tmp_path / "checkpoint", resume=resume)


def test_a_buffer_that_becomes_infinite(data: Data, tmp_path: Path) -> None:
    """A sample is finite and its square is not, by which BatchNorm normalises, and which goes into its buffer."""
    x = data.train.x.clone()
    x[3] = 1e25
    hurt = Data(Split(x, data.train.y), data.val, data.test)
    line = stopped(Masked(), hurt, replace(CONFIG, batch=160), "dense", checkpoint=tmp_path / "checkpoint")
    assert "epoch 1" in line
    assert not (tmp_path / "checkpoint").exists()


# -- losses -----------------------------------------------------------------------------------


def with_sample(split: Split, value: float | Tensor) -> Split:
    x = split.x.clone()
    x[17] = value
    return Split(x, split.y)


@pytest.mark.parametrize(("value", "why"), [(3e38, "finite input"), (math.nan, "itself not finite")])
def test_the_validation_loss_alone(value: float, why: str, data: Data, tmp_path: Path) -> None:
    # A finite input of this size overflows in the first layer where it has the signs of a row of the weights.
    signs = model().get_parameter("1.weight").detach()[0].sign()
    hurt = Data(data.train, with_sample(data.val, value * signs), data.test)
    line = stopped(model(), hurt, CONFIG, "prune", checkpoint=tmp_path / "checkpoint")
    assert all(word in line for word in ("epoch 1", "validation loss", "number 17", why))
    assert list(tmp_path.iterdir()) == []


def test_the_training_loss(data: Data) -> None:
    hurt = Data(with_sample(data.train, math.nan), data.val, data.test)
    line = stopped(model(), hurt, CONFIG, "prune")
    assert "epoch 1: step " in line
    assert "the loss is not finite" in line


def test_the_test_loss_alone(data: Data, tmp_path: Path) -> None:
    hurt = Data(data.train, data.val, with_sample(data.test, math.inf))
    line = stopped(model(), hurt, CONFIG, "dense", checkpoint=tmp_path / "checkpoint")
    assert "the test loss" in line
    assert len(load_checkpoint(tmp_path / "checkpoint")["history"]) == CONFIG.epochs


# -- going on ---------------------------------------------------------------------------------


def test_a_checkpoint_that_is_not_finite_is_refused(data: Data, tmp_path: Path) -> None:
    train_run(model(), data, CONFIG, "dense", checkpoint=tmp_path / "checkpoint")
    saved = load_checkpoint(tmp_path / "checkpoint")
    saved["net"]["model.3.bias"][1] = math.nan
    save_checkpoint(saved, tmp_path / "checkpoint")
    assert "3.bias" in stopped(model(), data, CONFIG, "dense", checkpoint=tmp_path / "checkpoint", resume=True)


def test_another_mode_model_or_data_are_named(data: Data, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    train_run(model(), data, CONFIG, "prune", checkpoint=checkpoint)
    before = checkpoint.read_bytes()
    other = Data(data.train, data.test, data.val)
    for args, words in (
        ((model(), data, CONFIG, "dense"), ["mode: prune then, dense now"]),
        ((model(), other, CONFIG, "prune"), ["content of the data"]),
        ((MLP([100, 8, 5, 2]), data, CONFIG, "prune"), ["model: ", "out_features=4", "out_features=5"]),
        ((model(), other, replace(CONFIG, lr=0.5), "grow"), ["lr: 0.003 then, 0.5 now", "mode: ", "content of the"]),
    ):
        line = stopped(*args, checkpoint=checkpoint, resume=True)
        assert "\n" not in line
        assert all(word in line for word in words)
    assert checkpoint.read_bytes() == before


# -- the command line ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [2, 3])
def test_the_command_train(
    epoch: int,
    after_step: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ["train", "--data", "moons", "--model", "mlp:6-4", "--epochs", "3", "--batch", "100"]
    succeed(*args, "--out", tmp_path / "whole")
    after_step(4 * epoch, entry(0, math.nan))
    line = fail(monkeypatch, capsys, *args, "--out", tmp_path / "run")
    assert all(word in line for word in (f"epoch {epoch}", "step 4 of 4", "1.weight"))
    found = {p.name for p in (tmp_path / "run").rglob("*") if p.is_file()}
    checkpoints = {"checkpoint.safetensors", "checkpoint-best.safetensors"}
    before = {"checkpoint-before.safetensors"} if epoch == 3 else set()
    assert found == {"run.json", "prepared.json", "metrics.jsonl", *checkpoints, *before}
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == epoch - 1
    succeed(*args, "--out", tmp_path / "run", "--resume")
    name = "prune/compact.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_evaluating_is_left_as_it_was(data: Data) -> None:
    """A loss that is not finite is a number for whoever evaluates by themselves."""
    assert math.isnan(evaluate(model(), with_sample(data.val, math.nan))[0])


# -- the culprit ------------------------------------------------------------------------------


class Logarithm(nn.Module):
    """Has no finite output where an input is 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


class Root(nn.Module):
    """Has a finite output, and no finite slope."""

    def forward(self, x: Tensor) -> Tensor:
        return (0 * x).sqrt() + x


def with_layer(layer: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 6), nn.ReLU(), nn.Sequential(layer), nn.Linear(6, 2))


def test_the_first_layer_with_such_an_output_is_named(data: Data, tmp_path: Path) -> None:
    line = stopped(with_layer(Logarithm()), data, CONFIG, "dense", checkpoint=tmp_path / "checkpoint")
    assert "epoch 1: step 1 of 4: the loss is not finite" in line
    assert "the first output that is not finite is that of '2.0' (Logarithm)" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["dense", "prune"])
def test_the_first_parameter_with_such_a_gradient_is_named(mode: Mode, data: Data, tmp_path: Path) -> None:
    """No step is made with it, so that all weights are finite."""
    line = stopped(with_layer(Root()), data, CONFIG, mode, checkpoint=tmp_path / "checkpoint")
    assert "epoch 1: step 1 of 4: the gradient of 0.weight is not finite" in line
    assert "the first tensor that is not finite" not in line


def test_a_row_of_the_data_is_named(data: Data) -> None:
    hurt = Data(with_sample(data.train, math.nan), data.val, data.test)
    line = stopped(model(), hurt, replace(CONFIG, batch=160), "dense")
    assert re.search(r"; input \d+ of the batch is itself not finite$", line)


def test_looking_for_the_culprit_leaves_no_trace(data: Data) -> None:
    """Neither hooks nor random numbers nor modes."""
    from plasticnet.apps.finite import naming_output

    net = prepare_run(model(), data, replace(CONFIG, epochs=4), "prune")[0]
    net.train()
    before = torch.get_rng_state()
    with pytest.raises(PlasticError, match=r"^mine$"), naming_output(net, data.train.x[:4]):
        raise PlasticError("mine")
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training
    assert not any(module._forward_hooks for module in net.modules())


# -- sites that would close -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:growth has ended before it began")
@pytest.mark.parametrize("extra", [["--price", "1e6"], ["--price", "1e6", "--growth"], ["--budget", "units=2"]])
def test_a_site_keeps_a_unit_and_it_is_said(extra: list[str], tmp_path: Path) -> None:
    args = ["train", "--data", "moons", "--model", "mlp:6-4", "--epochs", "9", "--batch", "50", "--gate-lr", "0.5"]
    text = succeed(*args, *extra, "--out", tmp_path)
    assert "widths 1-1" in text
    assert "--budget" in extra or "left a single unit in 1, 3" in text
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert min(json.loads(line)["units"].values()) >= 1
