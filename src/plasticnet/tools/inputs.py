"""Example inputs: reads, copies and makes them, and explains what is wrong when a model rejects them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from plasticnet.errors import PlasticError
from plasticnet.tools.trees import tensors_within

# Such a function runs a network on some data and returns its losses, shape (batch,), or their mean, a scalar.
Loss = Callable[[], Tensor]
Outputs = Callable[[Any], Any]  # such a function returns what is read of the output of a model
_LARGE = 50_000_000  # the number of parameters above which a model is large
_TOKENS = (2, 8)  # the shape of a batch of token ids
MORE = "more_inputs=[...]"  # how messages name the argument for further inputs


@dataclass(frozen=True, eq=False)
class Call:
    """One way to call a model.

    Attributes:
        args: The positional arguments.
        kwargs: The arguments by keyword.
        training: Whether the model is in training mode.
        outputs: What is read of the model's output, or None for all of it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool = False
    outputs: Outputs | None = None

    def read(self, out: Any) -> Any:
        """Return what is read of an output of the model.

        Raises:
            PlasticError: ``outputs`` raises an error, or returns no tensor.
        """
        if self.outputs is None:
            return out
        mode = "training" if self.training else "evaluation"
        try:
            found = self.outputs(out)
        except Exception as error:
            raise PlasticError(
                f"outputs= raises {error!r} on what the model returns in {mode} mode ({described(out)}). It gets "
                'the whole output, in both modes, and returns what is read of it, such as lambda out: out["logits"]'
            ) from error
        if not tensors_within(found):
            raise PlasticError(
                f"outputs= returns {described(found)}, without a tensor, for what the model returns in {mode} mode "
                f"({described(out)}). It returns what is read of the output, as tensors"
            )
        return found


def batch_size(args: Any, kwargs: Any) -> int:
    """Return the length of the first axis of the first tensor, or 1 where there is no such axis."""
    return next((len(t) for t in tensors_within((args, kwargs)) if t.dim()), 1)


def call_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments, from a tensor, a tuple of arguments or a mapping of them.

    Raises:
        PlasticError: The example inputs are something else.
    """
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


def calls_of(example_inputs: Any, more_inputs: Any = (), outputs: Outputs | None = None) -> list[Call]:
    """Return a call in evaluation mode for the example inputs, and one for each further set.

    Args:
        example_inputs: A tensor, a tuple of arguments or a mapping of them.
        more_inputs: A list of further ones.
        outputs: What is read of the model's output, or None for all of it.

    Raises:
        PlasticError: The example inputs or a further set are no arguments, the further sets are no list, or ``outputs``
            is no function.
    """
    if outputs is not None and not callable(outputs):
        raise PlasticError(
            f"outputs={outputs!r} is not a function of the model's output, such as outputs=lambda out: out[0]"
        )
    if not isinstance(more_inputs, list) and not (isinstance(more_inputs, tuple) and not more_inputs):
        raise PlasticError(
            "more_inputs is a list with one entry for each further call, which is a tuple of arguments or a dict of "
            f"keyword arguments: more_inputs=[(x, targets)], not a {type(more_inputs).__name__}"
        )
    return [Call(*call_arguments(entry), outputs=outputs) for entry in (example_inputs, *more_inputs)]


def described(value: Any) -> str:
    """Return what a value is, in a few words: its class, and its keys, its length or its shape."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{kind} with the keys {', '.join(map(repr, value))}"
    return f"{kind} of length {len(value)}" if isinstance(value, tuple | list) else kind


@contextmanager
def blaming_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], which: str = "the example inputs"
) -> Iterator[None]:
    """Explain errors in this context, in which a model runs for the first time, by the example inputs.

    Args:
        model: The model.
        args: The positional arguments.
        kwargs: The arguments by keyword.
        which: Which inputs these are, for the message.

    Raises:
        PlasticError: The model has raised an exception; the message has the shapes of the inputs.
    """
    try:
        yield
    except PlasticError:
        raise
    except Exception as error:
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (*args, *kwargs.values())]
        raise PlasticError(
            f"{type(model).__name__} does not run on {which} (shapes {shapes}): {error}. "
            "Pass example_inputs that model(*example_inputs) accepts."
        ) from error


def copy_inputs(tree: Any) -> Any:
    """Return inputs with copies of their tensors, which a model may change without changing the caller's."""
    return tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, tree)


def is_large(model: nn.Module) -> bool:
    """Return whether running a model again and again would take long.

    Tracing then tries not to compute, and the self-check cuts most units first. Parameters on the meta device do not
    count.
    """
    return sum(p.numel() for p in model.parameters() if not p.is_meta) > _LARGE


def transformer_inputs(model: nn.Module, shape: Sequence[int] | None = None) -> dict[str, Tensor] | None:
    """Return keyword arguments on which a model from the transformers library runs, according to its config.

    Args:
        model: The model.
        shape: The shape of the inputs, with the batch first; by default one that suits the model.

    Returns:
        Random token ids or pixels, by the name of the argument, or None for a model that is not from transformers.

    Raises:
        PlasticError: The model reads something else than token ids or pixels.
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
