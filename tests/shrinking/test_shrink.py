"""A trained model made smaller in one call: what it takes, what it leaves alone, and what it returns."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn
from plasticnet import Budget, PlasticError, shrink
from tests.kit.networks import ConvNet, mlp


def data(n: int = 320, features: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator)
    return x, (x @ torch.randn(features, 3, generator=generator)).argmax(1)


X, Y = data()
BATCHES = list(zip(X.split(64), Y.split(64), strict=True))


def trained(steps: int = 120) -> nn.Sequential:
    torch.manual_seed(0)
    model = mlp(6, 32, 24, 3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    model.zero_grad()
    return model


def wrong(network: nn.Module) -> float:
    return (network(X).argmax(1) != Y).double().mean().item()


def losses(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1], reduction="none")


def macs(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.dim() > 1)


# -- what it does -----------------------------------------------------------------------------


def test_at_once() -> None:
    model = trained()
    small, report = shrink(model, BATCHES, Budget(macs=0.2), validate=wrong)
    assert type(small) is nn.Sequential
    assert not small.training
    assert macs(small) <= 0.2 * macs(model)
    assert [s.name for s in report.steps] == ["whole", "cut", "repaired"]
    whole, cut, repaired = (s.error for s in report.steps)
    assert whole == wrong(model)
    assert repaired == wrong(small)
    assert repaired < cut
    assert report.steps[-1].macs == macs(small)
    assert report.steps[-1].parameters == sum(p.numel() for p in small.parameters())
    assert [(s.name, s.before, s.after) for s in report.sites] == [
        ("0", 32, small[0].out_features),
        ("2", 24, small[2].out_features),
    ]
    assert report.inputs == len(X)
    assert not report.interrupted


def test_training_makes_it_better() -> None:
    model = trained()
    _, at_once = shrink(model, BATCHES, Budget(macs=0.1), repair=False)
    options: dict[str, Any] = {"repair": False, "epochs": 20, "optimizer": lambda p: torch.optim.Adam(p, 1e-2)}
    small, imitating = shrink(model, BATCHES, Budget(macs=0.1), **options)
    assert [s.name for s in imitating.steps] == ["whole", "cut", *(f"epoch {i + 1}" for i in range(20))]
    assert imitating.steps[-1].error < at_once.steps[-1].error / 2
    assert not small.training
    assert all(p.grad is None for p in small.parameters())
    _, learning = shrink(model, BATCHES, Budget(macs=0.1), loss=losses, validate=wrong, **options)
    assert learning.steps[-1].error < learning.steps[1].error


def test_the_mean_of_the_loss_will_do() -> None:
    def mean(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1])

    _, one = shrink(trained(), BATCHES, Budget(macs=0.2), epochs=2, loss=mean, scores="magnitude")
    _, other = shrink(trained(), BATCHES, Budget(macs=0.2), epochs=2, loss=losses, scores="magnitude")
    assert one.steps[-1].error == pytest.approx(other.steps[-1].error, rel=1e-3)


def test_it_is_decided_by_its_seed_and_inputs() -> None:
    model = trained()
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(shrink(model, BATCHES, Budget(macs=0.2), epochs=1)[0].state_dict())
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("options", [{}, {"epochs": 1}, {"epochs": 1, "loss": losses}])
def test_the_model_is_left_as_it_was(options: dict[str, Any]) -> None:
    model = nn.Sequential(*trained(), nn.BatchNorm1d(3), nn.Dropout(0.2)).train()
    model[0].weight.requires_grad_(False)
    called: list[int] = []
    model.register_forward_hook(lambda *_: called.append(1))
    before, own = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    state = torch.get_rng_state()
    small, _ = shrink(model, BATCHES, Budget(macs=0.3), **options)
    assert model.training
    assert model[1].training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p is own[n] and p.grad is None for n, p in model.named_parameters())
    assert not model[0].weight.requires_grad
    assert not small[0].weight.requires_grad
    assert small[2].weight.requires_grad
    assert len(model._forward_hooks) == 1
    if not options:
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("budget", [Budget(macs=0.3), Budget(loss=0.1)])
def test_what_validate_does_to_a_network_stays_there(budget: Budget) -> None:
    def harmful(network: nn.Module) -> float:
        found = wrong(network)
        network.train().requires_grad_(False)
        for p in network.parameters():
            p.zero_()
        for b in network.buffers():
            b.zero_()
        network.register_forward_hook(lambda *_: math.nan)
        network.half()
        return found

    model = nn.Sequential(*trained(), nn.BatchNorm1d(3)).eval()
    before, own = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    found = []
    for validate in (wrong, harmful):
        torch.manual_seed(0)
        found.append(shrink(model, BATCHES, budget, epochs=1, validate=validate))
        assert not any(m.training or m._forward_hooks for m in model.modules())
        assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in model.state_dict().items())
        assert all(p is own[n] and p.requires_grad for n, p in model.named_parameters())
    (small, report), (other, other_report) = found
    assert torch.equal(small(X), other(X))
    assert [s.error for s in report.steps] == [s.error for s in other_report.steps]
    assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_precision_of_the_model(dtype: torch.dtype) -> None:
    small, _ = shrink(trained().to(dtype), BATCHES, Budget(macs=0.3), epochs=1, loss=losses)
    assert all(p.dtype == dtype for p in small.parameters())


def test_options_of_the_network() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    small, report = shrink(model, BATCHES, Budget(macs=0.5), exclude="2", residual=True)
    assert small[2].out_features == 16
    assert small[0].out_features < 16
    assert [s.name for s in report.sites] == ["0"]
    small, report = shrink(model, BATCHES, Budget(macs=0.5))
    assert "0" in report.frozen
    small, _ = shrink(trained(), BATCHES, Budget(macs=0.5), multiple_of=4)
    assert small[0].out_features % 4 == small[2].out_features % 4 == 0
    plain, _ = shrink(trained(), BATCHES, Budget(macs=0.5))
    small, _ = shrink(trained(), BATCHES, Budget(macs=0.5), multiple_of=64)  # more than any site has
    assert [layer.out_features for layer in small[::2]] == [layer.out_features for layer in plain[::2]]
    deep = nn.Sequential(
        nn.Linear(6, 8), *[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)], nn.Linear(8, 3)
    )
    small, report = shrink(deep, BATCHES, Budget(macs=0.6), blocks="[1-4]", exclude="0")
    assert [s.name for s in report.sites] == ["depth"]
    assert sum(isinstance(m, pn.Skip) for m in small) == 4 - report.sites[0].after > 0


def test_heads_need_not_be_a_multiple_where_their_widths_are() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(24, 6, batch_first=True), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))

    x = torch.randn(64, 5, 24)
    for multiple_of, heads in ((1, 5), (8, 4), (16, 4), (64, 5)):  # a head is 4 wide
        _, report = shrink(Attention(), [x], Budget(units=5), multiple_of=multiple_of, exclude="*.out_proj")
        assert [s.after for s in report.sites] == [heads]


# -- budgets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget", [Budget(macs=0.3), Budget(params=0.3), Budget(units=0.3), Budget(macs=300, units=30)]
)
def test_budgets_of_costs_are_met(budget: Budget) -> None:
    small, report = shrink(trained(), BATCHES, budget)
    last, whole = report.steps[-1], report.steps[0]
    if budget.macs is not None:
        assert macs(small) <= (budget.macs * whole.macs if budget.macs <= 1 else budget.macs)
    if budget.params is not None:
        assert last.parameters <= budget.params * whole.parameters
    if budget.units is not None:
        left = sum(s.after for s in report.sites)
        assert left <= (budget.units * 56 if budget.units <= 1 else budget.units)


@pytest.mark.parametrize("validate", [None, wrong])
def test_a_budget_of_loss(validate: Any) -> None:
    sizes = []
    for most in (0.02, 0.2):
        _, report = shrink(trained(), BATCHES, Budget(loss=most), validate=validate)
        assert report.steps[-1].error <= report.steps[0].error + most
        sizes.append(report.steps[-1].macs)
    assert sizes[1] <= sizes[0] < report.steps[0].macs


def test_a_budget_of_latency() -> None:
    model = mlp(6, 512, 512, 3)
    small, report = shrink(model, BATCHES, Budget(latency_ms=1e6))
    assert macs(small) == macs(model)
    assert report.milliseconds[0] > 0


# -- batches ----------------------------------------------------------------------------------


class Several(nn.Module):
    """Takes two inputs, and returns an object."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 16), nn.Linear(2, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, side: Tensor | None = None, labels: Tensor | None = None) -> Any:
        h = self.a(x).relu()
        h = h if side is None else h + self.b(side).relu()
        assert labels is None
        return SimpleNamespace(logits=self.out(h), hidden=[h.detach()])


