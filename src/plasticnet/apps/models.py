"""Reference architectures, and how a model and its example inputs are named on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from plasticnet.errors import PlasticError
from plasticnet.tools.inputs import transformer_inputs

IMAGE = (1, 1, 28, 28)  # what LeNet-5 reads, and an MLP unless told otherwise
_KNOWN = "mlp:300-100, lenet5, torchvision:NAME, timm:NAME, transformers:TYPE or PACKAGE:FACTORY"

# A transformer small enough to be tried in a second: whichever of these fields its config has.
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
    """Fully connected with ReLU: ``MLP([784, 300, 100, 10])`` on (batch, ...) flattened."""

    def __init__(self, widths: Sequence[int]) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for n, (a, b) in enumerate(pairwise(widths)):
            layers += [nn.Linear(a, b), nn.ReLU()] if n < len(widths) - 2 else [nn.Linear(a, b)]
        super().__init__(*layers)


class LeNet5(nn.Module):
    """LeNet-5-Caffe, 20-50-500: (batch, 1, 28, 28) to (batch, 10); 800 features behind the flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, 10)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 1, 28, 28) to (batch, 10)."""
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu()).flatten(1)
        return self.fc2(self.fc1(x).relu())


def factory(name: str, shape: Sequence[int], classes: int, *, full: bool = False) -> Callable[[], nn.Module]:
    """A factory for ``mlp:300-100``, ``lenet5``, ``torchvision:NAME``, ``timm:NAME``, ``transformers:TYPE``
    (a model type such as ``bert``: tiny, or with ``full`` of its config's default sizes) or
    ``PACKAGE:FACTORY``. The weights are random.

    ``shape`` is that of one input and ``classes`` the number of outputs (an MLP needs both).
    Raises `PlasticError` when there is no such model or its package is not installed.
    """
    head, _, tail = name.partition(":")
    if name == "lenet5":
        return LeNet5
    if head == "mlp":
        try:
            hidden = [int(w) for w in tail.split("-")]
            if min(hidden) < 1:
                raise ValueError
        except ValueError:
            raise PlasticError(f"model {name!r}: write the hidden widths as in mlp:300-100") from None
        features = 1
        for n in shape:
            features *= n
        return lambda: MLP([features, *hidden, classes])
    if head == "torchvision":
        models = _import("torchvision.models", name)
        return lambda: _call(models.get_model, name, tail, weights=None)
    if head == "timm":
        timm = _import("timm", name)
        return lambda: _call(timm.create_model, name, tail, pretrained=False)
    if head == "transformers":
        library = _import("transformers", name)
        return lambda: _call(_transformer, name, library, tail, full)
    if tail:
        function = getattr(_import(head, name), tail, None)
        if not callable(function):
            raise PlasticError(f"model {name!r}: {head} has no factory {tail!r}")
        return lambda: _call(function, name)
    raise PlasticError(f"unknown model {name!r}: use {_KNOWN}")


def build_model(make: Callable[[], nn.Module], meta: bool) -> nn.Module:
    """The module that a factory makes; with ``meta`` on the meta device, where it takes no memory."""
    if not meta:
        return make()
    try:
        with torch.device("meta"):
            return make().to("meta")
    except PlasticError:  # some constructors read the values that they compute
        return make().to("meta")


def example_inputs(
    name: str, model: nn.Module, shape: Sequence[int] | None = None
) -> tuple[Tensor] | dict[str, Tensor]:
    """What ``model`` can be run on: an image, or the keyword arguments of a transformers model (token
    ids or pixels), of the given ``shape`` (batch first) or of one that suits the model.

    Raises `PlasticError` when no shape is given for a model that does not tell, and when a
    transformers model reads something else.
    """
    found = transformer_inputs(model, shape)
    if found is not None:
        return found
    device = next((t.device for t in (*model.parameters(), *model.buffers())), None)
    return (torch.randn(*(shape or _shape(name, model)), device=device),)


def _shape(name: str, model: nn.Module) -> Sequence[int]:
    head = name.partition(":")[0]
    if name == "lenet5" or head == "mlp":
        return IMAGE
    if head == "timm":
        return (1, *(getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224)))
    if head == "torchvision":
        return (1, 3, 299, 299) if name == "torchvision:inception_v3" else (1, 3, 224, 224)
    raise PlasticError(f"model {name!r}: say the shape of its input, batch first, as in --input 1,3,224,224")


def _transformer(library: Any, kind: str, full: bool) -> nn.Module:
    if kind not in library.CONFIG_MAPPING:
        raise ValueError(f"transformers has no model type {kind!r}")
    config = library.AutoConfig.for_model(kind)
    if config.sub_configs:  # they would keep their own sizes, and read images beside text
        raise ValueError(f"{kind} is made of several models; name one, or write a PACKAGE:FACTORY")
    defaults: Mapping[str, Any] = config.to_dict()
    sizes: dict[str, Any] = {}
    for field, value in () if full else defaults.items():
        if type(value) is int and field in _TINY:
            sizes[field] = _TINY[field]
        elif isinstance(value, list | tuple) and field in _TINY:  # one per stage
            sizes[field] = [_TINY[field]] * len(value)
        elif type(value) is int and field.endswith("_token_id") and value >= _TINY["vocab_size"]:
            sizes[field] = 0
    return library.AutoModel.from_config(library.AutoConfig.for_model(kind, **sizes))


def _import(package: str, name: str) -> Any:
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
    try:
        model = function(*args, **kwargs)
    except Exception as error:  # whatever a constructor of someone else's raises
        raise PlasticError(f"model {name!r}: {(str(error).splitlines() or [repr(error)])[0]}") from error
    if not isinstance(model, nn.Module):
        raise PlasticError(f"model {name!r} is a {type(model).__name__}, not an nn.Module")
    return model
