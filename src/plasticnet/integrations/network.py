"""Finds the network that a callback is to train."""

from __future__ import annotations

from torch import nn

from plasticnet.errors import PlasticError
from plasticnet.net import PlasticNet


def find_network(module: nn.Module) -> PlasticNet:
    """Return the one `PlasticNet` among a module and all that it holds.

    Args:
        module: The module, such as a LightningModule; it may be the network itself.

    Raises:
        PlasticError: There is none, or there are several.
    """
    found = [(name, m) for name, m in module.named_modules() if isinstance(m, PlasticNet)]
    kind = type(module).__name__
    if not found:
        raise PlasticError(
            f"{kind} holds no PlasticNet: gate its model where it is made, as in self.net = pn.PlasticNet(model, "
            "(example_inputs,)), and run self.net in the training step"
        )
    if len(found) > 1:
        names = ", ".join(name or "the module itself" for name, _ in found)
        raise PlasticError(
            f"{kind} holds {len(found)} networks ({names}), and a callback has one schedule for one network. Gate one "
            "module that holds both models, or write the loop with a Schedule for each"
        )
    return found[0][1]
