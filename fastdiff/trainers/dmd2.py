"""DMD2, one step: distribution matching distillation with a fully trained fake score and an optional GAN term.

    x  = f(z, y) = x0(z, T, y)                                              the student, one call
    G  = ( x0_fake(x_t) - x0_real^guided(x_t) ) / mean_CHW| x - x0_real |   x_t = a_t x + s_t eps,  t ~ U{20..980}
    student (1 of `ratio` iterations):  mean 0.5 ( x - sg[x - G] )^2 + w_G softplus(-h(x_t'))
    fake score (every iteration):       mean ( eps_fake(x_t) - eps )^2 on sg[x],  t ~ U{0..999}
                                        + w_D [ softplus(h(x_t')) + softplus(-h(real_t')) ]

Only the teacher is guided. h reads the fake score's bottleneck at a fresh t' ~ U{0..999}; the discriminator's gradient flows
into the fake score too. The real samples of the GAN term are the teacher's stored results, so that the method stays free of
data: the paper uses real images. Both networks start from the teacher. Yin et al., NeurIPS 2024, arXiv 2405.14867.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.losses import (
    denoising,
    distribution_matching_gradient,
    pseudo_target,
    reduce,
    softplus_discriminator,
    softplus_generator,
)
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._regression import REGRESSION, PairedMethod
from fastdiff.trainers.method import Batch, Calls, Paper, Trial, due, last_time, needs_bottleneck, needs_thousand_times, one_step

_TRIAL = {"guidance_scale": 1.0, "lr": 1e-3, "fake_score_lr": 2e-3, "ratio": (1, 3)}


@dataclass(kw_only=True)
class DMD2(PairedMethod):
    """One-step student by distribution matching with a two-time-scale fake score; GAN term optional."""

    info: ClassVar[Paper] = Paper(
        title="Improved Distribution Matching Distillation for Fast Image Synthesis",
        venue="NeurIPS",
        year=2024,
        arxiv="2405.14867",
        sheet="few_step_diffusion.md: DMD and DMD2",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields=_TRIAL,
            bounds={"sliced_w2": 0.2, "mode_mass": 0.4, "mode_spread": 0.6, "stray": 0.25},
            max_steps=6000,
        ),
        "gaussian": Trial(fields=_TRIAL, bounds={"w2": 0.6, "axes": 0.95}, max_steps=6000),
        "classes": Trial(
            fields=_TRIAL,
            bounds={"sliced_w2": 0.25, "mode_mass": 0.8, "mode_spread": 0.9, "stray": 0.2},
            max_steps=6000,
        ),
        "images": Trial(
            fields={"guidance_scale": 1.0, "lr": 5e-4, "fake_score_lr": 1e-3, "ratio": (1, 2)},
            bounds={"sliced_w2": 0.2, "covariance": 0.25, "mode_mass": 0.5},
            max_steps=600,
            batch_size=64,
        ),
    }
    fixed_point: ClassVar[str] = "student"

    guidance_scale: float = 1.75
    """Guidance of the teacher (paper: 1.75 for SD 1.5, 8 for SDXL); 1 is off. The fake score is never guided."""
    lr: float = 1e-5
    """Student learning rate."""
    fake_score_lr: float = 1e-5
    """Learning rate of the fake score and of the discriminator head."""
    ratio: tuple[int, int] = (1, 5)
    """Student updates to fake-score updates: two integers."""
    fake_score: Literal["full", "lora"] = "full"
    """How the fake score trains: full (a copy, as in the paper) or lora (an adapter on the teacher's backbone)."""
    rank: int = 16
    """LoRA rank of the fake score when it is an adapter (alpha equals the rank)."""
    gan_weight: float = 0.0
    """Weight of the student's GAN term (paper: 1e-3 for SD 1.5); 0 turns the discriminator off."""
    discriminator_weight: float = 1e-2
    """Weight of the discriminator's own loss."""
    warm_start_steps: int = 0
    """First regress on ODE pairs for so many iterations (0: not at all)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.gan_weight, self.discriminator_weight, self.warm_start_steps) < 0:
            raise UserError("gan_weight, discriminator_weight and warm_start_steps must not be negative; 0 turns each off.")
        if self.fake_score not in {"full", "lora"}:
            raise UserError(f"fake_score is {self.fake_score!r}: expected full or lora.")
        if not 1 <= self.ratio[0] <= self.ratio[1]:
            raise UserError(f"ratio is {self.ratio}: at least 1 student update, and at least as many of the fake score.")

    def roles(self) -> dict[str, Role]:
        fake = Role(
            train="lora" if self.fake_score == "lora" else "full",
            lr=self.fake_score_lr,
            weight_decay=0.01,
            rank=self.rank,
            lora_alpha=float(self.rank),
        )
        roles = {"student": Role(train="full", lr=self.lr, weight_decay=0.01), "fake_score": fake}
        if self.gan_weight > 0:
            roles["discriminator"] = Role(train="module", lr=self.fake_score_lr, weight_decay=0.01, build=_head)
        return roles

    def validate(self, teacher: Teacher) -> None:
        needs_thousand_times(teacher)
        if self.gan_weight > 0:
            needs_bottleneck(teacher)

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        everywhere = (0, last_time(teacher.process))
        gan = ("gan_student_t", "gan_real_t", "gan_fake_t") if self.gan_weight > 0 else ()
        return {"student_t": (20, 980), "fake_t": everywhere} | dict.fromkeys(gan, everywhere)

    def regresses(self) -> bool:
        return self.warm_start_steps > 0 or self.gan_weight > 0

    def updates(self, step: int) -> tuple[str, ...]:
        if step < self.warm_start_steps:
            return (REGRESSION,)
        return ("student", "fake_score") if due(step - self.warm_start_steps, self.ratio) else ("fake_score",)

    def trains(self, update: str) -> tuple[str, ...]:
        if update == "fake_score" and self.gan_weight > 0:
            return ("fake_score", "discriminator")
        return super().trains(update)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        if REGRESSION in updates:
            return {"student": Calls(1, 1)}
        gan = self.gan_weight > 0
        if "student" not in updates:
            return {"student": Calls(1, 0), "fake_score": Calls(1, 1) + Calls(2 * gan, 2 * gan)}
        guided = 1 if self.guidance_scale == 1 else 2
        fake = Calls(2, 1) + Calls(3 * gan, 3 * gan)
        return {"student": Calls(1, 1), "teacher": Calls(guided, 0), "fake_score": fake}

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
            x_t = roles.teacher.process.add_noise(x, eps, t)
            real = roles.denoiser("teacher").guided(x_t, t, batch.cond, batch.null, self.guidance_scale)
            fake = roles.denoiser("fake_score")(x_t, t, batch.cond)
            gradient = distribution_matching_gradient(x, real.x0, fake.x0)
        terms = {"dmd": reduce(pseudo_target(x, gradient))}
        if self.gan_weight > 0:
            logits = self._logits(x, "gan_student", batch.cond, batch, roles)
            terms["gan"] = self.gan_weight * reduce(softplus_generator(logits))
        return terms

    def _fake_score_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        if "x" not in batch.memo:
            with torch.no_grad():
                batch.memo["x"] = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
        x, process = batch.memo["x"], roles.teacher.process
        t, eps = self.times("fake_t", batch), batch.noise("fake_eps")
        fake = roles.denoiser("fake_score")(process.add_noise(x, eps, t), t, batch.cond)
        terms = {"fake_score": reduce(denoising(fake.eps, eps))}
        if self.gan_weight > 0:
            _, real, cond = self.draw_pairs(batch, own=True)
            on_real = self._logits(real, "gan_real", cond, batch, roles)
            on_fake = self._logits(x, "gan_fake", batch.cond, batch, roles)
            halves = softplus_discriminator(on_real, on_fake)
            terms["discriminator"] = self.discriminator_weight * (reduce(halves[0]) + reduce(halves[1]))
        return terms

    def _logits(self, x: Tensor, draw: str, cond: Tensor, batch: Batch, roles: Roles) -> Tensor:
        """h on the fake score's bottleneck features of x, noised to a fresh time; the decoder half does not run."""
        process = roles.teacher.process
        t, eps = self.times(f"{draw}_t", batch), batch.noise(f"{draw}_eps")
        features = roles.features("fake_score", process.add_noise(x, eps, t), t, cond)
        logits: Tensor = roles.modules["discriminator"](features)
        return logits


def _head(teacher: Teacher) -> nn.Module:
    return teacher.family.head()
