"""Recurrent layers that were split compute what torch's do, and each has a width of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import plasticnet as pn
from plasticnet import PlasticError
from tests.kit.networks import randomise_gates

KINDS = [nn.LSTM, nn.GRU, nn.RNN]
SHAPES = [(1, True), (2, False), (2, True), (3, False), (3, True)]  # layers, and whether there are two directions


def parts(states: Any) -> list[Tensor]:
    """The last states as tensors: h_n, and c_n of an LSTM."""
    return [
        s.stacked() if isinstance(s, pn.LayerStates) else s for s in (states if type(states) is tuple else (states,))
    ]


def compare(module: nn.RNNBase, *inputs: Any) -> None:
    """The split module gives the same outputs and the same last states."""
    split = pn.split_recurrent(module)
    assert type(split) is pn.RecurrentStack
    torch.manual_seed(1)
    out, states = module(*inputs)
    torch.manual_seed(1)
    ours, ends = split(*inputs)
    pairs = zip(parts(ends), parts(states), strict=True)
    if isinstance(out, PackedSequence):
        assert torch.equal(out.batch_sizes, ours.batch_sizes)
        out, ours = out.data, ours.data
    for a, b in [(ours, out), *pairs]:
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("layers", "both"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_outputs(kind: type[nn.RNNBase], layers: int, both: bool, batch_first: bool) -> None:
    module: Any = kind(4, 5, num_layers=layers, bidirectional=both, batch_first=batch_first, dropout=0.3 * (layers > 1))
    module = module.double()
    x = torch.randn(3, 6, 4).double()
    count = layers * (2 if both else 1)
    first = torch.randn(2, count, 3 if batch_first else 6, 5).double()
    hx = tuple(first) if kind is nn.LSTM else first[0]
    compare(module, x)  # in training mode, with dropout between the layers
    module.eval()
    compare(module, x)
    compare(module, x, hx)
    alone = tuple(first[:, :, 0]) if kind is nn.LSTM else first[0, :, 0]
    compare(module, x[0], alone)
    for order in (True, False):
        lengths = torch.tensor([6, 4, 1] if order else [2, 6, 3])
        packed = pack_padded_sequence(
            x if batch_first else x.transpose(0, 1), lengths, batch_first=batch_first, enforce_sorted=order
        )
        compare(module, packed, *([] if batch_first is False else [hx]))
        compare(module.train(), packed)
        module.eval()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_gradients(kind: type[nn.RNNBase], batch_first: bool, packed: bool) -> None:
    module = kind(4, 5, num_layers=2, bidirectional=True, batch_first=batch_first).double()
    split, x = pn.split_recurrent(module), torch.randn(3, 3, 4).double().requires_grad_()
    found: list[list[Tensor]] = []
    for model in (module, split):
        given: Any = pack_padded_sequence(x, torch.tensor([3, 2, 1]), batch_first=batch_first) if packed else x
        out, states = model(given)
        loss = (out.data if packed else out).square().sum() + sum(s.square().sum() for s in parts(states))
        found.append(list(torch.autograd.grad(loss, [x, *model.parameters()])))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_options_and_the_parameters_themselves() -> None:
    module = nn.RNN(4, 5, num_layers=2, bias=False, nonlinearity="relu").double().eval()
    compare(module, torch.randn(6, 3, 4).double())
    split = pn.split_recurrent(module)
    assert isinstance(split, pn.RecurrentStack)
    assert not split.training
    assert (split.input_size, split.hidden_size, split.num_layers) == (4, 5, 2)
    assert torch.equal(split.get_parameter("layers.1.weight_hh_l0"), module.weight_hh_l1)
    assert sum(p.numel() for p in split.parameters()) == sum(p.numel() for p in module.parameters())
    with pytest.raises(PlasticError, match="2 layers and directions need as many states, not 3"):
        split(torch.randn(6, 3, 4).double(), torch.randn(3, 3, 5).double())


def test_states_by_index_and_as_a_tensor() -> None:
    equal = pn.LayerStates([torch.randn(4, 5) for _ in range(3)])
    whole = equal.stacked()
    assert torch.equal(equal[-1], whole[-1])
    assert torch.equal(equal[-1, :2], whole[-1, :2])
    assert torch.equal(equal[1:].stacked(), whole[1:])
    assert torch.equal(equal[:, 0], whole[:, 0])
    assert torch.equal(torch.cat((equal[-2], equal[-1]), 1), torch.cat((whole[-2], whole[-1]), 1))
    assert torch.equal(torch.transpose(equal, 0, 1), whole.transpose(0, 1))  # pyright: ignore
    assert torch.equal(2 * equal + equal, 3 * whole)  # pyright: ignore
    assert torch.equal(copy.deepcopy(equal).stacked(), whole)
    assert equal.view(3, -1).shape == (3, 20)
    apart = pn.LayerStates([torch.randn(4, 5), torch.randn(4, 2)])
    assert [s.shape[-1] for s in apart] == [5, 2]
    assert apart.detach()[1].shape == (4, 2)
    for read in (apart.stacked, lambda: apart.shape, lambda: apart * 2, lambda: torch.relu(apart)):  # pyright: ignore
        with pytest.raises(PlasticError, match=r"different widths, \[5, 2\]"):
            read()


class Reader(nn.Module):
    """A layer, a recurrent layer, and what reads it: the outputs, the last state, all states, or both in a packed one.

    ``reads`` is "outputs", "last", "states", "packed" or "zeros".
    """

    def __init__(self, kind: type[nn.RNNBase], layers: int, both: bool, reads: str = "outputs") -> None:
        super().__init__()
        sides = 2 if both else 1
        self.a = nn.Linear(4, 6)
        self.rnn: Any = kind(6, 5, num_layers=layers, bidirectional=both, batch_first=True)
        width = 5 * {"last": sides, "states": layers * sides}.get(reads, sides)
        self.b, self.reads = nn.Linear(width, 3), reads

    def forward(self, x: Tensor) -> Tensor:
        x, hx = self.a(x).tanh(), None
        if self.reads == "packed":
            x = pack_padded_sequence(x, torch.tensor([5, 3, 2]), batch_first=True)  # pyright: ignore
        if self.reads == "zeros":
            hx = x.new_zeros(self.rnn.num_layers * (1 + self.rnn.bidirectional), len(x), self.rnn.hidden_size)
            hx = (hx, hx) if self.rnn.mode == "LSTM" else hx
        out, state = self.rnn(x, hx)
        h = state[0] if self.rnn.mode == "LSTM" else state
        if self.reads == "last":
            return self.b(torch.cat((h[-2], h[-1]), 1) if self.rnn.bidirectional else h[-1])
        if self.reads == "states":
            return self.b(h.transpose(0, 1).flatten(1))
        return self.b(pad_packed_sequence(out, batch_first=True)[0] if self.reads == "packed" else out)


def split_net(*what: Any, **options: Any) -> tuple[pn.PlasticNet, Tensor]:
    x = torch.randn(3, 5, 4).double()
    return pn.PlasticNet(pn.split_recurrent(Reader(*what, **options).double()), (x,)), x


@pytest.mark.parametrize("reads", ["outputs", "last", "packed"])
@pytest.mark.parametrize(("layers", "both"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_a_site(kind: type[nn.RNNBase], layers: int, both: bool, reads: str, tmp_path: Path) -> None:
    net, x = split_net(kind, layers, both, reads)
    names = [f"rnn.layers.{i}" for i in range(layers * (1 + both))]
    assert set(net.sites) == {"a", *names}
    randomise_gates(net)
    widths = {name: [0, 2, 4][: 1 + i % 3] for i, name in enumerate(names)}
    net.resize(widths)
    assert [net.model.get_submodule(n).hidden_size for n in names] == [len(w) for w in widths.values()]
    net.eval()
    wanted = net(x)
    small = net.compact()
    torch.testing.assert_close(small(x), wanted, rtol=0, atol=1e-9)
    pn.save(small, tmp_path / "small.safetensors")
    again = pn.load(
        tmp_path / "small.safetensors", lambda: pn.split_recurrent(Reader(kind, layers, both, reads).double())
    )
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_grow(kind: type[nn.RNNBase]) -> None:
    net, x = split_net(kind, 2, True, "last")
    net.eval()
    wanted = net(x)
    net.grow({"rnn.layers.1": 2, "rnn.layers.2": 1})
    assert [net.sites[f"rnn.layers.{i}"].units.size for i in range(4)] == [5, 7, 6, 5]
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=1e-9)


def test_split_layers_are_repaired() -> None:
    torch.manual_seed(1)
    x = torch.randn(200, 5, 4).double()
    net = pn.PlasticNet(pn.split_recurrent(Reader(nn.LSTM, 2, False).double()), (x[:3],))
    net.eval()
    pn.prune_once(net, pn.Budget(macs=0.7), batches=x.split(50), cut=False)
    found = pn.repair(net, x.split(50))
    fitted = {r.name for r in found.readers if r.strength is not None}
    assert fitted & {f"rnn.layers.{i}.weight_{kind}_l0" for i in range(2) for kind in ("ih", "hh")}
    assert found.after < found.before
    torch.testing.assert_close(net.compact()(x), net(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads", ["states", "zeros"])
def test_layers_of_which_the_model_asks_one_width_are_tied(kind: type[nn.RNNBase], reads: str) -> None:
    net, x = split_net(kind, 2, False, reads)
    assert [n for n in net.sites if n.startswith("rnn")] == ["rnn.layers.0"]
    randomise_gates(net)
    net.resize({"rnn.layers.0": [1, 4]})
    net.eval()
    torch.testing.assert_close(net.compact()(x), net(x), rtol=0, atol=1e-9)


def test_states_that_the_caller_reads_are_frozen() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(4, 5, num_layers=2), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Any]:
            out, states = self.rnn(x)
            return self.out(out), states

    with pytest.raises(PlasticError, match=r"nothing to gate .rnn\.layers\.0: reaches the model's output"):
        pn.PlasticNet(pn.split_recurrent(Both()), (torch.randn(5, 3, 4),))


def test_a_training_that_resumes(tmp_path: Path) -> None:
    x, y = torch.randn(24, 5, 4), torch.randn(24, 5, 3)

    def begin() -> tuple[pn.PlasticNet, torch.optim.Optimizer, pn.Schedule]:
        torch.manual_seed(0)
        net = pn.PlasticNet(pn.split_recurrent(Reader(nn.LSTM, 2, True)), (x[:3],))
        optimizer = torch.optim.Adam(net.param_groups(lr=0.01))
        return (
            net,
            optimizer,
            pn.Schedule(net, optimizer, [pn.Stage(3, k=1.0), pn.Stage(2)], budget=pn.Budget(macs=0.5)),
        )

    def epochs(net: pn.PlasticNet, optimizer: torch.optim.Optimizer, schedule: pn.Schedule, count: int) -> None:
        for _ in range(count):
            for i in torch.arange(24).split(8):
                optimizer.zero_grad()
                loss = net.expected_loss(lambda i=i: (net(x[i]) - y[i]).square().mean((1, 2)))
                (loss + schedule.penalty()).backward()
                optimizer.step()
            schedule.step()

    torch.manual_seed(7)
    whole = begin()
    torch.manual_seed(3)
    epochs(*whole, 3)
    pn.save_checkpoint([part.state_dict() for part in whole], tmp_path / "state")
    torch.manual_seed(4)
    epochs(*whole, 2)
    second = begin()
    for part, state in zip(second, pn.load_checkpoint(tmp_path / "state"), strict=True):
        part.load_state_dict(state)
    torch.manual_seed(4)
    epochs(*second, 2)
    assert [s.units.size for s in second[0].sites.values()] == [s.units.size for s in whole[0].sites.values()]
    torch.testing.assert_close(second[0].compact()(x), whole[0].compact()(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_export(format: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    net = pn.PlasticNet(pn.split_recurrent(Reader(nn.LSTM, 2, True, "last")), (torch.randn(3, 5, 4),))
    net.resize({"rnn.layers.0": [0], "rnn.layers.1": [1, 2, 4], "rnn.layers.3": [2, 3]})
    pn.export(net.compact(), tmp_path / f"small.{format}", (torch.randn(3, 5, 4),))


def test_other_places_and_what_stays() -> None:
    shared = nn.GRU(4, 4, num_layers=2)
    model = nn.ModuleDict({"a": shared, "b": shared, "one": nn.LSTM(4, 4), "wide": nn.LSTM(4, 4, 2, proj_size=2)})
    split: Any = pn.split_recurrent(model)
    assert split["a"] is split["b"]
    assert [type(m) for m in split.values()] == [pn.RecurrentStack, pn.RecurrentStack, nn.LSTM, nn.LSTM]
    assert model["a"] is shared  # the model that was given stays
    assert split["a"].layers[1].weight_hh_l0 is not shared.weight_hh_l1


class Own(nn.LSTM):
    """A subclass."""


def hooked() -> nn.Module:
    module = nn.LSTM(4, 5, 2)
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (lambda: nn.Linear(3, 2), "there is none"),
        (lambda: nn.Sequential(nn.LSTM(4, 5)), "0: it has a single layer"),
        (lambda: nn.LSTM(4, 5, 2, proj_size=3), "LSTM: its outputs are projected"),
        (lambda: Own(4, 5, 2), "a Own, which may compute something else"),
        (hooked, "it has hooks"),
        (lambda: parametrizations.weight_norm(nn.LSTM(4, 5, 2), "weight_hh_l0"), "ParametrizedLSTM"),
        (lambda: nn.utils.weight_norm(nn.LSTM(4, 5, 2), "weight_hh_l0"), "it has hooks"),
    ],
)
def test_why_nothing_can_be_split(factory: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(PlasticError, match=reason):
        pn.split_recurrent(factory())
