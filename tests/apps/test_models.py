"""Reference architectures, and how the command line names a model."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from plasticnet import PlasticError, PlasticNet
from plasticnet.apps.models import MLP, LeNet5, build_model, example_inputs, factory, takes_classes


def test_mlp_flattens_and_ends_linear() -> None:
    model = factory("mlp:7-5", (1, 3, 4), 2)()
    assert [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)] == [
        (12, 7), (7, 5), (5, 2),
    ]  # fmt: skip
    assert [type(m).__name__ for m in MLP([3, 2, 2])] == ["Flatten", "Linear", "ReLU", "Linear"]
    assert model(torch.randn(6, 1, 3, 4)).shape == (6, 2)


def test_lenet5_is_20_50_500() -> None:
    model = factory("lenet5", (1, 28, 28), 10)()
    assert isinstance(model, LeNet5)
    assert sum(p.numel() for p in model.parameters()) == 431_080
    assert model(torch.randn(3, 1, 28, 28)).shape == (3, 10)


def test_a_factory_builds_anew() -> None:
    make = factory("mlp:4", (3,), 2)
    assert make() is not make()
    assert next(make().parameters()) is not next(make().parameters())


def test_models_of_other_packages() -> None:
    assert type(factory("torchvision:resnet18", (3, 64, 64), 10)()).__name__ == "ResNet"
    assert isinstance(factory("plasticnet.apps.models:LeNet5", (), 10)(), LeNet5)


def counted(num_classes: int = 4) -> nn.Module:
    return nn.Linear(3, num_classes)


def test_models_of_others_get_the_number_of_classes() -> None:
    """Where they take it; with None they keep their own."""
    own = f"{__name__}:counted"
    for name, layer in (("torchvision:resnet18", "fc"), (own, "")):
        assert takes_classes(name)
        assert factory(name, (3, 64, 64), 7)().get_submodule(layer).out_features == 7
        assert factory(name, (3, 64, 64), None)().get_submodule(layer).out_features == (1000 if layer else 4)
    assert not takes_classes("plasticnet.apps.models:LeNet5")
    assert factory("lenet5", (1, 28, 28), 7)()(torch.randn(1, 1, 28, 28)).shape == (1, 7)


def test_an_mlp_without_widths_begins_with_three_units() -> None:
    sizes = [layer.out_features for layer in factory("mlp", (4,), 2)().modules() if isinstance(layer, nn.Linear)]
    assert sizes == [3, 3, 2]


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 32, 32), (7,)])
def test_lenet5_reads_its_own_images_only(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlasticError, match=r"lenet5 reads images of the shape \(1, 28, 28\).*--image-size 28"):
        factory("lenet5", shape, 10)


@pytest.mark.parametrize(
    "name",
    [
        "nope", "", "lenet", "mlp:", "mlp:a", "mlp:3--4", "mlp:-3", "mlp:3.5", "torchvision:nope",
        "torchvision:", "no.such.package:f", "os:nope", "os:", "os:getcwd", "math:pi", "json:loads",
        "plasticnet.apps.models:MLP",
        ":f",
        ".a:f",
        "timm:nope",
        "transformers:nope",
        "transformers:",
        "transformers:clip",  # two models in one
        "mlp:0",
    ],
)  # fmt: skip
def test_bad_names(name: str) -> None:
    library = name.partition(":")[0]
    if library in ("timm", "transformers"):
        pytest.importorskip(library)
    with pytest.raises(PlasticError) as caught:
        factory(name, (3,), 2)()
    assert name in str(caught.value)


@pytest.mark.parametrize("package", ["torchvision", "timm", "transformers"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PlasticError, match=f"pip install {package}"):
        factory(f"{package}:resnet18", (3, 8, 8), 10)


# -- what they read ---------------------------------------------------------------------------


def shapes(name: str, shape: tuple[int, ...] | None = None) -> object:
    """The shapes of a model's example inputs, which it is also run on."""
    model = factory(name, (1, 28, 28), 10)().eval()
    found = example_inputs(name, model, shape)
    if isinstance(found, Mapping):
        model(**found)
        return {n: tuple(t.shape) for n, t in found.items()}
    model(*found)
    return tuple(found[0].shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet5", (1, 1, 28, 28)),
        ("mlp:4", (1, 1, 28, 28)),
        ("torchvision:resnet18", (1, 3, 224, 224)),
        ("torchvision:inception_v3", (1, 3, 299, 299)),
        ("timm:resnet18", (1, 3, 224, 224)),
        ("timm:inception_v3", (1, 3, 299, 299)),
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization of inception_v3")
def test_images(name: str, shape: tuple[int, ...]) -> None:
    pytest.importorskip("timm" if name.startswith("timm") else "torch")
    assert shapes(name) == shape


TEXT = ["bert", "roberta", "distilbert", "electra", "gpt2", "opt", "llama", "mistral", "qwen2", "gemma", "phi", "bloom"]


@pytest.mark.parametrize("kind", [*TEXT, "t5", "bart", "vit", "deit", "swin", "convnext"])
def test_tiny_transformers(kind: str) -> None:
    pytest.importorskip("transformers")
    name = f"transformers:{kind}"
    model = factory(name, (), 0)()
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    ids, pixels = {"input_ids": (2, 8)}, {"pixel_values": (2, 3, 64, 64)}
    decoded = {**ids, "decoder_input_ids": (2, 8)} if kind in ("t5", "bart") else ids
    assert shapes(name) == (decoded if kind in (*TEXT, "t5", "bart") else pixels)


def test_the_shape_may_be_given() -> None:
    pytest.importorskip("transformers")
    assert shapes("transformers:bert", (3, 5)) == {"input_ids": (3, 5)}
    assert shapes("transformers:vit", (1, 3, 64, 64)) == {"pixel_values": (1, 3, 64, 64)}
    assert shapes("torchvision:resnet18", (2, 3, 40, 40)) == (2, 3, 40, 40)


def test_queries_share_keys_where_the_config_has_them() -> None:
    pytest.importorskip("transformers")
    config = factory("transformers:llama", (), 0)().config
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)


