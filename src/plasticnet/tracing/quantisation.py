"""Has the rules for fake quantisation, which rounds weights and activations while a network trains."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plasticnet.tools.torch_private import schema_name
from plasticnet.tracing.labels import Tag
from plasticnet.tracing.mode import Tracer, rule
from plasticnet.tracing.views import dim_of, tensors_in


@rule("fake_quantize_per_tensor_affine_cachemask", "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
      "fake_quantize_per_channel_affine_cachemask", "_fake_quantize_learnable_per_tensor_affine",
      "_fake_quantize_learnable_per_channel_affine")  # fmt: skip
def _fake_quantized(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Keep the labels of what is rounded; zeros stay zeros. Scales and zero points belong to its channels, if any."""
    per_channel = "per_channel" in schema_name(func)
    _rounded(tracer, args[0], args[1:3], args[3] if per_channel else None, out)


def _rounded(tracer: Tracer, x: Tensor, scales: Any, axis: int | None, out: Any) -> None:
    """Let a result have the labels of what is rounded, and attach scales to the axis that they belong to, if any."""
    tag = tracer.ledger.settle(tracer.tag(x))
    for vector in tensors_in(scales):
        if axis is not None and vector.dim() and len(vector) == x.shape[axis]:
            tracer.attach(tracer.ledger.read(tag, dim_of(axis, x.dim())), vector, "a scale without units")
        else:
            tracer.freeze(vector, "a scale of fake quantisation")
    for o in tensors_in(out):
        if o.shape == x.shape:
            tracer.put(o, Tag(tag.axes, tag.levers, tag.static))


_OBSERVED = "its fake quantisation takes the range of all entries (torch.ao.quantization.disable_observer stops that)"


@rule("_fused_moving_avg_obs_fq_helper", "fused_moving_avg_obs_fake_quant")
def _observed(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Freeze what is rounded to a range that is being observed; where each row has its own, only within the rows."""
    x, observing = args[:2]
    axis = args[10] if len(args) > 11 and args[11] else None
    if observing.is_meta or bool(observing.any()):
        others = [d for d in range(x.dim()) if axis is None or d != dim_of(axis, x.dim())]
        tracer.freeze(x, _OBSERVED, others)
    _rounded(tracer, x, args[1:7], axis, out)


@rule("aminmax")
def _range(tracer: Tracer, func: Any, args: Any, kwargs: Any, out: Any) -> None:
    """Freeze the axes over which the range is taken, as an observer does."""
    x = args[0]
    dims = range(x.dim()) if kwargs.get("dim") is None else [dim_of(kwargs["dim"], x.dim())]
    tag = tracer.ledger.settle(tracer.tag(x))
    tracer.freeze(x, _OBSERVED, dims)
    axes = [() if d in dims else axis for d, axis in enumerate(tag.axes)]
    kept = axes if kwargs.get("keepdim") else [axis for d, axis in enumerate(axes) if d not in dims]
    for o in tensors_in(out):
        tracer.put(o, Tag(tuple(kept), static=tag.static))
