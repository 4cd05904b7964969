"""PlasticNet: a model with a gate on every unit. Its methods are one call each, of functions that lie below."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Literal

from torch import Tensor, nn

from plasticnet.checking.find import Patterns, find
from plasticnet.cost.latency import Latency
from plasticnet.errors import PlasticError
from plasticnet.gates.gated import GatedModel
from plasticnet.gates.wrapped import ignored_names
from plasticnet.learning import objective, passes, pressure
from plasticnet.learning.sampler import Sampler
from plasticnet.measuring.latency import measure_latency
from plasticnet.measuring.summary import Summary, summarise
from plasticnet.surgery import loading
from plasticnet.surgery.candidates import grow_by_gradient
from plasticnet.surgery.compact import compacted
from plasticnet.surgery.optimizers import Optimizers
from plasticnet.surgery.plan import Sources
from plasticnet.surgery.resize import grow, prune, resize
from plasticnet.tools.inputs import Loss
from plasticnet.tools.torch_private import has_child


class PlasticNet(GatedModel):
    """A model whose units open and close while it trains.

    The model is gated in place: its parameters are the ones that are trained, and `resize` replaces
    them. It starts as the model it is: k is infinity and every gate is open.

    Attributes: ``model``, the module; ``sites``, name to `Site`; ``weights``, parameter to `WeightSite`; ``frozen``,
    what cannot be gated and why; ``excluded``, sites left alone because of ``exclude``; ``checked``, whether the
    self-check ran (it cannot on the meta device); ``sampler``, how gates are drawn. Other attributes are the model's.

    Args:
        model: The module, which nothing gates yet.
        example_inputs: A tuple of arguments, or a dict of keyword arguments, that the model runs on; the batch is the
            first axis.
        estimator: One of `ESTIMATORS`.
        gates: Whether gates are drawn per sample or per batch; "auto" draws per sample where that is unbiased.
        inputs: Name patterns of consumers whose input features are gated one by one.
        exclude: Name patterns of sites to leave alone.
        residual: Whether to gate what LayerNorm, RMSNorm and their like normalise, and embeddings, too. The norms then
            take their statistics over the open units.
        blocks: Name patterns of modules that are units as a whole: a closed one hands on its first input.
        weights: Name patterns of modules whose weight gets a gate on every entry, shared by the batch.

    Raises:
        PlasticError: The model rejects the example inputs, has nothing to gate, or is gated already; a pattern matches
            nothing; or an option is unknown.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = pn.PlasticNet(model, (torch.randn(2, 4),))
        >>> {name: len(site) for name, site in net.sites.items()}
        {'0': 8}
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        estimator: str = "bitflip-cv",
        gates: Literal["auto", "sample", "batch"] = "auto",
        inputs: Patterns = (),
        exclude: Patterns = (),
        residual: bool = False,
        blocks: Patterns = (),
        weights: Patterns = (),
    ) -> None:
        sampler = Sampler(estimator, gates)
        if not isinstance(model, nn.Module) or any(isinstance(m, GatedModel) for m in model.modules()):
            raise PlasticError(f"{type(model).__name__}: a plain nn.Module is needed, one that is not gated yet")
        found = find(
            model, example_inputs, inputs=inputs, exclude=exclude, residual=residual, blocks=blocks, weights=weights
        )
        super().__init__(
            model,
            found.sites,
            found.weights,
            uses=found.uses,
            frozen=found.frozen,
            excluded=found.excluded,
            checked=found.checked,
        )
        self.sampler = sampler
        self.forward = MethodType(_with_signature(inspect.signature(model.forward)), self)
        _warn_of_shadows(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or not has_child(self, "model"):
                raise
            return getattr(self.model, name)

    # -- running ------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; that of a network has the model's signature. In training at finite k the gates are
        drawn, in evaluation they are at their mean (pi where pi >= 1/2, else 0)."""
        return passes.call(self, self.sampler, args, kwargs)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """`DistributedDataParallel` looks for this name."""
        return ignored_names(self)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the model in place, as `torch.nn.Module.compile` does, arguments included.

        Gates per batch, ordinary training and evaluation then run compiled; gates per sample and masked norms run
        as they were written. ``torch.compile(net)`` gives the same results, with random numbers of its own.
        """
        self.model.compile(*args, **kwargs)

    # -- training -----------------------------------------------------------------------------

    def param_groups(
        self, lr: float, gate_lr: float | None = None, gate_betas: tuple[float, float] = (0.9, 0.99), **options: Any
    ) -> list[dict[str, Any]]:
        """Two groups for an optimizer: the parameters of the model, and the logits of the gates.

        Args:
            lr: The learning rate of the model's parameters.
            gate_lr: That of the logits; ten times ``lr`` by default.
            gate_betas: The betas of the logits, for optimizers of Adam's family. The second is lower than usual: the
                gradients of the first steps are large, and a long memory of them would hold the gates back.
            options: What else the group of the model's parameters gets, such as ``weight_decay``. The logits get no
                weight decay.

        Returns:
            A list of two groups, for the first argument of an optimizer.
        """
        rate = 10 * lr if gate_lr is None else gate_lr
        weights = {"params": list(self.model.parameters()), "lr": lr, **options}
        gates = {"params": [g.phi for g in self.all_gates()], "lr": rate, "weight_decay": 0.0, "betas": gate_betas}
        return [weights, gates]

    def expected_loss(self, closure: Callable[[], Tensor]) -> Tensor:
        """The training loss, a scalar whose backward also gives the gates their gradient.

        Args:
            closure: A function that runs the network and returns the losses of the samples, shape (batch,), or their
                mean, a scalar. It is called once, and at finite k by most estimators twice or more, under the same
                random numbers and with BatchNorm's statistics updated once; it should have no other side effect.

        Raises:
            PlasticError: The network is in evaluation mode, the closure never calls it or returns something else, or a
                loss is not finite.
        """
        return objective.expected_loss(self, self.sampler, closure)

    def penalty(
        self, strength: float, cost: str | Mapping[str, float] = "units", scale: Literal["linear", "log"] = "linear"
    ) -> Tensor:
        """``strength`` times the expected cost (or its logarithm), a scalar differentiable in the gates.

        Args:
            strength: A number, 0 or more.
            cost: "units", "parameters", "macs" (for one sample), "latency" (milliseconds: `measure_latency`), or
                a mapping of these to weights: a weighted sum, of the logarithms with scale "log".
            scale: "linear" (NPN, section 3), or "log", which keeps the pressure relative to what is left.

        Raises:
            PlasticError: A name is unknown, a number is negative, or the latency has not been measured.
        """
        return pressure.penalty(self, strength, cost, scale)

    def limit(
        self, pattern: str, *, minimum: int | None = None, maximum: float = math.inf, strength: float = 1.0
    ) -> None:
        """Bound the sites whose name matches ``pattern``, anew. `resize` and `grow` do as they are told.

        Args:
            pattern: A name pattern of sites.
            minimum: How many units pruning leaves them; by default 1, and 0 for blocks. With 0 a site may die, as a
                residual branch may; one unit stays, read with weights of zero.
            maximum: The number of units at which growth stops.
            strength: What the pressure on their gates is multiplied by.

        Raises:
            PlasticError: No site matches, or the bounds contradict each other.
        """
        pressure.limit(self, pattern, minimum, maximum, strength)

    # -- measuring ----------------------------------------------------------------------------

    def summary(self) -> Summary:
        """Units, parameters and multiply-adds: per site and in total, all and open. It prints as a table."""
        return summarise(self)

    def measure_latency(self, example_inputs: Any, *, networks: int = 24, repeats: int = 9) -> Latency:
        """Make "latency" a cost: the milliseconds of a forward pass on the example inputs.

        The milliseconds are fitted to networks that are cut at random and run on the device at hand. The result stays
        when sizes or the device change; a state dict does not hold it, but that of a `Schedule` does.

        Args:
            example_inputs: A tuple of arguments or a dict; the batch that counts.
            networks: How many networks are cut and measured.
            repeats: How often each of them runs.

        Raises:
            PlasticError: As `profile` does.
        """
        self.use_latency(self.ranks.first(measure_latency(self, example_inputs, networks, repeats)))
        assert self.latency is not None
        return self.latency

    # -- changing size ------------------------------------------------------------------------

    def resize(self, sources: Sources, optimizer: Optimizers = None, *, init: str = "preserve", grace: int = 0) -> None:
        """Rebuild sites from lists of source indices: ``{"conv1": [0, 2, -1]}`` keeps units 0 and 2 of
        ``conv1`` and adds one. Kept units carry their optimizer state.

        Args:
            sources: For each site the old units that stay, in order, and -1 for a new one. In an input site -1 re-opens
                a closed feature.
            optimizer: The one, or all of those, that hold the parameters.
            init: How new units begin: with random incoming weights, and outgoing ones of zero ("preserve") or random
                ones too ("random", and "paper", whose gates start at pi = 1/2).
            grace: For how many epochs of the schedule new units are held open and unpriced.

        Raises:
            PlasticError: A site is unknown, an index is out of range, a site would be left empty, or the optimizers do
                not hold every trainable parameter or cannot be resized. Nothing was changed.
        """
        resize(self, sources, optimizer, init, grace)

    def grow(
        self,
        counts: Mapping[str, int],
        optimizer: Optimizers = None,
        init: str = "preserve",
        grace: int = 0,
        loss: Loss | None = None,
    ) -> None:
        """Add units: ``{"conv1": 2}``; see `resize`.

        With a ``loss`` the incoming weights of the new units are those for which the gradient of the outgoing ones,
        which are zero, is largest (GradMax: Evci et al., arXiv 2201.05125, section 3).

        Args:
            counts: How many units each site gets.
            optimizer: The one, or all of those, that hold the parameters.
            init: One of `resize`'s, or "gradmax".
            grace: For how many epochs of the schedule new units are held open and unpriced.
            loss: For "gradmax" a function without arguments that runs the network on some training data.

        Raises:
            PlasticError: As `resize` does; and "gradmax" was given without a loss.
        """
        if init != "gradmax":
            grow(self, counts, optimizer, init, grace)
        elif loss is None:
            raise PlasticError('grow(init="gradmax") needs a loss to take the gradient of: loss=...')
        else:
            grow_by_gradient(self, counts, loss, optimizer, grace=grace)

    def prune(self, below: float = 0.5, optimizer: Optimizers = None, multiple_of: int = 1) -> dict[str, int]:
        """Cut the units whose gate has a probability below ``below``, and those whose features are all cut; every site
        keeps at least one. Where single weights have gates and k is infinity, units that only closed ones read are cut
        too.

        Args:
            below: A probability.
            optimizer: The one, or all of those, that hold the parameters.
            multiple_of: What widths in the tensors are to be a multiple of: a site then keeps the next likely units,
                too. Sites that have not that many are cut as without, and so are those that a norm takes statistics
                over.

        Returns:
            How many units were cut, for each site that lost some.
        """
        return prune(self, below, optimizer, multiple_of)

    def compact(self, multiple_of: int = 1) -> nn.Module:
        """A plain module, a copy in evaluation mode, with the outputs of ``net.eval()``: closed units are cut, and the
        mean gates of the open ones are multiplied into the weights that read them. Single weights that are closed are
        zeros.

        Args:
            multiple_of: What widths are to be a multiple of, as in `prune`: some closed units stay, read with weights
                of zero.
        """
        return compacted(self, multiple_of)

    # -- saving -------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Resize to the sizes in ``state_dict``, then load it. The parameters stay the same objects, so
        optimizers may be built before or after (load their state too if they have any).

        Raises:
            PlasticError: It belongs to another architecture. Nothing was changed.
        """
        with loading.resized_to(self, state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _with_signature(signature: inspect.Signature) -> Callable[..., Any]:
    """`PlasticNet.forward` with the signature of a model's, which tools read to see what the model takes."""

    @functools.wraps(PlasticNet.forward)
    def forward(self: PlasticNet, *args: Any, **kwargs: Any) -> Any:
        return PlasticNet.forward(self, *args, **kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    kinds = {p.kind for p in signature.parameters.values()}
    if inspect.Parameter.POSITIONAL_ONLY in kinds:
        own = own.replace(kind=inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # pyright: ignore[reportAttributeAccessIssue]
    return forward


def _warn_of_shadows(net: PlasticNet) -> None:
    """Say once which attributes of the model the network has, too: ``net.k``, say, is not the model's."""
    plain = set(dir(nn.Module()))
    own = {n for n in dir(net) if not n.startswith("_")} - plain - {"model"}
    model = net.model
    shadowed = sorted(own & set(dir(model)) - {"forward"})
    if shadowed:
        warnings.warn(
            f"{type(model).__name__} has attributes that PlasticNet has, too: {', '.join(shadowed)}. On the network "
            f"these are PlasticNet's; the model's are net.model.{shadowed[0]} and so on.",
            UserWarning,
            stacklevel=3,
        )
