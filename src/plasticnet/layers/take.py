"""Selects the features that are left of a layer's input."""

from __future__ import annotations

from torch import Tensor, nn

from plasticnet.layers.replacing import replaced


class Take(nn.Module):
    """A module that selects features of its input along one axis.

    `PlasticNet.compact` puts it before a layer that has lost some of its input features.

    Args:
        indices: The places of the features to select, shape (features,).
        axis: The axis along which the features lie.

    Example:
        >>> import torch, plasticnet as pn
        >>> pn.Take(torch.tensor([0, 2]))(torch.tensor([[1, 2, 3]]))
        tensor([[1, 3]])
    """

    indices: Tensor

    def __init__(self, indices: Tensor, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("indices", indices)

    def forward(self, x: Tensor) -> Tensor:
        """Select the features: the axis becomes as long as there are indices."""
        return x.index_select(self.axis, self.indices)

    def extra_repr(self) -> str:
        """Return how many features are taken, and along which axis."""
        return f"{len(self.indices)}, axis={self.axis}"


def insert_take(model: nn.Module, consumer: str, take: Take) -> None:
    """Replace the module of this name by ``Sequential(take, module)``, wherever the model holds it."""
    target = model.get_submodule(consumer)
    wrapped = nn.Sequential(take, target)
    wrapped.train(target.training)
    replaced(model, target, wrapped)
