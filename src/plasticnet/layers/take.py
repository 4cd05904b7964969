"""Selects the features that are left of a layer's input."""

from __future__ import annotations

from torch import Tensor, nn

from plasticnet.tools.torch_private import children_of


class Take(nn.Module):
    """Selects features: ``x.index_select(axis, indices)``. Compaction puts it before a consumer whose
    input features were gated one by one."""

    indices: Tensor

    def __init__(self, indices: Tensor, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("indices", indices)

    def forward(self, x: Tensor) -> Tensor:
        """(..., features, ...) to (..., len(indices), ...)."""
        return x.index_select(self.axis, self.indices)

    def extra_repr(self) -> str:
        """How many features are taken, and along which axis."""
        return f"{len(self.indices)}, axis={self.axis}"


def insert_take(model: nn.Module, consumer: str, take: Take) -> None:
    """Replace a module by ``Sequential(take, module)`` wherever the model holds it."""
    target = model.get_submodule(consumer)
    wrapped = nn.Sequential(take, target)
    wrapped.train(target.training)
    for module in list(model.modules()):
        for name, child in list(children_of(module).items()):
            if child is target and module is not wrapped:
                children_of(module)[name] = wrapped
