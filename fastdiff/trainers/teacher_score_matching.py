"""Teacher score matching: a smaller network learns to answer as the teacher does, at all times, before it becomes a generator.

    L = E  lambda_t mean_CHW ( mu_teacher(x_t, t, c) - mu_student(x_t, t, c) )^2        x_t = a_t x0 + s_t eps,  t ~ U{0..T}

lambda_t makes it the error of the network's own output (eps or v), as in the teacher's training. x0 are stored teacher results, so
that it stays free of data: the paper uses real images. The minimum is the same, for the loss compares two functions of (x_t, t, c);
only the places where they are compared differ. Trained: the student, built by ``models.smaller`` from the teacher's weights.
Stage "TSM" of Song et al., Multi-student Diffusion Distillation for Better One-step Generators (2024), arXiv 2410.23274.
Times are uniform over the levels of the process, EDM's too (rho 7), where the sheet has log-normal ones.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastdiff.diffusion.process import LEVELS
from fastdiff.errors import UserError
from fastdiff.losses import reduce, squared_error
from fastdiff.models.roles import Role, Roles
from fastdiff.models.smaller import smaller
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._regression import StoredPairs
from fastdiff.trainers.method import Batch, Calls, Paper, Trial

_TRIAL = {"pairs": 20_000, "pair_steps": 16, "pair_guidance_scale": 1.0, "lr": 2e-3, "width": 0.5}


@dataclass(kw_only=True)
class TeacherScoreMatching(StoredPairs):
    """A smaller student repeats the teacher's scores: where smaller one-step students start from."""

    info: ClassVar[Paper] = Paper(
        title="Multi-student Diffusion Distillation for Better One-step Generators",
        venue="arXiv",
        year=2024,
        arxiv="2410.23274",
        sheet="few_step_diffusion.md: MSD (stage TSM)",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"posterior_mean": 0.5}, max_steps=1500),  # the mean is small there: 0 would be 1
        "classes": Trial(fields=_TRIAL, bounds={"posterior_mean": 0.06}, max_steps=1500),
    }

    width: float = 0.5
    """Channels of the student, as a share of the teacher's; rounded up to what norm groups and heads divide."""
    layers: int | None = None
    """Layers a block of the student; None is as many as the teacher has."""
    lr: float = 1e-3
    """Student learning rate."""

    @classmethod
    def name(cls) -> str:
        return "teacher-score-matching"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.width <= 1 or (self.layers is not None and self.layers < 1):
            raise UserError(f"width is {self.width} and layers {self.layers}: a width in (0, 1] and at least one layer are needed.")

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train="full", lr=self.lr, build=self.network)}

    def network(self, teacher: Teacher) -> nn.Module:
        """The student's network with the weights selected for it."""
        return smaller(teacher.family.backbone, width=self.width, layers=self.layers)

    def validate(self, teacher: Teacher) -> None:
        with torch.random.fork_rng(devices=[]):
            self.network(teacher)

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        return {"t": (0, LEVELS - 1)}

    def updates(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        return {"student": Calls(1, 1), "teacher": Calls(1, 0)}

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        _, x0, cond = self.draw_pairs(batch)
        t, eps, on = self.times("t", batch), batch.noise("eps"), roles.teacher.prediction_type
        x_t = roles.teacher.process.add_noise(x0, eps, t)
        with torch.no_grad():
            target = roles.denoiser("teacher")(x_t, t, cond).output(on)
        answer = roles.denoiser("student")(x_t, t, cond).output(on)
        return {"score": reduce(squared_error(answer, target))}
