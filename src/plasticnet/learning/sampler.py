"""What one training step needs: its draw, its passes, and the sampler that outlives them.

A `Step` is shared by the passes of one call of `expected_loss`, a `Pass` is one run of the closure, and the
`Sampler` of a network knows how gates are drawn and which pass is running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.learning.estimators import ESTIMATORS, Draw, Estimator
from plasticnet.learning.prefix import Prefix
from plasticnet.tools.snapshot import RandomState
from plasticnet.tools.trees import tensors_within


@dataclass
class Step:
    """What the passes of one training step share: the draw of the first (for units, and for single weights where
    they have gates), the random numbers after it, and what it recorded before the first gate. Then the estimate: the
    part that follows from the losses, in the backward pass also that of the slopes; and by what the loss was scaled."""

    draw: Draw | None = None
    weights: Draw | None = None
    after: RandomState | None = None
    prefix: Prefix | None = None
    gradients: bool = True  # whether they are wanted
    gated: list[Tensor] = field(default_factory=list)  # gates of the training pass that have slopes
    gradient: Tensor | None = None
    of_slopes: dict[int, Tensor] = field(default_factory=dict)  # by the first of the gates
    scale: Tensor | None = None

    @property
    def draws(self) -> list[Draw]:
        """Those that there are."""
        return [draw for draw in (self.draw, self.weights) if draw is not None]


@dataclass
class Pass:
    """One run of the closure: what for, the gates it uses, and what the network was called with.

    ``gates(draw)`` gives the gates, shape (rows, units), and from the other draw those of single weights, shape
    (1, weights); else they are those of the estimator's pass 0. The first "partner" fills the step's prefix, in its
    first call, and the passes behind it are handed what it holds. "training", which comes last, fills ``outputs``, if
    there are any, and a "partner" with ``rows`` computes them anew for these samples only. With ``running``, norms
    use their running statistics.
    """

    role: Literal["free", "probe", "partner", "training"] = "free"  # "free": outside of expected_loss
    step: Step = field(default_factory=Step)
    gates: Callable[[Draw], Tensor] | None = None
    running: bool = False
    z: Tensor | None = None
    weights: Mapping[str, Tensor] | None = None  # gates of the entries of weights, where not all are open
    probe: Callable[[int], Tensor] | None = None
    outputs: list[Any] | None = None
    rows: Tensor | None = None
    calls: int = 0
    sizes: set[int] = field(default_factory=set)  # of the first two axes of the inputs; one of them is the batch

    def note(self, args: Any, kwargs: Any) -> None:
        """A call of the network."""
        self.calls += 1
        self.sizes.update(n for t in tensors_within((args, kwargs)) for n in t.shape[:2])


Source = Callable[[Estimator, Tensor, Tensor, int, Tensor | None], Draw]


@dataclass(eq=False)
class Sampler:
    """How the gates of a network are drawn, and what the training step that runs now has found.

    Attributes: ``estimator``, the name of one of `ESTIMATORS`; ``mode``, whether gates are drawn per sample, per
    batch, or as a probe finds ("auto"); ``source``, which makes a draw as `Estimator.draw` does, with the same
    arguments; ``running``, the pass that is running; ``samples_apart``, for "auto", whether per-sample draws are
    possible (None: not known yet); ``rows_apart``, whether the network can be run on some of the samples;
    ``gradient``, the estimate of the last step for all logits, by whose size a budget measures its pressure;
    ``owed``, answers of a GPU to whether a loss was finite that have not come yet.

    Raises `PlasticError` for an unknown estimator or mode.
    """

    estimator: str = "bitflip-cv"
    mode: Literal["auto", "sample", "batch"] = "auto"
    source: Source = Estimator.draw
    running: Pass = field(default_factory=Pass)
    samples_apart: bool | None = None
    rows_apart: bool | None = None
    gradient: Tensor | None = None
    owed: list[tuple[torch.cuda.Event, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise PlasticError(f"estimator={self.estimator!r}: choose one of {', '.join(ESTIMATORS)}")
        if self.mode not in ("auto", "sample", "batch"):
            raise PlasticError(f"gates={self.mode!r}: choose one of auto, sample, batch")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owed": []}  # events of a GPU cannot be copied

    @property
    def rule(self) -> Estimator:
        """The estimator itself."""
        return ESTIMATORS[self.estimator]

    def draw(self, pi: Tensor, sizes: Tensor, rows: int, shared: Tensor | None = None) -> Draw:
        """A draw of the source for the estimator; see `Estimator.draw`."""
        return self.source(self.rule, pi, sizes, rows, shared)
