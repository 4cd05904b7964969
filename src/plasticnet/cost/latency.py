"""Predicts the time of a forward pass by a sum of measured terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from plasticnet.errors import PlasticError
from plasticnet.tools.table import format_table

TIME = {"cpu": "CPU time of one thread", "cuda": "GPU time"}  # which time is measured on each kind of device


@dataclass(frozen=True)
class Term:
    """One term of a latency: a time that is proportional to the lengths of some dimensions of a tensor.

    Attributes:
        module: The name of the module whose time this is a part of.
        tensor: The name of the parameter.
        dims: The dimensions of the parameter. Without any, the time is a constant.
        lengths: Their lengths in the network with all units.
        milliseconds: The time at these lengths.

    Example:
        >>> import plasticnet as pn
        >>> term = pn.Term("fc", "fc.weight", dims=(0, 1), lengths=(10, 20), milliseconds=4.0)
        >>> term.rate
        0.02
    """

    module: str
    tensor: str
    dims: tuple[int, ...]
    lengths: tuple[int, ...]
    milliseconds: float

    @property
    def rate(self) -> float:
        """The milliseconds divided by the product of the lengths."""
        return self.milliseconds / prod(self.lengths)


@dataclass(frozen=True)
class Latency:
    """A measured latency: a sum of terms that predicts the time of a forward pass.

    `PlasticNet.measure_latency` makes it. Printed, it is a table of the modules.

    Attributes:
        terms: The terms of the sum.
        constants: The names of the modules whose time does not depend on the gates.
        milliseconds: The measured time of the network with all units. On "cpu" it is the CPU time of one thread, and on
            "cuda" the time of the GPU.
        error: The mean relative error of the prediction for cut networks that the terms were not fitted to.
        worst: The largest of these errors.
        networks: How many networks the terms were fitted to.
        held_out: How many networks they were not fitted to.
        device: "cpu" or "cuda".
        dtype: The dtype of the network.
        batch: The number of samples in the batch that was measured.

    Example:
        >>> import plasticnet as pn
        >>> terms = (pn.Term("", "", (), (), 1.0), pn.Term("fc", "fc.weight", (0,), (10,), 4.0))
        >>> latency = pn.Latency(terms, ("",), 5.0, 0.02, 0.05, 18, 6, "cpu", "float32", 32)
        >>> pn.Latency.from_dict(latency.as_dict()) == latency
        True
    """

    terms: tuple[Term, ...]
    constants: tuple[str, ...]
    milliseconds: float
    error: float
    worst: float
    networks: int
    held_out: int
    device: str
    dtype: str
    batch: int

    def as_dict(self) -> dict[str, Any]:
        """Return the latency as plain data, which can be written as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Latency:
        """Make a latency from what `as_dict` returned.

        Args:
            data: The plain data.

        Raises:
            PlasticError: The data is something else.
        """
        try:
            terms = [Term(**{**t, "dims": tuple(t["dims"]), "lengths": tuple(t["lengths"])}) for t in data["terms"]]
            return cls(**{**data, "terms": tuple(terms), "constants": tuple(data["constants"])})
        except (TypeError, KeyError) as error:
            raise PlasticError(f"this is no table of latencies: {error!r}") from None

    def __str__(self) -> str:
        modules: dict[str, list[Term]] = {}
        for t in self.terms:
            modules.setdefault(t.module, []).append(t)
        rows = [("module", "ms", "constant part")]
        for name, terms in modules.items():
            total, constant = sum(t.milliseconds for t in terms), sum(t.milliseconds for t in terms if not t.dims)
            rows.append((name or "(the model)", f"{total:.4f}", f"{constant / total:.0%}"))
        return "\n".join([
            *format_table(rows),
            f"{self.milliseconds:.3f} ms for a batch of {self.batch} in {self.dtype} ({TIME[self.device]})",
            f"error of the prediction {self.error:.1%}, at most {self.worst:.1%}: {self.held_out} networks cut at "
            f"random, beside the {self.networks} that were fitted",
        ])  # fmt: skip
