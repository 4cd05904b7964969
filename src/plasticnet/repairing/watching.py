"""Watches a model run, and sees the products of its parameters with activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plasticnet.repairing.products import Place, Product, windows_of
from plasticnet.repairing.resuming import Record

_MATRICES = ("mm", "addmm", "_addmm_activation", "bmm", "baddbmm")
_NORMS = (
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm",
)  # fmt: skip


@dataclass(eq=False)
class Seen:
    """What was seen of the parameters in a run.

    Attributes:
        places: The parts of parameters that are multiplied with activations, in order of their first product, each with
            the number of products in this run.
        biases: The part of a parameter that is added to the result, by the part that is multiplied.
        shifts: The running mean, a buffer, that is subtracted from the result, by the part that is multiplied.
        sums: The parts whose result is added to other activations.
        otherwise: The operation that reads a parameter in another way, by the name of the parameter.
        running: How often statistics of a norm were used, by the name of the running mean.
    """

    places: dict[Place, int] = field(default_factory=dict)
    biases: dict[Place, Place] = field(default_factory=dict)
    shifts: dict[Place, Place] = field(default_factory=dict)
    sums: set[Place] = field(default_factory=set)
    otherwise: dict[str, str] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=dict)


class Products(TorchDispatchMode):
    """Watches a model run.

    Args:
        model: The model.
        notice: What is called with every product, or with those of one place.
        look: Whether to note how parameters are read, in `seen`.
        only: The place whose products are noticed; None for all.
        beside: The parameters whose products are noticed, too.
        summed: Whether these are noticed when they are added to other activations, and not at once.
        record: What an earlier run has recorded on the same inputs. The run begins where that one was closed, and is
            recorded up to the first product of ``only``.
    """

    def __init__(
        self,
        model: nn.Module,
        notice: Callable[[Product], None],
        *,
        look: bool = False,
        only: Place | None = None,
        beside: Collection[str] = (),
        summed: bool = False,
        record: Record | None = None,
    ) -> None:
        super().__init__()
        self.model, self.notice, self.look, self.only, self.summed = model, notice, look, only, summed
        self.beside = beside
        self.seen = Seen()
        self._held: dict[int, list[tuple[str, Tensor]]] = {}
        self._last: Product | None = None
        held = [*model.named_parameters(), *model.named_buffers()]
        self._strides = {n: t.stride() for n, t in held if t.layout == torch.strided}
        self._record, self._at, self._past = record, 0, len(record.steps) if record is not None else 0

    def begin(self, *_: Any) -> None:
        """Note which tensors the modules hold: within a run, gates have been multiplied into some of the parameters."""
        self._held = {}
        for name, t in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if t.layout == torch.strided and not t.is_meta:
                self._held.setdefault(t.untyped_storage().data_ptr(), []).append((name, t))

    def end(self, *_: Any) -> None:
        """Watch nothing until the model is called again."""
        self._held = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._held:
            return func(*args, **(kwargs or {}))
        if self._at < self._past:
            assert self._record is not None
            self._at += 1
            return self._record.take(self._at - 1, func, args, kwargs or {})
        found = self._operands(func.overloadpacket.__name__, args)
        if found is not None and self.only in (None, found[0]):
            if self._record is not None:
                self._record.close()
                self._record = None
            out = func(*args, **(kwargs or {}))
            self._last = product = found[1](out)
            if self.look:
                self._looked(product)
            if not self.summed:
                self.notice(product)
            return out
        if found is not None and found[0].tensor in self.beside:
            out = func(*args, **(kwargs or {}))
            if self._record is not None:
                self._record.add(func, out)
            self.notice(found[1](out))
            return out
        name = func.overloadpacket.__name__
        adds = self._adds(name, args, kwargs or {})
        if adds and self.summed and self._last is not None:
            last, self._last = self._last, None
            self.notice(last)
        out = func(*args, **(kwargs or {}))
        if self._record is not None:
            if func.is_view and self._named(args[0]) is not None:
                self._record.add_again(func)
            else:
                self._record.add(func, out)
        if self.look and not func.is_view:
            self._other(name, args, adds)
        self._follow(name, args, out)
        return out

    def _adds(self, name: str, args: Any, kwargs: Any) -> bool:
        """Return whether an operation adds the last product to other activations, which are then noted."""
        last = self._last
        if last is None or last.place.kind == "stack" or name not in ("add", "add_") or kwargs.get("alpha", 1) != 1:
            return False
        for mine, other in ((args[0], args[1]), (args[1], args[0])):
            if not (isinstance(mine, Tensor) and isinstance(other, Tensor) and mine.shape == other.shape):
                continue
            ours = last.memory
            if not _same(mine, ours) or self._named(other) is not None:
                continue
            if last.windows is not None and mine.shape == last.out.shape and mine.stride() == ours.stride():
                last.addend = other
            elif last.windows is None and mine.is_contiguous() and ours.is_contiguous():
                last.addend = other.reshape(last.out.shape)
            else:
                return False
            return True
        return False

    def _follow(self, name: str, args: Any, out: Any) -> None:
        """Note what a norm, or adding a bias, has made of the last product."""
        last = self._last
        if last is None or not args or not isinstance(args[0], Tensor):
            return
        if not _same(args[0], last.memory):
            return
        if name in _NORMS and last.scale is None and _by_outputs(last, args[0]):
            weight, variance, eps = args[1], args[4], args[-1]
            if isinstance(variance, Tensor) and isinstance(eps, float):
                scale = torch.rsqrt(variance + eps)
                last.scale = scale if weight is None else scale * weight
                last.follows = out[0]
        elif name in ("add", "add_") and self._vector(args[1], last.out.shape[-1]) is not None:
            last.follows = out

    def _named(self, t: Any) -> tuple[str, Tensor] | None:
        """Return the name and the whole of the parameter or buffer that a tensor is a part of."""
        if not isinstance(t, Tensor) or t.layout != torch.strided:
            return None
        for name, whole in self._held.get(t.untyped_storage().data_ptr(), ()):
            first = whole.storage_offset()
            if first <= t.storage_offset() < first + max(whole.numel(), 1) and t.dtype == whole.dtype:
                return name, whole
        return None

    def _place(self, t: Any, kind: str, groups: int = 1) -> Place | None:
        """Return the place of an operand that is a part of a parameter, or None."""
        found = self._named(t)
        if found is None or self._strides.get(found[0]) != found[1].stride():
            return None
        name, whole = found
        return Place(name, kind, tuple(t.shape), tuple(t.stride()), t.storage_offset() - whole.storage_offset(), groups)

    def _operands(self, name: str, args: Any) -> tuple[Place, Callable[[Tensor], Product]] | None:
        """Return the place of the operand that is a part of a parameter, and what makes the product from its result."""
        if name in _MATRICES:
            a, b = args[-2:]
            kind = "matrix" if a.dim() == 2 else "stack"
            bias = self._vector(args[0], b.shape[-1]) if len(args) > 2 else None
            if kind == "stack" and b.stride(0) == 0 and (place := self._place(b[0], "matrix")) is not None:
                return place, lambda out: Product(place, a.flatten(0, 1), out.flatten(0, 1), bias=bias)
            if kind == "stack" and a.stride(0) == 0 and (place := self._place(a[0].mT, "matrix")) is not None:
                return place, lambda out: Product(place, b.mT.flatten(0, 1), out.mT.flatten(0, 1))
            if (place := self._place(b, kind)) is not None:
                return place, lambda out: Product(place, a, out, bias=bias)
            if (place := self._place(a.mT, kind)) is not None:
                return place, lambda out: Product(place, b.mT, out.mT)
        elif name == "convolution":
            x, weight, added, stride, padding, dilation, transposed, _, groups = args[:9]
            if not transposed and (place := self._place(weight, "kernel", groups)) is not None:
                bias = self._vector(added, weight.shape[0])

                def windows(t: Tensor) -> Tensor:
                    return windows_of(t, weight.shape[2:], stride, padding, dilation)

                return place, lambda out: Product(place, x, out, windows, bias)
        return None

    def _vector(self, t: Any, length: int) -> Place | None:
        """Return the place of what is added to each of so many outputs, if it is a part of a parameter or buffer."""
        return self._place(t, "vector") if isinstance(t, Tensor) and t.shape == (length,) else None

    def _looked(self, product: Product) -> None:
        """Note a product."""
        place = product.place
        self.seen.places[place] = self.seen.places.get(place, 0) + 1
        if product.bias is not None:
            self.seen.biases[place] = product.bias

    def _other(self, name: str, args: Any, adds: bool) -> None:
        """Note an operation that is no product: what it reads, and what it does with the last product."""
        last = self._last
        if adds and last is not None:
            self.seen.sums.add(last.place)
        read = [found[0] for t in tree_leaves(args) if (found := self._named(t)) is not None]
        mine = last is not None and bool(args) and isinstance(args[0], Tensor) and _same(args[0], last.memory)
        if mine and last is not None and name in ("add", "add_") and len(read) == 1:
            bias = self._vector(args[1], last.out.shape[-1])
            if bias is not None and last.windows is None and last.place not in self.seen.biases:
                self.seen.biases[last.place] = bias
                return
        if name in _NORMS and (mean := self._place(args[3], "vector")) is not None:
            self.seen.running[mean.tensor] = self.seen.running.get(mean.tensor, 0) + 1
            if mine and last is not None and _by_outputs(last, args[0]):
                self.seen.shifts[last.place] = mean
        for parameter in read:
            self.seen.otherwise.setdefault(parameter, name)


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same memory."""
    return a.numel() == b.numel() and a.data_ptr() == b.data_ptr()


def _by_outputs(product: Product, x: Tensor) -> bool:
    """Return whether the channels of a norm's input are the outputs of a product."""
    return product.windows is not None or (x.dim() == 2 and product.out.dim() == 2 and x.shape == product.out.shape)


@contextmanager
def watching(model: nn.Module, notice: Callable[[Product], None], **options: Any) -> Iterator[Products]:
    """Watch the products of a model's parameters in every run within this context.

    Args:
        model: The model.
        notice: What is called with every product.
        options: The keyword arguments of `Products`.
    """
    mode = Products(model, notice, **options)
    handles = [
        model.register_forward_pre_hook(mode.begin),
        model.register_forward_hook(mode.end, always_call=True),
    ]
    try:
        with mode:
            yield mode
    finally:
        for handle in handles:
            handle.remove()
