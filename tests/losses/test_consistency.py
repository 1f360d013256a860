"""Consistency losses on a Gaussian, whose consistency function is known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastdiff.losses import (
    consistency,
    consistency_boundary,
    easy_consistency_time,
    huber_constant,
    improved_consistency,
    latent_consistency,
    latent_consistency_boundary,
    reduce,
)

M, V = 0.7, 0.3  # data N(M, V) in every element


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flow_map(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
    """The exact probability-flow ODE from noise level t to u (variance exploding)."""
    return M + ((V + u**2) / (V + t**2)).sqrt() * (x - M)


# --- the boundary


def test_boundary_coefficients_are_the_papers() -> None:
    sigma, sd = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64), 0.5
    skip, out = consistency_boundary(sigma, sigma_min=0.002)
    torch.testing.assert_close(skip, sd**2 / ((sigma - 0.002) ** 2 + sd**2), rtol=1e-12, atol=0)
    torch.testing.assert_close(out, sd * (sigma - 0.002) / (sigma**2 + sd**2).sqrt(), rtol=1e-12, atol=0)
    skip, out = consistency_boundary(sigma)
    torch.testing.assert_close(skip, sd**2 / (sigma**2 + sd**2), rtol=1e-12, atol=0)
    torch.testing.assert_close(out, sigma * sd / (sigma**2 + sd**2).sqrt(), rtol=1e-12, atol=0)
    skip, out = latent_consistency_boundary(torch.tensor([0, 1, 999]))
    torch.testing.assert_close(skip, torch.tensor([1.0, 0.25 / 100.25, 0.25 / (9990.0**2 + 0.25)]), rtol=1e-6, atol=0)
    torch.testing.assert_close(out, torch.tensor([0.0, 10 / 100.25**0.5, 1.0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_boundary_is_exact_to_the_bit(dtype: torch.dtype) -> None:
    x, f = normal(3).to(dtype), normal(3, seed=1).to(dtype)
    zero = torch.zeros(1, dtype=dtype)
    for skip, out in (
        consistency_boundary(zero),
        latent_consistency_boundary(zero),
        consistency_boundary(torch.tensor([0.002]), sigma_min=0.002),
    ):
        assert torch.equal((skip * x + out * f).to(dtype), x)


# --- the losses


def test_exact_consistency_function_has_zero_loss_on_an_exact_teacher_step() -> None:
    x0, eps, t, r = normal(4, 3), normal(4, 3, seed=1), torch.tensor([[2.0]]).double(), torch.tensor([[1.5]]).double()
    x_t, zero = x0 + t * eps, torch.zeros(1, 1).double()
    prediction, target = flow_map(x_t, t, zero), flow_map(flow_map(x_t, t, r), r, zero)
    for loss in (
        consistency(prediction, target),
        consistency(prediction, target, norm="absolute"),
        latent_consistency(prediction, target),
    ):
        assert loss.abs().max() < 1e-14
    assert improved_consistency(prediction, target, torch.full((4,), 2.0), torch.full((4,), 1.5)).abs().max() < 1e-13
    fresh = flow_map(x0 + r * normal(4, 3, seed=2), r, zero)  # CT with other noise in the second pass
    assert consistency(prediction, fresh).mean() > 1e-2


def test_one_ddim_step_is_exact_for_a_point_mass_and_second_order_for_a_gaussian() -> None:
    """LCM's target: halving the step divides |f(x_u, u) - f(x_t, t)| by four."""

    def error(variance: float, step: float) -> float:
        t = torch.tensor(0.8, dtype=torch.float64)
        u = t - step
        x_t = t.cos() * M + normal(5)
        total_t, total_u = t.cos() ** 2 * variance + t.sin() ** 2, u.cos() ** 2 * variance + u.sin() ** 2
        x0 = (t.cos() * variance * x_t + t.sin() ** 2 * M) / total_t
        x_u = u.cos() * x0 + u.sin() * (x_t - t.cos() * x0) / t.sin()
        f_t = M + (variance / total_t).sqrt() * (x_t - t.cos() * M)
        f_u = M + (variance / total_u).sqrt() * (x_u - u.cos() * M)
        return consistency(f_t, f_u).sum().sqrt().item()

    assert error(0.0, 0.2) < 1e-14
    assert error(V, 0.02) / error(V, 0.01) == pytest.approx(4, rel=0.05)


