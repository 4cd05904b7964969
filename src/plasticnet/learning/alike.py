"""Draws that agree: where the gates of two passes differ for few samples, only those are computed again."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from plasticnet.gates.gated import GatedModel
from plasticnet.learning.prefix import Diverged
from plasticnet.learning.sampler import Pass, Sampler
from plasticnet.tools.trees import tensors_within


class Alike(BaseException):  # not an Exception: a closure may catch these
    """The gates of the two passes differ for few samples or none: ``rows`` are their indices."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows


def check_alike(net: GatedModel, sampler: Sampler, now: Pass) -> None:
    """Raise `Alike` if it pays and is exact to compute only the samples whose gates differ: when samples do
    not interact, and nothing is left in buffers. A GPU is not asked, which would mean waiting for it."""
    draw, estimator = now.step.draw, sampler.rule
    assert draw is not None
    if list(net.weights) or draw.u.is_cuda or estimator.partners != 1 or estimator.slopes is not None or now.running:
        return
    differ = (estimator.gates(draw, 0) != estimator.gates(draw, 1)).any(1)
    rows = differ.nonzero().squeeze(1)
    apart = (
        draw.rows > 1
        and sampler.samples_apart
        and sampler.rows_apart is not False
        and not any(True for _ in net.model.buffers())
    )
    if not len(rows) or (apart and 2 * len(rows) <= draw.rows):
        raise Alike(rows)


def some_rows(net: GatedModel, now: Pass, z: Tensor, args: Any, kwargs: Any, before: Any) -> Any:
    """The output of the training pass, computed anew for some of the samples. Raises `Diverged` where the
    samples cannot be told."""
    inputs, outputs = tensors_within((args, kwargs)), tree_leaves(before)
    rows = now.rows
    assert rows is not None
    if len(inputs) != 1 or not all(isinstance(t, Tensor) and t.dim() and len(t) == len(z) for t in (*inputs, *outputs)):
        raise Diverged
    args, kwargs = tree_map_only(Tensor, lambda t: t[rows], (args, kwargs))
    output = net.run(z[rows], args, kwargs)
    return tree_map(lambda old, new: old.index_copy(0, rows, new), before, output)