SIDE = torch.randn(len(X), 2)
FORMS: dict[str, Any] = {
    "arguments": [((x, s), y) for x, s, y in zip(X.split(64), SIDE.split(64), Y.split(64), strict=True)],
    "nested mapping": [
        ({"x": x, "side": s}, y) for x, s, y in zip(X.split(64), SIDE.split(64), Y.split(64), strict=True)
    ],
    "mapping": [
        {"x": x, "side": s, "labels": y, "id": ["a"] * len(x)}
        for x, s, y in zip(X.split(64), SIDE.split(64), Y.split(64), strict=True)
    ],
    "list": [[x] for x in X.split(64)],
    "tensor": list(X.split(64)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("epochs", [0, 1])
def test_forms_of_batches(form: str, epochs: int) -> None:
    torch.manual_seed(0)
    model = Several()
    small, report = shrink(model, FORMS[form], Budget(macs=0.5), epochs=epochs, outputs=lambda out: out.logits)
    assert report.steps[-1].macs <= 0.5 * report.steps[0].macs
    with pytest.raises(RuntimeError):
        small.load_state_dict(model.state_dict())


def test_a_forward_of_the_users_own() -> None:
    batches = [SimpleNamespace(points=x) for x in X.split(64)]
    with pytest.raises(PlasticError, match="forward=lambda model, batch"):
        shrink(trained(), batches, Budget(macs=0.5))
    small, report = shrink(
        trained(), batches, Budget(macs=0.3), forward=lambda model, batch: {"logits": model(batch.points)}, epochs=1,
        outputs=lambda out: out["logits"],
    )  # fmt: skip
    assert macs(small) <= 0.3 * macs(trained())
    assert report.steps[2].error < report.steps[1].error


def test_loaders() -> None:
    pairs = torch.utils.data.TensorDataset(X, Y)
    for loader in (
        torch.utils.data.DataLoader(pairs, 64),
        torch.utils.data.DataLoader(pairs, 50, shuffle=True),
        torch.utils.data.DataLoader(pairs, 400),
    ):
        small, report = shrink(trained(), loader, Budget(macs=0.3), epochs=1, loss=losses, calibrate=200)
        assert report.inputs == 200
        assert macs(small) < macs(trained())


class Streamed(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_loader_that_does_not_know_its_length(epochs: int) -> None:
    loader = torch.utils.data.DataLoader(Streamed(), 64)
    small, report = shrink(trained(), loader, Budget(macs=0.3), epochs=epochs)
    assert len(report.steps) == 3 + epochs
    assert macs(small) <= 0.3 * macs(trained())


def test_regression_and_several_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 1), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            h = self.body(x).relu()
            return self.a(h), {"b": 100 * self.b(h)}

    _, report = shrink(Two(), list(X.split(64)), Budget(macs=0.5), epochs=3)
    whole, cut, repaired, *_, last = (s.error for s in report.steps)
    assert whole == 0
    assert 0 < repaired < cut
    assert last < cut


def test_outputs_that_differ_in_training() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(6, 32), nn.Linear(32, 3), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Any:
            h = self.body(x).relu()
            return (self.a(h), self.b(h)) if self.training else self.a(h)

    model, batches = Aside(), list(X.split(64))
    with pytest.raises(PlasticError, match=r"\(64, 3\), \(64, 4\) in training.*loss=\.\.\."):
        shrink(model, batches, Budget(macs=0.5), epochs=1)
    shrink(model, batches, Budget(macs=0.5), epochs=1, outputs=lambda out: out[0] if isinstance(out, tuple) else out)
    shrink(model, batches, Budget(macs=0.5), epochs=1, loss=lambda out, _: out[0].square().mean())


def test_images() -> None:
    model = ConvNet().eval()
    images = torch.randn(80, 3, 4, 4)
    small, report = shrink(model, list(images.split(16)), Budget(macs=0.5), epochs=1)
    assert small(images).shape == (80, 3)
    assert report.steps[2].error <= report.steps[1].error


# -- what it refuses --------------------------------------------------------------------------


def with_one(x: Tensor, bad: float = math.nan) -> Tensor:
    x = x.clone()
    x[5] = bad
    return x


def one_shot() -> Iterator[Tensor]:
    raise AssertionError("nothing is read from it")
    yield X


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": one_shot()}, "only once"),
        ({"batches": X}, r"\[batch\]"),
        ({"batches": []}, "no batches"),
        ({"batches": [X[:1]]}, "held out"),
        ({"batches": [("text", 1)] * 5}, "forward=lambda"),
        ({"batches": torch.utils.data.TensorDataset(X, Y)}, "DataLoader"),
        ({"batches": list(zip(X, Y, strict=True))}, "looks like one sample.*DataLoader"),
        ({"batches": (X, Y)}, r"\[\(x, y\)\]"),
        ({"batches": [X.numpy()]}, "from_numpy"),
        ({"batches": [(X.numpy(), Y.numpy())] * 2}, "from_numpy"),
        ({"batches": [{"x": X, "y": Y}]}, r"takes \['input'\].*forward=lambda"),
        ({"batches": [(X, X, Y)], "model": nn.Bilinear(6, 6, 3)}, r"float32\[320, 6\].*\(\(a, b\), labels\)"),
        ({"batches": [(X[:, :5], Y)]}, r"does not run on the first batch, \(float32\[320, 5\], int64\[320\]\)"),
        (
            {"batches": [X] * 3 + [X[:, :5]] * 2},
            r"Sequential does not run on a batch, float32\[320, 5\].*forward=lambda",
        ),
        ({"batches": [(X, Y)] * 3 + [(X[:, :5], Y)] * 3, "epochs": 1}, r"does not run on a batch, \(float32\[320, 5\]"),
        ({"validate": lambda network: 10**400}, "returned int"),
        ({"batches": [X.byte()]}, "uint8.*floating before"),
        ({"budget": 0.5}, r"budget is 0\.5: .*pn\.Budget\(macs=0\.5\)"),
        ({"budget": BATCHES}, r"^budget is a list: .*in this order: shrink\(model, batches, budget\)$"),
        ({"budget": Budget(macs=5)}, r"the target is 5\).*A share is a number of 1 or less, such as 0\.5$"),
        ({"budget": Budget(latency_ms=1e-6)}, r"blocks=$"),
        (
            {"batches": [X.numpy()]},
            r"two batches or more.*this one is an array of numpy, float32\[320, 6\].*from_numpy",
        ),
        ({"budget": Budget(macs=1e-6)}, "smallest network.*at least that.*blocks="),
        ({"budget": Budget(latency_ms=1e-6)}, r" ms \(the target is 1e-06\).*at least that.*blocks="),
        ({"exclude": ("*",)}, "exclude= leaves alone what can be gated, 0, 2: exclude less"),
        ({"model": nn.Linear(6, 3)}, "nothing to gate.*residual=True, or blocks="),
        ({"model": "resnet"}, "plain trained module"),
        ({"epochs": -1}, "epochs=-1"),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"calibrate": 0}, "calibrate=0"),
        ({"multiple_of": 0}, "multiple_of=0"),
        ({"scores": "best"}, "scores='best'"),
        ({"exclude": "nothing"}, "exclude='nothing'"),
        ({"forward": lambda model, batch: batch}, "has not called the model"),
        ({"validate": lambda network: None}, "returned NoneType"),
        ({"validate": lambda network: math.nan}, "validate= returned NaN"),
        ({"validate": lambda network: math.nan, "budget": Budget(loss=0.1)}, "validate= returned NaN"),
        ({"batches": [X[:100], X[:0], X[100:]]}, r"batch 2 is empty: float32\[0, 6\]"),
        ({"batches": [X[:0], X]}, "batch 1 is empty"),
        ({"batches": [X, X[:0]]}, "batch 2 is empty"),
        ({"batches": [X[:64], with_one(X[64:128]), *X[128:].split(64)]}, "outputs on batch 2.*NaN.*in the inputs"),
        ({"batches": [X[:64], with_one(X[64:128], math.inf), *X[128:].split(64)]}, "outputs on batch 2.*infinite"),
        ({"batches": [*X[:256].split(64), with_one(X[256:])]}, "held out are NaN"),
        (
            {"batches": [*X[:256].split(64), with_one(X[256:])], "calibrate": 128, "epochs": 1},
            "the loss is nan at batch 5 of epoch 1; the batch itself holds NaN",
        ),
        ({"loss": F.cross_entropy}, r"loss= raises TypeError.*batch\[1\]"),
        ({"loss": lambda output, batch: output.sum().item()}, "returned float"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(X)], 0.1)}, "optimizer=lambda p"),
        ({"loss": 5}, "loss=5 is not a function, such as loss=lambda output, batch"),
        ({"validate": 5}, "validate=5 is not a function, such as validate=lambda network"),
        ({"forward": 5}, "forward=5 is not a function, such as forward=lambda model, batch"),
        ({"outputs": 5}, "outputs=5 is not a function, such as outputs=lambda output"),
    ],
)
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    model = trained(1)
    before = copy.deepcopy(model.state_dict())
    arguments = {"model": model, "batches": BATCHES, "budget": Budget(macs=0.5), **change}
    with pytest.raises(PlasticError, match=message):
        shrink(**arguments)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    shrink(model, BATCHES, Budget(macs=0.5))


