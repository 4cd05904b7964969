"""Compares what modules give: every tensor that can be reached from an output."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = 1e-9
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional ones, and those by keyword


class Wrong(Exception):
    """Something differs that must be equal."""


def differs(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are not the same to the bit."""
    return a.shape != b.shape or a.dtype != b.dtype or not bool(((a == b) | ((a != a) & (b != b))).all())


def leaves(value: Any, path: str = "out") -> dict[str, Tensor]:
    """Return every tensor that can be reached from an output, by its path; other values count as tensors, too."""
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, Mapping):
        items = [(str(k), v) for k, v in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [(str(i), v) for i, v in enumerate(value)]
    elif hasattr(value, "__dict__"):
        items = list(vars(value).items())
    else:
        return {} if value is None else {path: torch.tensor(float(value))}
    return {p: t for key, v in items for p, t in leaves(v, f"{path}.{key}").items()}


class SameNumbers(TorchDispatchMode):
    """All entries of a random draw are one number, which follows from how many draws there were before.

    Networks of different widths draw different numbers otherwise, and so cannot be compared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.draws = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(out, Tensor):
            self.draws += 1
            part = self.draws * 0.618 % 1
            out.fill_(round(part) if "bernoulli" in str(func) else part)
        return out


def outputs_of(module: Callable[..., Any], arguments: Arguments) -> dict[str, Tensor]:
    """Return the tensors that a module gives under the `SameNumbers`."""
    args, kwargs = copy.deepcopy(arguments)
    with SameNumbers():
        return leaves(module(*args, **kwargs))


def agree(a: nn.Module, b: nn.Module, inputs: list[Arguments]) -> None:
    """Raise `Wrong` unless two modules give the same, whatever they are called with."""
    for i, arguments in enumerate(inputs):
        found = differences(outputs_of(a, arguments), outputs_of(b, arguments), TOLERANCE)
        if found:
            raise Wrong(f"call {i + 1}: {'; '.join(found[:3])}")


def differences(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> list[str]:
    """Return in which tensors two outputs differ, and by how much."""
    if a.keys() != b.keys():
        return [f"the outputs hold {sorted(a)} and {sorted(b)}"]
    found = []
    for path, s in a.items():
        t = b[path]
        if s.shape != t.shape or s.dtype != t.dtype:
            found.append(f"{path}: {tuple(s.shape)} {s.dtype} and {tuple(t.shape)} {t.dtype}")
        elif s.is_floating_point() and s.numel():
            s, t = s.detach(), t.detach()
            if bool((torch.isfinite(s) != torch.isfinite(t)).any()):
                found.append(f"{path}: only one of them is finite")
                continue
            error = float((s - t).nan_to_num(0, 0, 0).abs().max() / (s.nan_to_num(0, 0, 0).abs().max() + 1e-6))
            if error > tolerance:
                found.append(f"{path}: differs by {error:.1e}")
        elif not torch.equal(s, t):
            found.append(f"{path}: other whole numbers")
    return found
