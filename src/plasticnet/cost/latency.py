"""Predicts the time of a forward pass by a sum of measured terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from plasticnet.errors import PlasticError
from plasticnet.tools.table import format_table

TIME = {"cpu": "CPU time of one thread", "cuda": "GPU time"}  # what is measured on each kind of device


@dataclass(frozen=True)
class Term:
    """``milliseconds`` for these dimensions of a tensor while they have these ``lengths``, and in proportion
    to each of them; without dimensions, a constant. ``module`` is whose time it is part of."""

    module: str
    tensor: str
    dims: tuple[int, ...]
    lengths: tuple[int, ...]
    milliseconds: float

    @property
    def rate(self) -> float:
        """Milliseconds per product of the lengths."""
        return self.milliseconds / prod(self.lengths)


@dataclass(frozen=True)
class Latency:
    """What `PlasticNet.measure_latency` found: ``terms``, whose sum predicts the time of a forward pass.

    ``milliseconds`` is what the network with all units took, for a ``batch`` in this ``dtype``; on ``device``
    "cpu" it is the CPU time of one thread, on "cuda" that of the GPU. ``error`` is the relative error of the
    prediction for ``held_out`` cut networks that the fit has not seen, on average, and ``worst`` the largest;
    ``networks`` were fitted. ``constants`` are the modules whose time does not follow the gates.
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
        """Plain data, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Latency:
        """What `as_dict` gave. Raises `PlasticError` when it is something else."""
        try:
            terms = [Term(**{**t, "dims": tuple(t["dims"]), "lengths": tuple(t["lengths"])}) for t in data["terms"]]
            return cls(**{**data, "terms": tuple(terms), "constants": tuple(data["constants"])})
        except (TypeError, KeyError) as error:
            raise PlasticError(f"this is no table of latencies: {error!r}") from None

    def __str__(self) -> str:
        modules: dict[str, list[Term]] = {}
        for t in self.terms:
            modules.setdefault(t.module, []).append(t)
        rows = [("module", "ms", "of it constant")]
        for name, terms in modules.items():
            total, constant = sum(t.milliseconds for t in terms), sum(t.milliseconds for t in terms if not t.dims)
            rows.append((name or "(the model)", f"{total:.4f}", f"{constant / total:.0%}"))
        return "\n".join([
            *format_table(rows),
            f"{self.milliseconds:.3f} ms for a batch of {self.batch} in {self.dtype} ({TIME[self.device]})",
            f"error of the prediction {self.error:.1%}, at most {self.worst:.1%}: {self.held_out} networks cut at "
            f"random, beside the {self.networks} that were fitted",
        ])  # fmt: skip
