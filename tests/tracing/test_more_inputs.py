"""Further inputs, and models that do not run in training mode on the example inputs."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plasticnet as pn


class Detector(nn.Module):
    """A model that wants targets in training, where it uses a layer that evaluation does not use."""

    def __init__(self, error: type[Exception]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 3)
        self.extra = nn.Conv2d(12, 2, 3)
        self.error = error

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        h = self.b(self.a(x).relu()).relu()
        if not self.training:
            return self.c(h)
        if targets is None:
            raise self.error("targets should not be none when in training mode")
        return {"loss": (self.c(h) - targets).square().mean(), "extra": self.extra(h).mean()}


IMAGES, TARGETS = torch.rand(3, 3, 12, 12), torch.rand(3, 4, 6, 6)


def close_half(net: pn.PlasticNet) -> None:
    with torch.no_grad():
        for site in net.sites.values():
            site.phi[torch.randperm(len(site))[: len(site) // 2]] = -1


def check_exact(net: pn.PlasticNet, *args: Any) -> None:
    """Compare masking, cutting and compact modules, in training mode too where there are several arguments."""
    close_half(net)
    with torch.no_grad():
        out = net.eval()(args[0])
        small = net.compact()
        assert (small(args[0]) - out).abs().max() <= 1e-5 * out.abs().max()
        if len(args) > 1:
            for key, loss in net.train()(*args).items():
                torch.testing.assert_close(small.train()(*args)[key], loss)
        net.eval().prune()
        assert (net(args[0]) - out).abs().max() <= 1e-5 * out.abs().max()


@pytest.mark.parametrize("error", [AssertionError, ValueError, RuntimeError, KeyError, NotImplementedError])
def test_evaluation_alone_is_traced_and_that_is_said(error: type[Exception]) -> None:
    with pytest.warns(UserWarning, match=r"does not run in training mode.*targets should not be none.*more_inputs"):
        net = pn.PlasticNet(Detector(error), (IMAGES,))
    assert list(net.sites) == ["a"]
    for name in ("b", "extra"):  # the layer that evaluation does not use may read what `b` gives
        assert "extra did not run" in net.frozen["b"]
        assert "more_inputs=[...]" in net.frozen[name]
    check_exact(net, IMAGES)


@pytest.mark.parametrize("given", [
    {"example_inputs": (IMAGES, TARGETS)},
    {"example_inputs": {"x": IMAGES, "targets": TARGETS}},
    {"example_inputs": (IMAGES,), "more_inputs": [(IMAGES, TARGETS)]},
    {"example_inputs": IMAGES, "more_inputs": [{"x": IMAGES, "targets": TARGETS}]},
    {"example_inputs": IMAGES, "more_inputs": [IMAGES[:1], (IMAGES[:2], TARGETS[:2])]},
])  # fmt: skip
def test_inputs_for_training(given: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = pn.PlasticNet(Detector(AssertionError), **given)
    assert list(net.sites) == ["a", "b"]
    assert list(net.frozen) == ["c", "extra"]
    check_exact(net, IMAGES, TARGETS)


def test_inputs_that_run_in_training_only() -> None:
    class Strict(Detector):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
            if not self.training and targets is not None:
                raise TypeError("no targets in evaluation, please")
            return super().forward(x, targets)

    net = pn.PlasticNet(Strict(ValueError), (IMAGES,), more_inputs=[(IMAGES, TARGETS)])
    assert list(net.sites) == ["a", "b"]
    check_exact(net, IMAGES, TARGETS)


def test_costs_are_those_of_the_example_inputs() -> None:
    larger = torch.rand(2, 3, 20, 20)
    uses = pn.trace(Detector(ValueError), (IMAGES, TARGETS)).uses
    assert pn.trace(Detector(ValueError), (IMAGES,), more_inputs=[(IMAGES, TARGETS), larger]).uses == uses


@pytest.mark.parametrize("given", [(IMAGES, TARGETS), {"x": IMAGES}, IMAGES, "x", 3, None])
def test_a_form_that_could_mean_two_things_is_refused(given: Any) -> None:
    with pytest.raises(pn.PlasticError, match=r"more_inputs is a list.*more_inputs=\[\(x, targets\)\]"):
        pn.PlasticNet(Detector(ValueError), (IMAGES,), more_inputs=given)


def test_inputs_on_which_nothing_runs_are_named() -> None:
    with pytest.raises(pn.PlasticError, match=r"on more_inputs\[1\] \(shapes \[\(3, 5, 12, 12\)\]\)") as caught:
        pn.PlasticNet(Detector(ValueError), (IMAGES,), more_inputs=[IMAGES, (torch.rand(3, 5, 12, 12),)])
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(pn.PlasticError, match=r"on the example inputs \(shapes \[\(3, 5, 12, 12\)\]\)"):
        pn.PlasticNet(Detector(ValueError), (torch.rand(3, 5, 12, 12),), more_inputs=[IMAGES])


class Optional(nn.Module):
    """An optional argument leads through a layer that reads the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.a(x).relu()
        return self.b(h) if context is None else self.b(h) + self.c(h) * context


