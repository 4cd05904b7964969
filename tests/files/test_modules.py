"""Files: what goes in comes out, equal content gives equal bytes, and whatever is wrong is a `PlasticError`."""

from __future__ import annotations

import io
import json
import math
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.nn.utils import prune, weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.testing._internal.two_tensor import TwoTensor  # a tensor of two tensors, as quantised ones are

from plasticnet import PlasticError, PlasticNet, Take, load, load_checkpoint, save, save_checkpoint
from plasticnet.apps.models import MLP
from tests.kit.networks import ConvNet, images, mlp, randomise_gates

Factory = Callable[[], nn.Module]


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.GroupNorm(4, 12), nn.Conv2d(12, 2, 1)
    )


class Tied(nn.Module):
    """Two modules hold one weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, width), nn.Linear(3, width, bias=False), nn.Linear(width, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.a(x).tanh() + self.b(x)).relu())


class Hidden(nn.Module):
    """A buffer that state_dict leaves out, and that the outputs depend on."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)
        self.register_buffer("scale", torch.rand(1, 6) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.scale)


def compacted(make: Factory, x: Tensor, inputs: tuple[str, ...] = (), k: float = math.inf, grow: int = 0) -> nn.Module:
    net = PlasticNet(make(), (x,), inputs=inputs)
    net.train()(x)  # BatchNorm's statistics move
    if grow:
        net.grow({n: grow for n in net.sites if not n.endswith(".input")}, init="random")
    else:
        randomise_gates(net)
    net.k = k
    return net.compact()


ROUND_TRIPS: dict[str, tuple[Factory, Tensor, dict[str, Any]]] = {
    "batch norm, finite k": (ConvNet, images(), {"k": 5.0}),
    "input sites": (ConvNet, images(), {"inputs": ("fc1",)}),
    "input sites of numbered modules": (lambda: mlp(5, 8, 6, 3), torch.randn(4, 5), {"inputs": ("*",)}),
    "grouped": (grouped, images(), {}),
    "grown": (ConvNet, images(), {"grow": 5}),
    "grown groups": (grouped, images(), {"grow": 3}),
}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    make, x, options = ROUND_TRIPS[name]
    small = compacted(make, x, **options)
    assert [p.shape for p in small.parameters()] != [p.shape for p in make().parameters()]
    path = tmp_path / "small.safetensors"
    save(small, path)
    again = load(path, make)
    assert not again.training
    assert torch.equal(again(x), small(x))
    state = small.state_dict()
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[n]) for n, v in again.state_dict().items())
    assert repr(again) == repr(small)  # widths, groups, Take
    assert any(isinstance(m, Take) for m in again.modules()) == ("inputs" in options)
    assert all(p.requires_grad for p in again.parameters())


def test_any_width_of_the_factory_will_do(tmp_path: Path) -> None:
    small, x = mlp(4, 7, 5, 3), torch.randn(2, 4)
    save(small, tmp_path / "m")
    for make in (lambda: mlp(4, 2, 9, 3), lambda: mlp(4, 100, 1, 3)):
        assert torch.equal(load(tmp_path / "m", make)(x), small(x))


def test_tied_parameters_stay_tied(tmp_path: Path) -> None:
    small, x = Tied(5), torch.randn(4, 3)
    save(small, tmp_path / "m")
    again = load(tmp_path / "m", Tied)
    assert torch.equal(again(x), small(x))
    assert again.a.weight is again.b.weight
    assert again.a.weight.shape == (5, 3)


