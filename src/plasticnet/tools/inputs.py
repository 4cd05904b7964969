"""Example inputs: how they are given, copied and made, and what is said when a model rejects them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from plasticnet.errors import PlasticError
from plasticnet.tools.trees import tensors_within

Loss = Callable[[], Tensor]  # runs a network on some data; gives its losses, shape (batch,), or their mean, a scalar
_LARGE = 50_000_000  # parameters
_TOKENS = (2, 8)  # the shape of a batch of token ids


def batch_size(args: Any, kwargs: Any) -> int:
    """The length of the first axis of the first tensor."""
    return next((len(t) for t in tensors_within((args, kwargs)) if t.dim()), 1)


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from a tensor, a tuple of arguments or a mapping of them."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise PlasticError(
        "example_inputs must be a tuple of arguments or a dict of keyword arguments, "
        f"not a {type(example_inputs).__name__}"
    )


@contextmanager
def blaming_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Within this context the model runs for the first time: what it raises speaks of the example inputs."""
    try:
        yield
    except PlasticError:
        raise
    except Exception as error:
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (*args, *kwargs.values())]
        raise PlasticError(
            f"{type(model).__name__} does not run on the example inputs (shapes {shapes}): {error}. "
            "Pass example_inputs that model(*example_inputs) accepts."
        ) from error


def copy_inputs(tree: Any) -> Any:
    """Inputs of their own for a run, so that an in-place first operation leaves the caller's alone."""
    return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, tree)


def is_large(model: nn.Module) -> bool:
    """Whether running a model again and again takes long: then tracing tries to do without computing,
    and the self-check cuts most units first."""
    return sum(p.numel() for p in model.parameters() if not p.is_meta) > _LARGE


def transformer_inputs(model: nn.Module, shape: Sequence[int] | None = None) -> dict[str, Tensor] | None:
    """The keyword arguments on which a transformers model runs, as its config says: random token ids or pixels, of the
    given ``shape`` (batch first) or of one that suits the model. None for other models.

    Raises `PlasticError` when the model reads something else.
    """
    config: Any = getattr(model, "config", None)
    reads = getattr(model, "main_input_name", None)
    if config is None or reads is None:
        return None
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    if reads == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        names = [reads, "decoder_input_ids"] if config.is_encoder_decoder else [reads]
        return {n: torch.randint(vocabulary, tuple(shape or _TOKENS), device=device) for n in names}
    if reads == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, Sequence) else (size, size)
        return {reads: torch.randn(*(shape or (2, getattr(config, "num_channels", 3), height, width)), device=device)}
    raise PlasticError(f"{type(model).__name__} reads {reads}: give PlasticNet its example inputs in Python")
