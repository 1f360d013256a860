"""MeanFlow on a Gaussian, whose mean velocity is known."""

import pytest
import torch
from torch import Tensor
from torch.func import jvp

from fastdiff.losses import adaptive_weight, meanflow, meanflow_target, squared_error

M, V = 0.7, 0.3  # data N(M, V) on x_t = (1 - t) x0 + t eps


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(t: Tensor) -> Tensor:
    return (1 - t).square() * V + t.square()


def velocity(x: Tensor, t: Tensor) -> Tensor:
    """The probability-flow ODE."""
    return -M + (t - (1 - t) * V) / total(t) * (x - (1 - t) * M)


def mean_velocity(x: Tensor, r: Tensor, t: Tensor) -> Tensor:
    r, t = r[:, None], t[:, None]
    x_r = (1 - r) * M + (total(r) / total(t)).sqrt() * (x - (1 - t) * M)
    return (x - x_r) / (t - r)


def test_the_exact_mean_velocity_repeats_its_target() -> None:
    x, t, r = normal(4, 3), torch.tensor([0.3, 0.6, 0.9, 1.0]).double(), torch.tensor([0.1, 0.55, 0.0, 0.0]).double()
    v = velocity(x, t[:, None])
    u, du = jvp(mean_velocity, (x, r, t), (v, torch.zeros(4).double(), torch.ones(4).double()))
    target = meanflow_target(v, du, t, r)
    torch.testing.assert_close(u, target, rtol=1e-10, atol=1e-12)
    assert meanflow(u, target).max() < 1e-20
    assert (u - v).abs().max() > 0.1  # and it is not the velocity


def test_equal_times_are_flow_matching() -> None:
    u, v, t = normal(2, 3).requires_grad_(), normal(2, 3, seed=1), torch.tensor([0.2, 0.9]).double()
    target = meanflow_target(v, normal(2, 3, seed=2), t, t)
    assert torch.equal(target, v)
    loss = meanflow(u, target, p=0.0)
    torch.testing.assert_close(loss, squared_error(u, v).sum(dim=1), rtol=1e-12, atol=0)


def test_target_closed_form_and_sign() -> None:
    """The derivative is subtracted, times t - r of its own sample."""
    t, r = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.25])
    target = meanflow_target(torch.ones(2, 3, 2), torch.full((2, 3, 2), 2.0), t, r)
    assert torch.equal(target, torch.tensor([-1.0, 0.5])[:, None, None].expand(2, 3, 2))


def test_neither_target_nor_weight_is_differentiated() -> None:
    u = normal(2, 3).requires_grad_()
    target = meanflow_target(2 * u, u, torch.ones(2), torch.zeros(2))
    assert not target.requires_grad
    c, p = 0.01, 0.75
    (got,) = torch.autograd.grad(meanflow(u, u - 1, p=p, c=c).sum(), u)
    torch.testing.assert_close(got, torch.full((2, 3), 2 * (3 + c) ** -p, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_adaptive_weight_is_taken_of_the_sum_over_elements() -> None:
    """Of the mean, c would weigh n times as much beside it."""
    squared = torch.tensor([0.0, 2.0, 200.0], dtype=torch.float64)
    torch.testing.assert_close(adaptive_weight(squared), 1 / (squared + 0.01), rtol=1e-12, atol=0)
    u, n = torch.full((1, 4, 5), 0.1).double(), 20
    want = n * 0.01 / (n * 0.01 + 0.01)
    assert meanflow(u, torch.zeros_like(u)).item() == pytest.approx(want, rel=1e-6)


def test_a_sample_ignores_the_others() -> None:
    u, v = normal(3, 4), normal(3, 4, seed=1)
    assert torch.equal(meanflow(u, v)[[2, 0]], meanflow(u[[2, 0]], v[[2, 0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    u, v = normal(2, 3).to(dtype), normal(2, 3, seed=1).to(dtype)
    t, r = torch.ones(2), torch.zeros(2)
    assert torch.equal(meanflow_target(u, v, t, r), meanflow_target(u.float(), v.float(), t, r))
    assert torch.equal(meanflow(u, v), meanflow(u.float(), v.float()))
    assert meanflow(u, v).dtype == torch.float32


def test_numerical_gradient_of_the_unweighted_loss() -> None:
    u, v = normal(2, 2).requires_grad_(), normal(2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda u: meanflow(u, v, p=0.0), (u,))