def test_hidden_buffers_are_kept(tmp_path: Path) -> None:
    x = torch.randn(4, 3)
    net = PlasticNet(Hidden(), (x,))
    net.resize({"a": [1, 3, 4]})
    small = net.compact()
    save(small, tmp_path / "m")
    again = load(tmp_path / "m", Hidden)
    assert torch.equal(again(x), small(x))
    assert "scale" not in again.state_dict()


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Linear(3, 3)
        model.register_buffer("copy", model.weight.data)
        return model

    save(model := make(), tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", make).state_dict()["copy"], model.weight)


def test_equal_modules_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(3)
        save(compacted(ConvNet, images(), inputs=("fc1",), k=5.0), tmp_path / name)
    save(load(tmp_path / "a", ConvNet), tmp_path / "c")
    a, b, c = ((tmp_path / n).read_bytes() for n in "abc")
    assert a == b
    assert a == c
    save(ConvNet(), tmp_path / "d")
    assert a != (tmp_path / "d").read_bytes()


def pruned(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        prune.random_unstructured(layer, name, 0.3)
    return layer


PRUNED: dict[str, tuple[tuple[int, ...], Factory]] = {
    "bias of linear": ((4, 6), lambda: nn.Sequential(pruned(nn.Linear(6, 12), "bias"), nn.ReLU(), nn.Linear(12, 3))),
    "both of linear": (
        (4, 6),
        lambda: nn.Sequential(pruned(nn.Linear(6, 12), "weight", "bias"), nn.ReLU(), nn.Linear(12, 3)),
    ),
    "bias of convolution": (
        (4, 3, 5, 5),
        lambda: nn.Sequential(pruned(nn.Conv2d(3, 12, 3), "bias"), nn.ReLU(), nn.Conv2d(12, 3, 3)),
    ),
    "bias of transposed convolution": (
        (4, 3, 5, 5),
        lambda: nn.Sequential(pruned(nn.ConvTranspose2d(3, 12, 3), "bias", "weight"), nn.ReLU(), nn.Conv2d(12, 3, 3)),
    ),
    "bias of BatchNorm": (
        (4, 3, 5, 5),
        lambda: nn.Sequential(nn.Conv2d(3, 12, 3), pruned(nn.BatchNorm2d(12), "bias"), nn.ReLU(), nn.Conv2d(12, 3, 3)),
    ),
    "bias of GroupNorm": (
        (4, 3, 5, 5),
        lambda: nn.Sequential(nn.Conv2d(3, 12, 3), pruned(nn.GroupNorm(4, 12), "bias"), nn.ReLU(), nn.Conv2d(12, 3, 3)),
    ),
    "bias beside weight_norm": (
        (4, 6),
        lambda: nn.Sequential(pruned(weight_norm(nn.Linear(6, 12)), "bias"), nn.ReLU(), nn.Linear(12, 3)),
    ),
    "weight_norm of the bias": (
        (4, 6),
        lambda: nn.Sequential(weight_norm(nn.Linear(6, 12), "bias"), nn.ReLU(), nn.Linear(12, 3)),
    ),
}


@pytest.mark.parametrize("case", PRUNED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_what_a_hook_computes_from_other_parameters(case: str, tmp_path: Path) -> None:
    """The fresh module has a bias of the old shape until it runs, which says nothing about the file."""
    shape, make = PRUNED[case]
    x = torch.randn(shape)
    net = PlasticNet(make(), (x,)).eval()
    (site,) = net.sites.values()
    with torch.no_grad():
        site.phi[:4] = -1.0
    compact = net.compact()
    save(compact, tmp_path / "m")
    again = load(tmp_path / "m", make)
    assert torch.equal(again(x), compact(x))
    torch.testing.assert_close(again(x), net(x))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize("name", ["bias_orig", "bias_mask"])
def test_a_pruned_bias_of_another_length_is_refused(name: str, tmp_path: Path) -> None:
    module = PRUNED["bias of linear"][1]()
    layer = module[0]  # pyright: ignore[reportIndexIssue]
    wrong = torch.ones(7)
    setattr(layer, name, nn.Parameter(wrong) if name == "bias_orig" else wrong)
    save(module, tmp_path / "m")
    with pytest.raises(PlasticError, match=rf"0: {name} has shape \(7,\), for 12 outputs"):
        load(tmp_path / "m", PRUNED["bias of linear"][1])


@pytest.mark.parametrize("file", [True, False])
def test_only_what_there_is_is_named(file: bool, tmp_path: Path) -> None:
    save(nn.Linear(4, 3, bias=file), tmp_path / "m")
    with pytest.raises(PlasticError, match=rf"only the {'file' if file else 'model'} has \['bias'\]$"):
        load(tmp_path / "m", lambda: nn.Linear(4, 3, bias=not file))


class Normed(nn.Module):
    """Layers without a bias, each with a BatchNorm that can be folded into it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.up, self.norm2 = nn.ConvTranspose2d(8, 6, 2, bias=False), nn.BatchNorm2d(6)
        self.fc, self.norm3 = nn.Linear(6, 10, bias=False), nn.BatchNorm1d(10)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.up(self.norm1(self.conv(x)).relu())).relu().mean((2, 3))
        return self.out(self.norm3(self.fc(x)).relu())

    def folded(self) -> nn.Module:
        self.eval()
        self.conv = fuse_conv_bn_eval(self.conv, self.norm1)
        self.up = fuse_conv_bn_eval(self.up, self.norm2, transpose=True)
        self.fc = fuse_linear_bn_eval(self.fc, self.norm3)
        self.norm1 = self.norm2 = self.norm3 = nn.Identity()
        return self


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.weight = nn.Parameter(TwoTensor(model.weight.detach(), model.weight.detach()))
    with pytest.raises(PlasticError, match=r"weight is a TwoTensor.*before it is quantised"):
        save(model, tmp_path / "q.safetensors")


@pytest.mark.parametrize("name", ["small.pt", "small.pth", "small.ckpt"])
def test_a_name_for_torch_save_is_refused(name: str, tmp_path: Path) -> None:
    """Who reads it by torch.load would find no module in it."""
    with pytest.raises(PlasticError, match=r"torch\.load does not read: call it .*small\.safetensors"):
        save(nn.Linear(3, 2), tmp_path / name)
    assert not list(tmp_path.iterdir())


class Unread(nn.Module):
    """Calls no layer, but multiplies with weights, and leaves out what else a layer has.

    Args:
        kind: Which layer has what is never read.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.conv, self.norm = nn.Conv1d(5, 8, 1), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "cosine":
            y = F.linear(x, F.normalize(self.a.weight, dim=1))
        elif self.kind == "convolution":
            y = F.conv1d(x[..., None], self.conv.weight)[..., 0]
        else:
            y = self.a(x)
        if self.kind == "statistics":
            y = F.batch_norm(y, None, None, self.norm.weight, self.norm.bias, training=True)
        return self.head(y.relu())


@pytest.mark.parametrize("kind", ["cosine", "convolution", "statistics"])
def test_a_vector_that_the_model_does_not_read(kind: str, tmp_path: Path) -> None:
    x = torch.randn(6, 5)
    net = PlasticNet(Unread(kind), (x,)).eval()
    randomise_gates(net)
    small = net.compact()
    save(small, tmp_path / "m")
    loaded = load(tmp_path / "m", lambda: Unread(kind))
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}
    assert torch.equal(loaded(x), small(x))
    torch.testing.assert_close(loaded(x), net(x))


def test_norms_folded_after_the_cut(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Normed(), torch.randn(50, 3, 6, 6)
    model(x)
    net = PlasticNet(model, (x[:2],))
    net.resize({"conv": [0, 2, 5], "up": [1, 2], "fc": [0, 3, 6, 7]})
    small = net.compact()
    expected = small(x)
    folded = small.folded()
    torch.testing.assert_close(folded(x), expected)
    save(folded, tmp_path / "folded.safetensors")
    with pytest.raises(PlasticError, match=r"only the file has \['conv.bias'"):
        load(tmp_path / "folded.safetensors", Normed)
    loaded = load(tmp_path / "folded.safetensors", lambda: Normed().folded())
    assert torch.equal(loaded(x), folded(x))
    save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "folded.safetensors").read_bytes()


# -- files that are not right -----------------------------------------------------------------


def small_file(path: Path) -> bytes:
    save(mlp(4, 5, 3), path)
    return path.read_bytes()


def read_module(path: Path) -> Any:
    return load(path, lambda: mlp(4, 6, 3))


READERS: list[Callable[[Path], Any]] = [read_module, load_checkpoint]


@pytest.mark.parametrize("read", READERS)
def test_unreadable(read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "gone"
    with pytest.raises(PlasticError, match="gone"):
        read(path)
    with pytest.raises(PlasticError):
        read(tmp_path)
    pickled = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, pickled)
    noise = [random.Random(i).randbytes(n) for i, n in enumerate((1, 7, 8, 9, 100, 5000))]
    header = b'{"__metadata__":{"plasticnet":"'
    claims = [(n).to_bytes(8, "little") + header for n in (0, 30, 2**40, 2**64 - 1)]
    for content in (b"", *noise, *claims, pickled.getvalue(), serialise({"a": torch.zeros(2)})):
        path.write_bytes(content)
        with pytest.raises(PlasticError, match="gone"):
            read(path)


@pytest.mark.parametrize("kind", ["module", "checkpoint"])
def test_truncated(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    if kind == "module":
        data, read = small_file(path), read_module
    else:
        save_checkpoint({"a": torch.arange(5), "b": [1, 2]}, path)
        data, read = path.read_bytes(), load_checkpoint
    read(path)
    for length in (*range(0, len(data), 11), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(PlasticError):
            read(path)


def test_one_kind_for_the_other(tmp_path: Path) -> None:
    small_file(tmp_path / "module")
    save_checkpoint({}, tmp_path / "checkpoint")
    with pytest.raises(PlasticError, match=r"module.*expected.*checkpoint"):
        load_checkpoint(tmp_path / "module")
    with pytest.raises(PlasticError, match=r"checkpoint.*expected.*module"):
        read_module(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 5), nn.BatchNorm2d(6)), ["0", r"\(5, 5\)", r"\(6, 3, 3, 3\)"]),
        (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), [r"0\.weight", r"3, 3, 3\)", r"6, 3, 3\) in"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3)), ["Sequential has no '1'"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)), [r"the file has \['0\.bias'\]"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Linear(2, 2)), [r"2\.weight", r"2\.bias"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6)), [r"1\.num_features"]),
        (lambda: nn.Identity(), ["Identity", "'0'"]),
    ],
)  # fmt: skip
def test_another_architecture_is_named(make: Factory, parts: list[str], tmp_path: Path) -> None:
    save(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)), tmp_path / "m")
    with pytest.raises(PlasticError) as caught:
        load(tmp_path / "m", make)
    for part in parts:
        assert caught.match(part)


