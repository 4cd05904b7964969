"""Products of half precision on a CPU without instructions for them: widened, and rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from plasticnet.tools.half import products_in_single


class Seen(TorchDispatchMode):
    """Notes in which precision products are computed. It must be entered before what changes them."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = set[torch.dtype]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm"):
            self.kinds.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), torch.autograd.grad(y.float().square().sum(), x)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_the_exact_product_rounded_also_in_the_backward_pass(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plasticnet.tools.half.has_half_products", lambda _: False)
    model, x = nn.Linear(64, 32).to(dtype), torch.randn(4, 5, 64).to(dtype)
    wide = nn.Linear(64, 32).double()
    wide.load_state_dict(model.double().state_dict())
    model.to(dtype)
    with Seen() as seen, products_in_single(model):
        y, gradient = run(model, x)
    assert seen.kinds == {torch.float32}
    exact, _ = run(wide, x.double())
    near = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=near, atol=near)
    plain, own = run(model, x)
    torch.testing.assert_close(y, plain, rtol=2 * near, atol=2 * near)
    torch.testing.assert_close(gradient, own, rtol=4 * near, atol=8 * near)


@pytest.mark.parametrize(("dtype", "able"), [(torch.float32, False), (torch.float64, False), (torch.bfloat16, True)])
def test_elsewhere_nothing_changes(dtype: torch.dtype, able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plasticnet.tools.half.has_half_products", lambda _: able)
    model, x = nn.Linear(6, 4).to(dtype), torch.randn(3, 6).to(dtype)
    with Seen() as seen, products_in_single(model):
        found = run(model, x)
    assert seen.kinds == {dtype}
    assert all(map(torch.equal, found, run(model, x)))
