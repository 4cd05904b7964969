"""Describes units and sites, which tracing finds, gates switch and a resize rewrites.

A *unit* is a set of slices of parameters that must live or die together. A *site* is an ordered set of units of the
same shape that are born in the same place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeGuard

import numpy as np

CHOICE = "choice"  # the statistic of a `Norm` that is a choice among its units, as by the router of a mixture

# Three reasons for which parts of a model are frozen; other places refer to them.
READ = "reaches the model's output"
IDLE = "it did not run on the example inputs"
SCRIPTED = "compiled by TorchScript, which cannot be cut"


def gate_offsets(sites: Mapping[str, Units]) -> tuple[dict[str, int], int]:
    """Return where the gates of each site begin in the vector of all gates, and the index of the constant 1."""
    ends = np.cumsum([0, *(u.size for u in sites.values())]).tolist()
    return dict(zip(sites, ends, strict=False)), ends[-1]


def gate_positions(sites: Mapping[str, Units], key: tuple[str, int], length: int) -> np.ndarray:
    """Return the index of the gate of every position of one dimension of a tensor.

    Args:
        sites: The units of each site by name.
        key: The name of the tensor, and the dimension.
        length: The length of the dimension.

    Returns:
        The indices, shape (length,). A position that nothing gates has the index of the constant 1.
    """
    offsets, one = gate_offsets(sites)
    positions = np.full(length, one)
    for name, u in sites.items():
        for s in u.slices:
            if (s.tensor, s.dim) == key:
                positions[s.index] = offsets[name] + np.arange(u.size)[:, None]
    return positions


def owner(tensor: str) -> str:
    """Return the name of the module that a parameter belongs to.

    For a tensor that a parametrization keeps, such as weight_norm, this is the module that has the parametrization.
    """
    module = tensor.rpartition(".")[0]
    return f".{module}".partition(".parametrizations.")[0].removeprefix(".")


def family_of(name: str) -> str:
    """Return the name with # for every number, which the layers of a stack have in common: ``blocks.#.mlp``."""
    return re.sub(r"\d+", "#", name)


@dataclass
class Slice:
    """Where the units of one site lie along one dimension of one tensor.

    Attributes:
        tensor: The name of a parameter or a buffer, or of a virtual input axis, such as ``"fc1.input"``.
        dim: The dimension.
        index: The positions that each unit owns, shape (units, width).
        runs: The lengths of the stretches that stay contiguous within a unit; their sum is the width. They fix where a
            new unit is inserted.
        consumed: Whether a contraction sums over this dimension. If not, it produces the units.
        group: For dimension 0 of the weight of a grouped convolution, the number of rows of one group, else 0.
        virtual: Where the tensor is the input axis of an input site (`InputUnits`), and so no parameter or buffer: the
            dimension (tensor, dim) of the consumer that reads this axis. Else None.
        length: Where a weight_norm takes norms over this dimension: the name of the parameter with the lengths, and the
            dimension of both that it takes no norm over. Else None.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 10))
        >>> for s in pn.trace(model, (torch.zeros(2, 3, 6, 6),)).sites["0"].slices:
        ...     print(s.tensor, s.dim, s.index.shape, s.consumed)
        0.weight 0 (8, 1) False
        0.bias 0 (8, 1) False
        2.weight 1 (8, 16) True
    """

    tensor: str
    dim: int
    index: np.ndarray
    runs: tuple[int, ...]
    consumed: bool = False
    group: int = 0
    virtual: tuple[str, int] | None = None
    length: tuple[str, int] | None = None


@dataclass(frozen=True)
class Consumer:
    """A contraction that reads gated units through one dimension of a parameter.

    Attributes:
        tensor: The name of the parameter.
        dim: The dimension that is summed over.
        module: The name of the module that owns the parameter.
        axis: The axis of the module's first input that carries the units, counted from the end. None where they are not
            read from this input; then gates can only act through the parameter.
        per_sample: Whether axis 0 of this input is the batch.
        at_birth: Whether no weight reads the units, as in an inner product of two activations: they are then multiplied
            where they are born, and the dimension is one of the outputs.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> pn.trace(model, (torch.zeros(2, 4),)).sites["0"].consumers
        [Consumer(tensor='2.weight', dim=1, module='2', axis=-1, per_sample=True, at_birth=False)]
    """

    tensor: str
    dim: int
    module: str
    axis: int | None
    per_sample: bool
    at_birth: bool = False


