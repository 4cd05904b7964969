"""Batches of data as people have them: reads them, splits them, and runs a model on one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset

from plasticnet.errors import PlasticError, first_line
from plasticnet.tools.gradients import wants_gradients
from plasticnet.tools.snapshot import left_as_it_was

Forward = Callable[[Any, Any], Any]  # runs a model on a batch and returns its output
LABELS = ("labels", "label")  # keys of a batch that are no inputs where nothing is learned from them
_PARTS = 5  # one of so many parts is held out
_FORWARD = "forward=lambda model, batch: ... runs the model on anything else"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Inputs that were read once, so that every pass sees the same ones.

    Attributes:
        fitted: The batches to estimate from.
        held_out: The batches to judge by, a fifth of the inputs.
        inputs: The number of inputs in both.
        first: The first batch, whole.
    """

    fitted: list[Any]
    held_out: list[Any]
    inputs: int
    first: Any


def calibration(batches: Iterable[Any] | Calibration, most: int) -> Calibration:
    """Read inputs, and hold a fifth of them out.

    Every fifth batch is held out. Where there are fewer than five, their rows are split, if all their tensors have the
    same length; else the last batch is held out.

    Args:
        batches: The batches, which can be read again and again, or what was read of them before.
        most: The number of inputs at which reading stops; the last batch is shortened if its rows can be split.

    Raises:
        PlasticError: The batches are a one-shot iterator, there are none, one of them is empty, or there is a single
            one that cannot be split.
    """
    if isinstance(batches, Calibration):
        return batches
    check_batches(batches)
    read, inputs, first = list[Any](), 0, None
    for batch in batches:
        first = batch if first is None else first
        n = rows_of(batch, len(read) + 1)
        if inputs + n > most and (n := splittable(batch) or 0):
            n = most - inputs
            batch = some_rows(batch, slice(0, n))
        read.append(batch)
        inputs += n or rows(batch)
        if inputs >= most:
            break
    if not read:
        raise PlasticError("there are no batches to read")
    if len(read) < _PARTS and all((splittable(b) or 0) >= _PARTS for b in read):
        held = [some_rows(b, slice(_PARTS - 1, None, _PARTS)) for b in read]
        return Calibration([some_rows(b, _but_every(_PARTS, rows(b))) for b in read], held, inputs, first)
    if len(read) < 2:
        raise PlasticError(
            "a fifth of the inputs is held out, so give two batches or more. A single batch will do if it has five "
            f"inputs or more and all its tensors have one row for each input; this one is {_shown(read[0])}"
            f"{_if_numpy(read)}"
        )
    step = min(_PARTS, len(read))
    return Calibration([b for i, b in enumerate(read) if (i + 1) % step], read[step - 1 :: step], inputs, first)


def check_batches(batches: Any) -> None:
    """Raise `PlasticError` unless the batches can be read again and again."""
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise PlasticError(
            f"batches={type(batches).__name__} gives one sample after the other; a DataLoader makes batches of them: "
            "torch.utils.data.DataLoader(dataset, batch_size=64)"
        )
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise PlasticError(
            f"batches are a list of batches, a DataLoader or the like, not a {type(batches).__name__}; a single batch "
            "goes into a list: [batch]"
        )
    if isinstance(batches, tuple | list) and len(batches) == 2 and all(isinstance(t, Tensor) for t in batches):
        x, y = batches
        if len(x.shape) and x.shape[:1] == y.shape[:1] and x.dim() != y.dim():
            raise PlasticError(
                f"batches are {_shown(batches)}, which look like all inputs and their labels; a single batch goes into "
                "a list: [(x, y)], and list(zip(x.split(64), y.split(64))) makes several"
            )
    if iter(batches) is batches:
        raise PlasticError(
            f"batches={type(batches).__name__} is an iterator, which can be read only once; give a list or a DataLoader"
        )


