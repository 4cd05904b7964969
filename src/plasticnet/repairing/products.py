"""Describes a product of a part of a parameter with activations, at the level of torch's own operations.

There every layer is one of a few operations: a product of matrices, or a convolution. Whoever reads a parameter does so
there, be it a module, a function that takes the weight of another module, or an expression of the user's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """A part of a parameter that one operand of a product is, as `torch.as_strided` describes it.

    Attributes:
        tensor: The name of the parameter.
        kind: "matrix" for an operand that inputs are multiplied with from the left, shape (inputs, outputs); "stack"
            for a stack of such matrices; "kernel" for the weight of a convolution; "vector" for what is added.
        size: The size of the operand.
        stride: Its strides.
        offset: Its first entry, counted from that of the parameter.
        groups: The number of groups of a convolution, else 1.
    """

    tensor: str
    kind: str
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    groups: int = 1

    def of(self, parameter: Tensor) -> Tensor:
        """Return the operand as a view of the parameter, or of another tensor with the same strides."""
        return parameter.as_strided(self.size, self.stride, parameter.storage_offset() + self.offset)

    def matrices(self, operand: Tensor) -> Tensor:
        """Return an operand as matrices of shape (groups, inputs, outputs), which need not be a view."""
        if self.kind == "kernel":
            return operand.reshape(self.groups, self.size[0] // self.groups, -1).transpose(1, 2)
        return operand[None] if self.kind == "matrix" else operand

    def operand(self, matrices: Tensor) -> Tensor:
        """Return what `matrices` has made matrices of."""
        if self.kind == "kernel":
            return matrices.transpose(1, 2).reshape(self.size)
        return matrices[0] if self.kind == "matrix" else matrices


@dataclass(eq=False)
class Product:
    """One product of a part of a parameter with activations.

    Attributes:
        place: The part of the parameter.
        x: The activations: (rows, inputs) for a matrix, (stack, rows, inputs) for a stack, and as they are for a
            kernel.
        out: The result: (rows, outputs), (stack, rows, outputs), or as it is for a kernel.
        windows: For a kernel, what makes the view of all windows of the input: shape (batch, channels, *positions,
            *extent).
        bias: The part of a parameter that the operation adds to the result, or None.
        follows: What has the memory of the result by now: the result of a norm or of adding the bias, at last.
        scale: By what a norm has multiplied each output, shape (outputs,), or None.
        addend: The activations that the result was added to, in the shape of the result, or None.
    """

    place: Place
    x: Tensor
    out: Tensor
    windows: Callable[[Tensor], Tensor] | None = None
    bias: Place | None = None
    follows: Tensor | None = None
    scale: Tensor | None = None
    addend: Tensor | None = None

    @property
    def memory(self) -> Tensor:
        """What has the memory of the result by now."""
        return self.out if self.follows is None else self.follows

    @property
    def rows(self) -> int:
        """The number of rows: positions of all samples."""
        return self.out.numel() // max(self.out.shape[1], 1) if self.windows else self.out.shape[-2]

    def inputs(self, rows: Tensor | None) -> Tensor:
        """Return some rows of the activations, shape (groups, rows, inputs).

        Args:
            rows: The indices of the rows; None for all.
        """
        if self.windows is None:
            x = self.x if self.x.dim() == 3 else self.x[None]
            return x if rows is None else x[:, rows]
        seen = self.windows(self.x)
        dims = self.out.dim() - 2
        if rows is None:
            rows = torch.arange(self.rows, device=seen.device)
        sample, *where = _unravelled(rows, (self.out.shape[0], *self.out.shape[2:]))
        picked = seen.movedim(1, 1 + dims)[(sample, *where)]  # (rows, channels, *extent)
        return picked.reshape(len(rows), self.place.groups, -1).transpose(0, 1)

    @property
    def addend_scale(self) -> Tensor | None:
        """By what a norm multiplies each output before it is added to something, or None."""
        return None if self.addend is None else self.scale

    def outputs(self, rows: Tensor | None) -> Tensor:
        """Return some rows of the result, with what it was added to, shape (groups, rows, outputs)."""
        found = self._rows(self.out, rows)
        if self.addend is None:
            return found
        added = self._rows(self.addend, rows)
        return found + (added if self.scale is None else added * self._inverse().view(len(added), 1, -1))

    def _inverse(self) -> Tensor:
        """Return one over the scale, and 0 for outputs that the norm makes next to nothing of."""
        assert self.scale is not None
        sizes = self.scale.abs()
        return torch.where(sizes > 1e-3 * sizes.max(), 1 / self.scale, 0.0)

    def _rows(self, t: Tensor, rows: Tensor | None) -> Tensor:
        """Return some rows of a tensor in the shape of the result, shape (groups, rows, outputs)."""
        if self.windows is None:
            t = t if t.dim() == 3 else t[None]
            return t if rows is None else t[:, rows]
        t = t.movedim(1, -1)
        t = t.reshape(-1, t.shape[-1]) if rows is None else t[tuple(_unravelled(rows, tuple(t.shape[:-1])))]
        return t.reshape(len(t), self.place.groups, -1).transpose(0, 1)


def _unravelled(index: Tensor, shape: tuple[int, ...]) -> list[Tensor]:
    """Return the indices along each axis of a shape, from those of the flattened one."""
    found = list[Tensor]()
    for n in reversed(shape):
        found.append(index % n)
        index = index // n
    return found[::-1]


def windows_of(
    x: Tensor, extent: Iterable[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return the view of all windows of a convolution's input: shape (batch, channels, *positions, *extent)."""
    pads = [n for p in reversed(padding) for n in (p, p)]
    seen = F.pad(x, pads) if any(pads) else x
    for i, (k, s, d) in enumerate(zip(extent, stride, dilation, strict=True)):
        seen = seen.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]
    return seen


def overlap(places: Iterable[Place], parameter: Tensor) -> bool:
    """Return whether two of several parts of a parameter share an entry."""
    counted = torch.zeros_like(parameter, dtype=torch.int8, device="cpu")
    if counted.stride() != parameter.stride():
        return True
    for place in places:
        place.of(counted).add_(1)
    return bool((counted > 1).any())
