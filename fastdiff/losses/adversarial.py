"""GAN terms on discriminator logits, real high and fake low; unreduced.

R1 (R2) is the squared gradient of the logit at real (fake) inputs. Where attention has no second derivative it is estimated by
``(d(x_t + a n) - d(x_t))^2``: both logits at the noised input that the backbone sees. A perturbed *clean* image against a noised
one would not vanish with a, and would train the head to ignore noise.

R1 (ICML 2018, arXiv 1801.04406); the estimate is APT's (2025, arXiv 2501.08316).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastdiff.losses.precision import widened
from fastdiff.losses.shapes import rows


def softplus_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """``softplus(-real)``, ``softplus(fake)``: the two halves of the non-saturating discriminator loss, each like its logits.

    Minimised by ``logit = log p_real - log p_fake``; at equal laws both halves are log 2.
    """
    return softplus(-widened(real)), softplus(widened(fake))


def softplus_generator(fake: Tensor) -> Tensor:
    """``softplus(-fake)``: the non-saturating generator loss, like its logits."""
    return softplus(-widened(fake))


def hinge_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """``relu(1 - real)``, ``relu(1 + fake)``, each like its logits; 2 in sum at zero. SANA-Sprint halves the sum."""
    return (1 - widened(real)).relu(), (1 + widened(fake)).relu()


def hinge_generator(fake: Tensor) -> Tensor:
    """``-fake``, like its logits."""
    return -widened(fake)


def least_squares_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """``(real - 1)^2``, ``fake^2``, each like its logits (LSGAN; recalled, not read in the paper).

    Minimised by ``p_real / (p_real + p_fake)``: 1/2 at equal laws.
    """
    return (widened(real) - 1).square(), widened(fake).square()


def least_squares_generator(fake: Tensor) -> Tensor:
    """``(fake - 1)^2``, like its logits."""
    return (widened(fake) - 1).square()


def gradient_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """``|d logits / d inputs|^2`` [B]: R1 at real inputs, R2 at fake ones, differentiable itself. R1's usual factor is gamma / 2.

    Several logits a sample are summed first. A logit that depends on other samples (batch norm) would be counted for them.

    Args:
        logits: [B, ...], computed from ``inputs``.
        inputs: [B, ...] that require grad.
    """
    return gradient_penalties([logits], [inputs])[0]


def gradient_penalties(logits: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """``gradient_penalty`` of each of several heads at its own input, which bears on no other's logits, in one backward pass."""
    gradients = torch.autograd.grad(torch.stack([logit.sum() for logit in logits]).sum(), list(inputs), create_graph=True)
    return [rows(widened(gradient)).square().sum(dim=1) for gradient in gradients]


def approximate_gradient_penalty(logits: Tensor, perturbed: Tensor) -> Tensor:
    """``(d(x_t + a n) - d(x_t))^2``, like the logits, with n standard normal; tends to 0 with a.

    Over a^2 it tends to ``(n . grad d)^2``, whose mean over n is the exact ``|grad d|^2``. The released weights (100 to 1000 at
    a = 0.1) hold for this undivided form.

    Args:
        logits: d at x_t, **the same noised tensor** that was perturbed.
        perturbed: d at x_t + a n. In half precision a small difference is lost before it gets here.
    """
    return (widened(perturbed) - widened(logits)).square()
