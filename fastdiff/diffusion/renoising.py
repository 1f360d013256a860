"""Steps that put noise back: how few-step students go from one time to the next.

    renoise        x_u = (a_u / a_t) x_t + sqrt(s_u^2 - (a_u / a_t)^2 s_t^2) noise        the forward kernel, t < u
    consistency    x_u = a_u x0 + s_u noise                                             LCM, CM, DMD2, SANA-Sprint
    TCD            DDIM to w = (1 - gamma) u, then renoise from w to u                  gamma = 0 is DDIM

``u`` is a tensor [B], or None for the end of the path, where a step returns x0. Noise has unit variance and is always an argument.
Consistency models (ICML 2023, arXiv 2303.01469), LCM (arXiv 2310.04378), TCD (arXiv 2402.19159).
"""

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import NoiseProcess, expand
from fastdiff.diffusion.solvers import ddim_step


def renoise(x_t: Tensor, t: Tensor, u: Tensor, noise: Tensor, process: NoiseProcess) -> Tensor:
    """A sample of ``q(x_u | x_t)`` at the later times u [B], from ``noise`` ~ N(0, I).

    Raises:
        ValueError: u is earlier than t, where the kernel has a negative variance.
    """
    scale = process.alpha(u) / process.alpha(t)
    variance = process.sigma(u).square() - (scale * process.sigma(t)).square()
    if not variance.is_meta and (variance < -1e-12 * process.sigma(u).square()).any():
        raise ValueError(
            "renoise goes up: u is earlier than t, where no forward kernel leads. Swap them, or use solvers.ddim_step."
        )
    return expand(scale, x_t) * x_t + expand(variance.clamp(min=0).sqrt(), x_t) * noise


def consistency_step(prediction: Prediction, u: Tensor | None, noise: Tensor | None) -> Tensor:
    """x0 noised anew to ``u``; no noise is needed at the end.

    Raises:
        ValueError: noise is missing before the end.
    """
    if u is None:
        return prediction.x0
    return prediction.process.add_noise(prediction.x0, _needed(noise), u)


def tcd_step(prediction: Prediction, u: Tensor | None, noise: Tensor | None, gamma: float) -> Tensor:
    """Deterministically to ``w = (1 - gamma) u`` and with noise back to ``u``; gamma in [0, 1], 0.3 in the paper.

    On the integer times of a discrete process w is rounded down, in float32 as TCDScheduler has it. That scheduler ends at row 0,
    which is ``u = 0``; the end of the path, None, is x0.

    Raises:
        ValueError: gamma outside [0, 1], or noise is missing before the end.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], came {gamma}: w = (1 - gamma) u would lie outside [0, u].")
    if u is None:
        return prediction.x0
    w = (1 - gamma) * u if u.is_floating_point() else ((1 - gamma) * u.to(torch.float32)).floor().to(u.dtype)
    return renoise(ddim_step(prediction, w), w, u, _needed(noise), prediction.process)


def _needed(noise: Tensor | None) -> Tensor:
    if noise is None:
        raise ValueError("noise is missing: only the end of the path (u = None) needs none. Pass unit noise of the shape of x0.")
    return noise
