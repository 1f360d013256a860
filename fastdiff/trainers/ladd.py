"""LADD: a few-step student by a GAN in latent space, whose discriminator is the frozen teacher with a head on every block.

    x^ = x0(x_t, t_i, y),   t_i one of the student's times: x_t = noise at the first, else a_t x0 + s_t eps
    student        mean_k softplus(-h_k(x^))
    discriminator  mean_k [ softplus(-h_k(x0)) + softplus(h_k(x^)) ] + R1         heads and noise: ``_adversarial``

x0 are stored results of the guided teacher, with which the paper trains too: real images have not the teacher's guidance. There is
no distillation term, as in the paper's final recipe; ``add`` has one. Trained: the student, a full copy of the teacher's network,
and the heads; frozen: the teacher. Student and heads take turns, one update each. It samples with fresh noise between its calls.
Sauer et al., Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation (SIGGRAPH Asia 2024), arXiv
2403.12015; the sheet is recalled, but softplus and the random choice of the student's time, which FastGen's code has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.diffusion.process import LEVELS, expand
from fastdiff.diffusion.solvers import trailing_times
from fastdiff.errors import UserError
from fastdiff.models.roles import Role, Roles
from fastdiff.trainers._adversarial import Adversarial
from fastdiff.trainers.method import Batch, Calls, Paper, Trial
from fastdiff.trainers.trajectory import Sampler

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
class LADD(Adversarial):
    """Few-step student by a GAN on the frozen teacher's features; needs prompts only."""

    info: ClassVar[Paper] = Paper(
        title="Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
        venue="SIGGRAPH Asia",
        year=2024,
        arxiv="2403.12015",
        sheet="few_step_diffusion.md: ADD and LADD",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.22, "mode_mass": 0.6, "stray": 0.28}, max_steps=2000),
    }
    sampler: ClassVar[Sampler] = "consistency"

    steps: int = 4
    """Network calls of the student, each of them trained."""
    lr: float = 1e-5
    """Student learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps <= 50 or not self.lr > 0:
            raise UserError(f"steps is {self.steps}, lr {self.lr}: expected 1 to 50 steps and a rate above 0.")

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train="full", lr=self.lr), "discriminator": self.discriminator()}

    def levels(self) -> list[int]:
        return trailing_times(LEVELS, self.steps)

    def updates(self, step: int) -> tuple[str, ...]:
        return ("student", "discriminator")

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        return {"student": Calls(1, 1), **self.gan_calls()}

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        if update == "student":
            x, cond = self.generate(batch, roles)
            batch.memo["fake"] = x.detach(), cond
            return {"gan": self.fooling(x, cond, batch, roles), **self.further(x, cond, batch, roles)}
        _, real, cond = self.draw_pairs(batch, own=True)
        return self.judging((real, cond), {"fake": (*batch.memo["fake"], None)}, batch, roles)

    def generate(self, batch: Batch, roles: Roles) -> tuple[Tensor, Any]:
        """The student's samples [B, ...], each from a state at one of its times, and their conditions."""
        process = batch.teacher.process
        _, x0, cond = self.draw_pairs(batch, own=True)
        levels = torch.tensor(self.levels(), device=x0.device)
        rung, z = batch.draws.integers("rung", 0, len(levels)), batch.noise("z")
        t = process.at_level(levels[rung])
        first = expand(rung == 0, z).bool()
        x_t = torch.where(first, process.initial_scale * z, process.add_noise(x0, z, t))
        return roles.denoiser("student")(x_t, t, cond).x0, cond

    def further(self, x: Tensor, cond: Any, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """Other terms for the student's samples: none."""
        del x, cond, batch, roles
        return {}