@pytest.mark.parametrize(
    ("making", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), "step of LBFGS needs a closure.*SGD, Adam or AdamW"),
        (lambda p: None, "returned NoneType.*optimizer=lambda p"),
        (lambda p: torch.optim.SGD(p, lr=-1), "raises ValueError.*optimizer=lambda p"),
    ],
)
def test_optimizers_are_refused_before_anything_is_read(making: Any, message: str) -> None:
    read = Interrupted(100)
    with pytest.raises(PlasticError, match=message):
        shrink(trained(1), read, Budget(macs=0.5), epochs=1, optimizer=making)
    assert read.when == 100


def test_a_model_that_cannot_learn() -> None:
    model = trained(1).requires_grad_(False)
    shrink(model, BATCHES, Budget(macs=0.5))
    with pytest.raises(PlasticError, match="requires_grad_"):
        shrink(model, BATCHES, Budget(macs=0.5), epochs=1)


def test_contexts_of_the_caller() -> None:
    model = trained()
    with torch.no_grad():
        _, report = shrink(model, BATCHES, Budget(macs=0.2), epochs=5)
    assert report.steps[-1].error < report.steps[1].error
    with torch.inference_mode():
        batches = [x + 0 for x in X.split(64)]
        with pytest.raises(PlasticError, match="inference_mode"):
            shrink(model, batches, Budget(macs=0.2))
    shrink(model, batches, Budget(macs=0.2), epochs=1)


