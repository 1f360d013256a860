r"""Score distillation: training a generator by the difference of two scores.

A generator's sample x is diffused to ``x_t = a x + s eps`` and two denoisers look at it: the frozen teacher (real) and one
trained on the generator's own samples (fake). The difference of their predictions is a gradient G with respect to x,

    SDS         G = w (eps_real - eps)                  eps: the noise that was drawn
    VSD         G = w (eps_real - eps_fake),            w = s^2
    DMD         G = (x0_fake - x0_real) / mean|x - x0_real|      per sample

VSD and DMD are one reverse-KL direction E[score_fake - score_real] under positive weights (SDS lacks the entropy term):
x0_fake - x0_real =
(s^2 / a)(score_fake - score_real) and eps = -s score. Two networks give a gradient, not a loss; ``pseudo_target`` makes the
loss that has it. Neither network is differentiated: call them without grad.

DreamFusion (ICLR 2023, arXiv 2209.14988), ProlificDreamer (NeurIPS 2023, arXiv 2305.16213), SwiftBrush (CVPR 2024, arXiv
2312.05239), DMD (CVPR 2024, arXiv 2311.18828), DMD2 (NeurIPS 2024, arXiv 2405.14867).
"""

from torch import Tensor

from fastdiff.losses.precision import widened
from fastdiff.losses.regression import squared_error


def score_distillation_gradient(eps_real: Tensor, eps: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    """SDS: ``weight (eps_real - eps)`` [B, ...]; ``weight`` broadcasts, usually sigma(t)^2."""
    return weight * (widened(eps_real) - widened(eps))


def variational_score_gradient(eps_real: Tensor, eps_fake: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    """VSD: ``weight (eps_real - eps_fake)`` [B, ...]. With ``eps_fake = eps`` it is SDS, bit for bit."""
    return score_distillation_gradient(eps_real, eps_fake, weight=weight)


def distribution_matching_gradient(x: Tensor, x0_real: Tensor, x0_fake: Tensor, *, floor: float = 1e-6) -> Tensor:
    """DMD: ``(x0_fake - x0_real) / max(mean|x - x0_real|, floor)`` [B, ...], the mean over all but the batch dimension.

    The normaliser belongs to the sample: another sample in the batch changes nothing. ``floor`` (not in the paper) keeps a
    sample that the teacher reproduces exactly from dividing by zero.
    """
    x, x0_real, x0_fake = widened(x), widened(x0_real), widened(x0_fake)
    distance = (x - x0_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return (x0_fake - x0_real) / distance.clamp_min(floor)


def pseudo_target(x: Tensor, gradient: Tensor) -> Tensor:
    """Elementwise ``0.5 (x - sg[x - G])^2`` [B, ...], whose derivative with respect to x is G.

    Written as ``0.5 (x - sg[x] + G)^2``, the same in exact arithmetic: x - G would round to x where G is small beside x.

    Reduced by the mean over B n elements the gradient per element is G / (B n). The official codes zero NaN in G; here
    it stays, makes the gradient norm NaN, and the trainer's health check skips the update and says so.
    """
    x = widened(x)
    return 0.5 * (x - x.detach() + widened(gradient).detach()).square()


def denoising(prediction: Tensor, target: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    """Denoising score matching: ``weight (prediction - target)^2`` [B, ...], in eps, v or x0 alike.

    The error in one parametrisation is a weight times that in another: ``|x0' - x0|^2 = (s/a)^2 |eps' - eps|^2``.
    """
    return weight * squared_error(prediction, target)
