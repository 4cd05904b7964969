"""Writes a plain module as an ONNX file or a torch.export program, and compares the file with the module."""

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

from plasticnet.errors import PlasticError, first_line
from plasticnet.net import PlasticNet
from plasticnet.tools.difference import relative_difference
from plasticnet.tools.inputs import call_arguments, copy_inputs
from plasticnet.tools.progress import Progress

_TOLERANCE, _COARSE = 1e-4, 1e-2  # the largest relative differences of outputs; _COARSE is for half precision
ONE_FILE = 2**31 - 2**20  # the bytes of parameters that fit into a protobuf, which has room for the graph beside them
_ONNX = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """What `export` returns about the file that it wrote.

    Attributes:
        path: The file.
        dynamic_batch: Whether the file takes any batch size, and not just that of the example inputs.
        error: The largest difference between an output of the file and that of the module, relative to the largest
            entry of the module's output.

    Example:
        >>> import tempfile, torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = pn.export(model, f"{folder}/model.pt2", (torch.randn(3, 4),), dynamic_batch=False)
        >>> written.path.name, written.dynamic_batch, written.error < 1e-4
        ('model.pt2', False, True)
    """

    path: Path
    dynamic_batch: bool
    error: float


def export(
    module: nn.Module, path: str | os.PathLike[str], example_inputs: Any, *, dynamic_batch: bool = True
) -> Exported:
    """Write a plain module, in evaluation mode, as an ONNX file or as a torch.export program.

    The file is run, by onnxruntime or by torch, and compared with the module before it appears under its name. The
    module is left as it was. A transformers model is exported without its key-value cache.

    Args:
        module: A plain module, such as `PlasticNet.compact` returns.
        path: The file. Its suffix is ``.onnx``, or ``.pt2`` for torch.export. The weights of an ONNX model of 2 GB or
            more are written beside it, into a file with ``.data`` after the name.
        example_inputs: A tuple of arguments, or a dict of keyword arguments, on which the module runs; the batch is the
            first axis.
        dynamic_batch: Whether the file should take any batch size. Where the exporter cannot do that, the file takes
            that of the example inputs.

    Returns:
        What was written: the path, whether it takes any batch size, and how much its outputs differ.

    Raises:
        PlasticError: The suffix is another one, the module is a `PlasticNet` or rejects the inputs, a package is
            missing, the exporter fails, or the outputs differ by more than rounding. No file is left.

    Example:
        >>> import tempfile, torch, plasticnet as pn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = pn.export(model, f"{folder}/model.pt2", (torch.randn(3, 4),))
        ...     again = torch.export.load(written.path).module()
        >>> again(torch.randn(5, 4)).shape  # another batch size
        torch.Size([5, 2])
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
            outputs(module, args, kwargs)  # if this fails, its error says more than the exporter's
            if dynamic_batch:
                with suppress(Exception):  # if this fails in any way, a fixed batch size may still work
                    return Exported(path, True, _write(module, path, args, kwargs, dynamic=True))
            return Exported(path, False, _write(module, path, args, kwargs, dynamic=False))
        except PlasticError:
            raise
        except Exception as error:  # from the model, the exporter, the runtime or the file system
            raise PlasticError(f"cannot export to {path}: {first_line(error)}") from error


def _write(module: nn.Module, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool) -> float:
    """Export the module, compare the result with it, and put the files in their place.

    Args:
        module: The module, in evaluation mode.
        path: The file.
        args: The positional arguments of the example.
        kwargs: The keyword arguments of the example.
        dynamic: Whether the batch size is free.

    Returns:
        The largest relative difference of an output.
    """
    trials: list[Any] = [(args, kwargs)]
    shapes: Any = None
    if dynamic:  # the exporter would make a batch of one a constant; running a batch of three shows that it made none
        batch = next((len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim()), 1)
        trials = [tree_map(lambda t, n=n: _rows(t, batch, n), (args, kwargs)) for n in (2, 3)]
        axes = {0: torch.export.Dim("batch")}
        of_args, of_kwargs = tree_map(lambda t: axes if _is_batched(t, batch) else None, (args, kwargs))
        shapes = of_kwargs or of_args
    with (
        tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder,
        Progress(f"exporting {path.name}", total=3) as progress,
    ):
        partial = Path(folder) / path.name
        program = torch.export.export(module, *trials[0], dynamic_shapes=shapes)
        progress.advance("writing")
        if path.suffix == ".onnx":
            size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
            torch.onnx.export(program, f=partial, dynamo=True, verbose=False, external_data=size >= ONE_FILE)
            run = _onnx_runner(partial)
        else:
            torch.export.save(program, partial)
            run = torch.export.load(partial).module()
        progress.advance("comparing")
        error = max(
            check_outputs(outputs(module, *trial), outputs(run, *trial), f"cannot export to {path}") for trial in trials
        )
        progress.advance("done")
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights come before the graph, which names them
            os.replace(file, path.with_name(file.name))
    return error


def _is_batched(value: Any, batch: int) -> bool:
    """Return whether an input is a tensor whose first axis is as long as the batch."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch


def _rows(value: Any, batch: int, n: int) -> Any:
    """Return an input with ``n`` samples, which are those of the given one, repeated or cut off.

    An input that is not batched is returned as it is.
    """
    if not _is_batched(value, batch):
        return value
    return value[torch.arange(n, device=value.device) % batch]


def _onnx_runner(path: Path) -> Callable[..., list[Tensor]]:
    """Return a function that runs an ONNX file on the CPU and takes the arguments of the module."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        tensors = [t.cpu().numpy() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        return [torch.from_numpy(a) for a in session.run(None, dict(zip(names, tensors, strict=True)))]

    return run


def outputs(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Run a module, or what stands for it, on copies of the arguments; return its output tensors, on the CPU."""
    args, kwargs = copy_inputs((args, kwargs))
    return [t.cpu() for t in tree_leaves(run(*args, **kwargs)) if isinstance(t, Tensor)]


def check_outputs(expected: list[Tensor], found: list[Tensor], what: str) -> float:
    """Compare outputs, and return the largest difference, relative to the largest entry of the expected output.

    Args:
        expected: The outputs of the module.
        found: The outputs of the file.
        what: How the message of an error begins.

    Raises:
        PlasticError: The difference is more than rounding, or the shapes or the number of outputs differ.
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
    """Within this context a module runs as it is exported and compared: in evaluation mode and without gradients.

    TF32 is turned off in cuDNN, warnings (those of the exporters) are not shown, and a transformers model does not
    return its key-value cache. Afterwards everything is as it was.
    """
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
