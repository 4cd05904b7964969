"""Describes a compact module for whoever finds its folder: as plain data, and as a model card in Markdown.

The format of a card is that of the Hugging Face Hub: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from plasticnet.errors import PlasticError
from plasticnet.layers.take import Take
from plasticnet.measuring.profiling import profile
from plasticnet.version import __version__

LIBRARY = "plasticnet"
_BEGIN, _END = "<!-- plasticnet: begin -->", "<!-- plasticnet: end -->"  # between them lies what is written anew
_OUTPUTS = ("out_features", "out_channels", "hidden_size", "num_embeddings")  # the widths that a table shows


def describe(module: nn.Module, factory: Callable[[], nn.Module] | None, example: Any) -> dict[str, Any]:
    """Return what is known of a compact module, as plain data.

    Args:
        module: The compact module.
        factory: What builds the original architecture. Without it, nothing is said of the time before the cut.
        example: Example inputs, on which the module runs once so that its multiply-adds are known; or None.

    Returns:
        A dict with the keys ``library_name``, ``plasticnet_version``, ``factory`` (``"package:name"`` or None),
        ``after`` and ``before`` (the parameters, and the MACs for one sample; None where they are not known), and
        ``widths`` (the layers whose width has changed, with the widths before and after; 0 for a layer that is gone).

    Raises:
        PlasticError: The factory does not build a module, or a module does not run on the example inputs.
    """
    data: dict[str, Any] = {
        "library_name": LIBRARY,
        "plasticnet_version": __version__,
        "factory": None if factory is None else _importable(factory),
        "after": _size(module, example),
        "before": None,
        "widths": {},
    }
    if factory is not None:
        with torch.random.fork_rng(devices=[]):  # the weights of the original are of no interest
            original = factory()
        if not isinstance(original, nn.Module):
            raise PlasticError(f"the factory returned a {type(original).__name__}, not an nn.Module")
        before, after = _widths(original.eval()), _widths(module)
        changed = {name: [width, after.get(name, 0)] for name, width in before.items() if after.get(name, 0) != width}
        data.update(before=_size(original, example), widths=changed)
    return data


def model_card(data: dict[str, Any], name: str, license: str | None, tags: Sequence[str], old: str | None) -> str:
    """Return the text of a model card.

    Args:
        data: What `describe` returned.
        name: The repository or the folder, as `from_pretrained` takes it.
        license: The identifier of a licence, such as ``"apache-2.0"``.
        tags: More tags than those that the card has in any case.
        old: The card that is there already. Only what lies between the two marks of this library is replaced in it; a
            card without them is returned as it is.
    """
    body = "\n".join([_BEGIN, *_table(data), "", "Load it with plasticnet:", "",
                      "```python", *_lines(data, name), "```", _END])  # fmt: skip
    if old is not None:
        head, begun, rest = old.partition(_BEGIN)
        _, ended, tail = rest.partition(_END)
        return head + body + tail if begun and ended else old
    fields = [f"library_name: {LIBRARY}"]
    if license is not None:
        fields.append(f"license: {json.dumps(license)}")
    fields += ["tags:", *(f"- {json.dumps(t)}" for t in dict.fromkeys([LIBRARY, "pruning", "safetensors", *tags]))]
    title = f"# {_cell(name.rstrip('/').rpartition('/')[2] or name)}"
    about = "A compact PyTorch network, whose widths were learned. The weights come with a recipe for the shape, and no"
    return "\n".join(["---", *fields, "---", "", title, "", f"{about} pickle is involved.", "", body, ""])


def _importable(factory: Callable[[], nn.Module]) -> str | None:
    """Return ``package:name`` of a factory that can be imported by these, and None for any other."""
    package, name = getattr(factory, "__module__", None), getattr(factory, "__qualname__", "")
    return f"{package}:{name}" if package not in (None, "__main__", "builtins") and name.isidentifier() else None


def _size(module: nn.Module, example: Any) -> dict[str, int | None]:
    """Return the parameters of a module, and its multiply-adds for one sample where example inputs are given."""
    macs = None if example is None else profile(module, example, repeats=1).macs
    return {"parameters": sum(p.numel() for p in module.parameters()), "macs": macs}


def _widths(module: nn.Module) -> dict[str, int]:
    """Return the widths of the layers of a module, by their names in the original architecture."""
    found = dict[str, int]()
    for name, layer in module.named_modules():
        width = next((w for a in _OUTPUTS if type(w := getattr(layer, a, None)) is int), None)
        if width is not None and not list(layer.children()):
            parent, _, leaf = name.rpartition(".")
            # Where features are taken before a layer, the layer lies one step further down.
            taken = leaf == "1" and isinstance(getattr(module.get_submodule(parent), "0", None), Take)
            found[parent if taken else name] = width
    return found


def _table(data: dict[str, Any]) -> list[str]:
    """Return the lines of the table of sizes."""
    before, after = data["before"], data["after"]
    rows = [("", "before", "after")]
    for key, what in (("parameters", "parameters"), ("macs", "multiply-adds for one sample")):
        if after[key] is not None:
            rows.append((what, "" if before is None else f"{before[key]:,}", f"{after[key]:,}"))
    for name, (old, new) in data["widths"].items():
        rows.append((f"width of {_cell(name)}", f"{old:,}", f"{new:,}" if new else "removed"))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---|---:|---:|", *lines[1:]]


def _lines(data: dict[str, Any], name: str) -> list[str]:
    """Return the lines of Python that load the module."""
    package, _, leaf = (data["factory"] or "").partition(":")
    made = f"from {package} import {leaf}" if package else "factory = ...  # what builds the original architecture"
    return ["import plasticnet.hub as pn_hub", made, "",
            f"model = pn_hub.from_pretrained({json.dumps(name)}, {leaf or 'factory'})"]  # fmt: skip


def _cell(text: str) -> str:
    """Return a text so that Markdown shows it as it is, in a table, too."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|~" else " " if c in "\r\n" else c for c in text)
