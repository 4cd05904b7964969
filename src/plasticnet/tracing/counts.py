"""Lets attributes follow the units that they count: the channels of norms without tensors, and timm's feature_info."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from plasticnet.tools.feature_info import ATTRIBUTE, described_modules, described_outputs
from plasticnet.tools.torch_private import BatchOrInstanceNorm
from plasticnet.tools.trees import tensors_within
from plasticnet.tracing.facts import Facts
from plasticnet.tracing.labels import Tag, axis_size, has_labels
from plasticnet.units import InputUnits, Trace, Width


class Counting:
    """Notes in the facts, while a model runs, which labels the attributes count.

    Args:
        facts: What the runs of the model find.
        tag: Returns the labels of a tensor.
    """

    def __init__(self, facts: Facts, tag: Callable[[Tensor], Tag]) -> None:
        self.facts, self.tag = facts, tag

    def hooks(self, model: nn.Module) -> list[Any]:
        """Register hooks on norms without tensors and on what a ``feature_info`` describes, and return the handles."""
        handles: list[Any] = []
        for name, module in model.named_modules():
            if isinstance(module, BatchOrInstanceNorm | nn.GroupNorm) and not module.state_dict():
                handles.append(module.register_forward_pre_hook(partial(self._norm, name)))
        for holder, place, name, width in described_modules(model):
            hook = partial(self._described, (holder, ATTRIBUTE, place), width)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        return handles

    def note_outputs(self, model: nn.Module, out: Any) -> None:
        """Note which channels of the model's outputs its ``feature_info`` describes."""
        for place, tensor, width in described_outputs(model, out):
            self._note(("", ATTRIBUTE, place), width, tensor)

    def _norm(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note which channels a norm counts by an attribute, where it has no tensor whose shape says so."""
        attribute = "num_channels" if isinstance(module, nn.GroupNorm) else "num_features"
        count = getattr(module, attribute, None)
        if args and isinstance(x := args[0], Tensor):
            axis = next((a for a in (1, 0) if x.dim() > a and x.shape[a] == count), None)  # 0 without a batch
            if axis is not None:
                self.facts.counted[name, attribute, None] = self.facts.ledger.read(self.tag(x), axis)

    def _described(self, key: tuple[str, str, int], width: int, _: nn.Module, __: tuple[Any, ...], out: Any) -> None:
        """Note which channels of a module's output a ``feature_info`` describes."""
        for tensor in tensors_within(out)[:1]:
            self._note(key, width, tensor)

    def _note(self, key: tuple[str, str, int], width: int, tensor: Tensor) -> None:
        """Note which channels of a tensor a ``feature_info`` describes.

        Labels that were split and do not lie on an axis of their own are left alone, because reading them would decide
        what they mean.
        """
        axes = self.tag(tensor).axes
        if not any(f.is_split for axis in axes for f in axis):
            places = [i for i, a in enumerate(axes) if i and has_labels(a) and axis_size(a) == width]
            if places:
                self.facts.counted[key] = self.facts.ledger.read(self.tag(tensor), places[0])


def attach_counts(facts: Facts, trace: Trace) -> None:
    """Give each site the attributes that count its units.

    Args:
        facts: What the runs of the model have found.
        trace: The trace, whose sites are complete otherwise.
    """
    length = {(tensor, dim): len(labels) for tensor, dim, labels in facts.ledger.origins()}
    for u in trace.sites.values():
        if isinstance(u, InputUnits) or not facts.counted:
            continue
        slices = [facts.ledger.fresh(s.tensor, s.dim, length[s.tensor, s.dim])[s.index] for s in u.slices]
        labels = np.concatenate(slices, 1)
        for (module, attribute, place), counted in facts.counted.items():
            per_unit = _times(labels, counted).sum(1)
            if per_unit[0] and (per_unit == per_unit[0]).all():
                u.widths += (Width(module, attribute, int(per_unit[0]), place),)


def _times(labels: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return how often each label is counted: channels that were joined with themselves count twice."""
    known, times = np.unique(counted, return_counts=True)
    places = np.searchsorted(known, labels).clip(max=len(known) - 1)
    return np.where(known[places] == labels, times[places], 0)