def test_batches_of_one_input() -> None:
    normed = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    odd = [X[:64], X[64:128], X[128:129]]
    for loss in (None, lambda output, _: output.square().mean()):
        with pytest.raises(PlasticError, match="drop_last=True"):
            shrink(normed, odd, Budget(macs=0.5), epochs=1, loss=loss)
        with pytest.raises(PlasticError, match="drop_last=True"):
            shrink(normed, list(X[:20].split(1)), Budget(macs=0.5), epochs=1, loss=loss)
    shrink(normed, odd, Budget(macs=0.5))
    shrink(trained(), list(X[:20].split(1)), Budget(macs=0.5), epochs=1)


def test_half_precision_learns_in_full_one() -> None:
    model = trained().half()
    shrink(model, BATCHES, Budget(macs=0.5))
    with pytest.raises(PlasticError, match=r"model\.float\(\)"):
        shrink(model, BATCHES, Budget(macs=0.5), epochs=1)


def test_a_loss_that_is_not_finite() -> None:
    with pytest.raises(PlasticError, match="nan"):
        shrink(
            trained(1), BATCHES, Budget(macs=0.5), epochs=1, scores="magnitude",
            loss=lambda output, batch: output.sum() * math.nan,
        )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"validate": wrong}, {"validate": wrong, "loss": losses}])
