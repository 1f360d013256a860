"""GAN terms on logits."""

import math

import pytest
import torch

from fastdiff.losses import softplus_discriminator, softplus_generator


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
