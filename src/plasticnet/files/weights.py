"""Reads the weights of a trained model into it: from a state dict, in a safetensors file or one of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from plasticnet.errors import PlasticError, first_line
from plasticnet.files.disk import AnyPath, open_file, path_of

_NESTED = ("state_dict", "model", "model_state_dict")  # keys under which training scripts keep a state dict
_WRAPPED = ("module.", "_orig_mod.", "model.")  # what wrappers put before every name


def load_weights(model: nn.Module, path: AnyPath) -> nn.Module:
    """Load a state dict from a file into a model, and return the model in evaluation mode.

    Nothing in the file is run: a file of torch is read with ``weights_only=True``. The state dict may lie under a key
    such as "state_dict", and its names may begin with what a wrapper puts before them, such as "module.".

    Args:
        model: The model, which has the names and shapes of the file.
        path: A ``.safetensors`` file, or one that ``torch.save`` wrote.

    Raises:
        PlasticError: The file cannot be read, or it does not fit the model. The model was not changed.
    """
    path = path_of(path)
    state, own = _state(path), model.state_dict()
    for prefix in (*_WRAPPED, *_WRAPPED):  # twice, since wrappers may lie in each other in any order
        if not own.keys() & state.keys() and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or extra:
        found = [f"only the {what} has {names[:5]}" for what, names in (("model", missing), ("file", extra)) if names]
        raise PlasticError(f"{path} does not fit {type(model).__name__}: {', and '.join(found)}")
    for name, value in own.items():
        if isinstance(value, Tensor) and value.shape != state[name].shape:
            raise PlasticError(
                f"{path} does not fit {type(model).__name__}: {name} has shape {tuple(state[name].shape)} in the file, "
                f"and {tuple(value.shape)} in the model"
            )
    model.load_state_dict(state)
    return model.eval()


def _state(path: str) -> dict[str, Any]:
    """Return the state dict in a file."""
    try:
        if Path(path).exists():
            open_file(path).close()  # refuses a pipe, for which a reader would wait
        if Path(path).suffix == ".safetensors":
            return dict(load_file(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except PlasticError:
        raise
    except FileNotFoundError as error:
        raise PlasticError(f"{path} cannot be read as a state dict: there is no such file") from error
    except UnpicklingError as error:
        raise PlasticError(f"{path} holds more than tensors, or is damaged; save model.state_dict()") from error
    except Exception as error:  # bytes that are no pickle can make the unpickler raise anything
        raise PlasticError(f"{path} cannot be read as a state dict: {first_line(error)}") from error
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise PlasticError(f"{path} holds no state dict, but a {type(found).__name__}; save model.state_dict()")
    return dict(found)