def test_epochs_never_return_what_is_worse(options: dict[str, Any]) -> None:
    harmful = {"epochs": 3, "optimizer": lambda p: torch.optim.SGD(p, 30.0)}
    repaired, before = shrink(trained(), BATCHES, Budget(macs=0.3), **options)
    small, report = shrink(trained(), BATCHES, Budget(macs=0.3), **options, **harmful)
    assert report.kept == before.kept == "repaired"
    assert torch.equal(small(X), repaired(X))
    assert "after the step 'repaired'" in str(report)
    assert report.as_dict()["kept"] == "repaired"
    assert min(s.error for s in report.steps[1:]) == report.steps[2].error


def test_the_last_epoch_is_returned_where_it_is_best_or_nothing_says_what_is() -> None:
    gentle = {"epochs": 3, "optimizer": lambda p: torch.optim.Adam(p, 1e-3)}
    _, report = shrink(trained(), BATCHES, Budget(macs=0.2), repair=False, **gentle)
    assert report.kept == "epoch 3"
    harmful = {"epochs": 2, "optimizer": lambda p: torch.optim.SGD(p, 30.0)}
    _, report = shrink(trained(), BATCHES, Budget(macs=0.3), loss=losses, **harmful)
    assert report.kept == "epoch 2"
    assert "returned is" not in str(report)


