"""Fake quantisation by torch.ao: exact with fixed ranges, frozen while it observes ranges."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao import quantization

import plasticnet as pn
from tests.kit.adversarial_checks import check_exact

OBSERVED = "takes the range of all entries"


def prepared(per_tensor: bool, observing: bool, backend: str = "fbgemm") -> nn.Module:
    """Return a network that was prepared for quantisation-aware training, with ranges from one batch."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).train()
    weight = quantization.FakeQuantize.with_args(
        observer=quantization.MinMaxObserver, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
    )
    activation = quantization.FakeQuantize.with_args(observer=quantization.MovingAverageMinMaxObserver)
    own = quantization.QConfig(activation, weight)
    model.qconfig = own if per_tensor else quantization.get_default_qat_qconfig(backend)
    quantization.prepare_qat(model, inplace=True)
    model(torch.randn(64, 6))
    if not observing:
        model.apply(quantization.disable_observer)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("per_tensor", "backend"), [(True, "fbgemm"), (False, "fbgemm"), (False, "qnnpack")])
def test_ranges_that_are_fixed(per_tensor: bool, backend: str) -> None:
    x = torch.randn(5, 6)
    net = pn.PlasticNet(prepared(per_tensor, observing=False, backend=backend), (x,))
    assert {n: len(s) for n, s in net.sites.items()} == {"0": 16, "2": 12}
    check_exact(net, (x,), net.eval()(x), tolerance=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("per_tensor", [True, False])
def test_ranges_that_are_observed(per_tensor: bool) -> None:
    with pytest.raises(pn.PlasticError, match=f"nothing to gate.*{OBSERVED}"):
        pn.PlasticNet(prepared(per_tensor, observing=True), (torch.randn(5, 6),))
