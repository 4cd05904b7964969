"""Tries the plasticnet that is installed in the environment of this interpreter; run it with ``python -I``.

It imports every module, makes a network smaller in one call, saves and loads it, and says from where it was imported.
"""

import importlib
import pkgutil
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch import nn

import plasticnet as pn


def import_all() -> tuple[list[str], dict[str, str]]:
    """Import every module; return those that came, and for each of the others what it lacks."""
    came, lack = [], {}
    for found in pkgutil.walk_packages(pn.__path__, "plasticnet."):
        try:
            importlib.import_module(found.name)
            came.append(found.name)
        except ImportError as error:  # a package of an extra is missing, unless it is a part of plasticnet
            if str(error.name).partition(".")[0] == "plasticnet":
                raise
            lack[found.name] = str(error)
    return came, lack


def build() -> nn.Module:
    """Return a network of the original architecture."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3))


def main() -> None:
    home = Path(sysconfig.get_path("purelib")).resolve()
    came, lack = import_all()
    for name, module in sys.modules.items():
        if name.partition(".")[0] == "plasticnet":
            path = Path(str(module.__file__)).resolve()
            assert path.is_relative_to(home), f"{name} comes from {path}, and not from {home}"
    assert (Path(pn.__path__[0]) / "py.typed").is_file()
    x = torch.randn(400, 12)
    small, _ = pn.shrink(build(), x.split(100), pn.Budget(macs=0.5))
    with tempfile.TemporaryDirectory() as folder:
        pn.save(small, f"{folder}/small.safetensors")
        again = pn.load(f"{folder}/small.safetensors", build)
    assert torch.equal(again(x), small.eval()(x))
    parameters = [sum(p.numel() for p in module.parameters()) for module in (build(), small)]
    assert parameters[1] < 0.6 * parameters[0]
    print(f"plasticnet {pn.__version__} of {home}: {len(came)} modules, shrunk from {parameters[0]} to {parameters[1]}")
    for name, why in lack.items():
        print(f"{name} was not imported: {why}")


if __name__ == "__main__":
    main()
