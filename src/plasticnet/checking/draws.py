"""Makes random numbers comparable between models of different widths: within a sample, all entries of a draw are equal.

A model may draw random numbers as it runs: noise, a sample from a distribution, dropout by hand. In a model that was
cut, a draw has fewer entries, so that the numbers of the units that stay, and all later draws, would be others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from plasticnet.tools.torch_private import schema_name

_SEED = 1_000
_SLOPES = frozenset({"aten::rrelu_with_noise", "aten::rrelu_with_noise_"})  # these draw slopes while they train
# What fills a tensor with draws that do not depend on its entries, in place or by the like of it.
_FILLS = frozenset(
    f"aten::{name}"
    for name in (
        "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "normal_", "uniform_", "exponential_",
        "log_normal_", "cauchy_", "geometric_", "random_",
    )
)  # fmt: skip


class EvenDraws(TorchDispatchMode):
    """Within this context the entries of a draw depend on the number of the draw and on the index on axis 0 only.

    Attributes:
        count: How many draws there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        self.count += 1
        if "generator" in kwargs:  # one of the model's own would go on from call to call
            kwargs = {**kwargs, "generator": None}
        name = schema_name(func)
        probability = _probability(name, args, kwargs)
        self._seed()
        if probability is not None:
            return _zeros_and_ones(name, args[0], probability)
        if name in _SLOPES and len(args) > 4 and args[4]:
            return _sloped(name, *args[:4])
        out = func(*args, **kwargs)
        if name in _FILLS and isinstance(out, Tensor) and out.dim() > 1 and out.numel():
            self._seed()
            out.copy_(_first(out, func, args, kwargs))
        return out

    def _seed(self) -> None:
        """Seed the generators by the number of the draw."""
        torch.default_generator.manual_seed(_SEED + self.count)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(_SEED + self.count)


def _one_each(x: Tensor) -> tuple[int, ...]:
    """Return the shape of one number for each sample, which fits a tensor."""
    return (x.shape[0], *[1] * (x.dim() - 1)) if x.dim() else ()


def _zeros_and_ones(name: str, x: Tensor, probability: Tensor | float) -> Any:
    """Return zeros and ones, or what dropout makes of them, from a number for each sample."""
    drawn = torch.rand(_one_each(x)).to(x.device)
    if name == "aten::native_dropout":
        kept = (drawn >= probability).expand(x.shape)
        return x * kept / max(1 - float(probability), 1e-12), kept.clone()
    ones = (drawn < probability).to(x.dtype).expand(x.shape)
    return x.copy_(ones) if name == "aten::bernoulli_" else ones.clone()


def _sloped(name: str, x: Tensor, noise: Tensor, lower: float, upper: float) -> Tensor:
    """Return what a leaky activation makes of x by a slope for each sample, and note the slopes as torch does."""
    slope = lower + (upper - lower) * torch.rand(_one_each(x)).to(x)
    noise.copy_(torch.where(x > 0, 1.0, slope))
    return x.mul_(noise) if name == "aten::rrelu_with_noise_" else x * noise


def _probability(name: str, args: Any, kwargs: Any) -> Tensor | float | None:
    """Return the probability of an operation that draws zeros and ones, or None for another one."""
    if name == "aten::bernoulli":
        return args[1] if len(args) > 1 and args[1] is not None else kwargs.get("p", args[0])
    if name == "aten::bernoulli_":
        return args[1] if len(args) > 1 else kwargs.get("p", 0.5)
    if name == "aten::native_dropout" and (len(args) < 3 or args[2] is not False):
        return args[1]
    return None


def _first(out: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Return the like of a draw with a single entry for each sample, whatever the widths of its other axes."""
    shape = _one_each(out)
    narrow = torch.empty(shape, dtype=out.dtype, device=out.device)
    if args and isinstance(args[0], Tensor):
        found = func(narrow, *args[1:], **kwargs)
    else:
        size = next(i for i, a in enumerate(args) if isinstance(a, list | tuple))
        found = func(*args[:size], list(shape), *args[size + 1 :], **kwargs)
    assert isinstance(found, Tensor)
    return found
