"""Defines reference architectures, and builds models and example inputs by the names of the command line."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError, first_line
from plasticnet.tools.inputs import transformer_inputs

IMAGE = (1, 1, 28, 28)  # the input of LeNet-5, and of an MLP unless another shape is given
START = 3  # the units of each hidden layer of an MLP that is to choose its widths
_OUTPUTS = 10  # of an MLP and of LeNet-5 unless somebody says
_KNOWN = "mlp, mlp:300-100, lenet5, torchvision:NAME, timm:NAME, transformers:TYPE or PACKAGE:FACTORY"

# The sizes of a transformer that is small enough to be tried in a second. A config has some of these fields.
_TINY = {
    "vocab_size": 96, "max_position_embeddings": 48, "n_positions": 48,
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "num_decoder_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "depths": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8,
    "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "hidden_dim": 64, "ffn_hidden_size": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "hidden_sizes": 32,
    "image_size": 64, "patch_size": 4, "window_size": 2, "embed_dim": 16,
}  # fmt: skip


class MLP(nn.Sequential):
    """A fully connected network with ReLU between its layers: (batch, ...) is flattened to (batch, features).

    Args:
        widths: The numbers of features, from the input to the output: ``[784, 300, 100, 10]``.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for n, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Linear(a, b), nn.ReLU()] if n < len(widths) - 2 else [nn.Linear(a, b)]
        super().__init__(*layers)


