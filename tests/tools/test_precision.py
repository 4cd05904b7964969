"""A product that autocast leaves alone, in the forward pass and in the backward pass."""

from __future__ import annotations

import pytest
import torch

from plasticnet.tools.precision import full_precision, product


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_it_is_the_product_and_has_its_gradients(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(product(matrix, vector), matrix @ vector)
    torch.autograd.gradcheck(product, (matrix, vector))
    torch.autograd.gradgradcheck(product, (matrix, vector))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    matrix, vector = torch.rand(3, 400) * 1e4, (torch.rand(400) * 1e4).requires_grad_()
    plain = product(matrix, vector)
    (gradient,) = torch.autograd.grad(plain.sum() * 1e3, vector)
    with torch.autocast("cpu", dtype):
        cast = product(matrix, vector)
        (cast_gradient,) = torch.autograd.grad(cast.sum() * 1e3, vector)
    assert torch.equal(cast, plain)
    assert torch.equal(cast_gradient, gradient)


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps", "meta"])
def test_no_autocast_within(device_type: str) -> None:
    with torch.autocast("cpu", torch.bfloat16), full_precision(device_type):
        assert torch.is_autocast_enabled("cpu") is (device_type != "cpu")
