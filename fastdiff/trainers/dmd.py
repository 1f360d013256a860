"""DMD: distribution matching with regression on the teacher's own results in the same iteration.

    x  = f(z, y) = x0(z, T, y)                                              the student, one call
    G  = ( x0_fake(x_t) - x0_real^guided(x_t) ) / mean_CHW| x - x0_real |   x_t = a_t x + s_t eps,  t ~ U{20..980}
    student:    mean 0.5 ( x - sg[x - G] )^2 + w mean d( f(z', y'), x0' )   (z', y', x0'): stored ODE pairs, w = 0.25
    fake score: denoising on sg[x],  t ~ U{0..999}

Both in every iteration, 1:1 (weight and ratio recalled), without a discriminator. The regression holds the student to the
teacher's map from noise to image and so to all of its modes, which the reverse KL alone may drop. d is LPIPS in the paper; here it
is the pseudo-Huber distance on latents of ``PairedMethod``, which needs no feature network. Frozen: the teacher. Trained in
full: student and fake score, both from the teacher. Yin et al., CVPR 2024, arXiv 2311.18828.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastdiff.diffusion.process import LEVELS
from fastdiff.errors import UserError
from fastdiff.losses import pseudo_target, reduce
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._regression import REGRESSION, PairedMethod
from fastdiff.trainers._scores import FakeScored, generated, score_matching
from fastdiff.trainers.dmd2 import matching_gradient
from fastdiff.trainers.method import Batch, Calls, Paper, Trial, one_step

_TRIAL = {
    "guidance_scale": 1.0,
    "lr": 1e-3,
    "fake_score_lr": 2e-3,
    "pairs": 10_000,
    "pair_steps": 32,
    "pair_guidance_scale": 1.0,
}


@dataclass(kw_only=True)
class DMD(FakeScored, PairedMethod):
    """One-step student by distribution matching, held to the teacher's ODE pairs by regression."""

    info: ClassVar[Paper] = Paper(
        title="One-step Diffusion with Distribution Matching Distillation",
        venue="CVPR",
        year=2024,
        arxiv="2311.18828",
        sheet="few_step_diffusion.md: DMD and DMD2",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.2, "mode_mass": 0.35, "stray": 0.22}, max_steps=2500),
        "gaussian": Trial(fields=_TRIAL, bounds={"w2": 0.4, "axes": 0.4}, max_steps=2500),
    }

    guidance_scale: float = 3.0
    """Guidance of the teacher in G; 1 is off; the default is this library's. The fake score is never guided. Give the pairs
    (``pair_guidance_scale``) the same."""
    lr: float = 1e-5
    """Student learning rate."""
    fake_score_lr: float = 1e-5
    """Learning rate of the fake score."""
    regression_weight: float = 0.25
    """Weight of the regression on stored pairs; 0 leaves them out, which is DMD2 without its GAN term at a ratio of 1:1."""
    warm_start_steps: int = 0
    """First regress on ODE pairs alone for so many iterations (0: not at all, as in the paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("regression_weight", "warm_start_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must not be negative; 0 turns it off.")

    def roles(self) -> dict[str, Role]:
        rates = {"student": self.lr, "fake_score": self.fake_score_lr}
        return {name: Role(train="full", lr=lr, weight_decay=0.01) for name, lr in rates.items()}

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        return {"student_t": (20, 980), "fake_t": (0, LEVELS - 1)}

    def regresses(self) -> bool:
        return self.regression_weight > 0 or self.warm_start_steps > 0

    def updates(self, step: int) -> tuple[str, ...]:
        if step < self.warm_start_steps:
            return (REGRESSION,)
        return self.after_warmup(("student", "fake_score"), step - self.warm_start_steps)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        if REGRESSION in updates:
            return {"student": Calls(1, 1)}
        guided = 1 if self.guidance_scale == 1 else 2
        if "student" not in updates:
            return {"student": Calls(1, 0), "fake_score": Calls(1, 1)}
        on_pairs = int(self.regression_weight > 0)
        return {"student": Calls(1 + on_pairs, 1 + on_pairs), "teacher": Calls(guided, 0), "fake_score": Calls(2, 1)}

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
        terms = {"dmd": reduce(pseudo_target(x, matching_gradient(x, t, eps, batch.cond, batch, roles, self.guidance_scale)))}
        if self.regression_weight > 0:
            terms["regression"] = self.regression_weight * self.regression(batch, roles)["regression"]
        return terms

    def _fake_score_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x, process = generated(batch, roles), roles.teacher.process
        t, eps = self.times("fake_t", batch), batch.noise("fake_eps")
        fake = roles.denoiser("fake_score")(process.add_noise(x, eps, t), t, batch.cond)
        return {"fake_score": reduce(score_matching(fake, x, eps))}
