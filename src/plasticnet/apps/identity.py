"""Says what makes a run the same run, and names in what two runs differ."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from torch import nn

from plasticnet.apps.data import Data
from plasticnet.apps.settings import Config, Mode, Run, flat

# How settings are called where their own name would not be understood.
_WORDS = {"data_sha256": "content of the data (sha256)", "model_sha256": "structure of the model (sha256)"}
# Data may lie elsewhere when a run goes on; what they are is compared by their hash.
_ELSEWHERE = ("data_dir",)


def describe_model(model: nn.Module) -> str:
    """Return the structure of a model as text: its modules, and the names, types and shapes of its tensors.

    Addresses in memory are left out, because they differ from one process to the next.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lines = [repr(model), *(f"{name}: {tensor.dtype} {tuple(tensor.shape)}" for name, tensor in tensors)]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", "\n".join(lines))


def identity(data: Data, model: str, config: Config, mode: Mode) -> dict[str, Any]:
    """Return what must be the same when a run is resumed, as a checkpoint holds it.

    Args:
        data: The data.
        model: The structure of the model, as `describe_model` returns it.
        config: The settings.
        mode: What the run does.
    """
    return {"config": json.loads(json.dumps(asdict(config))), "model": model, "mode": mode, "data_sha256": data.sha256}


def settings(run: Run, data: Data, model: str) -> dict[str, Any]:
    """Return what must be the same when the runs of a folder are resumed, side by side.

    Args:
        run: The settings.
        data: The data.
        model: The structure of the model, as `describe_model` returns it.
    """
    named = {name: value for name, value in flat(run).items() if name not in _ELSEWHERE}
    return {**named, **hashes(data, model)}


def hashes(data: Data, model: str) -> dict[str, str]:
    """Return hashes of the content of data, and of the structure of a model that `describe_model` returned."""
    return {"data_sha256": data.sha256, "model_sha256": sha256(model.encode()).hexdigest()}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return a line that names every setting that is not as before: "lr: 0.003 then, 0.5 now; ...".

    Args:
        then: The settings as a file holds them. Those that ``now`` does not have are not compared.
        now: The settings of this call.
    """
    found = []
    for name, new in now.items():
        if name not in then:
            found.append(f"{_WORDS.get(name, name)}: not recorded then, {_text(name, new)} now")
        elif then[name] != new:
            old, new = _first_difference(then[name], new)
            found.append(f"{_WORDS.get(name, name)}: {_text(name, old)} then, {_text(name, new)} now")
    return "; ".join(found)


def _first_difference(old: Any, new: Any) -> tuple[Any, Any]:
    """Return the first lines in which two texts of several lines differ; other values are returned as they are."""
    if not (isinstance(old, str) and isinstance(new, str) and "\n" in old + new):
        return old, new
    a, b = old.splitlines(), new.splitlines()
    length = max(len(a), len(b))
    rows = zip(a + [""] * (length - len(a)), b + [""] * (length - len(b)), strict=True)
    return next(((x.strip(), y.strip()) for x, y in rows if x != y), (old, new))


def _text(name: str, value: Any) -> str:
    """Return a setting in a form that fits into a line."""
    if name.endswith("sha256"):
        return str(value)[:12]
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items() if v is not None) or "none"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else " ".join(str(value).split()) or "nothing"
