"""Recurrent layers of different widths: a stack that holds every layer and direction as a module of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from plasticnet.errors import PlasticError
from plasticnet.layers.replacing import replaced
from plasticnet.layers.states import LayerStates
from plasticnet.tools.snapshot import duplicate
from plasticnet.tools.torch_private import flat_names, has_hooks

Sequences = Tensor | PackedSequence


class RecurrentStack(nn.Module):
    """What an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` of several layers or directions computes, with a module for each.

    Torch has one ``hidden_size`` for all layers and directions, and here each has its own. It is called as the module
    that it comes from, and returns the same, with the last states as `LayerStates`. `split_recurrent` makes it, and
    users need not construct it.

    Args:
        module: The module, whose parameters are used and not copied.

    Attributes:
        layers: The layers and directions in the order of torch's ``h_n``: both directions of the first layer, then
            those of the second one. Each is of the kind of the module, and has one layer and one direction.

    Raises:
        PlasticError: ``hidden_size`` is read, and the widths differ.

    Example:
        >>> import torch, plasticnet as pn
        >>> stack = pn.RecurrentStack(torch.nn.GRU(4, 8, num_layers=2, bidirectional=True))
        >>> [(layer.input_size, layer.hidden_size) for layer in stack.layers]
        [(4, 8), (4, 8), (16, 8), (16, 8)]
        >>> out, states = stack(torch.randn(5, 3, 4))
        >>> out.shape, states[-1].shape
        (torch.Size([5, 3, 16]), torch.Size([3, 8]))
    """

    proj_size = 0

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        self.mode, self.num_layers, self.bias = module.mode, module.num_layers, module.bias
        self.batch_first, self.bidirectional, self.dropout = module.batch_first, module.bidirectional, module.dropout
        self.layers = nn.ModuleList(_layer(module, i) for i in range(self.num_layers * self._directions))
        self.train(module.training)

    @property
    def _directions(self) -> int:
        """The number of directions."""
        return 2 if self.bidirectional else 1

    @property
    def input_size(self) -> int:
        """The width of the inputs."""
        return self._layer(0).input_size

    @property
    def hidden_size(self) -> int:
        """The width of all layers, where they have the same."""
        widths = [self._layer(i).hidden_size for i in range(len(self.layers))]
        if len(set(widths)) > 1:
            raise PlasticError(f"the layers of a recurrent network have no hidden_size in common: they have {widths}")
        return widths[0]

    def flatten_parameters(self) -> None:
        """Lay the weights of every layer out as cuDNN wants them."""
        for i in range(len(self.layers)):
            self._layer(i).flatten_parameters()

    def forward(self, input: Sequences, hx: Any = None) -> tuple[Sequences, Any]:
        """Run all layers and directions.

        Args:
            input: The sequences, as the module that this one comes from takes them: shape (time, batch, width), (batch,
                time, width) with ``batch_first``, (time, width) without a batch, or packed.
            hx: The first states, by default zeros: a tensor of shape (layers * directions, batch, width), `LayerStates`
                or a list of tensors of shape (batch, width); for an LSTM a pair of these.

        Returns:
            The outputs of the last layer, whose directions lie one after the other in the last axis, and the last
            states as `LayerStates`; for an LSTM a pair of these.

        Raises:
            PlasticError: There are not as many first states as layers and directions.
        """
        lstm = self.mode == "LSTM"
        first = [] if hx is None else list(hx) if lstm else [hx]
        for states in first:
            if len(states) != len(self.layers):
                raise PlasticError(f"{len(self.layers)} layers and directions need as many states, not {len(states)}")
        last: list[tuple[Tensor, ...]] = []
        x = input
        for depth in range(self.num_layers):
            if depth and self.dropout:
                x = _mapped(x, lambda data: F.dropout(data, self.dropout, self.training))
            outputs: list[Sequences] = []
            for direction in range(self._directions):
                i = len(last)
                begin = tuple(states[i].unsqueeze(0) for states in first)
                out, end = self.layers[i](
                    self._turned(x) if direction else x, None if hx is None else begin if lstm else begin[0]
                )
                outputs.append(self._turned(out) if direction else out)
                last.append(tuple(state[0] for state in (end if lstm else (end,))))
            x = self._side_by_side(outputs)
        ends = tuple(LayerStates(states) for states in zip(*last, strict=True))
        return x, ends if lstm else ends[0]

    def _layer(self, i: int) -> nn.RNNBase:
        """Return one of the layers and directions."""
        layer = self.layers[i]
        assert isinstance(layer, nn.RNNBase)
        return layer

    def _turned(self, x: Sequences) -> Sequences:
        """Return the sequences with their steps in the opposite order."""
        if not isinstance(x, PackedSequence):
            return x.flip(1 if self.batch_first and x.dim() == 3 else 0)
        order = _opposite(x.batch_sizes, len(x.data)).to(x.data.device)
        return _mapped(x, lambda data: data.index_select(0, order))

    def _side_by_side(self, outputs: list[Sequences]) -> Sequences:
        """Return the outputs of both directions as one, one after the other in the last axis."""
        if len(outputs) == 1:
            return outputs[0]
        data = [out.data if isinstance(out, PackedSequence) else out for out in outputs]
        if self.batch_first and data[0].dim() == 3:
            # They lie in memory with the time first, as torch's own, so that dropout draws the same numbers.
            return torch.cat([t.transpose(0, 1) for t in data], -1).transpose(0, 1)
        return _mapped(outputs[0], lambda _: torch.cat(data, -1))

    def extra_repr(self) -> str:
        """Return what holds for all layers."""
        return f"dropout={self.dropout}, batch_first={self.batch_first}, bidirectional={self.bidirectional}"


def split_recurrent(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose recurrent layers may each have a width of its own.

    All layers and directions of an ``nn.LSTM``, ``nn.GRU`` or ``nn.RNN`` have one ``hidden_size``, so that a
    `PlasticNet` can only cut the same units from all of them. In the copy, every such module of several layers or
    directions is a `RecurrentStack`, which computes the same, and each layer and direction is a site. Modules with
    ``proj_size``, hooks or weights that are computed, and those of a subclass, stay as they are.

    A factory for `load` and for checkpoints must call this function, too, because the parameters have other names:
    ``rnn.weight_hh_l1`` becomes ``rnn.layers.1.weight_hh_l0``.

    Args:
        model: The model, which is not changed.

    Raises:
        PlasticError: There is no module that can be split; the message says why for each recurrent one.

    Example:
        >>> import torch, plasticnet as pn
        >>> class Speaker(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.lstm, self.out = torch.nn.LSTM(4, 8, num_layers=2, batch_first=True), torch.nn.Linear(8, 3)
        ...     def forward(self, x):
        ...         _, (h, _) = self.lstm(x)
        ...         return self.out(h[-1])
        >>> x = torch.randn(2, 6, 4)
        >>> list(pn.PlasticNet(Speaker(), (x,)).sites)
        ['lstm']
        >>> list(pn.PlasticNet(pn.split_recurrent(Speaker()), (x,)).sites)
        ['lstm.layers.0', 'lstm.layers.1']
    """
    small = duplicate(model)
    found = {name: m for name, m in small.named_modules() if isinstance(m, nn.RNNBase)}
    kept = {name: why for name, m in found.items() if (why := _why_whole(m)) is not None}
    if len(kept) == len(found):
        reasons = "; ".join(f"{name or type(small).__name__}: {why}" for name, why in kept.items()) or "there is none"
        raise PlasticError(f"{type(model).__name__} has no recurrent layers that can be split ({reasons})")
    for name, module in found.items():
        if name not in kept:
            small = replaced(small, module, RecurrentStack(module))
    return small


def _why_whole(module: nn.RNNBase) -> str | None:
    """Return why a recurrent module cannot be split, or None where it can."""
    if type(module) not in (nn.LSTM, nn.GRU, nn.RNN):
        return f"a {type(module).__name__}, which may compute something else than the class of torch"
    if module.num_layers == 1 and not module.bidirectional:
        return "it has a single layer"
    if module.proj_size:
        return "its outputs are projected (proj_size)"
    if has_hooks(module):
        return "it has hooks"
    if [name for name, _ in module.named_parameters()] != flat_names(module):
        return "its weights are computed from others"
    return None


def _layer(module: nn.RNNBase, i: int) -> nn.RNNBase:
    """Return one layer and direction as a module of its own, with the parameters of the module that it is a part of.

    Args:
        module: The module.
        i: The place of the layer and direction in its ``h_n``.
    """
    depth, direction = divmod(i, 2 if module.bidirectional else 1)
    suffix = f"_l{depth}" + ("_reverse" if direction else "")
    options = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
    width = getattr(module, f"weight_ih{suffix}").shape[1]
    layer: nn.RNNBase = type(module)(
        width, module.hidden_size, bias=module.bias, batch_first=module.batch_first, device="meta", **options
    )
    for name in flat_names(layer):
        setattr(layer, name, getattr(module, name.replace("_l0", suffix)))
    return layer


def _mapped(x: Sequences, function: Callable[[Tensor], Tensor]) -> Sequences:
    """Return what a function makes of the numbers of the sequences, which may be packed."""
    if isinstance(x, PackedSequence):
        return PackedSequence(function(x.data), x.batch_sizes, x.sorted_indices, x.unsorted_indices)
    return function(x)


def _opposite(sizes: Tensor, count: int) -> Tensor:
    """Return where the rows of packed sequences come from when each of them has its steps in the opposite order.

    No value is read, and no shape depends on one, because tracing would take that for a branch.

    Args:
        sizes: How many sequences have a step, for every step, shape (steps,), falling.
        count: The number of rows.

    Returns:
        For each row its place before, shape (rows,).
    """
    ends = sizes.cumsum(0)
    begins = ends - sizes
    rows = torch.arange(count, device=sizes.device)
    step = torch.searchsorted(ends, rows, right=True)
    sequence = rows - begins[step]
    length = torch.searchsorted(-sizes, -sequence)
    return begins[length - 1 - step] + sequence