@dataclass(frozen=True)
class Norm:
    """Statistics over gated units, which a module takes over the open units only.

    Attributes:
        module: The name of the module, such as a LayerNorm.
        axis: The axis of what is normalised along which the units lie, counted from the end.
        tensor: The name of a parameter of the module.
        dim: Its dimension along which the units lie in the same order.
        statistic: The name of the operation of ATen that takes them, or `CHOICE`.
        least: How many units must be open: 2 for a variance that divides by one less than their number.
        counts: Whether the module reads the number of units from a shape, to divide by it.

    Example:
        >>> import torch, plasticnet as pn
        >>> layers = torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2)
        >>> pn.trace(torch.nn.Sequential(*layers), (torch.zeros(2, 4),), residual=True).sites["0"].norms
        [Norm(module='1', axis=-1, tensor='1.weight', dim=0, statistic='native_layer_norm', least=1, counts=False)]
    """

    module: str
    axis: int
    tensor: str
    dim: int
    statistic: str
    least: int = 1
    counts: bool = False


@dataclass(frozen=True)
class Width:
    """An integer attribute of a module that follows the number of units, such as a number of heads.

    Attributes:
        module: The name of the module.
        attribute: The name of the attribute.
        per_unit: By how much it grows with every unit.
        place: The index of the integer where the attribute is a tuple, or the ``feature_info`` of timm; else None.

    Example:
        >>> import plasticnet as pn
        >>> pn.Width("attention", "all_head_size", per_unit=64)
        Width(module='attention', attribute='all_head_size', per_unit=64, place=None)
    """

    module: str
    attribute: str
    per_unit: int
    place: int | None = None


@dataclass
class Units:
    """One site as tracing found it.

    Attributes:
        name: The name of the site, which is that of the module that produces the units.
        size: The number of units.
        slices: Where the units lie in tensors.
        consumers: Who reads the units.
        norms: What takes statistics over the units.
        widths: The attributes of modules that follow the number of units.
        growable: Whether units can be added. Where it is False, units can be cut exactly, but new units would change
            the outputs, because they would lie in the wrong place or count in the statistics of a norm. The self-check
            finds this out.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> units = pn.trace(model, (torch.zeros(2, 4),)).sites["0"]
        >>> units.size, [s.tensor for s in units.slices], units.growable
        (8, ['0.weight', '0.bias', '2.weight'], True)
    """

    name: str
    size: int
    slices: list[Slice]
    consumers: list[Consumer] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list, kw_only=True)
    widths: tuple[Width, ...] = field(default=(), kw_only=True)
    growable: bool = field(default=True, kw_only=True)

    @property
    def least(self) -> int:
        """How many units must stay, so that the statistics over them are numbers."""
        return max((norm.least for norm in self.norms), default=1)


@dataclass
class InputUnits(Units):
    """An input site: each unit is one feature of the input axis of a consumer.

    The full axis is a virtual tensor that has the name of the site, so that the units that produce it can own stretches
    of it. The other attributes are those of `Units`.

    Attributes:
        features: The positions in the full axis that are present. The parameter of the consumer holds only these
            columns.
        full: The length of the full axis.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 10))
        >>> units = pn.trace(model, (torch.zeros(2, 3, 6, 6),), inputs=["2"]).sites["2.input"]
        >>> units.size, units.full
        (128, 128)
    """

    features: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    full: int = 0


def without_lost_inputs(sites: Mapping[str, Units]) -> dict[str, Units]:
    """Return sites that own columns of a weight themselves where the input site between is not among the sites.

    Sites are left out when they are excluded, frozen or compared apart from others. Units that lie along the virtual
    axis of an input site that was left out then own the columns of its consumer directly, as without input sites.

    Args:
        sites: The sites by name. No features of the input sites that were left out have been cut.
    """
    found: dict[str, Units] = {}
    for name, u in sites.items():
        slices: list[Slice] = []
        for s in u.slices:
            if s.virtual is not None and s.tensor not in sites:
                s = replace(s, tensor=s.virtual[0], dim=s.virtual[1], virtual=None)
            if not any(_same_place(s, other) for other in slices):  # the weight may be read directly, too
                slices.append(s)
        found[name] = replace(u, slices=slices)
    return found