def test_factory_of_something_else(tmp_path: Path) -> None:
    small_file(tmp_path / "m")
    with pytest.raises(PlasticError, match="factory returned a dict"):
        load(tmp_path / "m", dict)  # pyright: ignore[reportArgumentType]


# -- files that were tampered with ------------------------------------------------------------


def tamper(path: Path, recipe: Callable[[dict], Any], tensors: Callable[[dict], Any]) -> None:
    with safe_open(path, framework="pt") as f:
        data = json.loads(f.metadata()["plasticnet"])
    values = load_file(path)
    data.pop("checksum", None)  # as of a file of format 1, so that it is not the checksum that tells the change
    data["format"] = 1
    recipe(data)
    tensors(values)
    path.write_bytes(serialise(values, {"plasticnet": json.dumps(data)}))


def nothing(_: dict) -> None:
    """Leave it as it is."""


def widths(module: str, **values: Any) -> Callable[[dict], Any]:
    return lambda recipe: recipe["attributes"].setdefault(module, {}).update(values)


def tensor(name: str, value: Tensor) -> Callable[[dict], Any]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "tensors"),
    [
        pytest.param(widths("conv", training=0), nothing, id="training"),
        pytest.param(widths("conv", padding_mode="zeros"), nothing, id="padding_mode"),
        pytest.param(widths("conv", __class__=3), nothing, id="class"),
        pytest.param(widths("conv", forward=3), nothing, id="forward"),
        pytest.param(widths("conv", in_features=4), nothing, id="of another kind of module"),
        pytest.param(widths("conv", out_channels=-12), nothing, id="negative"),
        pytest.param(widths("conv", out_channels=0), nothing, id="no channels"),
        pytest.param(widths("conv", out_channels=12.0), nothing, id="float"),
        pytest.param(widths("conv", out_channels="12"), nothing, id="string"),
        pytest.param(widths("conv", out_channels=None), nothing, id="null"),
        pytest.param(widths("conv", out_channels=11), nothing, id="wrong"),
        pytest.param(widths("fc", in_features=10**30), nothing, id="huge"),
        pytest.param(widths("conv", groups=2), nothing, id="groups"),
        pytest.param(widths("nope", out_features=3), nothing, id="a module that is not there"),
        pytest.param(lambda r: r["attributes"].update(fc=[1]), nothing, id="widths that are a list"),
        pytest.param(lambda r: r.update(attributes=3), nothing, id="attributes that are a number"),
        pytest.param(lambda r: r.pop("takes"), nothing, id="no takes"),
        pytest.param(lambda r: r.update(format=99), nothing, id="another format"),
        pytest.param(lambda r: r["takes"].update(no=-1), tensor("no.0.indices", torch.arange(2)), id="Take on none"),
        pytest.param(lambda r: r["takes"].update(conv=1), nothing, id="Take without indices"),
        pytest.param(lambda r: r["takes"].update(fc="x"), nothing, id="Take along x"),
        pytest.param(nothing, tensor("fc.0.indices", torch.rand(5)), id="indices of floats"),
        pytest.param(nothing, tensor("fc.0.indices", torch.arange(5, dtype=torch.int32)), id="indices of int32"),
        pytest.param(nothing, tensor("fc.0.indices", torch.arange(6).reshape(2, 3)), id="indices of rank 2"),
        pytest.param(nothing, tensor("extra", torch.zeros(3)), id="a tensor too many"),
        pytest.param(nothing, lambda t: t.pop("conv.bias"), id="a tensor too few"),
        pytest.param(nothing, tensor("conv.weight", torch.zeros(12)), id="a tensor of another rank"),
        pytest.param(nothing, tensor("conv.weight", torch.zeros(12, 3, 3, 3)), id="a tensor of another shape"),
        pytest.param(widths("norm", num_channels=0), nothing, id="no channels to normalise"),
        pytest.param(widths("norm", num_groups=5), nothing, id="groups that do not divide the channels"),
        pytest.param(widths("first", groups=True), nothing, id="true"),
        pytest.param(nothing, tensor("first.weight", torch.ones(8, 3, 1, 1).long()), id="integer weights"),
        pytest.param(nothing, tensor("conv.bias", torch.zeros(11)), id="a bias that does not fit"),
        pytest.param(nothing, tensor("fc.0.indices", torch.arange(4)), id="too few indices"),
        pytest.param(nothing, tensor("fc.0.indices", -torch.arange(5)), id="negative indices"),
        pytest.param(lambda r: r.update(resized=3), nothing, id="resized dimensions that are a number"),
        pytest.param(lambda r: r["resized"].append("ab"), nothing, id="a resized dimension that is a text"),
        pytest.param(lambda r: r["resized"].append(["a"]), nothing, id="a resized tensor without a dimension"),
        pytest.param(lambda r: r["resized"].append([["a"], 0]), nothing, id="a resized tensor without a name"),
        pytest.param(lambda r: r["resized"].append(["a", 0.0]), nothing, id="a resized dimension that is no whole one"),
        pytest.param(lambda r: r["resized"].append([{}, {}]), nothing, id="a resized dimension that is a dict"),
    ],
)  # fmt: skip
def test_tampered(recipe: Callable[[dict], Any], tensors: Callable[[dict], Any], tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1, groups=4)
            self.norm, self.fc = nn.GroupNorm(4, 12), nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(self.conv(self.first(x))).mean((2, 3)))

    net = PlasticNet(Net(), (images(),), inputs=("fc",))
    net.resize({"fc.input": [0, 3, 4, 7, 9]})
    path = tmp_path / "m"
    save(net.compact(), path)
    tamper(path, nothing, nothing)
    load(path, Net)(images())
    tamper(path, recipe, tensors)
    with pytest.raises(PlasticError, match="m"):
        load(path, Net)


