"""Defines `PlasticNet`, a model with a gate on every unit; each method calls one function of a folder below."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, Literal

from torch import Tensor, nn

from plasticnet.budgets.floors import keep_signal
from plasticnet.checking.find import Patterns, find
from plasticnet.cost.latency import Latency
from plasticnet.errors import PlasticError
from plasticnet.gates.compiled import HookedCalls, compiling_seconds
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.tiers import Tiers
from plasticnet.gates.wrapped import ignored_names
from plasticnet.learning import objective, passes, pressure
from plasticnet.learning.sampler import Sampler
from plasticnet.measuring.latency import measure_latency
from plasticnet.measuring.summary import Summary, summarise
from plasticnet.surgery import loading
from plasticnet.surgery.candidates import grow_by_gradient
from plasticnet.surgery.compact import compacted
from plasticnet.surgery.optimizers import Optimizers, listed
from plasticnet.surgery.plan import Sources
from plasticnet.surgery.resize import grow, prune, resize
from plasticnet.surgery.undo import undone_on_error
from plasticnet.tools.gradients import outside_inference_mode, with_gradients_if_needed
from plasticnet.tools.inputs import Loss, Outputs
from plasticnet.tools.likeness import warn_of_shadows, with_signature
from plasticnet.tools.sharding import as_whole, held_parameters
from plasticnet.tools.torch_private import has_child


class PlasticNet(GatedModel):
    """A model whose units open and close while it trains.

    The model is gated in place: its parameters are the ones that are trained, and `resize` replaces them. At first k is
    infinity and every gate is open. An attribute that the network does not have itself is that of the model.

    Args:
        model: The module, which nothing gates yet.
        example_inputs: A tuple of arguments, or a dict of keyword arguments, that the model runs on. The batch is the
            first axis.
        more_inputs: A list of further such tuples and dicts: what the model trains on, if that is something else, with
            optional arguments, or what leads into other branches, as to the other experts of a mixture.
        outputs: A function that gets what the model returns, and returns what you read of it, losses included, such as
            ``lambda out: out["logits"]``. Only that is kept: the rest is still returned, and may lose channels. By
            default you read everything.
        estimator: One of `ESTIMATORS`.
        gates: Whether gates are drawn per sample or per batch. "auto" draws per sample where that is unbiased.
        inputs: Name patterns of consumers whose input features are gated one by one.
        exclude: Name patterns of sites that get no gates.
        residual: Whether embeddings, and what LayerNorm, RMSNorm and similar norms normalise, are gated, too. The norms
            then take their statistics over the open units.
        blocks: Name patterns of modules that are units as a whole. A closed one returns its first input.
        head_dims: Name patterns of attention modules in whose heads the dimensions are the units, and not the heads.
        experts: Name patterns of lists or stacks of experts, which are units as a whole; routers choose no closed one.
        weights: Name patterns of modules whose weight gets a gate on every entry, which the batch shares.

    Attributes:
        excluded: The names of the sites that matched ``exclude``.
        checked: Whether the self-check ran, which it cannot on the meta device.
        sampler: How gates are drawn.

    Raises:
        PlasticError: The model rejects the example inputs, has nothing to gate, or is gated already; a pattern matches
            nothing; or an option is unknown.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = pn.PlasticNet(model, (torch.randn(16, 4),))
        >>> net.limit("0", minimum=2, maximum=16)  # "0" is the site of the first layer
        >>> optimizer = torch.optim.Adam(net.param_groups(lr=0.01))
        >>> net.k = 7.0
        >>> loss = net.expected_loss(lambda: net(torch.randn(16, 4)).square().mean(1)) + net.penalty(0.1, "macs")
        >>> loss.backward()
        >>> optimizer.step()
        >>> net.grow({"0": 2}, optimizer)
        >>> net.resize({"0": [0, 3, 5, 9, -1]}, optimizer)  # keep four of the ten units, and add one
        >>> net.prune(0.01, optimizer)  # the gates are still open
        {}
        >>> net.summary().parameters
        37
        >>> [tuple(p.shape) for p in net.compact().parameters()]
        [(5, 4), (5,), (2, 5), (2,)]
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        more_inputs: Sequence[Any] = (),
        outputs: Outputs | None = None,
        estimator: str = "bitflip-cv",
        gates: Literal["auto", "sample", "batch"] = "auto",
        inputs: Patterns = (),
        exclude: Patterns = (),
        residual: bool = False,
        blocks: Patterns = (),
        head_dims: Patterns = (),
        experts: Patterns = (),
        weights: Patterns = (),
    ) -> None:
        sampler = Sampler(estimator, gates)
        if not isinstance(model, nn.Module) or any(isinstance(m, GatedModel) for m in model.modules()):
            raise PlasticError(f"{type(model).__name__}: a plain nn.Module is needed, one that is not gated yet")
        with as_whole(model), outside_inference_mode():
            found = with_gradients_if_needed(
                lambda: find(
                    model, example_inputs, more_inputs=more_inputs, outputs=outputs, inputs=inputs, exclude=exclude,
                    residual=residual, blocks=blocks, head_dims=head_dims, experts=experts,
                    weights=weights,
                )
            )  # fmt: skip
        super().__init__(
            model, found.sites, found.weights, uses=found.uses, frozen=found.frozen, excluded=found.excluded,
            checked=found.checked,
        )  # fmt: skip
        keep_signal(self)
        self.sampler = sampler
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)
        self.forward = MethodType(with_signature(PlasticNet.forward, inspect.signature(model.forward)), self)
        warn_of_shadows(self, model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            special = name.startswith("__") and name.endswith("__")  # such as __deepcopy__, which would copy the model
            if special or name == "model" or not has_child(self, "model"):
                raise
            return getattr(self.model, name)

    # -- running ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model under gates, with the arguments of its own forward, whose signature this method has.

        In training at finite k the gates are drawn. In evaluation they are at their mean: pi where pi >= 1/2, else 0.
        """
        return passes.call(self, self.sampler, args, kwargs)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The names of what `DistributedDataParallel` is to ignore; it looks for an attribute of this name."""
        return ignored_names(self)

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse `torch.nn.DataParallel`, whose copies in other threads would share the gates of this network."""
        raise PlasticError(
            "torch.nn.DataParallel cannot run a PlasticNet; use DistributedDataParallel, with a process each"
        )

    def compile(self, *args: Any, after: float = 20.0, **kwargs: Any) -> None:
        """Compile the model in place, as `torch.nn.Module.compile` does, as soon as that pays.

        To compile takes as long as many training steps, and every change of size makes what was compiled worthless. So
        the model runs as it was written until compiled runs would have saved at the present sizes what compiling costs,
        and so long that compiling puts all its runs back by about a twentieth at most. Ordinary training, gates per
        sample, gates per batch and evaluation then run compiled, each by itself. Where compiled runs turn out slower,
        the model goes on as it was written. Gates per sample run compiled if the model is one graph, and a warning says
        where it is not. Blocks that may be skipped and masked norms always run as they were written.
        ``torch.compile(net)`` compiles at once, with random numbers of its own.

        Args:
            args: The arguments of `torch.nn.Module.compile`.
            after: The seconds that runs at the present sizes must have taken at least; 0 compiles at once, whatever it
                costs.
            kwargs: The keyword arguments of `torch.compile`.

        Raises:
            PlasticError: ``after`` is no number from 0 on.
        """
        if not isinstance(after, int | float) or not after >= 0:
            raise PlasticError(f"compile(after={after!r}): the seconds after which it compiles, a number from 0 on")
        with self.lock:
            start = partial(self.model.compile, *args, **kwargs)
            self.tiers = Tiers(float(after), compiling_seconds(self.model), HookedCalls(kwargs), start)
            self.refresh()

    # -- training -----------------------------------------------------------------------------

    def param_groups(
        self, lr: float, gate_lr: float | None = None, gate_betas: tuple[float, float] = (0.9, 0.99), **options: Any
    ) -> list[dict[str, Any]]:
        """Return two groups for an optimizer: the parameters of the model, and the logits of the gates.

        Args:
            lr: The learning rate of the model's parameters.
            gate_lr: The learning rate of the logits. By default it is ten times ``lr``.
            gate_betas: The betas of the logits, for optimizers of Adam's family. The second is lower than usual,
                because the first gradients are large, and a long memory of them would hold the gates back.
            options: Other options of the model's parameters, such as ``weight_decay``. The logits get no weight decay.
        """
        rate = 10 * lr if gate_lr is None else gate_lr
        with self.lock:
            weights = {"params": list(held_parameters(self.model).values()), "lr": lr, **options}
        gates = {"params": [g.phi for g in self.all_gates()], "lr": rate, "weight_decay": 0.0, "betas": gate_betas}
        return [weights, gates]

    def expected_loss(self, closure: Callable[[], Tensor]) -> Tensor:
        """Return the training loss, a scalar whose backward pass also gives the gates their gradient.

        Args:
            closure: A function that runs the network and returns the losses of the samples, shape (batch,), or their
                mean, a scalar. Most estimators call it twice or more at finite k, with the same random numbers and one
                update of BatchNorm's statistics. It should have no other side effect.

        Raises:
            PlasticError: The network is in evaluation mode, the closure never calls it or returns something else, or a
                loss is not finite.
        """
        return objective.expected_loss(self, self.sampler, closure)

    def penalty(
        self, strength: float, cost: str | Mapping[str, float] = "units", scale: Literal["linear", "log"] = "linear"
    ) -> Tensor:
        """Return ``strength`` times the expected cost, or its logarithm: a scalar, differentiable in the gates.

        Args:
            strength: A number, 0 or more.
            cost: "units", "parameters", "macs" (multiply-adds for one sample) or "latency" (milliseconds, which
                `measure_latency` makes known). A mapping of these to weights stands for a weighted sum.
            scale: "linear" (arXiv 1908.08118, section 3), or "log": the pressure is then relative to the present cost.

        Raises:
            PlasticError: A name is unknown, a number is negative, or the latency was not measured.
        """
        return pressure.penalty(self, strength, cost, scale)

    def limit(
        self, pattern: str, *, minimum: int | None = None, maximum: float = math.inf, strength: float = 1.0
    ) -> None:
        """Set the bounds of all sites whose name matches a pattern. They do not bind `resize` and `grow`.

        Args:
            pattern: A name pattern of sites.
            minimum: How many units pruning leaves. By default it is 1, 0 for blocks, and more for units that the output
                layer reads: as many as it takes binary digits to number the outputs, but no more than an eighth of the
                units that are there at first. With 0 all units of a site may close, as in a residual branch; one unit
                then stays, and is read with weights of zero.
            maximum: The number of units at which a schedule stops to grow a site; of blocks, those that do not sleep.
            strength: What the pressure on the gates is multiplied by.

        Raises:
            PlasticError: No site matches, the bounds contradict each other, or the strength is no number from 0 on.
        """
        pressure.limit(self, pattern, minimum, maximum, strength)

    # -- measuring ----------------------------------------------------------------------------

    def summary(self) -> Summary:
        """Count units, parameters and multiply-adds, of each site and in total; the result prints as a table."""
        return summarise(self)

    def measure_latency(self, example_inputs: Any, *, networks: int = 24, repeats: int = 9) -> Latency:
        """Make "latency" a cost: the milliseconds of a forward pass on the example inputs.

        They are fitted to copies of the network that are cut at random and run on its device. The result stays valid
        when sizes or the device change. The state dict of a `Schedule` holds it, and that of the network does not.

        Args:
            example_inputs: A tuple of arguments, or a dict of keyword arguments, with the batch to measure.
            networks: How many networks are cut and measured, 8 or more.
            repeats: How often each of them runs.

        Raises:
            PlasticError: The inputs are rejected, time is not measured on their device, or a number is too small.
        """
        found = with_gradients_if_needed(lambda: measure_latency(self, example_inputs, networks, repeats))
        self.use_latency(self.ranks.first(found))
        assert self.latency is not None
        return self.latency

    # -- changing size ------------------------------------------------------------------------

    @contextmanager
    def _changing(self, optimizer: Optimizers) -> Iterator[None]:
        """Let nothing else use the network while its sizes change, and put everything back if that fails midway."""
        with passes.changing(self, self.sampler), undone_on_error(self, listed(optimizer), [self.sampler]):
            yield

    def resize(self, sources: Sources, optimizer: Optimizers = None, *, init: str = "preserve", grace: int = 0) -> None:
        """Rebuild sites from lists of their units: ``{"conv1": [0, 2, -1]}`` keeps units 0 and 2 and adds one.

        Args:
            sources: For each site the old units that stay, in order, and -1 for every new one. In an input site -1 adds
                a feature that was cut.
            optimizer: The optimizer, or all optimizers, of the parameters. Units that stay keep their state in it.
            init: How new units begin. Their incoming weights are random. Their outgoing weights are zero ("preserve")
                or random ("random" and "paper"). With "paper" their gates start at pi = 1/2.
            grace: For how many epochs of the schedule new units are held open and unpriced.

        Raises:
            PlasticError: A site is unknown, an index is out of range, a site would be left empty, or the optimizers do
                not hold every trainable parameter or cannot be resized. Nothing was changed, as when the call is
                interrupted or memory runs out.
        """
        with self._changing(optimizer):
            resize(self, sources, optimizer, init, grace)

    def grow(
        self,
        counts: Mapping[str, int],
        optimizer: Optimizers = None,
        init: str = "preserve",
        grace: int = 0,
        loss: Loss | None = None,
    ) -> None:
        """Add units to sites: ``{"conv1": 2}`` adds two units to ``conv1``.

        In a site of blocks, the next ones that sleep (see `narrow`) open. They begin anew as the identity, with the
        widths of the blocks beside them.

        Args:
            counts: How many units each site gets.
            optimizer: The optimizer, or all optimizers, of the parameters.
            init: How new units begin, as in `resize`. With "gradmax" their outgoing weights are zero, and the incoming
                weights those for which the outgoing ones have the largest gradient (arXiv 2201.05125, section 3).
            grace: For how many epochs of the schedule new units are held open and unpriced.
            loss: For "gradmax", a function that runs the network on some training data and returns the losses.

        Raises:
            PlasticError: A number is negative, fewer blocks sleep, the loss for "gradmax" is missing, or as `resize`
                raises it.
        """
        with self._changing(optimizer):
            if init != "gradmax":
                grow(self, counts, optimizer, init, grace)
            elif loss is None:
                raise PlasticError('grow(init="gradmax") needs a loss to take the gradient of: loss=...')
            else:
                grow_by_gradient(self, counts, loss, optimizer, grace=grace)

    def prune(self, below: float = 0.5, optimizer: Optimizers = None, multiple_of: int = 1) -> dict[str, int]:
        """Cut the units that are unlikely to be open, and the channels whose features are all cut.

        Every site keeps at least one unit. At infinite k, units that only closed single weights read are cut, too.

        Args:
            below: Units with a smaller probability are cut.
            optimizer: The optimizer, or all optimizers, of the parameters.
            multiple_of: Widths become multiples of this number, by the most likely of the units that would be cut. This
                does not apply to sites that have too few units, and to those that a norm takes statistics over.

        Returns:
            How many units were cut, for each site that lost some.
        """
        with self._changing(optimizer):
            return prune(self, below, optimizer, multiple_of)

    def compact(self, multiple_of: int | None = None) -> nn.Module:
        """Return a plain module, a copy in evaluation mode, whose outputs are those of ``net.eval()``.

        Closed units are cut, and the mean gates of open units are multiplied into the weights that read them. Closed
        single weights are zero.

        Args:
            multiple_of: As in `prune`; by default what the network was last pruned to, by `prune` or by a `Schedule`.
                Closed units that stay for this are read with weights of zero.
        """
        with self.lock, outside_inference_mode():
            return compacted(self, multiple_of)

    # -- saving -------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Resize the network to the sizes in a state dict, and load it; the parameters stay the same objects.

        So optimizers may be built before or after. An optimizer with a state must load its own state dict as well. The
        same happens when a module that contains the network loads its state dict.

        Raises:
            PlasticError: The state dict does not fit the network. Nothing was changed in it, as when the call is
                interrupted.
        """
        undone = undone_on_error(self, [], [self.sampler], self.parameters())
        with passes.changing(self, self.sampler), undone:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _before_loading(net: PlasticNet, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], *_: Any) -> None:
    """Resize a network to a state dict; torch calls this before it copies the tensors of the network."""
    with passes.changing(net, net.sampler):
        loading.prepare(net, state, prefix, bool(metadata.get("assign_to_params_buffers")))


def _after_loading(net: PlasticNet, _: Any) -> None:
    """Take notice of tensors that were replaced; torch calls this when the network is loaded."""
    loading.settle(net)