def length_of(batches: Iterable[Any]) -> int | None:
    """Return the number of batches, or None where that is not known, as for a DataLoader of an `IterableDataset`."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except TypeError:  # which such a DataLoader raises, although it has the method
        return None


def run_batch(model: nn.Module, batch: Any, forward: Forward | None = None, *, drop: tuple[str, ...] = LABELS) -> Any:
    """Run a model on a batch and return its output.

    Args:
        model: The model.
        batch: A tensor; a tuple or list whose first element is the input, which is itself a tuple of arguments or a
            mapping where the model takes several; or a mapping, of which the keys that forward names are passed. Its
            tensors move to the device and the floating dtype of the model.
        forward: What runs the model on the batch instead, where that does not fit.
        drop: Keys of a mapping that are not passed.

    Raises:
        PlasticError: The batch has none of these forms, or the model rejects it.
    """
    if forward is not None:
        return _run(model, batch, forward, drop)
    try:
        return _run(model, batch, None, drop)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError) or wants_gradients(error):
            raise
        raise PlasticError(
            f"{type(model).__name__} does not run on a batch, {_shown(batch)}: {first_line(error)}. Batches may differ "
            f"in their form only as the model allows it; {_FORWARD}"
        ) from error


def _run(model: nn.Module, batch: Any, forward: Forward | None, drop: tuple[str, ...] = LABELS) -> Any:
    """Return the output of a model on a batch, as `run_batch` does, and pass on what the model raises."""
    batch = like_model(model, batch)
    if forward is not None:
        return forward(model, batch)
    given = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(given, Mapping):
        return model(**_named(model, given, drop))
    if isinstance(given, tuple | list):
        return model(*given)
    if isinstance(given, Tensor):
        return model(given)
    raise PlasticError(
        f"a batch is a tensor, a tuple whose first element is the input, or a mapping, not a {type(given).__name__}"
        f"{_if_numpy(given)}; {_FORWARD}"
    )


def arguments_of(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Return what a model is called with for a batch, as `PlasticNet` takes it: a tuple, or a dict by keyword.

    Args:
        model: The model. It is left as it was.
        batch: The batch.
        forward: What runs the model on the batch, where its form does not fit.

    Raises:
        PlasticError: The batch has no form that is known, or the model does not run on it, or is not called.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        with left_as_it_was(model, training=False):
            _run(model, batch, forward)
    finally:
        handle.remove()
    if not calls:
        raise PlasticError("forward=... has not called the model that it was given")
    args, kwargs = calls[0]
    return {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs} if kwargs else args


def first_arguments(model: nn.Module, batch: Any, forward: Forward | None) -> Any:
    """Return what a model is called with for a few rows of the first batch, and explain why it rejects them.

    Args:
        model: The model. It is left as it was.
        batch: The batch.
        forward: What runs the model on the batch, where its form does not fit. Its own errors are passed on.

    Raises:
        PlasticError: What should be a batch is a single sample, or the model does not run on it.
    """
    few = some_rows(batch, slice(0, 2)) if splittable(batch) else batch
    if forward is not None:
        return arguments_of(model, few, forward)
    if isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[0], Tensor) and _is_number(batch[1]):
        raise PlasticError(
            f"the first batch is {_shown(batch)}, which looks like one sample with its label; a DataLoader makes "
            "batches of samples: torch.utils.data.DataLoader(samples, batch_size=64)"
        )
    try:
        return arguments_of(model, few, None)
    except PlasticError:
        raise
    except Exception as error:  # a model can raise anything
        given = few[0] if isinstance(few, tuple | list) and few else few
        whole = any(isinstance(t, Tensor) and not t.is_floating_point() for t in tree_leaves(given))
        raise PlasticError(
            f"{type(model).__name__} does not run on the first batch, {_shown(batch)}: {first_line(error)}. Of a "
            "tuple or list the first element is the input, and several inputs are a tuple in it, as in ((a, b), labels)"
            f"{'; whole numbers are passed as they are, so make those of images floating before' if whole else ''}; "
            f"{_FORWARD}"
        ) from error


def _is_number(value: Any) -> bool:
    """Return whether a value is one number, as the label of a single sample."""
    return type(value) in (int, float) or (isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0)


def _shown(batch: Any) -> str:
    """Return a batch in a few words: the dtypes and shapes of its tensors, in its containers."""
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{k!r}: {_shown(v)}" for k, v in batch.items()) + "}"
    if isinstance(batch, tuple | list):
        return "(" + ", ".join(map(_shown, batch[:4])) + (", ...)" if len(batch) > 4 else ")")
    if isinstance(batch, np.ndarray):
        return f"an array of numpy, {batch.dtype}{list(batch.shape)}"
    return type(batch).__name__


def _if_numpy(batch: Any) -> str:
    """Return the way out for arrays of numpy, where there are some in a batch."""
    arrays = any(isinstance(value, np.ndarray) for value in tree_leaves(batch))
    return ", and torch.from_numpy makes a tensor of an array" if arrays else ""


def _named(model: nn.Module, given: Mapping[str, Any], drop: tuple[str, ...]) -> dict[str, Any]:
    """Return the entries of a mapping that the forward of a model names."""
    parameters = inspect.signature(model.forward).parameters.values()
    everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}
    found = {k: v for k, v in given.items() if k not in drop and (everything or k in names)}
    if not found:
        raise PlasticError(
            f"forward takes {sorted(names)}, and the batch has only {sorted(given)}; name the keys so, or say it: "
            f"{_FORWARD}"
        )
    return found


def like_model(model: nn.Module, batch: Any) -> Any:
    """Return a batch on the device of a model, with its floating tensors in the dtype of the model's parameters."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if like is None:
        return batch

    def moved(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if t.is_inference() and not torch.is_inference_mode_enabled():
            t = t.clone()  # which gradients can flow beside
        return t.to(like.device, like.dtype) if t.is_floating_point() else t.to(like.device)

    return tree_map(moved, batch)


def rows(batch: Any) -> int:
    """Return how many inputs a batch has: the length of its first tensor, or 1 where there is none."""
    return next((len(t) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.dim()), 1)


def rows_of(batch: Any, place: int) -> int:
    """Return how many inputs a batch has, as `rows` does. Raises `PlasticError` where there are none.

    Args:
        batch: The batch.
        place: Which batch it is, counted from 1, for the message.
    """
    n = rows(batch)
    if not n:
        raise PlasticError(f"batch {place} is empty: {_shown(batch)}; leave out batches without inputs")
    return n


def splittable(batch: Any) -> int | None:
    """Return how many rows a batch can be split into, or None where its tensors do not all have one for each input."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, Tensor)]
    lengths = {len(t) if t.dim() else None for t in tensors}
    plain = all(isinstance(t, Tensor | int | float | str | bool | None) for t in tree_leaves(batch))
    return lengths.pop() if plain and len(lengths) == 1 else None


def some_rows(batch: Any, which: slice | Tensor) -> Any:
    """Return some of the rows of a batch that can be split."""
    return tree_map(lambda t: t[which] if isinstance(t, Tensor) else t, batch)


def _but_every(step: int, n: int) -> Tensor:
    """Return all indices up to a number but every n-th one."""
    index = torch.arange(n)
    return index[(index + 1) % step != 0]
