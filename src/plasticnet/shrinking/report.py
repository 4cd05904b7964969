"""What `shrink` has done, as numbers that print as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from plasticnet.tools.table import format_table


@dataclass(frozen=True)
class SiteChange:
    """What became of one site.

    Attributes:
        name: The name of the site.
        before: The number of its units at first.
        after: The number that is left.

    Example:
        >>> import plasticnet as pn
        >>> pn.SiteChange("conv1", before=20, after=6)
        SiteChange(name='conv1', before=20, after=6)
    """

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Milestone:
    """The network after one step of the work.

    Attributes:
        name: What was done: "whole", "cut", "repaired", "epoch 1" and so on.
        error: What ``validate`` returned; by default the divergence from the outputs of the model, on inputs held out.
        parameters: The number of parameters.
        macs: The multiply-adds for one sample.
        seconds: How long the step took.

    Example:
        >>> import plasticnet as pn
        >>> pn.Milestone("cut", error=0.25, parameters=34, macs=28, seconds=0.1).name
        'cut'
    """

    name: str
    error: float
    parameters: int
    macs: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """What `shrink` has done; it prints as tables.

    Attributes:
        sites: The sites in execution order.
        steps: The network after each step of the work, the whole one first.
        error: What the errors are, in words.
        milliseconds: How long a forward pass on the first batch takes, before and after.
        inputs: How many inputs were read for scores and repair.
        frozen: Why something could not be cut, by its name.
        left_out: Why readers of cut units were not repaired, by the name of the parameter.
        interrupted: Whether the epochs were interrupted.
        given_up: Why the epochs ended early although nobody interrupted them; empty where they did not.
        kept: The name of the step whose network was returned.

    Example:
        >>> import plasticnet as pn
        >>> steps = (pn.Milestone("whole", 0.0, 58, 48.0, 0.0), pn.Milestone("cut", 0.25, 34, 28.0, 0.1))
        >>> print(pn.Report((pn.SiteChange("0", 8, 4),), steps, "divergence", (0.02, 0.02), inputs=64))
        site  units before  after  kept
        0                8      4   50%
        <BLANKLINE>
        step   divergence  parameters  multiply-adds  seconds
        whole           0          58             48      0.0
        cut          0.25          34             28      0.1
        <BLANKLINE>
        0.020 ms for the first batch before, 0.020 ms after; 64 inputs were read
    """

    sites: tuple[SiteChange, ...]
    steps: tuple[Milestone, ...]
    error: str
    milliseconds: tuple[float, float]
    inputs: int
    frozen: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False
    given_up: str = ""
    kept: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        sites = [(s.name, str(s.before), str(s.after), f"{s.after / max(s.before, 1):.0%}") for s in self.sites]
        steps = [
            (s.name, f"{s.error:.4g}", f"{s.parameters:,}", f"{s.macs:,.0f}", f"{s.seconds:.1f}") for s in self.steps
        ]
        before, after = self.milliseconds
        lines = [
            *format_table([("site", "units before", "after", "kept"), *sites], right=True),
            "",
            *format_table([("step", self.error, "parameters", "multiply-adds", "seconds"), *steps], right=True),
            "",
            f"{before:.3f} ms for the first batch before, {after:.3f} ms after; {self.inputs} inputs were read",
            *(f"{name} was not repaired: {reason}" for name, reason in self.left_out.items()),
        ]
        if self.interrupted:
            lines.append("the epochs were interrupted")
        if self.given_up:
            lines.append(f"the epochs ended early: {self.given_up}")
        if self.kept not in ("", self.steps[-1].name):
            lines.append(f"returned is the network after the step {self.kept!r}, whose {self.error} is smallest")
        return "\n".join(lines)
