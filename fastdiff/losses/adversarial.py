"""GAN terms on discriminator logits, real high and fake low; unreduced."""

from torch import Tensor
from torch.nn.functional import softplus

from fastdiff.losses.precision import widened


def softplus_discriminator(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """``softplus(-real)``, ``softplus(fake)``: the two halves of the non-saturating discriminator loss, each like its logits.

    Minimised by ``logit = log p_real - log p_fake``; at equal laws both halves are log 2.
    """
    return softplus(-widened(real)), softplus(widened(fake))


def softplus_generator(fake: Tensor) -> Tensor:
    """``softplus(-fake)``: the non-saturating generator loss, like its logits."""
    return softplus(-widened(fake))
