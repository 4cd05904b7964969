"""Reference architectures, and how the command line names a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from plasticnet import PlasticError
from plasticnet.models import MLP, LeNet5, factory


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
    assert isinstance(factory("plasticnet.models:LeNet5", (), 10)(), LeNet5)


@pytest.mark.parametrize(
    "name",
    [
        "nope", "", "lenet", "mlp", "mlp:", "mlp:a", "mlp:3--4", "mlp:-3", "mlp:3.5", "torchvision:nope",
        "torchvision:", "no.such.package:f", "os:nope", "os:", "os:getcwd", "math:pi", "json:loads",
        "plasticnet.models:MLP",
        ":f",
        ".a:f",
        "mlp:0",
    ],
)  # fmt: skip
def test_bad_names(name: str) -> None:
    with pytest.raises(PlasticError) as caught:
        factory(name, (3,), 2)()
    assert name in str(caught.value)
