"""Deterministic steps from t to an earlier time, as plain functions.

DDIM (Song et al., ICLR 2021, arXiv 2010.02502) with eta = 0: ``x_u = alpha(u) x0 + sigma(u) eps`` with both from one prediction.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import expand


def ddim_step(prediction: Prediction, u: Tensor | None) -> Tensor:
    """The state at times ``u`` [B]; ``u = None`` is the end of the path, where x_u = x0."""
    if u is None:
        return prediction.x0
    process, x0 = prediction.process, prediction.x0
    return expand(process.alpha(u), x0) * x0 + expand(process.sigma(u), x0) * prediction.eps


def trailing_times(num_train_timesteps: int, num_steps: int) -> list[int]:
    """diffusers' trailing grid: ``round(T - k T / n) - 1`` for k = 0..n-1, so the first time is always T - 1.

    In numpy's arithmetic, as diffusers has it: halves fall as its accumulated float steps let them fall. (For some n, such as
    61, those add one step in diffusers; not here.)

    >>> trailing_times(1000, 4)
    [999, 749, 499, 249]
    """
    grid = np.round(np.arange(num_train_timesteps, 0, -num_train_timesteps / num_steps)).astype(np.int64)[:num_steps] - 1
    times: list[int] = grid.tolist()
    return times


def ddim_sample(denoise: Callable[[Tensor, Tensor], Prediction], noise: Tensor, times: Sequence[int]) -> Tensor:
    """Run DDIM from ``noise`` [B, ...] at times[0] through the decreasing ``times`` to x0. ``denoise(x_t, t)``, t [B]."""
    x = noise
    grid = [torch.full((len(noise),), t, device=noise.device) for t in times]
    for t, u in zip(grid, [*grid[1:], None], strict=True):
        x = ddim_step(denoise(x, t), u)
    return x
