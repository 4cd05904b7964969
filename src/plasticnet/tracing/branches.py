"""Freezes what a layer that did not run may read in a branch of the model that no run has taken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from plasticnet.tools.inputs import MORE
from plasticnet.tracing.labels import Ledger
from plasticnet.units import family_of, owner


def freeze_for_other_branches(ledger: Ledger, classes: np.ndarray, unseen: Sequence[str], why: str, when: str) -> None:
    """Freeze everything whose length is that of a dimension of a tensor that no run has used.

    Dimensions that lie within a module do not count: those that a module of the same structure, which has run, shares
    with nothing outside of it, such as the hidden units of an expert in a mixture.

    Args:
        ledger: The labels.
        classes: The class of joined labels, for each label.
        unseen: The names of the parameters and buffers that no run has used.
        why: Why the layer may run elsewhere.
        when: When it may.
    """
    idle = set(unseen)
    origins = list(ledger.origins())
    siblings = {(family_of(t), d, len(labels)): (t, labels) for t, d, labels in origins if t not in idle}
    lengths: dict[int, str] = {}
    for tensor, dim, labels in origins:
        if tensor in idle and len(labels) > 1:
            sibling = siblings.get((family_of(tensor), dim, len(labels)))
            if sibling is None or not _is_inside(_module(sibling[0], tensor), sibling[1], ledger, classes):
                lengths[len(labels)] = owner(tensor) or tensor
    for _, _, labels in origins:
        if len(labels) in lengths:
            what = f"{lengths[len(labels)]} did not run: it may read these units {when}"
            ledger.freeze(labels, f"{why} and {what}; give inputs that reach it, too: {MORE}")


def _module(tensor: str, other: str) -> str:
    """Return the module around a tensor that takes the place of the one around another tensor of its family."""
    parts = list(zip(tensor.split("."), other.split("."), strict=True))
    first = next(i for i, (a, b) in enumerate(parts) if a != b)
    return ".".join(a for a, _ in parts[: first + 1])


def _is_inside(module: str, labels: np.ndarray, ledger: Ledger, classes: np.ndarray) -> bool:
    """Return whether nothing outside of a module has labels that are joined with these, and more than one tensor has.

    A tensor alone tells nothing: its units were read by something that moves no labels, or not at all.
    """
    joined = np.flatnonzero(np.isin(classes, classes[labels]))
    names, starts = zip(*[(tensor, own[0]) for tensor, _, own in ledger.origins() if len(own)], strict=True)
    tensors = {names[i] for i in np.unique(np.searchsorted(starts, joined, side="right") - 1)}
    return len(tensors) > 1 and all(f"{tensor}.".startswith(f"{module}.") for tensor in tensors)
