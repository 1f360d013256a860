"""Preference losses: log-ratios of Gaussian steps, margins, and where they vanish."""

import math

import pytest
import torch
from torch import Tensor

from fastdiff.losses import clipped_log_ratio, concept_hinge, denoising_margin, gaussian_log_ratio, preference


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_log_ratio_against_torch_distributions() -> None:
    x, mean, ref = normal(3, 2, 4, 5)
    variance = torch.tensor([0.3, 2.0], dtype=torch.float64)
    std = variance.sqrt()[:, None, None]
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(ref, std)
    want = (p.log_prob(x) - q.log_prob(x)).mean(dim=(1, 2))
    torch.testing.assert_close(gaussian_log_ratio(x, mean, ref, variance), want, rtol=1e-10, atol=1e-13)


def test_log_ratio_is_per_element_whatever_the_size() -> None:
    """A sum over dims makes beta n times as large: with 64 x 64 latents every margin saturates."""
    x, mean, ref = normal(3, 2, 4, 4)
    tiled = [v.repeat(1, 3, 5) for v in (x, mean, ref)]
    torch.testing.assert_close(gaussian_log_ratio(*tiled, 0.5), gaussian_log_ratio(x, mean, ref, 0.5), rtol=1e-12, atol=0)


def test_student_equal_to_reference_has_ratio_one_and_loss_log_two_exactly() -> None:
    x, mean = normal(2, 2, 4).float()
    log_ratio = gaussian_log_ratio(x, mean, mean.clone(), 0.5)
    assert torch.equal(log_ratio, torch.zeros(2))
    assert torch.equal(clipped_log_ratio(log_ratio), torch.zeros(2))
    w, loser = normal(2, 3).square()
    margin = denoising_margin(w, w.clone(), loser, loser.clone(), loser_weight=0.1)
    assert torch.equal(margin, torch.zeros(3).double())
    torch.testing.assert_close(
        preference(margin, beta=50.0), torch.full((3,), math.log(2), dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_close_means_do_not_cancel() -> None:
    """|x - m_ref|^2 - |x - m|^2 in float32 has no digit left when the means differ by 1e-7 of x."""
    x, mean, ref = torch.tensor([[8.0]]), torch.tensor([[1.0]]), torch.tensor([[1.0 + 2**-23]])
    assert gaussian_log_ratio(x, mean, ref, 0.5).item() == pytest.approx(-14 * 2**-23, rel=1e-5)


def test_a_deterministic_step_is_refused() -> None:
    x = normal(2, 3)
    with pytest.raises(ValueError, match="last"):
        gaussian_log_ratio(x, x, x, torch.tensor([0.5, 0.0]))


def test_winner_and_loser_are_not_swapped() -> None:
    """Swapped, the student learns what people dislike, and the loss falls all the same."""
    w, w_ref, loser, loser_ref = torch.tensor([[1.0], [2.0], [3.0], [2.5]]).requires_grad_().unbind()
    margin = denoising_margin(w, w_ref, loser, loser_ref, loser_weight=1.0)
    assert margin.item() == 1.5
    assert denoising_margin(loser, loser_ref, w, w_ref, loser_weight=1.0).item() == -1.5
    on_winner, on_loser = torch.autograd.grad(preference(margin, beta=1.0).sum(), (w, loser))
    assert on_winner > 0  # descent lowers the winner's error
    assert on_loser < 0


def test_margin_is_the_sheets_and_with_equal_weights_diffusion_dpo() -> None:
    w, w_ref, loser, loser_ref = normal(4, 3).square()
    torch.testing.assert_close(
        denoising_margin(w, w_ref, loser, loser_ref), (w_ref - 0.1 * loser_ref) - (w - 0.1 * loser), rtol=1e-12, atol=1e-14
    )
    beta, steps, weight = 0.3, 10, 2.0
    dpo = -(-beta * steps * weight * ((w - w_ref) - (loser - loser_ref))).sigmoid().log()
    got = preference(denoising_margin(w, w_ref, loser, loser_ref, loser_weight=1.0), beta=beta * steps * weight)
    torch.testing.assert_close(got, dpo, rtol=1e-10, atol=0)


def test_preference_gradient_is_beta_times_the_wrong_probability_and_never_overflows() -> None:
    margin = normal(4).requires_grad_()
    (got,) = torch.autograd.grad(preference(margin, beta=5.0).sum(), margin)
    torch.testing.assert_close(got, -5 * (-5 * margin).sigmoid(), rtol=1e-10, atol=0)
    assert preference(torch.tensor([-1e4, 1e4]), beta=50.0).tolist() == [5e5, 0]


def test_the_clip_bounds_the_ratio_and_kills_the_gradient_outside() -> None:
    log_ratio = torch.tensor([-0.5, 0.05, 0.5], dtype=torch.float64, requires_grad=True)
    clipped = clipped_log_ratio(log_ratio, clip=0.1)
    torch.testing.assert_close(clipped.exp(), log_ratio.exp().clamp(0.9, 1.1), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(clipped.sum(), log_ratio)
    assert gradient.tolist() == [0, 1, 0]


def test_concept_hinge_closed_form() -> None:
    w, loser = torch.tensor([0.5, 0.0]).double(), torch.tensor([1.0, 4.0]).double()
    got = concept_hinge(w, loser, beta=5.0)
    torch.testing.assert_close(got, torch.tensor([1 + 5 * 0.4 + 0.5, 2.0]).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    a, b, c, d = (x.to(dtype) for x in normal(4, 3))
    wide = [x.float() for x in (a, b, c, d)]
    rows, wide_rows = [x[:, None] for x in (a, b, c)], [x[:, None] for x in wide[:3]]
    for half, full in (
        (gaussian_log_ratio(*rows, 0.5), gaussian_log_ratio(*wide_rows, 0.5)),
        (clipped_log_ratio(a), clipped_log_ratio(wide[0])),
        (denoising_margin(a, b, c, d), denoising_margin(*wide)),
        (preference(a, beta=2.0), preference(wide[0], beta=2.0)),
        (concept_hinge(a, b), concept_hinge(*wide[:2])),
    ):
        assert half.dtype == torch.float32
        assert torch.equal(half, full)


def test_numerical_gradient() -> None:
    x, mean, ref = (v.requires_grad_() for v in normal(3, 2, 2))
    assert torch.autograd.gradcheck(lambda x, m, r: gaussian_log_ratio(x, m, r, 0.5), (x, mean, ref))
    assert torch.autograd.gradcheck(lambda m: preference(m, beta=2.0), (normal(3).requires_grad_(),))
    errors = tuple(e.requires_grad_() for e in normal(4, 2))
    assert torch.autograd.gradcheck(denoising_margin, errors)
    assert torch.autograd.gradcheck(concept_hinge, errors[:2])