def test_closed_forms() -> None:
    a, b = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([[0.0, 4.0], [0.0, 1.0]]).double()
    assert consistency(a, b).tolist() == [[9, 16], [0, 0]]
    assert consistency(a, b, norm="absolute").tolist() == [[3, 4], [0, 0]]
    torch.testing.assert_close(latent_consistency(a, b, c=4.0), torch.tensor([[1.0, 32**0.5 - 4], [0, 0]]).double())
    t, r = torch.tensor([2.0, 1.0]).double(), torch.tensor([1.5, 0.0]).double()
    torch.testing.assert_close(improved_consistency(a, b, t, r, c=12.0), torch.tensor([1 / 0.5, 0]).double())
    torch.testing.assert_close(improved_consistency(a, b, t, r, c=0.0), torch.tensor([5 / 0.5, 0]).double())
    c = huber_constant(2)
    assert improved_consistency(a, b, t, r)[0].item() == pytest.approx(((25 + c**2) ** 0.5 - c) / 0.5, rel=1e-12)


def test_target_receives_no_gradient() -> None:
    """A consistency loss that also moves its target collapses to a constant, with a falling loss."""
    prediction, target = normal(2, 3).requires_grad_(), normal(2, 3, seed=1).requires_grad_()
    t, r = torch.ones(2), torch.zeros(2)
    for loss in (
        consistency(prediction, target),
        consistency(prediction, target, norm="absolute"),
        improved_consistency(prediction, target, t, r),
        latent_consistency(prediction, target),
    ):
        own, other = torch.autograd.grad(loss.sum(), (prediction, target), allow_unused=True)
        assert own.abs().min() > 0
        assert other is None


def test_times_in_the_wrong_order_are_refused() -> None:
    a, b = normal(2, 3), normal(2, 3, seed=1)
    for t, r in (([1.0, 1.0], [0.5, 1.0]), ([0.5, 0.1], [1.0, 0.2])):
        with pytest.raises(ValueError, match="noisier"):
            improved_consistency(a, b, torch.tensor(t), torch.tensor(r))
    with pytest.raises(ValueError, match="absolute"):
        consistency(a, b, norm="l1")


def test_the_weight_of_a_step_belongs_to_its_sample() -> None:
    """Distances [B] over times [B, 1] would be a [B, B] table, and its mean no error."""
    a, b = normal(2, 3), normal(2, 3, seed=1)
    t, r = torch.tensor([2.0, 1.0]).double(), torch.tensor([1.5, 0.0]).double()
    flat = improved_consistency(a, b, t, r)
    assert torch.equal(improved_consistency(a, b, t[:, None], r[:, None]), flat)
    assert torch.equal(improved_consistency(a[[1, 0]], b[[1, 0]], t[[1, 0]], r[[1, 0]]), flat[[1, 0]])
    assert flat[0] == improved_consistency(a[:1], b[:1], t[:1], r[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    a, b, t, r = normal(2, 3).to(dtype), normal(2, 3, seed=1).to(dtype), torch.ones(2), torch.zeros(2)
    for half, full in (
        (consistency(a, b), consistency(a.float(), b.float())),
        (consistency(a, b, norm="absolute"), consistency(a.float(), b.float(), norm="absolute")),
        (latent_consistency(a, b), latent_consistency(a.float(), b.float())),
        (improved_consistency(a, b, t, r), improved_consistency(a.float(), b.float(), t, r)),
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_numerical_gradient() -> None:
    a, b, t, r = normal(2, 2).requires_grad_(), normal(2, 2, seed=1), torch.ones(2), torch.zeros(2)
    assert torch.autograd.gradcheck(lambda x: reduce(consistency(x, b)), (a,))
    assert torch.autograd.gradcheck(lambda x: latent_consistency(x, b, c=0.1), (a,))
    assert torch.autograd.gradcheck(lambda x: improved_consistency(x, b, t, r, c=0.1), (a,))


# --- the curriculum of ECT


def test_easy_consistency_starts_as_diffusion_and_its_steps_shrink() -> None:
    t = torch.tensor([0.1, 1.0, 80.0], dtype=torch.float64)
    stages = [easy_consistency_time(t, stage) for stage in range(12)]
    assert stages[0][:2].tolist() == [0, 0]
    assert stages[0][2].item() == pytest.approx(40, rel=1e-9)
    want = 1 - 2**-4 * (1 + 8 / (1 + math.exp(1.0)))
    assert stages[3][1].item() == pytest.approx(want, rel=1e-12)
    for earlier, later in pairwise(stages):
        assert ((later >= earlier) & (later < t)).all()
    torch.testing.assert_close(stages[11], t, rtol=2e-3, atol=0)
