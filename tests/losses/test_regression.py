"""Distances to a target."""

import pytest
import torch

from fastdiff.losses import pseudo_huber, squared_error


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a, b


def gradient(distance: torch.Tensor, c: float) -> torch.Tensor:
    x = distance.clone().requires_grad_()
    pseudo_huber(x, torch.zeros_like(x), c=c).sum().backward()
    return x.grad


def test_squared_error_closed_form() -> None:
    assert torch.equal(squared_error(torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])), torch.tensor([4.0, 9.0]))


def test_pseudo_huber_closed_form() -> None:
    """sqrt(3^2 + 4^2) - 4 = 1, and zero at zero."""
    assert torch.equal(pseudo_huber(torch.tensor([7.0, 4.0]), torch.tensor([4.0, 4.0]), c=4.0), torch.tensor([1.0, 0.0]))


def test_small_c_is_the_absolute_value() -> None:
    d = torch.tensor([-2.0, -0.5, 0.25, 3.0], dtype=torch.float64)
    torch.testing.assert_close(pseudo_huber(d, torch.zeros(4).double(), c=1e-6), d.abs(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(d, 1e-6), d.sign(), rtol=1e-10, atol=0)


def test_large_c_is_half_the_square_over_c() -> None:
    d, c = torch.tensor([-2.0, -0.5, 0.25, 3.0], dtype=torch.float64), 1e4
    torch.testing.assert_close(pseudo_huber(d, torch.zeros(4).double(), c=c), d.square() / (2 * c), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient(d, c), d / c, rtol=1e-6, atol=0)


def test_gradient_is_d_over_root_and_zero_at_zero() -> None:
    d, c = torch.tensor([-2.0, 0.0, 0.1, 3.0], dtype=torch.float64), 0.1
    torch.testing.assert_close(gradient(d, c), d / (d.square() + c**2).sqrt(), rtol=1e-12, atol=0)


def test_distances_are_elementwise_and_symmetric() -> None:
    a, b = pair()
    for distance in (squared_error, lambda x, y: pseudo_huber(x, y, c=0.3)):
        assert torch.equal(distance(a, b), distance(b, a))
        assert torch.equal(distance(a, b)[2], distance(a[2], b[2]))


def test_numerical_gradient_with_respect_to_both() -> None:
    a, b = (x.requires_grad_() for x in pair())
    assert torch.autograd.gradcheck(squared_error, (a, b))
    assert torch.autograd.gradcheck(lambda x, y: pseudo_huber(x, y, c=0.1), (a, b))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 sqrt(d^2 + c^2) - c of a small d is zero."""
    a, b = (x.to(dtype) for x in pair())
    for distance in (squared_error, lambda x, y: pseudo_huber(x, y, c=0.1)):
        assert distance(a, b).dtype == torch.float32
        assert torch.equal(distance(a, b), distance(a.float(), b.float()))