def test_a_factory_of_the_users_own_must_be_told_its_input() -> None:
    name = "plasticnet.apps.models:LeNet5"
    with pytest.raises(PlasticError, match="--input"):
        example_inputs(name, LeNet5())
    assert example_inputs(name, LeNet5(), (2, 1, 28, 28))[0].shape == (2, 1, 28, 28)


def test_other_inputs_than_text_and_images_are_refused() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(PlasticError, match="reads input_features"):
        example_inputs("transformers:whisper", build_model(factory("transformers:whisper", (), 0), meta=True))


# -- without memory ---------------------------------------------------------------------------


class Reads(nn.Module):
    """A constructor that reads a value that it has computed, which the meta device cannot give."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, int(torch.ones(3).sum().item()))


def test_built_on_the_meta_device() -> None:
    for name in ("lenet5", f"{__name__}:Reads"):
        model = build_model(factory(name, (), 10), meta=True)
        assert all(p.is_meta for p in model.parameters())
        assert example_inputs("lenet5", model)[0].is_meta  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_llama_7b_in_seconds() -> None:
    pytest.importorskip("transformers")
    name = "transformers:llama"
    model = build_model(factory(name, (), 0, full=True), meta=True)
    net = PlasticNet(model, example_inputs(name, model))
    assert not net.checked
    summary = net.summary()
    assert summary.parameters == 6_607_343_616
    assert [row[:3] for row in summary.rows()] == [
        ("layers.[0-31]", "", ""), ("  self_attn.q_proj", "32", "2,097,152"), ("  mlp.gate_proj", "11,008", "12,288"),
    ]  # fmt: skip
