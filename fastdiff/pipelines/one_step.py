"""One network call by a bare ``pipeline(prompt)``, with stock diffusers classes only.

``StableDiffusionPipeline`` defaults to 50 steps and guidance 7.5, and neither can be stored in its folder. Two facts about stock
classes make the bare call right nevertheless:

- a UNet with ``time_cond_proj_dim`` set turns classifier-free guidance off whatever is passed, and with a zero projection it
  computes what it computed before, bit for bit;
- ``DPMSolverMultistepScheduler`` with trailing spacing drops every time above the one where ``lambda_min_clipped`` cuts. Told
  of ``max_steps`` times more training times than there are, it keeps exactly one for every number of steps up to
  ``max_steps``; a constant beta puts ``abar`` at that time where the teacher has it, and order 1 with a zero final sigma
  returns x0 itself.
"""

import math
from typing import Any

import torch

from fastdiff.models.guidance_embedding import with_guidance_embedding


def one_step_scheduler(alpha_bar: float, *, timestep: int = 999, prediction_type: str = "epsilon", max_steps: int = 50) -> Any:
    """A stock scheduler that visits ``timestep`` alone, where ``alphas_cumprod`` is ``alpha_bar`` to 1e-5 relative.

    Raises:
        ValueError: ``alpha_bar`` is 0 (zero-terminal SNR): its log does not exist, so no constant beta reaches it.
    """
    from diffusers import DPMSolverMultistepScheduler

    if not 0 < alpha_bar < 1:
        raise ValueError(f"alpha_bar at the student's time is {alpha_bar}: a one-step scheduler needs it between 0 and 1.")
    last, total = timestep + 1, max_steps * (timestep + 1)
    start = -math.expm1(math.log(alpha_bar) / last)

    def reached(end: float) -> float:
        betas = torch.linspace(start, end, total, dtype=torch.float32)[:last]
        return torch.cumprod(1 - betas, 0)[timestep].double().item()

    end = min((start * (1 + k * 1e-5) for k in range(-1000, 1001)), key=lambda e: abs(reached(e) - alpha_bar))
    options: dict[str, Any] = {
        "num_train_timesteps": total,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "linear",
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "algorithm_type": "dpmsolver++",
        "solver_order": 1,
        "final_sigmas_type": "zero",
    }
    log_snr = DPMSolverMultistepScheduler(**options).lambda_t
    clip = float(log_snr[timestep] + log_snr[last]) / 2
    return DPMSolverMultistepScheduler(**options, lambda_min_clipped=clip)


def without_guidance(unet: Any) -> Any:
    """The same network with a guidance embedding of zero: pipelines then never run the unconditional pass."""
    return with_guidance_embedding(unet, width=4)