def _same_place(a: Slice, b: Slice) -> bool:
    """Return whether two slices say the same of where units lie."""
    return (a.tensor, a.dim, a.virtual) == (b.tensor, b.dim, b.virtual) and np.array_equal(a.index, b.index)


@dataclass
class BlockUnits(Units):
    """A site whose units are whole blocks, so that depth is learned: a closed block returns its first input.

    Blocks own no slices. What lies inside a block has sites of its own. The other attributes are those of `Units`.

    Attributes:
        blocks: The names of the modules. Their output has the shape of their first input.
        ends: For each block the names of the modules at the ends of its branches: where their weights and biases are
            zero, the block returns its first input. None for a block that has no such modules.

    Example:
        >>> import torch, plasticnet as pn
        >>> layers = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()) for _ in range(3)]
        >>> model = torch.nn.Sequential(*layers, torch.nn.Linear(4, 2))
        >>> pn.trace(model, (torch.zeros(2, 4),), blocks=["[012]"]).sites["depth"].blocks
        ('0', '1', '2')
    """

    blocks: tuple[str, ...] = ()
    ends: tuple[tuple[str, ...] | None, ...] = ()

    def inside(self, tensor: str) -> int | None:
        """Return the place of the block that contains a module or a tensor, or None.

        Args:
            tensor: The name of the module or the tensor.
        """
        return next((i for i, block in enumerate(self.blocks) if f"{tensor}.".startswith(f"{block}.")), None)


def is_skipped(units: Units) -> TypeGuard[BlockUnits]:
    """Return whether closed units of a site are skipped when the model runs, as blocks are, and experts are not."""
    return isinstance(units, BlockUnits) and not isinstance(units, ExpertUnits)


@dataclass
class ExpertUnits(BlockUnits):
    """A site whose units are the experts of a mixture: the router never chooses a closed one.

    Their slices are the rows of the router, and the experts themselves where these lie in stacked parameters. Like
    blocks, closed experts stay until the network is compacted. The other attributes are those of `BlockUnits`.

    Attributes:
        listed: Whether the experts are the modules of a list, and ``blocks`` has their names.
        sparse: Whether each row of an input goes to some of the experts only, so that fewer experts do the same work.

    Example:
        >>> import torch, plasticnet as pn
        >>> class Mixture(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.router = torch.nn.Linear(4, 3)
        ...         self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 2) for _ in range(3))
        ...     def forward(self, x):
        ...         weights = self.router(x).softmax(-1)
        ...         return sum(weights[:, i, None] * expert(x) for i, expert in enumerate(self.experts))
        >>> net = pn.PlasticNet(Mixture(), (torch.zeros(2, 4),), experts=["experts"])
        >>> net.sites["experts.members"].units.blocks
        ('experts.0', 'experts.1', 'experts.2')
    """

    listed: bool = True
    sparse: bool = False


@dataclass
class Trace:
    """The units of a model, as `plasticnet.trace` returns them.

    Attributes:
        sites: The units of each site by name, in execution order.
        frozen: Why something cannot be gated, by its name.
        uses: How often each entry of a parameter is multiplied for one sample, by the name of the parameter. The
            multiply-adds of a layer are this number times the number of entries.
        checked: Whether the self-check has run.
        positional: Whether the model tells units apart by their position, as ``x[:, :3]`` does.
        steered: Whether values steer the model, as in ``if x.sum() > 0`` or a mixture of experts.
        stateful: Whether the model keeps something from one call to the next.
        random: Whether the model draws random numbers in evaluation mode.
        sorting: Whether the model sorts values, of which some may be equal but for rounding.

    Example:
        >>> import torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(128, 10))
        >>> found = pn.trace(model, (torch.zeros(2, 3, 6, 6),))
        >>> list(found.sites), list(found.frozen), found.uses
        (['0'], ['2'], {'0.weight': 16.0, '2.weight': 1.0})
    """

    sites: dict[str, Units]
    frozen: dict[str, str]
    uses: dict[str, float]
    checked: bool = False
    positional: bool = False
    steered: bool = False
    stateful: bool = False
    random: bool = False
    sorting: bool = False
