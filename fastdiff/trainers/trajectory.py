"""How a few-step student makes a sample, and what it passes through on the way.

    x_T = scale z         x0_i = student(x_{t_i}, t_i)          t_0 > t_1 > .. : the student's levels
    ddim          x_{i+1} = a x0_i + s eps_i                    eps_i the student's own, TDM
    consistency   x_{i+1} = a x0_i + s noise                    fresh noise, LCM and DMD2
    tcd           ddim to (1 - eta) t_{i+1}, and with fresh noise back to t_{i+1}; eta = 0 is ddim and draws none

One-step students are the case of one level. The exported pipeline makes the same steps with a stock scheduler.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.renoising import consistency_step, tcd_step
from fastdiff.diffusion.solvers import ddim_step
from fastdiff.models.denoiser import Denoiser

Sampler = Literal["ddim", "consistency", "tcd"]
Generators = torch.Generator | Sequence[torch.Generator] | None


def trajectory(
    student: Denoiser,
    noise: Tensor,
    cond: Any,
    levels: Sequence[int],
    sampler: Sampler,
    generators: Generators | Callable[[int], Tensor] = None,
    *,
    eta: float = 0.0,
) -> list[Prediction]:
    """The student's predictions at ``levels`` [K] of 0..999, from unit noise [B, ...]; the last one's x0 is the sample.

    Args:
        generators: for fresh noise: a generator, one a sample, or ``step -> noise`` like ``noise``.
        eta: of the tcd sampler, from 0 to 1.

    Raises:
        ValueError: fresh noise is needed and nothing gives any.
    """
    times = [student.process.at_level(torch.tensor(level)) for level in levels]
    return through(student, noise, cond, times, sampler, generators, eta=eta)


def through(
    student: Denoiser,
    noise: Tensor,
    cond: Any,
    times: Sequence[Tensor],
    sampler: Sampler,
    generators: Generators | Callable[[int], Tensor] = None,
    *,
    eta: float = 0.0,
) -> list[Prediction]:
    """``trajectory`` at times [K] of the student's process itself, each a scalar."""
    found = list[Prediction]()
    x = student.process.initial_scale * noise
    deterministic = sampler == "ddim" or (sampler == "tcd" and eta == 0)
    for i, time in enumerate(times):
        t = time.to(noise.device).expand(len(noise))
        if i > 0 and deterministic:
            x = ddim_step(found[-1], t)
        elif i > 0:
            fresh = generators(i) if callable(generators) else fresh_noise(noise, generators)
            x = tcd_step(found[-1], t, fresh, eta) if sampler == "tcd" else consistency_step(found[-1], t, fresh)
        found.append(student(x, t, cond))
    return found


def own_generators(n: int) -> list[torch.Generator]:
    """Generators of ``n`` samples, the i-th with seed i: what an export is compared by."""
    return [torch.Generator().manual_seed(i) for i in range(n)]


def own_noise(like: Tensor) -> Tensor:
    """The first noise that a pipeline draws from ``own_generators`` where its call takes none, like ``like`` [B, ...]."""
    return fresh_noise(like, own_generators(len(like)))


def fresh_noise(like: Tensor, generators: Generators) -> Tensor:
    """Unit noise as diffusers draws it: on the CPU, one sample after another where each has its generator."""
    if generators is None:
        raise ValueError("this sampler draws noise between its steps: pass a generator, or one a sample.")
    if isinstance(generators, torch.Generator):
        return torch.randn(like.shape, generator=generators, dtype=like.dtype).to(like.device)
    rows = [torch.randn((1, *like.shape[1:]), generator=generator, dtype=like.dtype) for generator in generators]
    return torch.cat(rows).to(like.device)
