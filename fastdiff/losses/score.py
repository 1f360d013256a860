r"""Score distillation: training a generator by the difference of two scores.

A generator's sample x is diffused to ``x_t = a x + s eps`` and two denoisers look at it: the frozen teacher (real) and one
trained on the generator's own samples (fake). The difference of their predictions is a gradient G with respect to x,

    SDS         G = w (eps_real - eps)                  eps: the noise that was drawn
    VSD         G = w (eps_real - eps_fake),            w = s^2
    DMD         G = (x0_fake - x0_real) / mean|x - x0_real|      per sample
    f-distill   G = h(p_real / p_fake) times DMD's                 h by divergence, 1 for the reverse KL

VSD and DMD are one reverse-KL direction E[score_fake - score_real] under positive weights (SDS lacks the entropy term):
x0_fake - x0_real =
(s^2 / a)(score_fake - score_real) and eps = -s score. Two networks give a gradient, not a loss; ``pseudo_target`` makes the
loss that has it. Neither network is differentiated: call them without grad. Two losses stand apart: TDM's is the same direction
under a pseudo-Huber, and SiD's is a loss proper, differentiated through both networks.

DreamFusion (ICLR 2023, arXiv 2209.14988), ProlificDreamer (NeurIPS 2023, arXiv 2305.16213), SwiftBrush (CVPR 2024, arXiv
2312.05239), DMD (CVPR 2024, arXiv 2311.18828), DMD2 (NeurIPS 2024, arXiv 2405.14867), SiD (ICML 2024, arXiv 2404.04057),
f-distill (2025, arXiv 2502.15681), TDM (ICCV 2025, arXiv 2503.06674).
"""

import math

from torch import Tensor

from fastdiff.losses.divergences import f_generator
from fastdiff.losses.precision import widened
from fastdiff.losses.regression import pseudo_huber, squared_error
from fastdiff.losses.shapes import coefficient, rows


def score_distillation_gradient(eps_real: Tensor, eps: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    """SDS: ``weight (eps_real - eps)`` [B, ...]; ``weight`` is a number or one a sample, [B] or [B, 1, ...], usually sigma(t)^2."""
    difference = widened(eps_real) - widened(eps)
    return coefficient(weight, difference) * difference


def variational_score_gradient(eps_real: Tensor, eps_fake: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    """VSD: ``weight (eps_real - eps_fake)`` [B, ...]. With ``eps_fake = eps`` it is SDS, bit for bit."""
    return score_distillation_gradient(eps_real, eps_fake, weight=weight)


def distribution_matching_gradient(x: Tensor, x0_real: Tensor, x0_fake: Tensor, *, floor: float = 1e-6) -> Tensor:
    """DMD: ``(x0_fake - x0_real) / max(mean|x - x0_real|, floor)`` [B, ...], the mean over all but the batch dimension.

    The normaliser belongs to the sample: another sample in the batch changes nothing. ``floor`` (not in the paper) keeps a
    sample that the teacher reproduces exactly from dividing by zero.
    """
    x, x0_real, x0_fake = widened(x), widened(x0_real), widened(x0_fake)
    return (x0_fake - x0_real) / _distance(x, x0_real, floor)


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
    error = squared_error(prediction, target)
    return coefficient(weight, error) * error


def score_identity(x: Tensor, x0_real: Tensor, x0_fake: Tensor, *, alpha: float = 1.0, floor: float = 1e-6) -> Tensor:
    """SiD: ``(x0_real - x0_fake) ((x0_real - x) - alpha (x0_real - x0_fake)) / sg[max(mean|x - x0_real|, floor)]``, elementwise.

    The gradient runs through x and, by x_t, through **both** predictions: call the networks with grad and frozen weights. Under
    an optimal fake score the mean is (1 - alpha) times the Fisher divergence, so the value says nothing about progress.
    ``alpha`` is 1 to 1.2. The official code sums over elements.
    """
    x, x0_real, x0_fake = widened(x), widened(x0_real), widened(x0_fake)
    difference = x0_real - x0_fake
    return difference * (x0_real - x - alpha * difference) / _distance(x, x0_real, floor)


def f_divergence_weight(
    log_ratio: Tensor, *, kind: str, low: float = 0.1, high: float = 20.0, typical: Tensor | float = 1.0
) -> Tensor:
    """f-distill: ``sg[h(clamp(exp(log_ratio), low, high) / typical)]`` with h(r) = r^2 f''(r), like log_ratio [B]; multiplies G.

    Args:
        log_ratio: log p_real - log p_fake at x_t, what a softplus discriminator's logit estimates (its heads averaged).
        kind: a key of ``F_DIVERGENCES``; ``reverse_kl`` is DMD.
        typical: a running mean of the clamped ratio near the sample's time.

    Divide by its mean over the *global* batch: the released code does, and the scale of h differs by kind.
    """
    ratio = widened(log_ratio).detach().clamp(math.log(low), math.log(high)).exp() / typical
    return ratio.square() * f_generator(ratio, kind=kind)[2]


def trajectory_importance(mixed: Tensor, fresh: Tensor) -> Tensor:
    """TDM: ``exp((mean fresh^2 - mean mixed^2) / 2)`` [B], how likely the effective noise in x_tau is beside fresh noise.

    **Means** over a sample's elements, as the released code has it: with sums, the true density ratio, the weight of an image
    would be 0 or infinite.
    """
    return ((rows(widened(fresh)).square().mean(dim=1) - rows(widened(mixed)).square().mean(dim=1)) / 2).exp()


def trajectory_matching(x: Tensor, x0_real: Tensor, x0_fake: Tensor, *, c: float | None = 1e-3, floor: float = 1e-6) -> Tensor:
    """TDM: pseudo-Huber of ``x - sg[x + x0_real - x0_fake]``, over sg[max(mean|x - x0_real|, floor)], elementwise [B, ...].

    ``x0_real`` is guided. Its gradient is DMD's over c for large c, and the sign of DMD's over the normaliser for small c. With
    ``c`` None the squared error takes the place of the pseudo-Huber: its gradient is twice DMD's.
    """
    x, x0_real, x0_fake = widened(x), widened(x0_real).detach(), widened(x0_fake).detach()
    moved, step = x - x.detach(), x0_real - x0_fake
    error = squared_error(moved, step) if c is None else pseudo_huber(moved, step, c=c)
    return error / _distance(x, x0_real, floor)


def _distance(x: Tensor, x0_real: Tensor, floor: float) -> Tensor:
    """sg[max(mean|x - x0_real|, floor)] over all but the batch dimension, kept."""
    gap = (x - x0_real).detach().abs()
    return gap.mean(dim=tuple(range(1, x.ndim)), keepdim=True).clamp_min(floor)
