"""SwiftBrush: a one-step generator by variational score distillation, from prompts alone.

    f(z, y) = (z - s_T eps_theta(z, T, y)) / a_T                                    the student, one call
    G       = s_t^2 ( eps_real^guided(x_t, t, y) - eps_fake^guided(x_t, t, y) )     x_t = a_t f + s_t eps,  t ~ U{20..980}
    student:     mean 0.5 ( f - sg[f - G] )^2
    fake score:  mean ( a_t eps_fake(x_t) - a_t eps )^2 on sg[f],  t ~ U{0..999}, the null prompt for the whole batch w.p. 0.1

Both teachers are guided with the same scale. Frozen: the teacher. Trained: the student, in full; the fake score, a LoRA adapter
on the teacher's own backbone. Nguyen & Tran, CVPR 2024, arXiv 2312.05239; losses and LoRA as in the
official script; lr and its decay are not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fastdiff.trainers._variational import VariationalMethod
from fastdiff.trainers.method import Batch, Paper, Trial

_TRIAL = {"guidance_scale": 1.0, "lr": 2e-4, "fake_score_lr": 2e-3}


@dataclass(kw_only=True)
class SwiftBrush(VariationalMethod):
    """One-step student by variational score distillation with a LoRA fake score; needs prompts only."""

    info: ClassVar[Paper] = Paper(
        title="SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational Score Distillation",
        venue="CVPR",
        year=2024,
        arxiv="2312.05239",
        sheet="few_step_diffusion.md: SwiftBrush",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.2, "mode_mass": 0.45, "stray": 0.35}, max_steps=4000),
        "gaussian": Trial(fields=_TRIAL, bounds={"w2": 0.9, "covariance": 0.15}, max_steps=4000),
        "classes": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.25, "mode_mass": 0.95, "stray": 0.35}, max_steps=4000),
    }
    guidance_scale: float = 4.5
    """Guidance of teacher and fake score alike; 1 is off."""

    def guided(self) -> bool:
        return self.guidance_scale != 1

    def scale(self, batch: Batch) -> float:
        return self.guidance_scale
