"""What a repair has done, as numbers that print as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from plasticnet.tools.table import format_table


@dataclass(frozen=True)
class RepairedReader:
    """One part of a parameter that was refitted, or tried.

    Attributes:
        name: The name of the parameter.
        before: The error of what it computes on inputs held out, as a share of the variance.
        after: The same with the new weights.
        strength: The strength of the ridge, or None where the old weights were better.
        constant: The name of the bias or of the running mean that was shifted too, or None.

    Example:
        >>> import plasticnet as pn
        >>> pn.RepairedReader("2.weight", before=0.2, after=0.05, strength=0.001, constant="2.bias").after
        0.05
    """

    name: str
    before: float
    after: float
    strength: float | None
    constant: str | None


@dataclass(frozen=True)
class Repaired:
    """What `repair` has done; it prints as a table.

    Args:
        before: The error of the outputs on inputs held out, as a share of their variance, before the repair.
        after: The same after it.
        readers: The readers in the order in which they were refitted.
        left_out: Why readers of closed units were not refitted, by the name of the parameter.
        norms: The BatchNorms whose statistics were estimated anew.
        inputs: How many inputs were read, a fifth of them held out.

    Example:
        >>> import plasticnet as pn
        >>> reader = pn.RepairedReader("2.weight", before=0.2, after=0.05, strength=0.001, constant="2.bias")
        >>> print(pn.Repaired(0.2, 0.05, (reader,), inputs=100))
        error of the outputs, as a share of their variance: 0.2 before, 0.05 after
        reader    before  after  ridge
        2.weight     0.2   0.05  0.001
    """

    before: float
    after: float
    readers: tuple[RepairedReader, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    inputs: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"error of the outputs, as a share of their variance: {self.before:.4g} before, {self.after:.4g} after"
        ]
        if self.readers:
            cells = [
                (r.name, f"{r.before:.3g}", f"{r.after:.3g}", "left" if r.strength is None else f"{r.strength:g}")
                for r in self.readers
            ]
            lines += format_table([("reader", "before", "after", "ridge"), *cells], right=True)
        if self.norms:
            lines.append(f"statistics estimated anew: {', '.join(self.norms)}")
        return "\n".join([*lines, *(f"{name} was left out: {reason}" for name, reason in self.left_out.items())])
