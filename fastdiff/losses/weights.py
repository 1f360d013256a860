r"""Weights of denoising score matching, one number a sample, from the process's own a = alpha(t) and s = sigma(t).

A weight belongs to the parametrisation whose squared error it multiplies. At one (x_t, t) the errors are multiples of each other,

    |x0' - x0|^2 = (s / a)^2 E    |v' - v|^2 = (rho^2 / a)^2 E    |u' - u|^2 = (W / a)^2 E    with E = |eps' - eps|^2,

rho^2 = a^2 + s^2 and W = a s' - s a' (1 for rectified flow), so each weighting has a form for every network;
``convert_weight`` is that change, and of the weight 1 it is a uniform weighting of one error seen from another. SNR = (a / s)^2.

EDM (NeurIPS 2022, arXiv 2206.00364), min-SNR (ICCV 2023, arXiv 2303.09556), P2 (CVPR 2022, arXiv 2204.00227), SD3's logit-normal
times (ICML 2024, arXiv 2403.03206), EDM2 (CVPR 2024, arXiv 2312.02696), sCM (ICLR 2025, arXiv 2410.11081). Min-SNR, P2 and the
logit-normal density are recalled, not read in the papers; the conversions are derived.
"""

import math

import torch
from torch import Tensor

from fastdiff.losses.precision import widened
from fastdiff.losses.shapes import coefficient


def snr(alpha: Tensor, sigma: Tensor) -> Tensor:
    """``(alpha / sigma)^2``, like its arguments; infinite without noise."""
    return (widened(alpha) / widened(sigma)).square()


def convert_weight(
    weight: Tensor | float, alpha: Tensor, sigma: Tensor, *, source: str, target: str, wronskian: Tensor | float | None = None
) -> Tensor:
    """The weight on the ``target`` error that equals ``weight`` on the ``source`` error.

    Args:
        weight, alpha, sigma: numbers, one a sample.
        source, target: ``epsilon``, ``sample``, ``v_prediction`` or ``flow_prediction``.
        wronskian: ``alpha sigma' - sigma alpha'``, needed by ``flow_prediction``.

    Raises:
        ValueError: another name, or ``flow_prediction`` without its wronskian.

    >>> convert_weight(1.0, torch.tensor(0.6), torch.tensor(0.8), source="sample", target="epsilon")  # (s / a)^2
    tensor(1.7778)
    """
    return weight * (_error(source, alpha, sigma, wronskian) / _error(target, alpha, sigma, wronskian))


def edm_weight(alpha: Tensor, sigma: Tensor, *, sigma_data: float) -> Tensor:
    """``SNR + 1 / sigma_data^2`` on the x0 error, in EDM (alpha = 1) ``(sigma^2 + sd^2) / (sigma sd)^2``.

    It makes the weight on the error of EDM's raw network output F uniform.
    """
    return snr(alpha, sigma) + sigma_data**-2


def min_snr_weight(alpha: Tensor, sigma: Tensor, *, on: str, gamma: float = 5.0, wronskian: Tensor | float | None = None) -> Tensor:
    """Min-SNR-gamma: ``min(SNR, gamma)`` on the x0 error, hence ``min(1, gamma / SNR)`` on eps and, variance preserving,
    ``min(SNR, gamma) / (SNR + 1)`` on v.

    Args:
        on: whose error is multiplied, a name of ``convert_weight``. Finite also where alpha or sigma is 0.
    """
    a2, s2 = widened(alpha).square(), widened(sigma).square()
    if on == "epsilon":
        return (gamma * s2 / a2).clamp(max=1.0)
    if on == "sample":
        return (a2 / s2).clamp(max=gamma)
    return torch.minimum(a2, gamma * s2) / _error(on, alpha, sigma, wronskian)


def p2_weight(alpha: Tensor, sigma: Tensor, *, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """``1 / (k + SNR)^gamma`` on the eps error: little weight on the last, imperceptible noise."""
    return (k + snr(alpha, sigma)).pow(-gamma)


def logit_normal_weight(t: Tensor, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Density of ``sigmoid(N(mean, std^2))`` at flow time t in [0, 1], zero at both ends.

    Under uniform times it is the weight on the velocity error (``flow_prediction``) that drawing logit-normal times would give.
    """
    t = widened(t)
    inside = (t > 0) & (t < 1)
    t = t.where(inside, 0.5)
    density = (-0.5 * ((t.logit() - mean) / std).square()).exp() / (t * (1 - t) * std * math.sqrt(2 * math.pi))
    return density.where(inside, 0.0)


def learned_variance(loss: Tensor, log_variance: Tensor) -> Tensor:
    """``exp(-lv) loss + lv``, like ``loss`` [B, ...]; ``log_variance`` [B] is a trained head's output.

    Least at ``lv = log loss``, where it is ``1 + log loss``: every noise level then pulls with the same strength. The value
    may be negative and falls although no sample improves: log the plain loss.
    """
    loss = widened(loss)
    lv = coefficient(log_variance, loss)
    return (-lv).exp() * loss + lv


def learned_weight(loss: Tensor, log_weight: Tensor) -> Tensor:
    """``exp(w) loss - w``, sCM's writing of ``learned_variance`` with w = -lv."""
    return learned_variance(loss, -log_weight)


def _error(name: str, alpha: Tensor, sigma: Tensor, wronskian: Tensor | float | None) -> Tensor:
    """alpha^2 times the squared error of ``name`` for a unit error of eps; finite at alpha = 0."""
    a2, s2 = widened(alpha).square(), widened(sigma).square()
    if name == "flow_prediction":
        if wronskian is None:
            raise ValueError(
                "the error of a velocity depends on how fast the path runs: pass wronskian=alpha sigma' - sigma alpha'."
            )
        return torch.as_tensor(wronskian).to(a2).square().expand_as(a2)
    errors = {"epsilon": a2, "sample": s2, "v_prediction": (a2 + s2).square()}
    if name not in errors:
        raise ValueError(f"no error of {name!r} is known; the names are {', '.join([*errors, 'flow_prediction'])}.")
    return errors[name]
