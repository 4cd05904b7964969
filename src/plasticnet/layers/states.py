"""The last states of the layers of a recurrent network, which may have different widths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_map

from plasticnet.errors import PlasticError


class LayerStates:
    """The last state of every layer and direction, in the order of torch's ``h_n``, as `RecurrentStack` returns them.

    An index gives the state of one layer, of shape (batch, width). In everything else it is the tensor that torch
    returns, of shape (layers * directions, batch, width): it has the methods and the operators of a tensor, and
    functions of torch take it. Reading the states as this tensor needs equal widths, so tracing ties the layers of a
    model that does so. Reading them by index ties nothing.

    Args:
        states: The state of each layer and direction, shape (batch, width), or (width,) without a batch.

    Raises:
        PlasticError: The states are read as one tensor, and their widths differ.

    Example:
        >>> import torch, plasticnet as pn
        >>> states = pn.LayerStates([torch.zeros(4, 5), torch.ones(4, 5)])
        >>> states[-1].shape, len(states), states.transpose(0, 1).shape
        (torch.Size([4, 5]), 2, torch.Size([4, 2, 5]))
        >>> pn.LayerStates([torch.zeros(4, 3), torch.ones(4, 5)])[-1].shape
        torch.Size([4, 5])
    """

    def __init__(self, states: Sequence[Tensor]) -> None:
        self._states = list(states)

    def stacked(self) -> Tensor:
        """Return the states as one tensor, shape (layers * directions, batch, width)."""
        widths = [s.shape[-1] for s in self._states]
        if len(set(widths)) > 1:
            raise PlasticError(
                f"the layers of a recurrent network have different widths, {widths}, so that their states are no "
                "single tensor: read them by index, such as h_n[-1]"
            )
        return torch.stack(self._states)

    def detach(self) -> LayerStates:
        """Return the states without their graph."""
        return LayerStates([s.detach() for s in self._states])

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._states)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            return self._states[index]
        if isinstance(index, slice):
            return LayerStates(self._states[index])
        if isinstance(index, tuple) and index and isinstance(index[0], int):
            return self._states[index[0]][index[1:]]
        return self.stacked()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask for such names, and must not get those of a tensor
            raise AttributeError(name)
        return getattr(self.stacked(), name)

    def __repr__(self) -> str:
        return f"LayerStates({self._states!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(
            lambda a: a.stacked() if isinstance(a, cls) else a,
            (args, kwargs or {}),
            is_leaf=lambda a: isinstance(a, cls),
        )
        return func(*args, **kwargs)


def _operator(name: str) -> Callable[..., Any]:
    """Return an operator of tensors for states, which are read as one tensor."""

    def operate(self: LayerStates, *others: Any) -> Any:
        own = [o.stacked() if isinstance(o, LayerStates) else o for o in others]
        return getattr(self.stacked(), name)(*own)

    return operate


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "matmul", "neg", "abs",
              "lt", "le", "gt", "ge"):  # fmt: skip
    setattr(LayerStates, f"__{_name}__", _operator(f"__{_name}__"))

register_pytree_node(
    LayerStates,
    lambda states: (list(states), None),
    lambda states, _: LayerStates(list(states)),
    serialized_type_name="plasticnet.LayerStates",
)