class LeNet5(nn.Module):
    """LeNet-5-Caffe with 20-50-500 units: (batch, 1, 28, 28) to (batch, outputs).

    Args:
        outputs: The number of outputs.
    """

    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, outputs)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Map images, shape (batch, 1, 28, 28), to logits, shape (batch, outputs)."""
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu()).flatten(1)
        return self.fc2(self.fc1(x).relu())


def chooses(name: str) -> bool:
    """Return whether a model of this name has no widths of its own, and is to choose them."""
    return name == "mlp"


def takes_classes(name: str) -> bool:
    """Return whether what builds a model that is not ours takes the number of its outputs, as ``num_classes=``."""
    head, _, tail = name.partition(":")
    if head in ("torchvision", "timm"):
        return True
    if head in ("mlp", "lenet5", "transformers") or not tail:
        return False
    try:
        return "num_classes" in inspect.signature(getattr(_import(head, name), tail)).parameters
    except (AttributeError, TypeError, ValueError):
        return False


def factory(name: str, shape: Sequence[int], classes: int | None, *, full: bool = False) -> Callable[[], nn.Module]:
    """Return a factory for the model of a name. The weights of what it builds are random.

    Args:
        name: ``mlp`` (with two hidden layers of 3 units, from which it can grow), ``mlp:300-100`` (with the hidden
            widths), ``lenet5``, ``torchvision:NAME``, ``timm:NAME``, ``transformers:TYPE`` (with a model type such as
            ``bert``), or ``PACKAGE:FACTORY`` (with a function that takes no arguments, or only ``num_classes=``).
        shape: The shape of one input, which an MLP needs.
        classes: The number of outputs. Models of torchvision and timm, and a factory that takes it, get it as
            ``num_classes=``. With None they keep their own number, and an MLP has 10.
        full: Whether a transformers model has the default sizes of its config, and not tiny ones.

    Raises:
        PlasticError: There is no such model, or its package is not installed, or it does not read such inputs. Some of
            this is noticed only when the factory is called.
    """
    head, _, tail = name.partition(":")
    outputs = _OUTPUTS if classes is None else classes
    given = {"num_classes": classes} if classes is not None and takes_classes(name) else {}
    if name == "lenet5":
        if shape and tuple(shape) != IMAGE[1:]:
            raise PlasticError(
                f"lenet5 reads images of the shape {IMAGE[1:]}, and not inputs of the shape {tuple(shape)}: give grey "
                "images and --image-size 28, or another model, such as mlp or torchvision:resnet18"
            )
        return lambda: _call(LeNet5, name, outputs)
    if head == "mlp":
        widths = [math.prod(shape), *_widths(name, tail), outputs]
        return lambda: _call(MLP, name, widths)
    if head == "torchvision":
        models = _import("torchvision.models", name)
        return lambda: _call(models.get_model, name, tail, weights=None, **given)
    if head == "timm":
        timm = _import("timm", name)
        return lambda: _call(timm.create_model, name, tail, pretrained=False, **given)
    if head == "transformers":
        library = _import("transformers", name)
        return lambda: _call(_transformer, name, library, tail, full)
    if tail:
        function = getattr(_import(head, name), tail, None)
        if not callable(function):
            raise PlasticError(f"model {name!r}: {head} has no factory {tail!r}")
        return lambda: _call(function, name, **given)
    raise PlasticError(f"unknown model {name!r}: use {_KNOWN}")


def reads_numbers(name: str) -> bool:
    """Return whether a model of this name reads floating numbers only, so that whole ones are converted for it."""
    return name.partition(":")[0] in ("mlp", "lenet5", "torchvision", "timm")


def _widths(name: str, text: str) -> list[int]:
    """Return the hidden widths of an MLP."""
    if chooses(name):
        return [START, START]
    try:
        hidden = [int(w) for w in text.split("-")]
        if min(hidden) < 1:
            raise ValueError
    except ValueError:
        raise PlasticError(f"model {name!r}: write the hidden widths as in mlp:300-100") from None
    return hidden


def build_model(make: Callable[[], nn.Module], meta: bool) -> nn.Module:
    """Return the module that a factory makes, or the same on the meta device, where it takes no memory."""
    if not meta:
        return make()
    try:
        with torch.device("meta"):
            return make().to("meta")
    except PlasticError:  # some constructors read values that they compute, which the meta device does not have
        return make().to("meta")


def example_inputs(
    name: str, model: nn.Module, shape: Sequence[int] | None = None
) -> tuple[Tensor] | dict[str, Tensor]:
    """Make random inputs on which a model can be run.

    Args:
        name: The name of the model, as `factory` takes it.
        model: The model.
        shape: The shape of the input, batch first; by default one that suits the model.

    Returns:
        A tuple of one tensor; or for a transformers model its keyword arguments, which are token ids or pixels.

    Raises:
        PlasticError: No shape is given, and none is known for this model; or a transformers model reads something other
            than token ids or pixels.
    """
    found = transformer_inputs(model, shape)
    if found is not None:
        return found
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    return (torch.randn(*(shape or _shape(name, model)), device=device),)


def _shape(name: str, model: nn.Module) -> Sequence[int]:
    """Return an input shape that suits a model, batch first. Raises `PlasticError` where none is known."""
    head = name.partition(":")[0]
    if name == "lenet5" or head == "mlp":
        return IMAGE
    if head == "timm":
        return (1, *(getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224)))
    if head == "torchvision":
        return (1, 3, 299, 299) if name == "torchvision:inception_v3" else (1, 3, 224, 224)
    raise PlasticError(f"model {name!r}: say the shape of its input, batch first, as in --input 1,3,224,224")


def _transformer(library: Any, kind: str, full: bool) -> nn.Module:
    """Build a transformers model, tiny or with the default sizes of its config.

    Args:
        library: The module ``transformers``.
        kind: A model type, such as "bert".
        full: Whether the model has the default sizes.

    Raises:
        ValueError: There is no such type, or it is made of several models.
    """
    if kind not in library.CONFIG_MAPPING:
        raise ValueError(f"transformers has no model type {kind!r}")
    config = library.AutoConfig.for_model(kind)
    if config.sub_configs:  # the parts would keep their own sizes, and some read images beside text
        raise ValueError(f"{kind} is made of several models; name one, or write a PACKAGE:FACTORY")
    defaults: Mapping[str, Any] = config.to_dict()
    sizes: dict[str, Any] = {}
    for field, value in () if full else defaults.items():
        if type(value) is int and field in _TINY:
            sizes[field] = _TINY[field]
        elif isinstance(value, list | tuple) and field in _TINY:  # such a field has a value for each stage
            sizes[field] = [_TINY[field]] * len(value)
        elif type(value) is int and field.endswith("_token_id") and value >= _TINY["vocab_size"]:
            sizes[field] = 0
    return library.AutoModel.from_config(library.AutoConfig.for_model(kind, **sizes))


def _import(package: str, name: str) -> Any:
    """Import a package for the model of this name. Raises `PlasticError` where that fails."""
    top = package.partition(".")[0]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        known = top in ("torchvision", "timm", "transformers") and str(error.name).partition(".")[0] == top
        way_out = f": pip install {top}" if known else f": {error}"
        raise PlasticError(f"model {name!r}: cannot import {package}{way_out}") from error
    except (ImportError, ValueError, TypeError) as error:
        raise PlasticError(f"model {name!r}: cannot import {package}: {error}") from error


def _call(function: Any, name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """Call what builds the model of this name. Raises `PlasticError` where that fails or gives no module."""
    try:
        model = function(*args, **kwargs)
    except Exception as error:  # a constructor that is not ours may raise anything
        raise PlasticError(f"model {name!r}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise PlasticError(f"model {name!r} is a {type(model).__name__}, not an nn.Module")
    return model
