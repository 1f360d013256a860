"""Divergences: categorical, Gaussian, and their generators."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdiff.losses import (
    F_DIVERGENCES,
    f_generator,
    forward_kl,
    gaussian_kl,
    jensen_shannon,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    total_variation,
)

ALL: list[Callable[..., Tensor]] = [forward_kl, reverse_kl, jensen_shannon, skewed_forward_kl, skewed_reverse_kl, total_variation]


def logits(seed: int = 0, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape or (2, 5), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(dim=-1)


def laws(temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """q of the student and p of the teacher."""
    return (logits() / temperature).softmax(-1), (logits(1) / temperature).softmax(-1)


def test_categorical_closed_forms() -> None:
    for t in (1.0, 2.5):
        q, p = laws(t)
        m, skewed, reverse_skewed = 0.3 * p + 0.7 * q, 0.2 * p + 0.8 * q, 0.2 * q + 0.8 * p
        for got, want in (
            (forward_kl(logits(), logits(1), temperature=t), kl(p, q)),
            (reverse_kl(logits(), logits(1), temperature=t), kl(q, p)),
            (jensen_shannon(logits(), logits(1), beta=0.3, temperature=t), 0.3 * kl(p, m) + 0.7 * kl(q, m)),
            (skewed_forward_kl(logits(), logits(1), skew=0.2, temperature=t), kl(p, skewed)),
            (skewed_reverse_kl(logits(), logits(1), skew=0.2, temperature=t), kl(q, reverse_skewed)),
            (total_variation(logits(), logits(1), temperature=t), 1 - torch.minimum(p, q).sum(-1)),
        ):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_of_the_student_logits_are_the_closed_forms(temperature: float) -> None:
    """q (g - <q, g>) / T with g the derivative with respect to q; for forward KL q - p."""
    q, p = laws(temperature)
    m, skewed, reverse_skewed = 0.3 * p + 0.7 * q, 0.2 * p + 0.8 * q, 0.2 * q + 0.8 * p
    cases: list[tuple[Callable[..., Tensor], dict[str, float], Tensor]] = [
        (forward_kl, {}, -p / q),
        (reverse_kl, {}, (q / p).log() + 1),
        (jensen_shannon, {"beta": 0.3}, 0.7 * (q / m).log()),
        (skewed_forward_kl, {"skew": 0.2}, -0.8 * p / skewed),
        (skewed_reverse_kl, {"skew": 0.2}, (q / reverse_skewed).log() + 1 - 0.2 * q / reverse_skewed),
        (total_variation, {}, 0.5 * (q - p).sign()),
    ]
    for divergence, options, g in cases:
        student = logits().requires_grad_()
        (got,) = torch.autograd.grad(divergence(student, logits(1), temperature=temperature, **options).sum(), student)
        want = q * (g - (q * g).sum(-1, keepdim=True)) / temperature
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    student = logits().requires_grad_()
    (got,) = torch.autograd.grad(forward_kl(student, logits(1), temperature=temperature).sum(), student)
    torch.testing.assert_close(got, (q - p) / temperature, rtol=1e-9, atol=1e-12)


def test_forward_and_reverse_are_not_swapped() -> None:
    """A student that drops one of two modes pays forward KL without bound and reverse KL at most log 2."""
    teacher, student = torch.tensor([0.0, 0.0]).double(), torch.tensor([0.0, -40.0]).double()
    assert forward_kl(student, teacher) > 15
    assert reverse_kl(student, teacher).item() == pytest.approx(math.log(2), rel=1e-9)


@pytest.mark.parametrize("divergence", ALL)
def test_zero_at_equal_laws_and_blind_to_a_shift_of_the_logits(divergence: Callable[..., Tensor]) -> None:
    assert divergence(logits(), logits() + 3.0).abs().max() < 1e-13
    torch.testing.assert_close(divergence(logits() - 7.0, logits(1)), divergence(logits(), logits(1)), rtol=1e-10, atol=0)
    assert (divergence(logits(), logits(1)) > 0).all()


def test_jensen_shannon_is_symmetric_tends_to_both_kl_and_is_bounded() -> None:
    a, b = logits(), logits(1)
    torch.testing.assert_close(jensen_shannon(a, b, beta=0.3), jensen_shannon(b, a, beta=0.7), rtol=1e-12, atol=0)
    torch.testing.assert_close(jensen_shannon(a, b, beta=1e-6) / 1e-6, forward_kl(a, b), rtol=1e-4, atol=0)
    torch.testing.assert_close(jensen_shannon(a, b, beta=1 - 1e-6) / 1e-6, reverse_kl(a, b), rtol=1e-4, atol=0)
    far = torch.tensor([60.0, 0.0]).double(), torch.tensor([0.0, 60.0]).double()
    entropy = -(0.3 * math.log(0.3) + 0.7 * math.log(0.7))
    assert jensen_shannon(*far, beta=0.3).item() == pytest.approx(entropy, rel=1e-9)
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="forward_kl"):
            jensen_shannon(a, b, beta=beta)


def test_skewed_divergences_are_bounded_and_tend_to_the_plain_ones() -> None:
    a, b = logits(), logits(1)
    torch.testing.assert_close(skewed_forward_kl(a, b, skew=1e-9), forward_kl(a, b), rtol=1e-6, atol=0)
    torch.testing.assert_close(skewed_reverse_kl(a, b, skew=1e-9), reverse_kl(a, b), rtol=1e-6, atol=0)
    far = torch.tensor([60.0, 0.0]).double(), torch.tensor([0.0, 60.0]).double()
    for divergence in (skewed_forward_kl, skewed_reverse_kl):
        assert divergence(*far, skew=0.1).item() == pytest.approx(-math.log(0.1), rel=1e-9)


def test_high_temperature_matches_centred_logits() -> None:
    """T^2 KL tends to |centred difference|^2 / 2V."""
    a, b = logits(), logits(1)
    difference = (a - a.mean(-1, keepdim=True)) - (b - b.mean(-1, keepdim=True))
    want = difference.square().sum(-1) / (2 * a.shape[-1])
    torch.testing.assert_close(1e6 * forward_kl(a, b, temperature=1000.0), want, rtol=1e-2, atol=0)


@pytest.mark.parametrize("divergence", ALL)
def test_logits_masked_on_both_sides_are_a_smaller_vocabulary(divergence: Callable[..., Tensor]) -> None:
    """-inf - -inf is NaN; and where it is hidden in the value it returns in the gradient."""
    student = logits().requires_grad_()
    mask = torch.tensor([False, False, True, False, True])
    masked = divergence(student.masked_fill(mask, -math.inf), logits(1).masked_fill(mask, -math.inf))
    small = divergence(student[:, ~mask], logits(1)[:, ~mask])
    torch.testing.assert_close(masked, small, rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(masked.sum(), student, retain_graph=True)
    (want,) = torch.autograd.grad(small.sum(), student)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("divergence", ALL)
def test_another_vocabulary_is_refused(divergence: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="5 logits and teacher 4"):
        divergence(logits(), logits()[:, :4])


@pytest.mark.parametrize("divergence", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(divergence: Callable[..., Tensor], dtype: torch.dtype) -> None:
    a, b = logits().to(dtype), logits(1).to(dtype)
    assert divergence(a, b).dtype == torch.float32
    assert torch.equal(divergence(a, b), divergence(a.float(), b.float()))


@pytest.mark.parametrize("divergence", ALL)
def test_numerical_gradient_with_respect_to_both(divergence: Callable[..., Tensor]) -> None:
    a, b = logits(0, 1, 4).requires_grad_(), logits(1, 1, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: divergence(x, y, temperature=1.7), (a, b))


# --- Gaussians


def test_gaussian_kl_against_torch_distributions() -> None:
    mp, lp, mq, lq = logits(2, 4, 3)
    p, q = (torch.distributions.Normal(m, (0.5 * lv).exp()) for m, lv in ((mp, lp), (mq, lq)))
    torch.testing.assert_close(gaussian_kl(mp, lp, mq, lq), torch.distributions.kl_divergence(p, q), rtol=1e-10, atol=1e-14)
    assert torch.equal(gaussian_kl(mp, lp, mp, lp), torch.zeros(3).double())


def test_gaussian_kl_of_close_variances_does_not_cancel() -> None:
    """e^g - g - 1 of g = 1e-3 is 5e-7, four units of float32 at 1."""
    zero = torch.zeros(1)
    assert gaussian_kl(zero, torch.full((1,), 1e-3), zero, zero).item() == pytest.approx(2.5e-7, rel=1e-2)


def test_gaussian_kl_numerical_gradient() -> None:
    assert torch.autograd.gradcheck(gaussian_kl, tuple(x.requires_grad_() for x in logits(3, 4, 2)))


# --- generators

RATIOS = torch.tensor([0.1, 0.7, 1.0, 1.8, 20.0], dtype=torch.float64)


@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_the_derivatives_are_the_derivatives(kind: str) -> None:
    r = RATIOS.clone().requires_grad_()
    f, first, second = f_generator(r, kind=kind)
    torch.testing.assert_close(torch.autograd.grad(f.sum(), r, retain_graph=True)[0], first, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(first.sum(), r)[0], second, rtol=1e-10, atol=1e-12)
    assert (second > 0).all()
    assert f[2].abs() < 1e-14


def test_r_squared_f_second_is_the_papers_table() -> None:
    r = RATIOS
    table = {
        "reverse_kl": torch.ones_like(r),
        "forward_kl": r,
        "jensen_shannon": r / (1 + r),
        "softened_reverse_kl": 1 / (1 + r),
        "neyman": 1 / r,
        "squared_hellinger": r.sqrt(),
        "jeffreys": 1 + r,
    }
    assert table.keys() == F_DIVERGENCES.keys()
    for kind, h in table.items():
        torch.testing.assert_close(r.square() * f_generator(r, kind=kind)[2], h, rtol=1e-12, atol=0)


def test_mean_f_of_the_ratio_is_the_divergence() -> None:
    q, p = laws()
    m = (p + q) / 2
    for kind, want in {
        "reverse_kl": kl(q, p),
        "forward_kl": kl(p, q),
        "jensen_shannon": 2 * jensen_shannon(logits(), logits(1)),
        "softened_reverse_kl": 2 * kl(m, p),
        "neyman": ((p - q).square() / p).sum(-1) / 2,
        "squared_hellinger": 2 * (p.sqrt() - q.sqrt()).square().sum(-1),
        "jeffreys": kl(p, q) + kl(q, p),
    }.items():
        torch.testing.assert_close((q * f_generator(p / q, kind=kind)[0]).sum(-1), want, rtol=1e-9, atol=1e-13)


def test_an_unknown_kind_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="reverse_kl, forward_kl"):
        f_generator(RATIOS, kind="rkl")