# -- interrupts, and the report ---------------------------------------------------------------


class Interrupted:
    """Batches that are interrupted in a certain pass over them."""

    def __init__(self, when: int) -> None:
        self.when = when

    def __iter__(self) -> Iterator[Any]:
        self.when -= 1
        for i, batch in enumerate(BATCHES):
            if not self.when and i == 2:
                raise KeyboardInterrupt
            yield batch


def test_an_interrupt_ends_the_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    read = Interrupted(100)
    shrink(trained(), read, Budget(macs=0.3))
    before = 100 - read.when  # how often they are read before the first epoch
    small, report = shrink(trained(), Interrupted(before + 3), Budget(macs=0.3), epochs=9, loss=losses)
    assert report.interrupted
    assert [s.name for s in report.steps][-3:] == ["epoch 1", "epoch 2", "epoch 3, interrupted"]
    assert macs(small) <= 0.3 * macs(trained())
    assert not small.training
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(KeyboardInterrupt):
        shrink(trained(), Interrupted(1), Budget(macs=0.3), epochs=9)


class Failing:
    """An error that is NaN from a certain call on."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, network: nn.Module) -> float:
        self.left -= 1
        return wrong(network) if self.left >= 0 else math.nan


@pytest.mark.parametrize("loss", [None, losses])
def test_nan_in_a_late_epoch_ends_the_epochs(loss: Any, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"loss": loss, "optimizer": lambda p: torch.optim.Adam(p, 1e-3), "repair": False}
    small, report = shrink(trained(), BATCHES, Budget(macs=0.1), epochs=9, validate=Failing(4), **options)
    assert [s.name for s in report.steps] == ["whole", "cut", "epoch 1", "epoch 2"]
    best = min(report.steps[1:], key=lambda s: s.error)
    assert report.kept in [s.name for s in report.steps if s.error == best.error]
    assert wrong(small) == best.error
    assert not small.training
    assert not report.interrupted
    assert "the epochs ended early: validate= returned NaN" in str(report)
    assert "validate= returned NaN" in report.as_dict()["given_up"]
    assert capsys.readouterr().out.startswith("given up in epoch 3 of 9, and the best network so far is returned")
    with pytest.raises(PlasticError, match="validate= returned NaN"):
        shrink(trained(), BATCHES, Budget(macs=0.1), epochs=9, validate=Failing(2), **options)


def test_a_loss_that_is_nan_in_a_late_epoch_ends_the_epochs() -> None:
    calls = 0

    def loss(output: Tensor, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return losses(output, batch) * (math.nan if calls > 13 else 1.0)  # one call is before the work

    options: dict[str, Any] = {"scores": "magnitude", "epochs": 5, "loss": loss}
    small, report = shrink(trained(), BATCHES, Budget(macs=0.2), validate=wrong, **options)
    assert "the loss is nan at batch 3 of epoch 3" in report.given_up
    assert wrong(small) == min(s.error for s in report.steps[1:])
    calls = 0
    with pytest.raises(PlasticError, match="the loss is nan at batch 3 of epoch 3"):  # nobody says what is best
        shrink(trained(), BATCHES, Budget(macs=0.2), **options)


def test_an_interrupt_of_an_epoch_that_has_come_to_nothing() -> None:
    read = Interrupted(100)
    shrink(trained(), read, Budget(macs=0.3))
    batches = Interrupted(100 - read.when + 1)
    small, report = shrink(trained(), batches, Budget(macs=0.3), epochs=2, validate=Failing(3))
    assert report.interrupted
    assert report.given_up
    assert report.kept == "repaired"
    assert wrong(small) == report.steps[-1].error


def test_the_report() -> None:
    _, report = shrink(trained(), BATCHES, Budget(macs=0.3), epochs=1)
    text = str(report)
    for part in ("units before", "whole", "repaired", "epoch 1", "multiply-adds", "ms for the first batch"):
        assert part in text
    again = json.loads(json.dumps(report.as_dict()))
    assert again["steps"][0]["name"] == "whole"
    assert again["interrupted"] is False
    assert len(again["milliseconds"]) == 2


def test_the_time_of_a_slow_model_is_taken_fewer_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plasticnet.shrinking.shrink._PATIENCE", 0.0)
    _, report = shrink(trained(0), BATCHES, Budget(macs=0.5))
    assert min(report.milliseconds) > 0
