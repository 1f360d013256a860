"""The one-step stage of Hyper-SD: score distillation of the sample that one call makes, held to what several calls make of it.

    x      = the student's one-step sample of z, from level 999
    x*     = what the student of the stage before, frozen, makes of the same z in ``multistep`` deterministic steps
    L      = w_S 0.5 mean ( x - sg[x - G] )^2 + w_M mean ( x - x* )^2 + kept             G: DMD's, of teacher and fake score
    fake   = denoising score matching on sg[x], as in ``dmd2``, in every iteration

One step is the weak end of trajectory consistency, which serves all other ends too. ``kept`` (``_segments``) holds x0 at all times
but 999 to that of the stage before, since the adapter is to keep its other numbers of steps: this library's choice, and so are the
weights, and whose several steps x* is made in: the sheet says the multistep output. In one adapter for all numbers of steps the
time is 999, in the paper's adapter for one step alone 800. Hyper-SD (arXiv 2404.13686), DMD (arXiv 2311.18828).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.diffusion.process import LEVELS
from fastdiff.diffusion.solvers import lcm_times
from fastdiff.errors import UserError
from fastdiff.losses import pseudo_target, reduce, squared_error
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._scores import score_matching
from fastdiff.trainers._segments import TrajectoryConsistency, sample_tcd
from fastdiff.trainers.dmd2 import matching_gradient
from fastdiff.trainers.lcm_lora import adapter_role
from fastdiff.trainers.method import Batch

FAKE_SCORE, ONE_STEP = "fake_score", "one_step"


@dataclass(kw_only=True)
class OneStepDistilled(TrajectoryConsistency):
    """A trajectory-consistency method with the one-step stage; the method says when."""

    one_step_steps: int = 0
    """Iterations of score distillation for one step, after all stages; 0 leaves the stage out."""
    one_step_warmup: int = 0
    """The first of them, in which the fake score alone trains: it begins as the teacher, and the student does not."""
    score_weight: float = 1.0
    """Of the score term."""
    multistep_weight: float = 1.0
    """Of the distance to the multistep output."""
    multistep: int = 4
    """Steps of that output."""
    fake_score_lr: float = 1e-4
    """Learning rate of the fake score, an adapter like the student's."""
    rank: int = 64
    """Rank of the adapters; their alpha equals it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("one_step_steps", "one_step_warmup", "score_weight", "multistep_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must not be negative; 0 turns it off.")
        if self.one_step_warmup >= max(self.one_step_steps, 1):
            raise UserError(
                f"one_step_warmup is {self.one_step_warmup} of one_step_steps {self.one_step_steps}: the student would not learn."
            )
        if not 1 <= self.multistep <= self.original_steps or not self.fake_score_lr > 0:
            raise UserError(
                f"multistep is {self.multistep}, fake_score_lr {self.fake_score_lr}: expected 1 to {self.original_steps} "
                "steps, and a rate above 0."
            )

    def one_step_roles(self) -> dict[str, Role]:
        """What the stage needs besides the student."""
        return {FAKE_SCORE: adapter_role(self.rank, self.fake_score_lr)} if self.one_step_steps else {}

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        own = {"student_t": (20, 980), "fake_t": (0, LEVELS - 1)} if self.one_step_steps else {}
        return {**super().noise_range(teacher), **own}

    def one_step_terms(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        """The score term and the distance to the multistep output; the samples stay in the batch for the fake score."""
        x = self._one_step(batch, roles)
        batch.memo["x"] = x.detach()
        t, eps = self.times("student_t", batch), batch.noise("student_eps")
        gradient = matching_gradient(x, t, eps, batch.cond, batch, roles, self.teacher_guidance())
        with torch.no_grad():
            levels = lcm_times(self.multistep, self.original_steps, LEVELS)
            several = sample_tcd(roles.denoiser("previous"), batch.noise("z"), batch.cond, levels, 0.0)
        return {
            "score": self.score_weight * reduce(pseudo_target(x, gradient)),
            "multistep": self.multistep_weight * reduce(squared_error(x, several)),
        }

    def fake_score_term(self, batch: Batch, roles: Roles) -> Tensor:
        """Denoising score matching of the fake score on the student's one-step samples."""
        if "x" not in batch.memo:
            with torch.no_grad():
                batch.memo["x"] = self._one_step(batch, roles)
        x, t, eps = batch.memo["x"], self.times("fake_t", batch), batch.noise("fake_eps")
        prediction = roles.denoiser(FAKE_SCORE)(roles.teacher.process.add_noise(x, eps, t), t, batch.cond)
        return reduce(score_matching(prediction, x, eps))

    def _one_step(self, batch: Batch, roles: Roles) -> Tensor:
        return sample_tcd(roles.denoiser("student"), batch.noise("z"), batch.cond, [LEVELS - 1], 0.0)
