"""What SwiftBrush and its successors share: variational score distillation with an adapter as the fake score.

    f(z, y) = (z - s_T eps_theta(z, T, y)) / a_T                                    the student, one call
    G       = s_t^2 ( eps_real^guided(x_t, t, y) - eps_fake^guided(x_t, t, y) )     x_t = a_t f + s_t eps,  t ~ U{20..980}
    student:     mean 0.5 ( f - sg[f - G] )^2 + what a method adds
    fake score:  mean ( a_t eps_fake(x_t) - a_t eps )^2 on sg[f],  t ~ U{0..999}, the null prompt for the whole batch w.p. 0.1

A method says the scale of the guidance, which is one for both networks: with two, their difference would keep a multiple of the
direction of guidance and never vanish. SwiftBrush, CVPR 2024, arXiv 2312.05239.
"""

from abc import abstractmethod
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
from fastdiff.trainers._scores import FakeScored, generated
from fastdiff.trainers.method import Batch, Calls, one_step


@dataclass(kw_only=True)
class VariationalMethod(FakeScored, PairedMethod):
    """One-step student by variational score distillation with a LoRA fake score; needs prompts only."""

    fixed_point: ClassVar[str] = "student"

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

    @abstractmethod
    def guided(self) -> bool:
        """Whether the two networks are asked about the null prompt too."""

    @abstractmethod
    def scale(self, batch: Batch) -> float:
        """The guidance of teacher and fake score in this iteration, equal on all ranks; 1 is off."""

    def student_role(self) -> Role:
        """How the student trains."""
        return Role(train="full", lr=self.lr)

    def added(self, x: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Further terms of the student's loss on its samples x."""
        del x, batch
        return {}

    def roles(self) -> dict[str, Role]:
        fake = Role(
            train="lora",
            lr=self.fake_score_lr,
            rank=self.rank,
            lora_alpha=self.lora_alpha,
            lora_targets=("to_q", "to_v"),
        )
        return {"student": self.student_role(), "fake_score": fake}

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        return {"student_t": (20, 980), "fake_t": (0, LEVELS - 1)}

    def regresses(self) -> bool:
        return self.warm_start_steps > 0

    def updates(self, step: int) -> tuple[str, ...]:
        if step < self.warm_start_steps:
            return (REGRESSION,)
        return self.after_warmup(("student", "fake_score"), step - self.warm_start_steps)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        if REGRESSION in updates:
            return {"student": Calls(1, 1)}
        student = "student" in updates
        asked = (1 + self.guided()) * student
        return {"student": Calls(1, int(student)), "teacher": Calls(asked, 0), "fake_score": Calls(asked + 1, 1)}

    def lr_of(self, role: str, step: int) -> float:
        return self.regression_lr if step < self.warm_start_steps else super().lr_of(role, step)

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        if update == REGRESSION:
            return self.regression(batch, roles)
        return self._student_loss(batch, roles) if update == "student" else self._fake_score_loss(batch, roles)

    def _student_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
        batch.memo["x"] = x.detach()
        t, eps, scale = self.times("student_t", batch), batch.noise("student_eps"), self.scale(batch)
        with torch.no_grad():
            process = roles.teacher.process
            x_t = process.add_noise(x, eps, t)
            real = roles.denoiser("teacher").guided(x_t, t, batch.cond, batch.null, scale)
            fake = roles.denoiser("fake_score").guided(x_t, t, batch.cond, batch.null, scale)
            weight = expand((process.sigma(t) / process.norm(t)).square(), x)
            gradient = variational_score_gradient(real.eps, fake.eps, weight=weight)
        return {"vsd": reduce(pseudo_target(x, gradient))} | self.added(x, batch)

    def _fake_score_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x, process = generated(batch, roles), roles.teacher.process
        t, eps = self.times("fake_t", batch), batch.noise("fake_eps")
        cond = batch.null if batch.draws.choice("null") < self.null_probability else batch.cond
        fake = roles.denoiser("fake_score")(process.add_noise(x, eps, t), t, cond)
        weight = expand((process.alpha(t) / process.norm(t)).square(), x)
        return {"fake_score": reduce(denoising(fake.eps, eps, weight=weight))}
