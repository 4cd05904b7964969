"""When runs are compiled: after a while, again where it promises to pay, and not where it was slower."""

from __future__ import annotations

import pytest
import torch

from plasticnet.gates.tiers import BEHIND, COMPARED, COMPILING, Tiers


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Runs:
    """Runs of one kind that take as long as they are told to.

    Args:
        monkeypatch: It sets the clock.
        after: The seconds after which runs are compiled.
        compiling: What the first compiled run takes in addition.
        compiled: What each compiled run takes; those that run as written take a second.
        cost: What compiling is expected to take.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, after: float, compiling: float, compiled: float, cost: float = 0.0
    ) -> None:
        self.clock, self.tiers = Clock(), Tiers(after, cost)
        self.compiling, self.compiled, self.fresh = compiling, compiled, True
        monkeypatch.setattr("time.perf_counter", self.clock)

    def run(self, batch: int = 8) -> bool:
        """Run once, and return whether that was compiled."""
        compiled = self.tiers.compiles("training", batch, False)
        with self.tiers.timing("training", compiled):
            self.clock.now += (self.compiled + self.compiling * self.fresh) if compiled else 1.0
            self.fresh = self.fresh and not compiled
        return compiled

    def until_compiled(self, limit: int = 10_000) -> int:
        """Run until the next run would be compiled, and return how many runs that took."""
        return next(i for i in range(limit) if self.run())

    def resize(self) -> None:
        self.tiers.renew()
        self.fresh = True


def test_first_after_the_given_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Runs(monkeypatch, after=20, compiling=30, compiled=0.5).until_compiled() == 20


def test_first_when_it_puts_the_runs_back_by_a_twentieth(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Runs(monkeypatch, after=20, compiling=30, compiled=0.5, cost=30).until_compiled() == 20 * 30


def test_again_once_it_promises_to_win_back_what_compiling_took(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, after=20, compiling=30, compiled=0.5)
    runs.until_compiled()
    assert all(runs.run() for _ in range(2000))  # it has won back far more than another compilation
    runs.resize()
    # Compiled, each second of a run saves half a second. To save what compiling took, it takes twice as long.
    assert runs.until_compiled() == pytest.approx(2 * 30, abs=3)


def test_where_sizes_change_before_anything_is_won_back(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, after=20, compiling=30, compiled=0.5)
    before = runs.until_compiled()
    runs.resize()
    # Behind by one compilation, with another one to come: together they are a twentieth of this.
    assert before + runs.until_compiled() == pytest.approx(20 * 2 * 30, abs=60)


def test_what_was_slower_is_remembered_at_other_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, after=20, compiling=30, compiled=1.5)
    runs.until_compiled()
    assert sum(runs.run() for _ in range(20_000)) == COMPILING + COMPARED - 1
    runs.resize()
    assert runs.until_compiled() == pytest.approx(10 * 30, abs=12)


@pytest.mark.parametrize("compiled", [0.5, 0.95, 1.5])
@pytest.mark.parametrize("settled", [30, 100, 1000])  # how many runs there are between two changes of size
def test_no_run_loses_more_than_a_twentieth(settled: int, compiled: float, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, after=20, compiling=30, compiled=compiled, cost=30)
    for done in range(1, 10_001):
        runs.run()
        assert runs.clock.now <= (1 + BEHIND) * done + 10  # the runs that are compared, where compiled ones are slower
        if done % settled == 0:
            runs.resize()


def test_at_once_means_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, after=0, compiling=30, compiled=0.5)
    for _ in range(4):
        assert runs.run()
        runs.resize()


def test_the_last_batch_of_an_epoch_runs_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, after=20, compiling=30, compiled=0.5)
    runs.until_compiled()
    for _ in range(5):
        assert runs.run()
        assert not runs.run(batch=3)


def test_batches_of_all_sizes_run_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch, after=20, compiling=30, compiled=0.5)
    found = [runs.run(batch=i % 7) for i in range(70)]
    assert all(found[21:])


def test_a_single_size_where_what_is_compiled_serves_no_other() -> None:
    tiers = Tiers(0.0)
    found = [tiers.compiles("per sample", batch, True) for batch in (8, 3, 8, 5, 5, 5, 5, 8)]
    assert found == [True, False, True, False, False, False, False, True]


def test_what_cannot_be_compiled_is_not_tried_again() -> None:
    tiers = Tiers(0.0)
    assert tiers.compiles("per sample", 8, True)
    tiers.give_up("per sample")
    tiers.renew()
    assert not tiers.compiles("per sample", 8, True)


def test_the_backward_pass_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            clock.now += 19.5
            return grad

    clock, tiers = Clock(), Tiers(20)
    monkeypatch.setattr("time.perf_counter", clock)
    x = torch.ones(2, requires_grad=True)
    with tiers.timing("training", False) as follow:
        clock.now += 0.5
        out = Slow.apply(x)
        assert isinstance(out, torch.Tensor)
        follow(out)
    assert not tiers.compiles("training", 8, False)
    out.sum().backward()
    assert tiers.compiles("training", 8, False)