def test_many_resized_dimensions_and_many_tensors_do_not_multiply(tmp_path: Path) -> None:
    """A crafted file may say of many dimensions that they were resized, and the model may have many, too."""

    def seconds(pairs: int, layers: int) -> float:
        def factory() -> nn.Module:
            return nn.Sequential(*(nn.Linear(2, 2) for _ in range(layers)))

        save(factory(), tmp_path / "m")
        tamper(tmp_path / "m", lambda recipe: recipe.update(resized=[["a", 0]] * pairs), nothing)
        begun = time.process_time()
        load(tmp_path / "m", factory)
        return time.process_time() - begun

    both, one, other = (min(seconds(*size) for _ in range(3)) for size in ((40_000, 200), (40_000, 1), (1, 200)))
    assert both < 3 * (one + other)


def mutations(data: bytes) -> Iterator[bytes]:
    """One byte of the header changed, each of them in two ways."""
    for i in range(8 + int.from_bytes(data[:8], "little")):
        for new in (b'"I', b"0\xff")[i % 2] if data[i : i + 2] != b"F3" else b'I"':
            if data[i] != new:
                yield data[:i] + bytes([new]) + data[i + 1 :]


def test_any_damaged_module_is_refused_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "m"
    refused = 0
    for content in mutations(small_file(path)):
        path.write_bytes(content)
        try:
            assert isinstance(read_module(path), nn.Module)
        except PlasticError:
            refused += 1
    assert refused > 500


