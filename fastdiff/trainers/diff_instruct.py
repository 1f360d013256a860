"""Diff-Instruct: a one-step generator by the difference of two denoisers, with one weight at all noise levels.

    x  = f(z, y) = x0(z, T, y)                                              the student, one call
    L  = E sum_CHW sg( mu_fake - mu_real^guided )(x_t, t, y) . x            x_t = a_t x + s_t eps,  ln(s_t / a_t) ~ N(-1.2, 1.2^2)
    fake score: denoising on sg[x] at times of the same law

The law of the noise is EDM's, stated in the noise-to-signal ratio s / a and so defined under every process: t is the time that has
the ratio, or the nearest one the process has. It is not rescaled by the deviation of the data (EDM's images have 0.5). The loss
is computed as ``sum 0.5 (x - sg[x - G])^2``, which has the same gradient and a value that is not a difference. The sum over a
sample's elements, not their mean, is the paper's. Frozen: the teacher. Trained in full: the student, and the fake score, a copy of
the teacher in train mode (its dropout is at work). The paper has no guidance; ``guidance_scale`` is that of the teacher alone.
Luo et al., NeurIPS 2023, arXiv 2305.18455.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdiff.errors import UserError
from fastdiff.losses import pseudo_target, reduce
from fastdiff.models.roles import Role, Roles
from fastdiff.trainers._scores import FakeScored, generated, score_matching
from fastdiff.trainers.method import Batch, Calls, Paper, Trial, one_step

_TRIAL = {"lr": 1e-3, "fake_score_lr": 2e-3}


@dataclass(kw_only=True)
class DiffInstruct(FakeScored):
    """One-step student by the unweighted difference of two denoisers at log-normal noise."""

    info: ClassVar[Paper] = Paper(
        title="Diff-Instruct: A Universal Approach for Transferring Knowledge From Pre-trained Diffusion Models",
        venue="NeurIPS",
        year=2023,
        arxiv="2305.18455",
        sheet="few_step_diffusion.md: Diff-Instruct and f-distill",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.25, "mode_mass": 0.5, "stray": 0.3}, max_steps=3000),
        "gaussian": Trial(fields=_TRIAL, bounds={"w2": 0.6, "covariance": 0.2}, max_steps=3000),
    }
    fixed_point: ClassVar[str] = "student"

    guidance_scale: float = 1.0
    """Guidance of the teacher; 1 is off, as in the paper. The fake score is never guided."""
    lr: float = 1e-5
    """Student learning rate."""
    fake_score_lr: float = 1e-5
    """Learning rate of the fake score."""
    log_nsr_mean: float = -1.2
    """Mean of ln(sigma / alpha) at which both losses look."""
    log_nsr_std: float = 1.2
    """Its standard deviation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.log_nsr_std > 0:
            raise UserError(f"log_nsr_std is {self.log_nsr_std}: it must be above 0.")

    @classmethod
    def name(cls) -> str:
        return "diff-instruct"

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train="full", lr=self.lr), "fake_score": Role(train="full", lr=self.fake_score_lr, dropout=True)}

    def updates(self, step: int) -> tuple[str, ...]:
        return self.after_warmup(("student", "fake_score"), step)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        if "student" not in updates:
            return {"student": Calls(1, 0), "fake_score": Calls(1, 1)}
        guided = 1 if self.guidance_scale == 1 else 2
        return {"student": Calls(1, 1), "teacher": Calls(guided, 0), "fake_score": Calls(2, 1)}

    def drawn_times(self, name: str, batch: Batch) -> Tensor:
        """Times [B] of log-normal noise-to-signal ratios, clamped to the process's range."""
        process = batch.teacher.process
        log_nsr = self.log_nsr_mean + self.log_nsr_std * batch.draws.normal(name, ()).double()
        t = process.t_from_nsr(log_nsr.exp())
        return t.clamp(process.t_min, process.t_max).to(t)

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        return self._student_loss(batch, roles) if update == "student" else self._fake_score_loss(batch, roles)

    def _student_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
        batch.memo["x"] = x.detach()
        t, eps = self.drawn_times("student_t", batch), batch.noise("student_eps")
        with torch.no_grad():
            x_t = roles.teacher.process.add_noise(x, eps, t)
            real = roles.denoiser("teacher").guided(x_t, t, batch.cond, batch.null, self.guidance_scale)
            fake = roles.denoiser("fake_score")(x_t, t, batch.cond)
        return {"diff_instruct": reduce(pseudo_target(x, fake.x0 - real.x0), denominator=len(x))}

    def _fake_score_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x, process = generated(batch, roles), roles.teacher.process
        t, eps = self.drawn_times("fake_t", batch), batch.noise("fake_eps")
        fake = roles.denoiser("fake_score")(process.add_noise(x, eps, t), t, batch.cond)
        return {"fake_score": reduce(score_matching(fake, x, eps))}