def test_optional_arguments() -> None:
    x, context = torch.randn(5, 4), torch.randn(5, 3)
    assert "nothing is known of what reads it" in pn.PlasticNet(Optional(), x).frozen["c"]
    net = pn.PlasticNet(Optional(), x, more_inputs=[{"x": x, "context": context}])
    assert list(net.frozen) == ["b", "c"]
    close_half(net)
    small = net.eval().compact()
    for args in ((x,), (x, context)):
        assert (net(*args) - small(*args)).abs().max() <= 1e-6


class Auxiliary(nn.Module):
    """An auxiliary head that needs larger images than the rest, as that of Inception."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 5, 1)
        self.aux = nn.Sequential(nn.AvgPool2d(5), nn.Conv2d(12, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 2))

    def forward(self, x: Tensor) -> Any:
        h = self.b(self.a(x).relu()).relu()
        out = self.c(h).mean((2, 3))
        return (out, self.aux(h).mean((2, 3))) if self.training else out


def test_an_auxiliary_head_for_which_the_images_are_too_small() -> None:
    small, large = torch.randn(2, 3, 12, 12), torch.randn(2, 3, 20, 20)
    with pytest.warns(UserWarning, match="Kernel size can't be greater"):
        net = pn.PlasticNet(Auxiliary(), (small,))
    assert "b" not in net.frozen  # the run got as far as the first layer of the head
    assert "aux.3" in net.frozen
    check_exact(net, small)
    full = pn.PlasticNet(Auxiliary(), (large,))
    both = pn.PlasticNet(Auxiliary(), (small,), more_inputs=[large])
    assert list(full.sites) == list(both.sites) == ["a", "b", "aux.1"]
    close_half(both)
    compact = both.eval().compact().train()
    both.train()
    for found, expected in zip(compact(large), both(large), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_single_sample_is_doubled_for_batchnorm_in_the_check_too() -> None:
    class Normed(Auxiliary):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(12), nn.Conv2d(12, 5, 1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = pn.PlasticNet(Normed(), (torch.randn(1, 3, 12, 12),))
    assert list(net.sites) == ["a", "b"]


def test_blocks_are_looked_for_in_all_inputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.block, self.other = (nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))

        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            h = self.block(self.a(x))
            return self.b(self.block(h)) if twice else self.b(F.relu(self.other(h)))

    x = torch.randn(3, 4)
    blocks = ["block", "other"]
    assert "block (as a block)" not in pn.PlasticNet(Twice(), x, blocks=blocks).frozen
    frozen = pn.PlasticNet(Twice(), x, more_inputs=[(x, True)], blocks=blocks).frozen
    assert "several times" in frozen["block (as a block)"]
    assert "other (as a block)" not in frozen


def test_a_parameter_of_the_model_itself_that_did_not_run_is_named() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.shift = nn.Linear(3, 5), nn.Linear(5, 2), nn.Parameter(torch.zeros(5))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            return self.b(h + self.shift if x.sum() > 1e9 else h)

    assert "and shift did not run" in pn.trace(Branching(), (torch.randn(2, 3),)).frozen["a"]