def test_any_damaged_checkpoint_is_refused_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint({"a": torch.rand(3), 1: [(2.5, None), True, {"x": torch.arange(4)}], "inf": math.inf}, path)
    refused = 0
    for content in mutations(path.read_bytes()):
        path.write_bytes(content)
        try:
            load_checkpoint(path)
        except PlasticError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    "tree",
    ['{"tensor": "nope"}', '{"tensor": []}', '{"dict": 3}', '{"dict": [[1]]}', '{"dict": [[{"list": []}, 1]]}',
     '{"set": []}', '{"list": 3}', "{}", '{"list": [], "tuple": []}'],
)  # fmt: skip
def test_tampered_checkpoint(tree: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(
        serialise({}, {"plasticnet": json.dumps({"format": 1, "kind": "checkpoint", "tree": json.loads(tree)})})
    )
    with pytest.raises(PlasticError, match="damaged"):
        load_checkpoint(path)


def test_deep_checkpoint(tmp_path: Path) -> None:
    for depth in (*range(300, 520, 4), 1000, 100_000):
        tree = '{"list":[' * depth + "]}" * depth
        path = tmp_path / "c"
        path.write_bytes(serialise({}, {"plasticnet": f'{{"format":1,"kind":"checkpoint","tree":{tree}}}'}))
        try:
            load_checkpoint(path)
        except PlasticError:
            continue
        assert depth < 1000


# -- checkpoints ------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(type(k) is type(n) for k, n in zip(a, b, strict=True)) and all(
            same(a[k], b[k]) for k in a
        )  # fmt: skip
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree = {
        "numbers": {0: 1, -3: 2.5, 10**25: "x", (1, "a"): [], None: True, 1.5: False},
        "floats": [math.inf, -math.inf, math.nan, 0.1, 1e-320],
        "tuples": ((), (1, (2.0, [3])), {"betas": (0.9, 0.99)}),
        "tensors": [torch.zeros(0), torch.tensor(3), torch.rand(2, 3).half(), torch.get_rng_state(), torch.rand(2) > 0],
        "strided": [shared[::2], shared.reshape(2, 3).t(), shared],
        "names": {"dict": {"tensor": "000000"}, "list": "tuple", "": "ü \x00 \U0001f600"},
    }
    save_checkpoint(tree, tmp_path / "c")
    again = load_checkpoint(tmp_path / "c")
    assert same(again, tree)
    assert not same(again, {**tree, "floats": tree["floats"][::-1]})
    save_checkpoint(again, tmp_path / "d")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "d").read_bytes()


