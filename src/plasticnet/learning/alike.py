"""Finds draws that agree: where the gates of two passes differ for few samples, only those samples are run again."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from plasticnet.gates.gated import GatedModel
from plasticnet.learning.prefix import Diverged
from plasticnet.learning.sampler import Pass, Sampler
from plasticnet.tools.trees import tensors_within


class Alike(BaseException):  # not an Exception, because a closure may catch those
    """Says that the gates of two passes differ for few samples, or for none.

    Args:
        rows: The indices of the samples whose gates differ, shape (samples,).
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = rows


def check_alike(net: GatedModel, sampler: Sampler, now: Pass) -> None:
    """Raise `Alike` where it is exact, and saves time, to run only the samples whose gates differ.

    It is exact where samples do not interact and the model has no buffers, in which a run could leave something. It
    saves time where the gates of at most half of the samples differ. The question is not put to a GPU, whose answer
    the program would have to wait for.

    Args:
        net: The network.
        sampler: How its gates are drawn.
        now: The partner pass, which is about to run the network for the first time.

    Raises:
        Alike: The gates of the two passes are equal, or they differ for few samples.
    """
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
    """Return the output of the training pass, computed anew for the samples in ``now.rows``.

    Args:
        net: The network.
        now: The partner pass that is running; it has ``rows``.
        z: The gates of this pass for all samples, shape (batch, units + 1).
        args: The positional arguments of this call of the network.
        kwargs: The keyword arguments of this call.
        before: What the training pass returned for the same call.

    Raises:
        Diverged: The network has several input tensors, or the first axis of a tensor is not the batch.
    """
    inputs, outputs = tensors_within((args, kwargs)), tree_leaves(before)
    rows = now.rows
    assert rows is not None
    if len(inputs) != 1 or not all(isinstance(t, Tensor) and t.dim() and len(t) == len(z) for t in (*inputs, *outputs)):
        raise Diverged
    args, kwargs = tree_map_only(Tensor, lambda t: t[rows], (args, kwargs))
    output = net.run(z[rows], args, kwargs)
    return tree_map(lambda old, new: old.index_copy(0, rows, new), before, output)
