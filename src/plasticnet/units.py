"""Units and sites: what tracing finds, gates switch and resize rewrites.

A *unit* is a set of parameter slices that must live or die together. A *site* is an ordered set of
units of the same shape that are born at the same place.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


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


@dataclass
class Units:
    """One site as tracing found it: ``size`` units, the slices that they own and who reads them.

    ``growable`` is False where units can be cut exactly but new ones would come to lie in the wrong
    place (a normalisation group that spans a concatenation, say); the self-check finds out.
    """

    name: str
    size: int
    slices: list[Slice]
    consumers: list[Consumer] = field(default_factory=list)
    growable: bool = field(default=True, kw_only=True)

    @property
    def is_input(self) -> bool:
        """Whether this is an input site: features selected in front of one consumer."""
        return False


@dataclass
class InputUnits(Units):
    """An input site: each unit is one feature of the consumer's input axis.

    ``features`` are the positions, in the full axis of length ``full``, that are present; the
    consumer's parameter holds only those columns. The full axis is a virtual tensor of this site's
    name, so that the units that produce it can own stretches of it.
    """

    features: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    full: int = 0

    @property
    def is_input(self) -> bool:
        """True: see `Units.is_input`."""
        return True


@dataclass
class Trace:
    """What `plasticnet.trace` returns.

    ``sites`` maps a name to its units, in execution order; ``frozen`` maps the name of whatever
    cannot be gated to the reason; ``uses`` maps a parameter to how often each of its entries is
    multiplied for one sample (the multiply-adds of a layer are ``uses * numel``).
    """

    sites: dict[str, Units]
    frozen: dict[str, str]
    uses: dict[str, float]
    checked: bool = False