@pytest.mark.parametrize("value", [{1, 2}, 3j, b"bytes", object(), nn.Linear(1, 1), range(3), lambda: 0])
def test_unsupported_types_are_refused(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint({"old": 1}, path)
    with pytest.raises(PlasticError, match=type(value).__name__):
        save_checkpoint({"a": [value]}, path)
    assert load_checkpoint(path) == {"old": 1}


# -- writing ----------------------------------------------------------------------------------


@contextmanager
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond 200 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


WRITERS = [lambda path: save(ConvNet(), path), lambda path: save_checkpoint([torch.rand(1000)], path)]


@pytest.mark.parametrize("write", WRITERS)
def test_a_failing_write_leaves_the_old_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "m"
    before = small_file(path)
    with full_disk(), pytest.raises(PlasticError, match="m cannot be written"):
        write(path)
    assert path.read_bytes() == before
    write(path)
    assert path.read_bytes() != before
    assert os.listdir(tmp_path) == ["m"]


def test_a_failing_write_leaves_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(PlasticError, match="cannot be written"):
        save(ConvNet(), tmp_path / "gone" / "m")
    with full_disk(), pytest.raises(PlasticError, match="m cannot be written"):
        save(ConvNet(), tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_what_no_resize_touches_must_fit(tmp_path: Path) -> None:
    """The file of a network with 5 outputs does not load into one with 7."""
    net = PlasticNet(MLP([4, 6, 5]), (torch.randn(2, 4),))
    net.resize({"1": [0, 2]})
    save(net.compact(), tmp_path / "m")
    assert load(tmp_path / "m", lambda: MLP([4, 9, 5]))(torch.randn(1, 4)).shape == (1, 5)
    with pytest.raises(PlasticError, match=r"3.weight has shape \(5, 2\) in the file, \(7, 6\)"):
        load(tmp_path / "m", lambda: MLP([4, 6, 7]))
    save(load(tmp_path / "m", lambda: MLP([4, 6, 5])), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "m").read_bytes()


def test_what_is_not_saved_or_loaded(tmp_path: Path) -> None:
    net = PlasticNet(MLP([4, 6, 5]), (torch.randn(2, 4),))
    with pytest.raises(PlasticError, match="compact"):
        save(net, tmp_path / "m")
    save(net.compact(), tmp_path / "m")
    with pytest.raises(PlasticError, match="takes a factory"):
        load(tmp_path / "m", MLP([4, 6, 5]))


class Shaped(nn.Module):
    """A layer whose output is laid out by an attribute that holds its width beside other entries."""

    def __init__(self, shape: Any, way: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)
        self.shape, self.way = shape, way

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        match self.way:
            case "view":
                h = h.view(self.shape)
            case "last":
                h = h.view(h.shape[0], self.shape[-1])
            case "expand":
                h = h + torch.zeros(1, 1, dtype=h.dtype).expand(self.shape)
        return self.b(h.tanh())


SHAPES: dict[str, tuple[Factory, Any]] = {
    "tuple": (lambda: Shaped((-1, 8), "view"), (-1, 3)),
    "list": (lambda: Shaped([-1, 8], "view"), [-1, 3]),
    "expand": (lambda: Shaped([-1, 8], "expand"), [-1, 3]),
    "none": (lambda: Shaped((None, 8), "last"), (None, 3)),
    "zero": (lambda: Shaped([0, 8], "last"), [0, 3]),
    "word": (lambda: Shaped(("width", True, 8), "last"), ("width", True, 3)),
    "numbers": (lambda: Shaped((1, 8), "last"), (1, 3)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_widths_beside_other_entries(name: str, tmp_path: Path) -> None:
    make, expected = SHAPES[name]
    x = torch.randn(4, 3)
    net = PlasticNet(make(), (x,))
    net.resize({"a": [1, 3, 4]})
    small = net.compact()
    assert small.shape == expected
    save(small, tmp_path / "m")
    again = load(tmp_path / "m", make)
    assert torch.equal(again(x), small(x))
    assert again.shape == expected
    assert type(again.shape) is type(expected)


@pytest.mark.parametrize("other", [(8, -1), (-1, 8, 1), (2, 8), [-1, "8"], 8, (-1, -1)])
def test_other_entries_must_be_those_of_the_factory(other: Any, tmp_path: Path) -> None:
    net = PlasticNet(Shaped((-1, 8), "view"), (torch.randn(4, 3),))
    net.resize({"a": [1, 3, 4]})
    save(net.compact(), tmp_path / "m")
    with pytest.raises(PlasticError, match="may not set"):
        load(tmp_path / "m", lambda: Shaped(other, "view"))


def test_the_shape_of_an_unflatten(tmp_path: Path) -> None:
    def make() -> nn.Module:
        layers = nn.Linear(3, 8), nn.Unflatten(1, (-1, 8)), nn.Flatten(), nn.Tanh(), nn.Linear(8, 2)
        return nn.Sequential(*layers)

    x = torch.randn(4, 3)
    net = PlasticNet(make(), (x,))
    net.resize({"0": [1, 3, 4]})
    small = net.compact()
    assert tuple(small[1].unflattened_size) == (-1, 3)
    save(small, tmp_path / "m")
    assert torch.equal(load(tmp_path / "m", make)(x), small(x))


@pytest.mark.parametrize("which", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_layers_that_torch_prunes(which: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    """Their weight or bias is computed at every call, and until then that of the architecture is there."""

    def build() -> nn.Module:
        if kind == "linear":
            layers = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
        else:
            layers = nn.Sequential(nn.Conv1d(4, 12, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))
        for name in which:
            torch.nn.utils.prune.random_unstructured(layers[0], name, 0.3)
        return layers

    x = torch.randn(5, 4) if kind == "linear" else torch.randn(5, 4, 2)
    net = PlasticNet(build(), (x,))
    net.resize({"0": [0, 3, 4, 7, 11]})
    small = net.compact()
    save(small, tmp_path / "small.safetensors")
    torch.testing.assert_close(load(tmp_path / "small.safetensors", build)(x), small(x))
