"""Distances to a target."""

import pytest
import torch

from fastdiff.losses import huber_constant, pseudo_huber, pseudo_huber_norm, squared_error


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


def test_pseudo_huber_norm_closed_form_per_sample() -> None:
    a = torch.tensor([[[1.0, 2.0], [2.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert torch.equal(pseudo_huber_norm(a, torch.zeros_like(a), c=12.0), torch.tensor([1.0, 0.0]))


def test_the_norm_needs_a_constant_that_grows_with_the_size() -> None:
    """Equal errors d: sqrt(n d^2 + n c^2) - sqrt(n) c is sqrt(n) times the elementwise value."""
    d, n = torch.full((2, 16), 0.3, dtype=torch.float64), 16
    per_sample = pseudo_huber_norm(d, torch.zeros_like(d), c=0.1 * n**0.5)
    torch.testing.assert_close(per_sample, n**0.5 * pseudo_huber(d, torch.zeros_like(d), c=0.1)[:, 0], rtol=1e-12, atol=0)
    assert huber_constant(3 * 32 * 32) == pytest.approx(0.00054 * 3072**0.5, rel=1e-12)


def test_the_plain_norm_has_no_nan_where_both_agree() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    value = pseudo_huber_norm(x, torch.zeros(2, 2), c=0.0)
    assert value.tolist() == [5, 0]
    (gradient,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_pseudo_huber_norm_numerical_gradient() -> None:
    a, b = (x[:4].reshape(2, 2).requires_grad_() for x in pair())
    assert torch.autograd.gradcheck(lambda x, y: pseudo_huber_norm(x, y, c=0.1), (a, b))
