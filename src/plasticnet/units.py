"""Units and sites: what tracing finds, gates switch and resize rewrites.

A *unit* is a set of parameter slices that must live or die together. A *site* is an ordered set of
units of the same shape that are born at the same place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


def gate_offsets(sites: Mapping[str, Units]) -> tuple[dict[str, int], int]:
    """Where each site's gates begin in the gates of all, and where the constant 1 is."""
    ends = np.cumsum([0, *(u.size for u in sites.values())]).tolist()
    return dict(zip(sites, ends, strict=False)), ends[-1]


def gate_positions(sites: Mapping[str, Units], key: tuple[str, int], length: int) -> np.ndarray:
    """For each position of one dimension of a tensor, the index of its gate."""
    offsets, one = gate_offsets(sites)
    positions = np.full(length, one)
    for name, u in sites.items():
        for s in u.slices:
            if (s.tensor, s.dim) == key:
                positions[s.index] = offsets[name] + np.arange(u.size)[:, None]
    return positions


def owner(tensor: str) -> str:
    """The name of the module that a parameter belongs to; for what a parametrization keeps (weight_norm,
    say), of the module that it is a parameter of."""
    module = tensor.rpartition(".")[0]
    return f".{module}".partition(".parametrizations.")[0].removeprefix(".")


def family_of(name: str) -> str:
    """What the layers of a stack share of their names: ``blocks.#.mlp``."""
    return re.sub(r"\d+", "#", name)


@dataclass
class Slice:
    """Where the units of one site lie along one dimension of one tensor.

    ``tensor`` is the name of a parameter or buffer, or of a virtual input axis (``"fc1.input"``).
    ``index`` has shape (units, width): the positions that each unit owns. ``runs`` are the lengths,
    summing to width, of the stretches that stay contiguous within a unit; they fix where a new
    unit is inserted.
    """

    tensor: str
    dim: int
    index: np.ndarray
    runs: tuple[int, ...]
    consumed: bool = False  # the dimension that a contraction sums over (else it produces the units)
    group: int = 0  # for dimension 0 of a grouped convolution's weight, the rows of one group


@dataclass(frozen=True)
class Consumer:
    """A contraction that reads gated units: dimension ``dim`` of parameter ``tensor``.

    ``axis`` is the axis of the owning module's first input that carries the units, counted from the
    end, or None when no module call reads it (then it can only be gated through its weight).
    ``per_sample`` says that axis 0 of that input is the batch.
    """

    tensor: str
    dim: int
    module: str
    axis: int | None
    per_sample: bool


@dataclass(frozen=True)
class Norm:
    """Statistics over gated units: while ``module`` runs, they are taken over the open ones only.

    The units lie along ``axis`` (counted from the end) of what is normalised, in the order of dimension
    ``dim`` of the module's parameter ``tensor``.
    """

    module: str
    axis: int
    tensor: str
    dim: int


@dataclass(frozen=True)
class Width:
    """An integer attribute of a module that grows by ``per_unit`` with every unit of a site: a number
    of heads, say, or the width of all of them. ``place`` is its index where the attribute is a tuple."""

    module: str
    attribute: str
    per_unit: int
    place: int | None = None


@dataclass
class Units:
    """One site as tracing found it: ``size`` units, the slices that they own and who reads them.

    ``norms`` take statistics over the units, and ``widths`` are attributes that follow their number.
    ``growable`` is False where units can be cut exactly but new ones would not leave the outputs alone
    (they would come to lie in the wrong place, or count in a norm's statistics); the self-check finds out.
    """

    name: str
    size: int
    slices: list[Slice]
    consumers: list[Consumer] = field(default_factory=list)
    norms: list[Norm] = field(default_factory=list, kw_only=True)
    widths: tuple[Width, ...] = field(default=(), kw_only=True)
    growable: bool = field(default=True, kw_only=True)


@dataclass
class InputUnits(Units):
    """An input site: each unit is one feature of the consumer's input axis.

    ``features`` are the positions, in the full axis of length ``full``, that are present; the
    consumer's parameter holds only those columns. The full axis is a virtual tensor of this site's
    name, so that the units that produce it can own stretches of it.
    """

    features: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    full: int = 0


@dataclass
class BlockUnits(Units):
    """Whole blocks as units, so that depth is learned: a closed block hands on its first input.

    ``blocks`` are the modules, whose output has the shape of their first input. They own no slices;
    what lies inside a block has sites of its own.
    """

    blocks: tuple[str, ...] = ()

    def inside(self, tensor: str) -> int | None:
        """The block that a module or tensor of this name belongs to, by its place, or None."""
        return next((i for i, block in enumerate(self.blocks) if f"{tensor}.".startswith(f"{block}.")), None)


@dataclass
class Trace:
    """What `plasticnet.trace` returns.

    ``sites`` maps a name to its units, in execution order; ``frozen`` maps the name of whatever
    cannot be gated to the reason; ``uses`` maps a parameter to how often each of its entries is
    multiplied for one sample (the multiply-adds of a layer are ``uses * numel``). ``trains_more``
    says that parameters are used in training that are not used in evaluation (auxiliary heads), and
    ``positional`` that the model tells units apart by their position (``x[:, :3]``).
    """

    sites: dict[str, Units]
    frozen: dict[str, str]
    uses: dict[str, float]
    checked: bool = False
    trains_more: bool = False
    positional: bool = False
