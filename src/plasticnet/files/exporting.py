"""Hand-over: a plain module as an ONNX file or a torch.export program, compared with the module."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet
from plasticnet.tools.difference import relative_difference
from plasticnet.tools.inputs import call_arguments, copy_inputs

_TOLERANCE, _COARSE = 1e-4, 1e-2  # relative; _COARSE for half precision
ONE_FILE = 2**31 - 2**20  # bytes of parameters that a protobuf can hold, with room for the graph
_ONNX = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """What `export` wrote: the file, whether it takes any batch size (else that of the example inputs
    only), and the largest difference from the module's outputs, relative to the largest output."""

    path: Path
    dynamic_batch: bool
    error: float


def export(
    module: nn.Module, path: str | os.PathLike[str], example_inputs: Any, *, dynamic_batch: bool = True
) -> Exported:
    """Write a plain module, in evaluation mode, as ``.onnx`` or as a torch.export program, ``.pt2``.

    ``example_inputs`` is a tuple of arguments or a dict of keyword arguments, the batch on the first
    axis. The file takes any batch size where the exporter can do that and ``dynamic_batch`` is true.
    It is run (by onnxruntime, or torch) and compared with the module before it appears under its
    name. The weights of an ONNX model of 2 GB or more lie beside it, in ``path + ".data"``. The module
    is left as it was. A transformers model is exported without its key-value cache.

    Raises `PlasticError`, and leaves no file, for another suffix, for a `PlasticNet`, for a missing
    package, when the module rejects the inputs, when the exporter fails, and when the outputs differ.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise PlasticError(f"cannot export to {path}: the suffix is .onnx or .pt2")
    if any(isinstance(child, PlasticNet) for child in module.modules()):
        raise PlasticError("export takes a plain module: net.compact()")
    missing = [n for n in _ONNX if importlib.util.find_spec(n) is None] if path.suffix == ".onnx" else []
    if missing:
        raise PlasticError(f"cannot export to {path}: pip install {' '.join(missing)}")
    args, kwargs = call_arguments(example_inputs)
    with evaluation(module):
        try:
            outputs(module, args, kwargs)  # its own error says more than the exporter's
            if dynamic_batch:
                with suppress(Exception):  # whatever is wrong with a free batch: one without may do
                    return Exported(path, True, _write(module, path, args, kwargs, dynamic=True))
            return Exported(path, False, _write(module, path, args, kwargs, dynamic=False))
        except PlasticError:
            raise
        except Exception as error:  # the model's, the exporter's, the runtime's or the file system's
            what = (str(error).splitlines() or [repr(error)])[0]
            raise PlasticError(f"cannot export to {path}: {what}") from error


def _write(module: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> float:
    """Export, compare, and put the files in their place. Returns the largest relative difference."""
    trials: list[Any] = [(args, kwargs)]
    shapes: Any = None
    if dynamic:  # a batch of one would become a constant; a third size shows that none did
        batch = next((len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()), 1)
        trials = [tree_map(lambda t, n=n: _rows(t, batch, n), (args, kwargs)) for n in (2, 3)]
        axes = {0: torch.export.Dim("batch")}
        of_args, of_kwargs = tree_map(lambda t: axes if _is_batched(t, batch) else None, (args, kwargs))
        shapes = of_kwargs or of_args
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder) / path.name
        program = torch.export.export(module, *trials[0], dynamic_shapes=shapes)
        if path.suffix == ".onnx":
            size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
            torch.onnx.export(program, f=partial, dynamo=True, verbose=False, external_data=size >= ONE_FILE)
            run = _onnx_runner(partial)
        else:
            torch.export.save(program, partial)
            run = torch.export.load(partial).module()
        error = max(
            check_outputs(outputs(module, *trial), outputs(run, *trial), f"cannot export to {path}") for trial in trials
        )
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights before the graph that names them
            os.replace(file, path.with_name(file.name))
    return error


def _is_batched(value: Any, batch: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch


def _rows(value: Any, batch: int, n: int) -> Any:
    """An input with ``n`` samples, repeating those that there are."""
    if not _is_batched(value, batch):
        return value
    return value[torch.arange(n, device=value.device) % batch]


def _onnx_runner(path: Path) -> Callable[..., list[Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = [t.cpu().numpy() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        return [torch.from_numpy(a) for a in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run


def outputs(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a run returns, on the CPU."""
    args, kwargs = copy_inputs((args, kwargs))
    return [t.cpu() for t in tree_leaves(run(*args, **kwargs)) if isinstance(t, Tensor)]


def check_outputs(expected: list[Tensor], found: list[Tensor], what: str) -> float:
    """The largest difference of what was found from what was expected, relative to the largest entry of its output.

    Raises `PlasticError`, which begins with ``what``, when it is more than rounding.
    """
    if [t.shape for t in expected] != [t.shape for t in found] or not expected:
        raise PlasticError(f"{what}: it has other outputs than the module")
    largest = 0.0
    for a, b in zip(expected, found, strict=True):
        error = relative_difference([a], [b])
        if error > (_TOLERANCE if a.dtype in (torch.float32, torch.float64) else _COARSE):
            raise PlasticError(f"{what}: its outputs differ from the module's by {error:.1e}, relatively")
        largest = max(largest, error)
    return largest


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, without gradients, TF32 or the exporters' warnings, and without the key-value cache
    that a transformers model returns unless told otherwise; all is put back."""
    training = {child: child.training for child in module.modules()}
    configs: list[Any] = [getattr(child, "config", None) for child in training]
    caching = [c for c in configs if getattr(c, "use_cache", False) is True]
    module.eval()
    for config in caching:
        config.use_cache = False
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for child, mode in training.items():
            child.training = mode
        for config in caching:
            config.use_cache = True
