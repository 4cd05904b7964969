"""The same model through torch-pruning: whether what is left computes what masking computes, and in what time.

What was done, so that it can be judged:

- ``BasePruner`` with a ratio of 0.3 in every layer and random importance: which units go does not matter
  here, and magnitudes of random weights would mean nothing either.
- Layers that make the output (as many features or channels as an output has) are ignored, as its
  examples ask for.
- Attention with separate or packed projections is announced in ``num_heads``, and whole heads are pruned
  (``prune_num_heads``, ``head_pruning_ratio=0.3``, no ``prune_head_dims``: that would change the scale of
  the products, and break rotary embeddings). Afterwards the modules' numbers of heads are brought up to date,
  as its examples do by hand. With torch's own MultiheadAttention widths are rounded to the number of heads
  (``round_to``), as its examples do.
- Before the step every parameter is replaced by the numbers of its entries, afterwards by the
  values that these numbers stand for. So it is known which entries were removed, whatever the library did.
- The reference is the unpruned model with all removed entries set to zero: rows, columns, biases,
  scales and shifts. Both run in evaluation mode and double precision, on the same random parameters. "exact"
  means a largest relative error of 1e-6 at most. Where a LayerNorm's width is pruned the two differ by
  nature, because its mean and variance are then taken over fewer entries: this library freezes such widths.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from zoo_measure import build, double, first_line, randomise, run

from plasticnet.tools.difference import relative_difference

RATIO = 0.3
TOLERANCE = 1e-6
_PROJECTIONS = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("qkv",),
    ("query_key_value",),
)
_HEADS = ("num_attention_heads", "num_heads", "n_heads")


def compare(name: str, seed: int, report: Callable[[dict[str, Any]], None]) -> None:
    """Prune one model and report the verdict, the seconds and the share of the parameters that is left."""
    import torch_pruning

    _, model, inputs = build(name, seed)
    model, inputs = model.double().eval(), double(inputs)
    randomise(model)
    with torch.no_grad():
        whole = run(model, inputs)
    pruned = copy.deepcopy(model)
    start = time.perf_counter()
    row: dict[str, Any] = {}
    try:
        heads = dict(_attention(pruned))
        options: dict[str, Any] = {"num_heads": heads, "in_channel_groups": {}, "out_channel_groups": {}}
        if heads:
            options |= {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": RATIO}
        for module in pruned.modules():
            if isinstance(module, nn.MultiheadAttention):
                options["round_to"] = module.num_heads
        pruner = torch_pruning.pruner.BasePruner(
            pruned,
            inputs,
            importance=torch_pruning.importance.RandomImportance(),
            pruning_ratio=RATIO,
            ignored_layers=_output_layers(pruned, whole),
            **options,
        )
        _number(pruned)
        pruner.step()
        _update_heads(pruned, pruner.num_heads)
        row["seconds"] = time.perf_counter() - start
        report(row)
        masked = _restore(pruned, model)
        with torch.no_grad():
            expected, found = run(masked, inputs), run(pruned, inputs)
    except Exception as error:
        report({**row, "status": f"crash: {first_line(error)}"})
        return
    row["left"] = sum(p.numel() for p in pruned.parameters()) / sum(p.numel() for p in model.parameters())
    row["error"] = relative_difference(expected, found)
    if row["left"] == 1:
        row["status"] = "nothing pruned"
    else:
        row["status"] = "exact" if row["error"] <= TOLERANCE else f"inexact ({row['error']:.1%})"
    report(row)


def _attention(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The projections of every attention with the number of their heads."""
    for module in model.modules():
        for names in _PROJECTIONS:
            found = [getattr(module, n, None) for n in names]
            heads = _heads(module)
            if heads is None or not all(isinstance(p, nn.Linear) for p in found):
                continue
            groups = getattr(module, "num_key_value_groups", 1)
            for n, projection in zip(names, found, strict=True):
                yield projection, heads // groups if groups > 1 and n[0] in "kv" else heads


def _heads(module: nn.Module) -> int | None:
    config = getattr(module, "config", None)
    for holder in (module, config):
        for name in _HEADS:
            if isinstance(heads := getattr(holder, name, None), int):
                return heads
    return None


def _update_heads(model: nn.Module, heads: dict[nn.Module, int]) -> None:
    """What the library's examples do by hand: integers that repeat a width or a number of heads follow."""
    for module in model.modules():
        for names in _PROJECTIONS:
            first = getattr(module, names[0], None)
            if first not in heads:
                continue
            width = first.out_features // (3 if len(names) == 1 else 1)
            for name in _HEADS:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, heads[first])
            for name in ("all_head_size", "attn_dim", "inner_dim", "embed_dim", "dim", "hidden_size"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, width)
            if hasattr(module, "num_key_value_groups"):
                module.num_key_value_groups = heads[first] // heads[getattr(module, names[1])]
        if isinstance(module, torchvision.models.VisionTransformer):
            module.hidden_dim = module.conv_proj.out_channels
        if isinstance(module, nn.Transformer):
            module.d_model = next(m for m in module.modules() if isinstance(m, nn.MultiheadAttention)).embed_dim


def _output_layers(model: nn.Module, outputs: list[Tensor]) -> list[nn.Module]:
    """Layers with as many features, or channels, as an output has (SqueezeNet ends in a convolution)."""
    features, channels = {o.shape[-1] for o in outputs if o.dim()}, {o.shape[1] for o in outputs if o.dim() > 2}
    return [
        m
        for m in model.modules()
        if (isinstance(m, nn.Linear) and m.out_features in features)
        or (isinstance(m, nn.modules.conv._ConvNd) and m.out_channels in channels | features)
    ]


def _floating(model: nn.Module) -> dict[str, Tensor]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {n: t for n, t in tensors if t.is_floating_point()}


def _number(model: nn.Module) -> None:
    """Replace every entry of every tensor by its number."""
    for t in _floating(model).values():
        t.data = torch.arange(t.numel(), dtype=t.dtype).reshape(t.shape)


def _restore(pruned: nn.Module, model: nn.Module) -> nn.Module:
    """Put the values back into the pruned model; return the whole one with zeros where entries were removed."""
    masked = copy.deepcopy(model)
    left, whole = _floating(pruned), _floating(masked)
    parameters = dict(masked.named_parameters())
    for name, numbers in left.items():
        kept = numbers.data.long().reshape(-1)
        numbers.data = _values(model, name).reshape(-1)[kept].reshape(numbers.shape).clone()
        if name in parameters:
            gone = torch.ones(whole[name].numel(), dtype=torch.bool)
            gone[kept] = False
            whole[name].data.view(-1)[gone] = 0
    return masked


def _values(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf).data
