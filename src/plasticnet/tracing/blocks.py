"""Finds blocks, which are modules that can be skipped as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.layers.skip import Skip
from plasticnet.tools.copying import deep_copy
from plasticnet.tools.gradients import without_gradients
from plasticnet.tools.inputs import Call
from plasticnet.tools.snapshot import duplicate
from plasticnet.tools.torch_private import is_scripted
from plasticnet.units import SCRIPTED, BlockUnits


def find_blocks(model: nn.Module, patterns: Sequence[str], calls: Sequence[Call]) -> tuple[list[str], dict[str, str]]:
    """Find the blocks whose names match.

    Args:
        model: The model, of which a copy is run.
        patterns: Name patterns of blocks.
        calls: The calls in evaluation mode, of which the first one must succeed.

    Returns:
        The names of the blocks; and for every other module that matches, the reason why it cannot be skipped.

    Raises:
        PlasticError: A pattern matches no module.
    """
    names = [
        n
        for n, m in model.named_modules()
        if n and not isinstance(m, Skip) and any(fnmatchcase(n, p) for p in patterns)
    ]
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern) for n in names):
            known = ", ".join(n for n, m in model.named_modules() if n and next(m.children(), None) is not None)
            raise PlasticError(f"blocks={pattern!r} matches no module; those with parts are: {known or 'none'}")
    if not names:
        return [], {}
    noted: dict[str, list[str]] = {n: [] for n in names}
    for i, call in enumerate(calls):
        noted = {n: max(noted[n], found, key=_told) for n, found in _noted(model, names, call, i > 0).items()}
    places = [(id(p), n) for n, p in model.named_parameters(remove_duplicate=False)]
    frozen: dict[str, str] = {}
    for name in names:
        own = {p for p, n in places if n.startswith(f"{name}.")}
        shared = next((n for p, n in places if p in own and not n.startswith(f"{name}.")), None)
        reasons = noted[name] or ["a block that was never called"]
        if any(name.startswith(f"{other}.") for other in names):
            reasons = ["a block within a block"]
        elif shared is not None:
            reasons = [f"it shares a parameter with {shared}, outside of it"]
        reason = next((r for r in reasons if r), None if len(reasons) == 1 else "a block that is called several times")
        if reason is not None:
            frozen[name] = reason
    return [name for name in names if name not in frozen], frozen


def block_sites(names: Sequence[str], ends: Mapping[str, tuple[str, ...] | None]) -> dict[str, BlockUnits]:
    """Return a site for each module that holds blocks, such as ``layer1.depth`` for ``layer1.0`` and ``layer1.1``.

    Args:
        names: The names of the blocks.
        ends: For each block what `branch_ends` returns of it.
    """
    held: dict[str, list[str]] = {}
    for name in names:
        held.setdefault(f"{name.rpartition('.')[0]}.depth".lstrip("."), []).append(name)
    return {
        n: BlockUnits(n, len(b), [], blocks=tuple(b), ends=tuple(ends[block] for block in b), growable=False)
        for n, b in held.items()
    }


def _noted(model: nn.Module, names: Sequence[str], call: Call, fallible: bool) -> dict[str, list[str]]:
    """Return what `_note` notes of modules in one run; if the run may fail, what it notes until then."""
    noted: dict[str, list[str]] = {n: [] for n in names}
    twin = duplicate(model).eval()
    for name in names:
        if is_scripted(twin.get_submodule(name)):
            noted[name].append(SCRIPTED)
        else:
            twin.get_submodule(name).register_forward_hook(_note(noted[name]), with_kwargs=True)
    with without_gradients(), suppress(*[Exception] if fallible else []):
        args, kwargs = deep_copy((call.args, call.kwargs))
        twin(*args, **kwargs)
    return noted


def _told(reasons: list[str]) -> tuple[bool, int]:
    """Return how much a run says against a block: whether it names a reason, and how often the block was called."""
    return any(reasons), len(reasons)


def _note(reasons: list[str]) -> Any:
    """Return a forward hook that notes for each call why the module is no block, or "" where it is one."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(out, Tensor) or not isinstance(first, Tensor):
            reasons.append(f"a block returns a tensor like its first input, not a {type(out).__name__}")
        elif out.shape != first.shape or out.dtype != first.dtype:
            reasons.append(f"its output has shape {tuple(out.shape)}, its first input {tuple(first.shape)}")
        else:
            reasons.append("")

    return hook
