r"""Preferences on few-step diffusion: a winner w should gain likelihood over a reference, a loser l should lose it.

    L = -log sigmoid(beta margin)

    online PSO     margin = log rho_w - log rho_l        rho = clamp(p / p_ref, 1 +- clip) of one sampling step N(mean, v)
    offline PSO    margin = (e_ref^w - lam e_ref^l) - (e^w - lam e^l)        e: denoising errors, lam = 0.1
    Diffusion-DPO  the offline margin with lam = 1, t over all times and beta T w(lambda_t) in place of beta

At student = reference every margin is 0 and L = log 2. log p / p_ref of two Gaussians of one
variance is a difference of squares (derived); the relation to Diffusion-DPO is derived as well.

PSO (ICLR 2025, arXiv 2410.03190), Diffusion-DPO (CVPR 2024, arXiv 2311.12908).
"""

import math

from torch import Tensor
from torch.nn.functional import softplus

from fastdiff.losses.precision import widened
from fastdiff.losses.shapes import coefficient, rows


def gaussian_log_ratio(x: Tensor, mean: Tensor, mean_ref: Tensor, variance: Tensor | float) -> Tensor:
    """``(|x - mean_ref|^2 - |x - mean|^2) / (2 v n)`` [B]: log p / p_ref of a sampled step, **per element**.

    The released code takes the mean over the n elements and its beta is meant for it; the log-ratio itself is n times larger.

    Args:
        x, mean, mean_ref: the step's outcome and both means [B, ...]. x is a recorded sample, in the dtype it was drawn in.
        variance: v > 0, a number or [B]. A deterministic last step has no density: leave it out.

    Raises:
        ValueError: a variance is not positive.
    """
    x, mean, mean_ref = widened(x), widened(mean), widened(mean_ref)
    v = coefficient(variance, x)
    if bool((v <= 0).any()):
        raise ValueError("a step of variance 0 has no density: leave out the deterministic (last) step of the sampler.")
    # the factorised difference of squares: close means do not cancel
    return rows((mean - mean_ref) * ((x - mean) + (x - mean_ref)) / (2 * v)).mean(dim=1)


def clipped_log_ratio(log_ratio: Tensor, *, clip: float = 0.1) -> Tensor:
    """``log clamp(exp(log_ratio), 1 - clip, 1 + clip)``, like it; no gradient outside: a trust region round the reference."""
    return widened(log_ratio).clamp(math.log1p(-clip), math.log1p(clip))


def denoising_margin(winner: Tensor, winner_ref: Tensor, loser: Tensor, loser_ref: Tensor, *, loser_weight: float = 0.1) -> Tensor:
    """``(winner_ref - lam loser_ref) - (winner - lam loser)``, like its arguments: denoising errors [B] of student and reference.

    All four at one noise and time; positive when the student denoises the winner better than the reference does. The scale of
    the errors (mean or sum over elements, weight) is part of beta.
    """
    winner, winner_ref, loser, loser_ref = (widened(e) for e in (winner, winner_ref, loser, loser_ref))
    return (winner_ref - winner) - loser_weight * (loser_ref - loser)


def preference(margin: Tensor, *, beta: float) -> Tensor:
    """``-log sigmoid(beta margin)``, like margin; log 2 at 0."""
    return softplus(-beta * widened(margin))


def concept_hinge(
    winner: Tensor, loser: Tensor, *, beta: float = 5.0, loser_weight: float = 0.1, prior_weight: float = 0.5
) -> Tensor:
    """``relu(1 + beta (winner - lam loser)) + prior_weight loser``: PSO for one concept, without a reference, like its arguments.

    ``winner`` and ``loser`` are denoising errors [B] on images of the concept and on the student's own; the last term keeps the
    student on the latter. The sheet gives no beta for this variant; the default is the offline one's.
    """
    winner, loser = widened(winner), widened(loser)
    return (1 + beta * (winner - loser_weight * loser)).relu() + prior_weight * loser
