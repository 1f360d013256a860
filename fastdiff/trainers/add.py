"""ADD: a few-step student by a GAN and by the frozen teacher's denoising of the student's own noised samples.

    student  mean_k g(-h_k(x^)) + lambda mean a_t ( x^ - sg x0_teacher(a_t x^ + s_t eps, t, y) )^2,     t ~ U{0..999}
    heads    hinge, and R1 on the features

x^, the heads and the discriminator's noise are LADD's (``ladd``, ``_adversarial``). Here the teacher is guided as it was for the
stored results that are the GAN's real samples, so that both terms mean one law. The weight c(t) = a_t is the paper's exponential
one. **Departure**: the paper's discriminator looks at decoded images through DINOv2 and is told prompt and image by a projection;
here it looks at noised latents through the teacher, which has read the prompt. No image network is a part of a training in this
library. Sauer et al., Adversarial Diffusion Distillation (ECCV 2024), arXiv 2311.17042; the sheet is recalled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.process import LEVELS
from fastdiff.errors import UserError
from fastdiff.losses import reduce, squared_error
from fastdiff.models.roles import Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers.ladd import LADD
from fastdiff.trainers.method import Batch, Calls, Paper, Trial

_TRIAL = {
    "pairs": 20_000,
    "pair_steps": 40,
    "pair_guidance_scale": 1.0,
    "steps": 1,
    "lr": 2e-4,
    "discriminator_lr": 1e-3,
    "gan_log_mean": -0.7,
    "gan_log_std": 1.5,
}


@dataclass(kw_only=True)
class ADD(LADD):
    """Few-step student by a GAN on the teacher's features and by distillation of the teacher's denoising."""

    info: ClassVar[Paper] = Paper(
        title="Adversarial Diffusion Distillation",
        venue="ECCV",
        year=2024,
        arxiv="2311.17042",
        sheet="few_step_diffusion.md: ADD and LADD",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.2, "mode_mass": 0.74, "stray": 0.18}, max_steps=2000),
    }

    gan: Literal["softplus", "hinge"] = "hinge"
    """Loss of both players: non-saturating, or the hinge's."""
    r1_weight: float = 1e-5
    """Weight of the penalty on the discriminator's slope at real samples; 0 is off."""
    distillation_weight: float = 2.5
    """lambda, the weight of the distillation term."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distillation_weight > 0:
            raise UserError(f"distillation_weight is {self.distillation_weight}: it must be above 0. Without that term it is ladd.")

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        return {"distillation_t": (0, LEVELS - 1)}

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        calls = super().calls(updates)
        asked = 1 if self.pair_guidance_scale == 1 else 2
        return calls | {"teacher": calls["teacher"] + Calls(asked, 0)}

    def further(self, x: Tensor, cond: Any, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        t, process = self.times("distillation_t", batch), roles.teacher.process
        with torch.no_grad():
            x_t = process.add_noise(x, batch.noise("distillation_eps"), t)
            denoised = roles.denoiser("teacher").guided(x_t, t, cond, batch.null, self.pair_guidance_scale).x0
        error = reduce(squared_error(x, denoised), weight=process.alpha(t).to(x.device))
        return {"distillation": self.distillation_weight * error}
