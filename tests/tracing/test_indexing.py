"""Rows that are read, written and summed by an index: channels pass where every channel does the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kit.rows import Rows, check_cut_through, check_frozen

FROM, TO = torch.tensor([1, 2, 3, 4, 0, 2, 0]), torch.tensor([0, 1, 2, 3, 4, 0, 2])  # edges, some to the same node
SOME = torch.tensor([4, 0, 2])
MASK = torch.tensor([True, False, True, True, False])
TABLE = torch.randint(0, 5, (5, 8), generator=torch.Generator().manual_seed(0))  # another row for each channel


def over(index: Tensor, like: Tensor, dim: int = 0) -> Tensor:
    """An index with one entry for each row, expanded over the other axes."""
    shape = [1] * like.dim()
    shape[dim] = -1
    return index.view(shape).expand_as(like)


def set_rows(h: Tensor, index: object, values: object) -> Tensor:
    out = torch.zeros_like(h)
    out[index] = values  # pyright: ignore[reportArgumentType, reportCallIssue]
    return out + h


def reduced(kind: str, include_self: bool) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.zeros_like(h).scatter_reduce(0, over(TO, h[FROM]), h[FROM], kind, include_self=include_self)


def sparse(like: Tensor, csr: bool = False) -> Tensor:
    values = torch.linspace(0.1, 1, 7).to(like)
    matrix = torch.sparse_coo_tensor(torch.stack([FROM, TO]), values, (5, 5), check_invariants=True)
    return matrix.coalesce().to_sparse_csr() if csr else matrix


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "index_add": lambda h: torch.zeros_like(h).index_add(0, TO, h[FROM]),
    "index_add, negative dim, alpha": lambda h: h.index_add(-2, TO, h[FROM], alpha=0.5),
    "index_add in place": lambda h: h.new_zeros(5, h.shape[1]).index_add_(0, TO, h[FROM]),
    "index_add of a constant": lambda h: h.index_add(0, SOME, torch.ones(3, h.shape[1]).to(h)),
    "index_copy": lambda h: torch.zeros_like(h).index_copy(0, SOME, h[:3]),
    "index_copy in place": lambda h: h.clone().index_copy_(-2, SOME, h[SOME].tanh()),
    "index_fill": lambda h: h.index_fill(0, SOME, 0.5),
    "index_reduce": lambda h: h.index_reduce(0, TO, h[FROM], "amax", include_self=False),
    "scatter": lambda h: torch.zeros_like(h).scatter(0, over(SOME, h[:3]), h[:3]),
    "scatter of a number": lambda h: h.scatter(0, over(SOME, h[:3]), 0.5),
    "scatter_add in place": lambda h: torch.zeros_like(h).scatter_add_(0, over(TO, h[FROM]), h[FROM]),
    "scatter_add, negative dim": lambda h: h.scatter_add(-2, over(TO, h[FROM]), h[FROM]),
    "scatter_add, repeated index": lambda h: h.scatter_add(0, TO[:, None].repeat(1, h.shape[1]), h[FROM]),
    "scatter_add, repeat_interleave": lambda h: h.scatter_add(0, TO[:, None].repeat_interleave(h.shape[1], 1), h[FROM]),
    **{f"scatter_reduce, {kind}": reduced(kind, True) for kind in ("sum", "mean", "prod", "amax", "amin")},
    **{f"scatter_reduce, {kind}, not of zeros": reduced(kind, False) for kind in ("mean", "prod", "amax")},
    "scatter_reduce in place": lambda h: h.clone().scatter_reduce_(0, over(TO, h[FROM]), h[FROM], "mean"),
    "mean by counts": lambda h: (
        torch.zeros_like(h).index_add(0, TO, h[FROM]) / torch.bincount(TO, minlength=5).clamp(min=1)[:, None]
    ),
    "gather": lambda h: h.gather(0, over(SOME, h[:3])),
    "gather, negative dim": lambda h: h.gather(-2, SOME[:, None].expand(-1, h.shape[1])),
    "take_along_dim": lambda h: torch.take_along_dim(h, FROM[:, None], 0),
    "places of each channel's own": lambda h: h.tanh().gather(0, h.argsort(0)),
    "index_put, accumulate": lambda h: torch.zeros_like(h).index_put((TO,), h[FROM], accumulate=True),
    "rows are set": lambda h: set_rows(h, SOME, h[:3].tanh()),
    "rows are set to a row": lambda h: set_rows(h, SOME, h.mean(0)),
    "rows are set to one row": lambda h: set_rows(h, SOME, h[:1]),
    "rows are set to a number": lambda h: set_rows(h, SOME, 2.0),
    "rows of a mask are set": lambda h: set_rows(h, MASK, h[MASK].tanh()),
    "entries of a mask are set": lambda h: set_rows(h, h > 0, 3.0),
    "rows of a mask are added to": lambda h: h.index_put((MASK,), h[MASK] * 2, accumulate=True),
    "product with a sparse matrix": lambda h: torch.sparse.mm(sparse(h), h),
    "operator, compressed rows": lambda h: sparse(h, csr=True) @ h,
    "sparse.addmm": lambda h: torch.sparse.addmm(h, sparse(h), h, beta=0.5),
    "segments by lengths": lambda h: torch.segment_reduce(h, "max", lengths=torch.tensor([2, 3])),
    "segments by offsets": lambda h: torch.segment_reduce(h, "mean", offsets=torch.tensor([0, 1, 5]), axis=0),
    "bags": lambda h: F.embedding_bag(torch.stack([FROM, TO]), h, mode="sum"),
    "bags, max": lambda h: F.embedding_bag(FROM, h, torch.tensor([0, 3, 5]), mode="max"),
    "bags, weighted": lambda h: F.embedding_bag(
        torch.stack([FROM, TO]), h, mode="sum", per_sample_weights=torch.ones(2, 7).to(h)
    ),
}
FROZEN: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "index_add over channels": (lambda h: h.index_add(1, SOME, h[:, :3]), "indexed by position|pieces|unequal|cut"),
    "index_add over channels, negative": (lambda h: h.index_add(-1, torch.arange(8), h), "indexed by position"),
    "index_copy over channels": (lambda h: h.index_copy(1, torch.arange(7, -1, -1), h), "indexed by position"),
    "index_fill over channels": (lambda h: h.index_fill(1, SOME, 0.5), "indexed by position"),
    "another row for each channel, gather": (lambda h: h.gather(0, TABLE), "index that may differ"),
    "another row for each channel, scatter": (lambda h: h.scatter_add(0, TABLE, h), "index that may differ"),
    "another row, scatter_reduce": (lambda h: h.scatter_reduce(0, TABLE, h, "amax"), "index that may differ"),
    "gather over channels": (lambda h: h.gather(1, TABLE), "indexed by position.* a slice, split or chunk is"),
    "scatter over channels": (lambda h: torch.zeros_like(h).scatter(1, TABLE, h), "indexed by position"),
    "gather of a part": (lambda h: h.gather(0, SOME[:, None].expand(3, 4)), "only the first of its channels"),
    "scatter of a part": (lambda h: h.scatter(0, SOME[:, None].expand(3, 4), h[:3]), "only the first of its channels"),
    "a fixed width": (
        lambda h: h.gather(0, SOME[:, None].expand(3, 8)),
        "does not run.*as a number, take it from a shape",
    ),
    "a fixed width, scatter": (
        lambda h: torch.zeros(5, 8).to(h).scatter_add(0, SOME[:, None].expand(3, 8), h[:3]),
        "take it from a shape",
    ),
    "a fixed width, in a view": (lambda h: h.view(-1, 1, 8).flatten(0, 1), "attribute of a module, as self.width"),
    "channels are set": (lambda h: h.index_put((torch.arange(5)[:, None], SOME), h[:, :3]), "indexed by position|cut"),
    "values are set beside": (lambda h: h.index_put((SOME,), torch.arange(8).to(h)), "nothing to cut"),
    "one channel is spread": (lambda h: set_rows(h, SOME, h[:3, :1]), "single channels"),
    "channels choose rows": (lambda h: h[h.argmax(0)], "used as an index"),
    "rows are sorted by a channel": (lambda h: h[h[:, 0].argsort()], "single channels"),
    "a table by channel values": (lambda h: torch.eye(8).to(h)[h.argmax(1)], "reduced over its channels"),
    "segments of channels": (
        lambda h: torch.segment_reduce(h.t().contiguous(), "sum", lengths=torch.tensor([3, 5])).t().repeat(1, 4),
        "reduced over its channels",
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_channels_pass(name: str, tmp_path: Path) -> None:
    check_cut_through(Rows, EXACT[name], torch.randn(5, 4), tmp_path)


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_with_its_reason(name: str) -> None:
    check_frozen(Rows, *[FROZEN[name][0], torch.randn(5, 4), FROZEN[name][1]])


BATCHED: dict[str, Callable[[Tensor], Tensor]] = {  # of shape (samples, rows, channels)
    "rows of all samples": lambda h: h[:, SOME],
    "rows of each sample": lambda h: h[torch.arange(len(h))[:, None, None], FROM[:6].view(1, 3, 2)].amax(2),
    "rows of each sample, apart": lambda h: h[torch.arange(len(h))[:, None], :, :][:, 0],
    "rows, the samples behind": lambda h: h.transpose(0, 1)[FROM].transpose(0, 1),
    "gather": lambda h: h.gather(1, FROM.view(1, -1, 1).expand(len(h), -1, h.shape[2])),
    "gather of samples": lambda h: h.gather(0, torch.tensor([1, 0]).view(2, 1, 1).expand(-1, *h.shape[1:])),
    "scatter": lambda h: h.scatter_add(1, over(TO, h[:, FROM], 1), h[:, FROM]),
    "index_add": lambda h: torch.zeros_like(h).index_add(-2, TO, h[:, FROM]),
    "rows are set": lambda h: h.index_put((torch.tensor([[0], [1]]), SOME), h[:, :3].tanh()),
    "a mask of rows": lambda h: h.index_put((torch.stack([MASK, ~MASK]),), h.mean((0, 1))),
    "heads": lambda h: (
        torch.zeros_like(h).unflatten(2, (2, -1)).index_add(1, TO, h.unflatten(2, (2, -1))[:, FROM]).flatten(2)
    ),
    "segments": lambda h: torch.segment_reduce(h, "sum", lengths=torch.tensor([[2, 3], [1, 4]]), axis=1),
}


@pytest.mark.parametrize("name", BATCHED)
def test_channels_pass_behind_samples(name: str, tmp_path: Path) -> None:
    check_cut_through(Rows, BATCHED[name], torch.randn(2, 5, 4), tmp_path, 2 if name == "heads" else 8)
