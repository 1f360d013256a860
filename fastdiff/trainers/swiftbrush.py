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

import torch
from torch import Tensor

from fastdiff.diffusion.process import LEVELS, expand
from fastdiff.errors import UserError
from fastdiff.losses import denoising, pseudo_target, reduce, variational_score_gradient
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._regression import REGRESSION, PairedMethod
from fastdiff.trainers.method import Batch, Calls, Paper, Trial, one_step

_TRIAL = {"guidance_scale": 1.0, "lr": 2e-4, "fake_score_lr": 2e-3}


@dataclass(kw_only=True)
class SwiftBrush(PairedMethod):
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
    fixed_point: ClassVar[str] = "student"

    guidance_scale: float = 4.5
    """Guidance of teacher and fake score alike; 1 is off."""
    lr: float = 1e-5
    """Student learning rate (official command: 1e-6)."""
    fake_score_lr: float = 1e-3
    """Learning rate of the fake score's adapter."""
    rank: int = 64
    """LoRA rank of the fake score."""
    lora_alpha: float = 108.0
    """LoRA alpha of the fake score."""
    null_probability: float = 0.1
    """How often the fake score learns the null prompt, which its guidance needs; decided once per batch."""
    warm_start_steps: int = 0
    """First regress on ODE pairs for so many iterations (0: not at all, as in the paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.null_probability <= 1:
            raise UserError(f"null_probability is {self.null_probability}: it must be in [0, 1].")
        if self.warm_start_steps < 0:
            raise UserError(f"warm_start_steps is {self.warm_start_steps}: it must not be negative; 0 turns the warm start off.")

    def roles(self) -> dict[str, Role]:
        fake = Role(
            train="lora",
            lr=self.fake_score_lr,
            rank=self.rank,
            lora_alpha=self.lora_alpha,
            lora_targets=("to_q", "to_v"),
        )
        return {"student": Role(train="full", lr=self.lr), "fake_score": fake}

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        return {"student_t": (20, 980), "fake_t": (0, LEVELS - 1)}

    def regresses(self) -> bool:
        return self.warm_start_steps > 0

    def updates(self, step: int) -> tuple[str, ...]:
        return (REGRESSION,) if step < self.warm_start_steps else ("student", "fake_score")

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        if REGRESSION in updates:
            return {"student": Calls(1, 1)}
        guided = 1 if self.guidance_scale == 1 else 2
        return {"student": Calls(1, 1), "teacher": Calls(guided, 0), "fake_score": Calls(guided + 1, 1)}

    def lr_of(self, role: str, step: int) -> float:
        return self.regression_lr if step < self.warm_start_steps else super().lr_of(role, step)

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        if update == REGRESSION:
            return self.regression(batch, roles)
        return self._student_loss(batch, roles) if update == "student" else self._fake_score_loss(batch, roles)

    def _student_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
        batch.memo["x"] = x.detach()
        t, eps = self.times("student_t", batch), batch.noise("student_eps")
        with torch.no_grad():
            process = roles.teacher.process
            x_t = process.add_noise(x, eps, t)
            real = roles.denoiser("teacher").guided(x_t, t, batch.cond, batch.null, self.guidance_scale)
            fake = roles.denoiser("fake_score").guided(x_t, t, batch.cond, batch.null, self.guidance_scale)
            weight = expand((process.sigma(t) / process.norm(t)).square(), x)
            gradient = variational_score_gradient(real.eps, fake.eps, weight=weight)
        return {"vsd": reduce(pseudo_target(x, gradient))}

    def _fake_score_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x, process = batch.memo["x"], roles.teacher.process
        t, eps = self.times("fake_t", batch), batch.noise("fake_eps")
        cond = batch.null if batch.draws.choice("null") < self.null_probability else batch.cond
        fake = roles.denoiser("fake_score")(process.add_noise(x, eps, t), t, cond)
        weight = expand((process.alpha(t) / process.norm(t)).square(), x)
        return {"fake_score": reduce(denoising(fake.eps, eps, weight=weight))}
