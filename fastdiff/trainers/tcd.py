"""TCD: latent consistency at random ends of the jump, so that any number of steps works, with as much fresh noise as is wanted.

    t_end   ~ U{0 .. t_{n-1}},  of levels 0..999
    x_u     = DDIM step from x_t, teacher guided at s;    u = t_{n-1}
    L       = mean( sqrt((Psi(x_t, t_end) - sg Psi-(x_u, t_end))^2 + c^2) - c ),      Psi(x, v) = a_v x0(x) + s_v eps(x)
    sample  DDIM to w = (1 - eta) u, then noise from w to u:   x_u = (a_u / a_w) x_w + sqrt(s_u^2 - (a_u / a_w)^2 s_w^2) noise

Times, guidance and its embedding, target: ``lcm``. Ends, jumps and sampling: ``_segments``; with all ends at 0 it is LCM but for a
factor, on a table that ends at s_0 = 0 to the last digit. eta = 0 samples as DDIM does and eta = 1 as LCM does, up to abar_0.
Zheng et al., Trajectory Consistency Distillation (2024), arXiv 2402.19159; as on the sheet of Hyper-SD, read in the released code.
Departures: those of ``lcm``. A flow teacher of diffusers has a scheduler for eta = 0 and for eta = 1 only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastdiff.models.denoiser import Denoiser
from fastdiff.trainers._segments import TrajectoryConsistency
from fastdiff.trainers.lcm import LCM
from fastdiff.trainers.method import Paper, Trial
from fastdiff.trainers.trajectory import Generators

_TRIAL = {
    "guidance_range": (1.0, 1.0),
    "original_steps": 40,
    "pairs": 20_000,
    "pair_steps": 40,
    "pair_guidance_scale": 1.0,
    "lr": 1e-3,
}


@dataclass(kw_only=True)
class TCD(TrajectoryConsistency, LCM):
    """Few-step student whose jumps agree at every end; samples with any number of steps and a chosen share of fresh noise."""

    info: ClassVar[Paper] = Paper(
        title="Trajectory Consistency Distillation",
        venue="arXiv",
        year=2024,
        arxiv="2402.19159",
        sheet="few_step_diffusion.md: Hyper-SD (TCD sampling)",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.1, "stray": 0.09}, max_steps=3200),
        "gaussian": Trial(
            fields={**_TRIAL, "eta": 0.0, "steps": 2}, bounds={"flow_map": 0.16, "w2": 0.7, "axes": 0.9}, max_steps=2500
        ),
    }

    def sample(self, student: Denoiser, noise: Tensor, cond: Any, generators: Generators = None) -> Tensor:
        return super().sample(student, noise, self.told(cond, noise), generators)
