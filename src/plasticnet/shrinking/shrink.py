"""Makes a trained model smaller in one call: scores, cut, repair, and training where it is asked for."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.budgets.budget import Budget
from plasticnet.errors import PlasticError
from plasticnet.net import Patterns, PlasticNet
from plasticnet.oneshot.prune import prune_once
from plasticnet.oneshot.scores import Scores, by_cost
from plasticnet.oneshot.scores import scores as scores_of
from plasticnet.repairing.repair import repair as repaired
from plasticnet.shrinking.best import Best
from plasticnet.shrinking.finite import NotFinite
from plasticnet.shrinking.given import Loss, check_options, error_of, loss_of, try_loss
from plasticnet.shrinking.imitation import Imitation
from plasticnet.shrinking.multiples import close_to_multiples
from plasticnet.shrinking.report import Milestone, Report, SiteChange
from plasticnet.shrinking.tuning import MakeOptimizer, make_optimizer, trainable, tune
from plasticnet.tools.batches import (
    Calibration,
    Forward,
    arguments_of,
    calibration,
    first_arguments,
    like_model,
    run_batch,
)
from plasticnet.tools.inputs import Outputs
from plasticnet.tools.progress import Progress
from plasticnet.tools.snapshot import duplicate, left_as_it_was

Validate = Callable[[nn.Module], float]
_HALVINGS = 7  # how often the range of sizes is halved to meet a budget of loss
_RUNS = 6  # how often the time is taken; the first does not count
_PATIENCE = 10.0  # after so many seconds fewer runs will do, but two at least
_SMALLEST = 0.02  # the share of the multiply-adds below which no budget of loss goes


def shrink(
    model: nn.Module,
    batches: Iterable[Any],
    budget: Budget,
    *,
    epochs: int = 0,
    loss: Loss | None = None,
    validate: Validate | None = None,
    forward: Forward | None = None,
    outputs: Outputs | None = None,
    calibrate: int = 2048,
    scores: Scores = "repair",
    repair: bool = True,
    exclude: Patterns = (),
    residual: bool = False,
    blocks: Patterns = (),
    head_dims: Patterns = (),
    experts: Patterns = (),
    optimizer: MakeOptimizer | None = None,
    multiple_of: int = 1,
    example_inputs: Any = None,
) -> tuple[nn.Module, Report]:
    """Make a trained model smaller, and return the small one with a report.

    Units are scored, the least useful ones for their cost are closed, the layers that read them are refitted so that
    they compute what they did before, and the closed units are cut. With ``epochs``, the small network is then trained.
    Without ``loss`` no labels are needed, because the network imitates the model itself.

    Args:
        model: The trained model. It is left as it was.
        batches: A list, a DataLoader or the like, which can be read again and again. A batch is a tensor; a tuple or
            list whose first element is the input, itself a tuple of arguments or a mapping where the model takes
            several; or a mapping, of which the keys that forward names are passed, without "labels" and "label".
            Batches move to the model's device and floating dtype.
        budget: What the small network may cost. `Budget(loss=...)` asks for the smallest network whose error is at most
            so much above that of the model. `Budget(latency_ms=...)` is the time of the first batch.
        epochs: How often the batches are trained on after the cut. Of the networks before and after each epoch the one
            with the smallest error is returned. A loss or an error that is NaN after the first epoch ends them early.
            With ``loss`` and without ``validate`` nobody has said what is best: then the last network is returned, and
            NaN is an error.
        loss: Called with an output and its batch, it returns the losses of the samples, shape (batch,), or a scalar.
            By default the network imitates the model: by the divergence of the class probabilities where the output, or
            its ``logits``, has the shape (batch, classes), else by the squared error of every floating tensor, divided
            by its variance.
        validate: Called with a copy of a network, in evaluation mode, it returns a number, lower for better, which the
            report shows and `Budget(loss=...)` is about. By default it is the divergence from the model's outputs on
            the inputs that are held out.
        forward: Called with a model and a batch, it returns an output, where a batch has none of the forms above.
        outputs: Called with an output, it returns what you read of it; by default you read everything. With
            ``forward``, everything that the model itself returns is kept.
        calibrate: How many inputs scores and repair read at most, of which a fifth is held out.
        scores: How units are scored, as in `prune_once`. By default it is by what the others of their site cannot
            replace, for which no labels are read.
        repair: Whether the readers of cut units are refitted.
        exclude: Name patterns of sites that are left alone.
        residual: Whether what LayerNorm and similar norms normalise may be cut, too.
        blocks: Name patterns of modules that may be removed as a whole.
        head_dims: Name patterns of attention modules whose heads become smaller instead of fewer.
        experts: Name patterns of lists or stacks of experts, of which some may be removed as a whole.
        optimizer: Makes an optimizer from parameters, such as ``lambda p: torch.optim.SGD(p, lr=0.01)``; AdamW by
            default. Its learning rate falls to 0 along a cosine. It is first called before the work, to try it.
        multiple_of: Widths become multiples of this number, within the budget: each goes down to the next multiple, or
            up where the budget has room for it. A site of which the budget leaves less than one multiple keeps what
            the budget leaves.
        example_inputs: What the model is traced on, as in `PlasticNet`, where the first batch does not do.

    Returns:
        The small network, a copy in evaluation mode on the same device and in the same dtype, and the report.

    Raises:
        PlasticError: An option is out of range, the batches can be read only once or have no form that is known, the
            budget cannot be met, an error or an output is NaN, or `PlasticNet` refuses the model. Nothing was changed.

    Example:
        >>> import torch, plasticnet as pn
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> small, report = pn.shrink(model, [torch.randn(64, 4)], pn.Budget(macs=0.5))
        >>> small[0]
        Linear(in_features=4, out_features=8, bias=True)
        >>> [step.name for step in report.steps]
        ['whole', 'cut', 'repaired']
    """
    functions = {"loss": loss, "validate": validate, "forward": forward, "outputs": outputs}
    check_options(model, budget, epochs, calibrate, multiple_of, optimizer, **functions)
    twin = duplicate(model).eval()
    if epochs:
        make_optimizer(trainable(twin), optimizer)  # so that a wrong one is noticed before the work begins
    data = calibration(batches, calibrate)
    first = data.first
    example = first_arguments(twin, first, forward) if example_inputs is None else example_inputs
    if loss is not None:
        try_loss(loss, twin, first, forward)
    read = outputs if forward is None else None  # what a forward of the user's reads of the model is unknown
    kinds: dict[str, Any] = {"exclude": exclude, "blocks": blocks, "head_dims": head_dims, "experts": experts}
    net = PlasticNet(twin, example, outputs=read, residual=residual, **kinds)
    with _evaluating(model):
        work = _Work(net, data, Imitation(model, forward, outputs), loss, validate, scores, repair, multiple_of)
        work.note("whole", model)
        if budget.latency_ms is not None:
            net.measure_latency(arguments_of(twin, first, forward))
        work.cut(net, budget if budget.loss is None else work.search(budget.loss), work.note)
        small = net.compact()
        if epochs:
            work.train(small, batches, epochs, optimizer)
        times = _milliseconds(model, small, lambda network: run_batch(network, first, forward))
    return small, work.report(times)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Keep a model in evaluation mode within this context; afterwards every module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Work:
    """The work of one call of `shrink`.

    Args:
        net: A network around a copy of the model.
        data: The inputs that scores and repair read.
        imitation: Compares outputs with those of the model.
        loss: The loss, or None for the imitation.
        validate: What the errors are, or None for the divergence of the imitation.
        scores: How units are scored.
        repair: Whether readers are refitted.
        multiple_of: What widths are multiples of.
    """

    def __init__(
        self,
        net: PlasticNet,
        data: Calibration,
        imitation: Imitation,
        loss: Loss | None,
        validate: Validate | None,
        scores: Scores,
        repair: bool,
        multiple_of: int,
    ) -> None:
        self.net, self.data, self.imitation, self.loss, self.validate = net, data, imitation, loss, validate
        self.repair, self.multiple_of = repair, multiple_of
        self.before = {name: len(site) for name, site in net.sites.items()}
        self.steps: list[Milestone] = []
        self.kept = self.given_up = ""
        self.interrupted = False
        self.left_out: dict[str, str] = {}
        self._begun = time.monotonic()
        imitation.fit(data.fitted)
        self.per_cost = by_cost(scores)
        self.worth = self._scored(scores)

    def _scored(self, scores: Scores) -> Mapping[str, Tensor]:
        """Return the scores of all units."""
        forward, outputs, batches = self.imitation.forward, self.imitation.outputs, self.data.fitted
        if not isinstance(scores, str):
            return scores
        if self.loss is None or scores == "repair":
            return scores_of(self.net, scores, batches=batches, forward=forward, outputs=outputs)
        one, loss = iter(cycle(batches)), self.loss

        def losses() -> Tensor:
            batch = like_model(self.net.model, next(one))
            return loss_of(loss, run_batch(self.net, batch, forward), batch)

        return scores_of(self.net, scores, losses, batches=len(batches))

    def error(self, network: nn.Module) -> float:
        """Return how wrong a network is. Raises `PlasticError` where that is no number, and `NotFinite` for NaN."""
        with left_as_it_was(network, training=False):
            if self.validate is None:
                return self.imitation.divergence(network, self.data.held_out)
            return error_of(self.validate(duplicate(network)))  # a copy, to which anything may be done

    def note(self, name: str, network: nn.Module) -> None:
        """Add a milestone for what was done since the last one."""
        seconds, found = time.monotonic() - self._begun, self.net.summary()
        self.steps.append(Milestone(name, self.error(network), found.open_parameters, found.open_macs, seconds))
        self._begun = time.monotonic()

    def cut(self, net: PlasticNet, budget: Budget, note: Callable[[str, nn.Module], None]) -> None:
        """Close units of a network to meet a budget of costs, and refit what reads them.

        Args:
            net: The network, or a copy of it.
            budget: The budget.
            note: Called after each step with its name and the network.
        """
        prune_once(net, budget, scores=self.worth, per_cost=self.per_cost, cut=False)
        close_to_multiples(net, self.worth, self.multiple_of, budget.targets(net))
        note("cut", net)
        if self.repair:
            found = repaired(net, self.data, forward=self.imitation.forward, outputs=self.imitation.outputs)
            self.left_out = dict(found.left_out)
            note("repaired", net)

    def search(self, most: float) -> Budget:
        """Return the smallest budget of multiply-adds at which the error is at most so much above that of the model.

        The range of shares is halved several times, and each share is tried on a copy of the network.
        """
        limit, low, high = self.steps[0].error + most, _SMALLEST, 1.0
        with Progress("searching", _HALVINGS) as progress:
            for _ in range(_HALVINGS):
                share = (low + high) / 2
                trial = copy.deepcopy(self.net)
                try:
                    self.cut(trial, Budget(macs=share), lambda *_: None)
                    fits = self.error(trial) <= limit
                except PlasticError:  # Even the smallest network costs more.
                    fits = False
                low, high = (low, share) if fits else (share, high)
                progress.advance(f"{share:.0%} of the multiply-adds {'will do' if fits else 'are too few'}")
        return Budget(macs=high)

    def train(self, small: nn.Module, batches: Iterable[Any], epochs: int, optimizer: MakeOptimizer | None) -> None:
        """Train the small network until the epochs are over, or end early.

        Where what is trained on is also what the errors measure, or ``validate`` says what counts, the network becomes
        what it was after the step with the smallest error. Then numbers that are not finite end the training, too,
        once there was an epoch without them; in the first epoch, what was given is likely to be wrong.
        """
        judged = self.validate is not None or self.loss is None
        best = Best(small, self.steps[-1], judged)

        def losses(batch: Any) -> Tensor:
            batch = like_model(small, batch)
            output = run_batch(small, batch, self.imitation.forward)
            if self.loss is not None:
                return loss_of(self.loss, output, batch)
            return self.imitation.losses(output, self.imitation.wanted(batch))

        done = 0
        try:
            try:
                for _ in tune(small, batches, losses, epochs, optimizer):
                    self.note(f"epoch {done + 1}", small)
                    best.see(self.steps[-1])
                    done += 1
            except KeyboardInterrupt:
                self.interrupted = True
                print(f"interrupted in epoch {done + 1} of {epochs}: the best network so far is returned")
                small.eval()
                self.note(f"epoch {done + 1}, interrupted", small)
                best.see(self.steps[-1])
        except NotFinite as error:
            if not judged or not (done or self.interrupted):
                raise
            self.given_up = str(error)
            print(f"given up in epoch {done + 1} of {epochs}, and the best network so far is returned: {error}")
        self.kept = best.restore()

    def report(self, milliseconds: tuple[float, float]) -> Report:
        """Return the report; ``milliseconds`` say how long a forward pass takes, before and after."""
        sites = tuple(SiteChange(n, self.before[n], int(s.open.sum())) for n, s in self.net.sites.items())
        name = "divergence" if self.validate is None else "error"
        frozen = dict(self.net.frozen)
        return Report(
            sites, tuple(self.steps), name, milliseconds, self.data.inputs, frozen, self.left_out, self.interrupted,
            self.given_up, self.kept or self.steps[-1].name,
        )  # fmt: skip


def _milliseconds(model: nn.Module, small: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[float, float]:
    """Return how long two networks take, by turns: the medians of a few runs in evaluation mode."""
    found: tuple[list[float], list[float]] = [], []
    begun = time.monotonic()
    for i in range(_RUNS):
        if i > 1 and time.monotonic() - begun > _PATIENCE:
            break
        for network, times in zip((model, small), found, strict=True):
            with left_as_it_was(network, training=False):
                _wait(network)
                started = time.perf_counter()
                run(network)
                _wait(network)
                times.append(1000 * (time.perf_counter() - started))
    before, after = (median(times[1:]) for times in found)
    return before, after


def _wait(network: nn.Module) -> None:
    """Wait until a GPU that holds a network has done what it was given."""
    if any(p.is_cuda for p in network.parameters()):
        torch.cuda.synchronize()
