"""The callback for Lightning on one process: what a fit leaves, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("lightning.pytorch", reason="lightning is not installed: see `make integrations`")
pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed: see `make integrations`")

import lightning.pytorch as L
import pytorch_lightning as PL

import plasticnet as pn
from plasticnet.lightning import PlasticCallback
from tests.integrations import task
from tests.integrations.kit_lightning import EPOCHS, Module, Scheduled, begin, fit

pytestmark = [
    pytest.mark.integration("Lightning", 1),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning"),
]


# -- one fit ----------------------------------------------------------------------------------


def test_a_fit_prunes_to_the_budget(tmp_path: Path) -> None:
    """A fit ends within the budget, as accurate as a plain loop with the same budget."""
    begin()
    module, callback, _ = fit(tmp_path)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_bf16(tmp_path: Path) -> None:
    """Under bf16-mixed a fit prunes to the budget, and loses no accuracy."""
    begin()
    module, _, _ = fit(tmp_path, precision="bf16-mixed")
    task.assert_pruned(module.net)
    begin()
    single, _, _ = fit(tmp_path)
    assert abs(task.accuracy(module.net) - task.accuracy(single.net)) <= 1.0


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


@pytest.mark.slow
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


@pytest.mark.slow
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
    with pytest.warns(UserWarning, match="ends after 2 of the 10 epochs"):
        fit(tmp_path, max_epochs=2)
