"""GAN terms on logits."""

import math

import pytest
import torch

from fastdiff.losses import (
    approximate_gradient_penalty,
    gradient_penalty,
    hinge_discriminator,
    hinge_generator,
    least_squares_discriminator,
    least_squares_generator,
    softplus_discriminator,
    softplus_generator,
)


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_every_half_is_log_two_at_zero() -> None:
    zero = torch.zeros(2)
    for half in (*softplus_discriminator(zero, zero), softplus_generator(zero)):
        torch.testing.assert_close(half, torch.full((2,), math.log(2)), rtol=1e-6, atol=0)


def test_real_is_high_and_fake_is_low() -> None:
    """A swap of the halves, or of a sign, would train the generator away from the data without an error."""
    x = torch.zeros(1, requires_grad=True)
    for term, sign in (
        (softplus_discriminator(x, torch.zeros(1))[0], -0.5),
        (softplus_discriminator(torch.zeros(1), x)[1], 0.5),
        (softplus_generator(x), -0.5),
    ):
        (gradient,) = torch.autograd.grad(term.sum(), x)
        assert gradient.item() == sign


def test_optimal_discriminator_is_the_log_density_ratio() -> None:
    """Two discrete laws p, q: sum p softplus(-h) + q softplus(h) is stationary and least at h = log p - log q."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.3, 0.6]).double()

    def loss(h: torch.Tensor) -> torch.Tensor:
        real, fake = softplus_discriminator(h, h)
        return (p * real + q * fake).sum()

    best = (p.log() - q.log()).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(best), best)
    assert gradient.abs().max() < 1e-7
    nearby = [loss(best + 0.1 * torch.eye(3)[i] * sign) for i in range(3) for sign in (-1, 1)]
    assert min(nearby) > loss(best)
    jensen_shannon = 0.5 * sum((r * (2 * r / (p + q)).log()).sum() for r in (p, q))
    assert loss(best).item() == pytest.approx(2 * math.log(2) - 2 * jensen_shannon.item(), abs=1e-6)


def test_large_logits_do_not_overflow() -> None:
    big = torch.tensor([1e4, -1e4])
    assert torch.equal(softplus_generator(big), torch.tensor([0.0, 1e4]))
    assert torch.equal(softplus_discriminator(big, big)[1], torch.tensor([1e4, 0.0]))


def test_the_halves_do_not_see_each_other() -> None:
    real, fake = logits().requires_grad_(), logits(1).requires_grad_()
    on_real, on_fake = softplus_discriminator(real, fake)
    assert torch.autograd.grad(on_real.sum(), fake, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(on_fake.sum(), real, allow_unused=True)[0] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    real, fake = logits().to(dtype), logits(1).to(dtype)
    ours = (*softplus_discriminator(real, fake), softplus_generator(fake))
    wide = (*softplus_discriminator(real.float(), fake.float()), softplus_generator(fake.float()))
    for a, b in zip(ours, wide, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_float64_stays_float64() -> None:
    """`float32 or better`: narrowed to float32 a proof in float64 stops at 1e-7, and no numerical gradient can be checked."""
    real, fake = logits(), logits(1)
    for term in (*softplus_discriminator(real, fake), softplus_generator(fake)):
        assert term.dtype == torch.float64
    torch.testing.assert_close(softplus_generator(fake), (1 + (-fake).exp()).log(), rtol=1e-13, atol=0)


def test_numerical_gradient() -> None:
    real, fake = logits().requires_grad_(), logits(1).requires_grad_()
    assert torch.autograd.gradcheck(softplus_discriminator, (real, fake))
    assert torch.autograd.gradcheck(softplus_generator, (fake,))


# --- hinge and least squares


def test_hinge_closed_forms_and_directions() -> None:
    x = torch.tensor([-2.0, 0.0, 0.5, 2.0])
    on_real, on_fake = hinge_discriminator(x, x)
    assert on_real.tolist() == [3, 1, 0.5, 0]
    assert on_fake.tolist() == [0, 1, 1.5, 3]
    assert hinge_generator(x).tolist() == [2, 0, -0.5, -2]


def test_hinge_leaves_confident_samples_alone() -> None:
    x = torch.tensor([2.0, -2.0], requires_grad=True)
    on_real, on_fake = hinge_discriminator(x[:1], x[1:])
    (gradient,) = torch.autograd.grad((on_real + on_fake).sum(), x)
    assert torch.equal(gradient, torch.zeros(2))


def test_optimal_least_squares_discriminator_is_the_posterior_and_one_half_at_equal_laws() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.3, 0.6]).double()
    best = (p / (p + q)).requires_grad_()
    on_real, on_fake = least_squares_discriminator(best, best)
    (gradient,) = torch.autograd.grad((p * on_real + q * on_fake).sum(), best)
    assert gradient.abs().max() < 1e-14
    assert best[1].item() == pytest.approx(0.5)


def test_least_squares_generator_pulls_fakes_up_to_one() -> None:
    assert least_squares_generator(torch.tensor([-1.0, 1.0, 3.0])).tolist() == [4, 0, 4]


# --- gradient penalties


def head(x: torch.Tensor) -> torch.Tensor:
    """A smooth logit a sample, of [B, 3]."""
    w = torch.tensor([0.7, -1.2, 0.4], dtype=x.dtype)
    return (x @ w).tanh() + 0.3 * x.square().sum(dim=1)


def points(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_gradient_penalty_closed_form_per_sample_and_differentiable() -> None:
    """A linear logit w x: |w|^2 at every sample, with gradient 2 w with respect to w."""
    w = torch.tensor([0.7, -1.2, 0.4], dtype=torch.float64, requires_grad=True)
    x = points().requires_grad_()
    penalty = gradient_penalty(x @ w, x)
    torch.testing.assert_close(penalty, w.square().sum().expand(2), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(penalty.mean(), w)
    torch.testing.assert_close(gradient, 2 * w, rtol=1e-12, atol=0)
    y = points().reshape(2, 1, 3).requires_grad_()
    torch.testing.assert_close(gradient_penalty(0.5 * y.square(), y), y.square().sum(dim=(1, 2)), rtol=1e-12, atol=0)


def test_approximate_penalty_vanishes_with_the_perturbation() -> None:
    """Perturbing the clean image but comparing with the noised one leaves a penalty at a = 0: the head unlearns noise."""
    x, n = points(), points().flip(1)
    values = [approximate_gradient_penalty(head(x), head(x + a * n)).sum().item() for a in (1e-2, 1e-3, 0.0)]
    assert values[0] / values[1] == pytest.approx(100, rel=0.05)
    assert values[2] == 0


def test_approximate_penalty_over_a_squared_tends_to_the_exact_one() -> None:
    """The points +-sqrt(d) e_i have the second moments of a standard normal: the mean over them is exact, up to O(a^2)."""
    x = points(1)
    d = x.shape[1]
    directions = torch.cat([torch.eye(d), -torch.eye(d)]).double() * d**0.5
    inputs = x.clone().requires_grad_()
    exact = gradient_penalty(head(inputs), inputs).item()

    def error(a: float) -> float:
        values = approximate_gradient_penalty(head(x).expand(2 * d), head(x + a * directions))
        return abs(values.mean().item() / a**2 - exact)

    assert error(1e-3) < 1e-4 * exact
    assert error(2e-2) / error(1e-2) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_terms_in_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    real, fake = logits().to(dtype), logits(1).to(dtype)
    for term in (hinge_discriminator, least_squares_discriminator):
        for a, b in zip(term(real, fake), term(real.float(), fake.float()), strict=True):
            assert torch.equal(a, b)
    for one in (hinge_generator, least_squares_generator):
        assert torch.equal(one(fake), one(fake.float()))
    assert torch.equal(approximate_gradient_penalty(real, fake), approximate_gradient_penalty(real.float(), fake.float()))


def test_numerical_gradients_of_the_other_terms() -> None:
    real, fake = logits().requires_grad_(), logits(1).requires_grad_()
    for term in (hinge_discriminator, least_squares_discriminator, approximate_gradient_penalty):
        assert torch.autograd.gradcheck(term, (real, fake))
    for one in (hinge_generator, least_squares_generator):
        assert torch.autograd.gradcheck(one, (fake,))
    assert torch.autograd.gradcheck(lambda x: gradient_penalty(head(x), x), (points().requires_grad_(),))
