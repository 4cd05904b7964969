"""Holds what a training step needs: its draw, its passes, and the sampler that outlives them.

A `Step` is shared by the passes of one call of `expected_loss`, and a `Pass` is one run of the closure. The `Sampler`
of a network knows how gates are drawn and which pass is running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from plasticnet.errors import PlasticError
from plasticnet.learning.coupling import Draw
from plasticnet.learning.estimators import ESTIMATORS, Estimator
from plasticnet.learning.missed import Missed
from plasticnet.learning.prefix import Prefix
from plasticnet.tools.snapshot import RandomState
from plasticnet.tools.trees import tensors_within


@dataclass
class Step:
    """What the passes of one training step share.

    Attributes:
        draw: The draw for the gates of units, which the first call of the network makes.
        weights: The draw for the gates of single weights, where they have gates.
        after: The random number generators after the draw.
        prefix: What the first pass has computed before its first gate.
        gradients: Whether gradients are wanted.
        gated: The gates of the training pass that have slopes.
        gradient: The part of the estimate that follows from the losses, for all logits.
        of_slopes: The parts that follow from the slopes, known in the backward pass. The key is the index of the first
            gate that a part belongs to.
        scale: By what the loss was scaled in the backward pass.
    """

    draw: Draw | None = None
    weights: Draw | None = None
    after: RandomState | None = None
    prefix: Prefix | None = None
    gradients: bool = True
    gated: list[Tensor] = field(default_factory=list)
    gradient: Tensor | None = None
    of_slopes: dict[int, Tensor] = field(default_factory=dict)
    scale: Tensor | None = None

    @property
    def draws(self) -> list[Draw]:
        """The draws that were made: for units, and for single weights where they have gates."""
        return [draw for draw in (self.draw, self.weights) if draw is not None]


@dataclass
class Pass:
    """One run of the closure: its purpose, the gates that it uses, and what the network was called with.

    The first "partner" pass fills the prefix of the step in its first call of the network, and the passes after it are
    handed the results in it. The "training" pass usually comes last. Where it comes first, it fills ``outputs``, and a
    "partner" with ``rows`` computes them anew for these samples only.

    Attributes:
        role: What the run is for. "free" is a call of the network outside of `expected_loss`.
        step: The step that the pass belongs to.
        gates: ``gates(draw)`` gives the gates: shape (rows, units) for the draw of the units, and (1, weights) for that
            of single weights. None stands for the gates of the estimator's pass 0.
        running: Whether norms over the batch use their running statistics.
        z: The gates of the units, shape (rows, units + 1), once they are known.
        weights: The gates of single weights, by the name of the parameter, where not all are open.
        probe: ``probe(rows)`` gives the gates of a "probe", shape (rows, units + 1).
        outputs: What the network returned at each call.
        rows: The indices of the samples that are computed. None stands for all.
        calls: How often the network was called.
        sizes: The lengths of the first two axes of its inputs. One of them is the batch.
    """

    role: Literal["free", "probe", "partner", "training"] = "free"
    step: Step = field(default_factory=Step)
    gates: Callable[[Draw], Tensor] | None = None
    running: bool = False
    z: Tensor | None = None
    weights: Mapping[str, Tensor] | None = None
    probe: Callable[[int], Tensor] | None = None
    outputs: list[Any] | None = None
    rows: Tensor | None = None
    calls: int = 0
    sizes: set[int] = field(default_factory=set)

    def anew(self) -> Pass:
        """Return the same pass as it was before it ran."""
        return replace(self, z=None, weights=None, calls=0, sizes=set())

    def note(self, args: Any, kwargs: Any) -> None:
        """Note that the network is called with these arguments."""
        self.calls += 1
        self.sizes.update(n for t in tensors_within((args, kwargs)) for n in t.shape[:2])


# A source makes a draw, from the arguments of `Estimator.draw`.
Source = Callable[[Estimator, Tensor, Tensor, int, Tensor | None], Draw]


@dataclass(eq=False)
class Sampler:
    """How the gates of a network are drawn, and what its training steps have found.

    Attributes:
        estimator: The name of one of `ESTIMATORS`.
        mode: Whether gates are drawn per "sample" or per "batch". With "auto" a probe decides.
        source: What makes a draw, with the arguments of `Estimator.draw`.
        running: The pass that is running.
        samples_apart: For "auto", whether gates can be drawn per sample. None as long as this is not known.
        rows_apart: Whether the network can be run on some of the samples. None as long as this is not known.
        differentiates: Whether the closure takes a gradient itself, so that no pass can run without gradients.
        estimates: For how many training steps the gradient of the gates was estimated.
        gradient: The estimate of the last step for all logits. A budget measures its pressure by the size of it.
        missed: What growth wants to know of some units, which every training step then measures; or None.
        owed: The answers of a GPU to whether something was finite that have not arrived yet, and the messages for it.

    Raises:
        PlasticError: The estimator or the mode is unknown.
    """

    estimator: str = "bitflip-cv"
    mode: Literal["auto", "sample", "batch"] = "auto"
    source: Source = Estimator.draw
    running: Pass = field(default_factory=Pass)
    samples_apart: bool | None = None
    rows_apart: bool | None = None
    differentiates: bool = False
    estimates: int = 0
    gradient: Tensor | None = None
    missed: Missed | None = None
    owed: list[tuple[torch.cuda.Event, Tensor, Callable[[], str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise PlasticError(f"estimator={self.estimator!r}: choose one of {', '.join(ESTIMATORS)}")
        if self.mode not in ("auto", "sample", "batch"):
            raise PlasticError(f"gates={self.mode!r}: choose one of auto, sample, batch")

    def __getstate__(self) -> dict[str, Any]:
        # The events of a GPU cannot be copied, and a copy that is made in a closure runs no closure itself.
        return {**self.__dict__, "owed": [], "running": Pass()}

    @property
    def rule(self) -> Estimator:
        """The estimator that ``estimator`` names."""
        return ESTIMATORS[self.estimator]

    def draw(self, pi: Tensor, sizes: Tensor, rows: int, shared: Tensor | None = None) -> Draw:
        """Return a draw for the estimator, made by the source.

        Args:
            pi: The probabilities of the gates, shape (units,).
            sizes: For each gate the number of units in its site, shape (units,).
            rows: How many rows have gates of their own.
            shared: Which gates have one draw for all rows, a mask of shape (units,). None where there are none.
        """
        return self.source(self.rule, pi, sizes, rows, shared)
