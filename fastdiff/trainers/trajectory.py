"""How a few-step student makes a sample, and what it passes through on the way.

    x_T = scale z         x0_i = student(x_{t_i}, t_i)          t_0 > t_1 > .. : the student's levels
    ddim          x_{i+1} = a x0_i + s eps_i                    eps_i the student's own, TDM
    consistency   x_{i+1} = a x0_i + s noise                    fresh noise, LCM and DMD2

One-step students are the case of one level. The exported pipeline makes the same steps with a stock scheduler.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.renoising import consistency_step
from fastdiff.diffusion.solvers import ddim_step
from fastdiff.models.denoiser import Denoiser

Sampler = Literal["ddim", "consistency"]
Generators = torch.Generator | Sequence[torch.Generator] | None


def trajectory(
    student: Denoiser,
    noise: Tensor,
    cond: Any,
    levels: Sequence[int],
    sampler: Sampler,
    generators: Generators | Callable[[int], Tensor] = None,
) -> list[Prediction]:
    """The student's predictions at ``levels`` [K] of 0..999, from unit noise [B, ...]; the last one's x0 is the sample.

    Args:
        generators: for the consistency sampler's fresh noise: a generator, one a sample, or ``step -> noise`` like ``noise``.

    Raises:
        ValueError: fresh noise is needed and nothing gives any.
    """
    times = [student.process.at_level(torch.tensor(level)) for level in levels]
    return through(student, noise, cond, times, sampler, generators)


def through(
    student: Denoiser,
    noise: Tensor,
    cond: Any,
    times: Sequence[Tensor],
    sampler: Sampler,
    generators: Generators | Callable[[int], Tensor] = None,
) -> list[Prediction]:
    """``trajectory`` at times [K] of the student's process itself, each a scalar."""
    found = list[Prediction]()
    x = student.process.initial_scale * noise
    for i, time in enumerate(times):
        t = time.to(noise.device).expand(len(noise))
        if i > 0 and sampler == "ddim":
            x = ddim_step(found[-1], t)
        elif i > 0:
            fresh = generators(i) if callable(generators) else _draw(noise, generators)
            x = consistency_step(found[-1], t, fresh)
        found.append(student(x, t, cond))
    return found


def own_generators(n: int) -> list[torch.Generator]:
    """Generators of ``n`` samples, the i-th with seed i: what an export is compared by."""
    return [torch.Generator().manual_seed(i) for i in range(n)]


def _draw(like: Tensor, generators: Generators) -> Tensor:
    """Unit noise as diffusers draws it: on the CPU, one sample after another where each has its generator."""
    if generators is None:
        raise ValueError("this sampler draws noise between its steps: pass a generator, or one a sample.")
    if isinstance(generators, torch.Generator):
        return torch.randn(like.shape, generator=generators, dtype=like.dtype).to(like.device)
    rows = [torch.randn((1, *like.shape[1:]), generator=generator, dtype=like.dtype) for generator in generators]
    return torch.cat(rows).to(like.device)
