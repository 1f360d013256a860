"""SiD, score identity distillation: a Fisher divergence whose gradient runs through both frozen networks.

    x  = f(z, y) = x0(z, T, y)                                              the student, one call
    L  = mean ( mu_r - mu_f ) ( (mu_r - x) - alpha (mu_r - mu_f) ) / sg[ mean_CHW | x - mu_r | ]         t ~ U{0..800}
    fake score: mean ( SNR + 1 / sd^2 ) ( mu_f(x_t) - x )^2 on sg[x],  t ~ U{0..800}

mu_r and mu_f are the x0 predictions of teacher and fake score at ``x_t = a_t x + s_t eps``; their weights are frozen while the
student learns, and the gradient reaches x through them too: only the normaliser is detached. With the best fake score E L is
(1 - alpha) times the Fisher divergence, so the value says nothing about progress. Guidance is that of SiD-LSG (recalled): the
same scale for both, for which the fake score learns the null prompt too, as SwiftBrush's does (derived). Departures: the official
code sums over elements, and calls its student at sigma 2.5; here the mean, and the last level, where the exported pipeline calls.
Zhou et al., ICML 2024, arXiv 2404.04057; SiD-LSG, arXiv 2406.01561.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastdiff.diffusion.process import expand
from fastdiff.errors import UserError
from fastdiff.losses import denoising, reduce, score_identity
from fastdiff.losses.weights import edm_weight
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._scores import FakeScored, generated
from fastdiff.trainers.method import Batch, Calls, Paper, Trial, one_step

_TRIAL = {"guidance_scale": 1.0, "lr": 1e-3, "fake_score_lr": 2e-3}


@dataclass(kw_only=True)
class SiD(FakeScored):
    """One-step student by score identities, differentiated through teacher and fake score."""

    info: ClassVar[Paper] = Paper(
        title="Score identity Distillation: Exponentially Fast Distillation of Pretrained Diffusion Models for One-Step Generation",
        venue="ICML",
        year=2024,
        arxiv="2404.04057",
        sheet="few_step_diffusion.md: SiD",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.3, "mode_mass": 0.5, "stray": 0.35}, max_steps=3000),
        "gaussian": Trial(fields=_TRIAL, bounds={"w2": 0.45, "covariance": 0.15}, max_steps=3000),
    }
    fixed_point: ClassVar[str] = "student"

    guidance_scale: float = 1.5
    """Guidance of teacher and fake score alike (SiD-LSG, recalled); 1 is off."""
    alpha: float = 1.0
    """Weight of the explicit Fisher term, 1 to 1.2 (paper: 1.2 for CIFAR, 1 for several text-to-image settings)."""
    lr: float = 1e-5
    """Student learning rate."""
    fake_score_lr: float = 1e-5
    """Learning rate of the fake score."""
    null_probability: float = 0.1
    """How often a guided fake score learns the null prompt; decided once per batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1.0 <= self.alpha <= 1.2:
            raise UserError(f"alpha is {self.alpha}: SiD is stable from 1 to 1.2; below, its term of the wrong sign wins.")
        if not 0 <= self.null_probability <= 1:
            raise UserError(f"null_probability is {self.null_probability}: it must be in [0, 1].")

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train="full", lr=self.lr), "fake_score": Role(train="full", lr=self.fake_score_lr)}

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        return dict.fromkeys(("student_t", "fake_t"), (0, 800))

    def updates(self, step: int) -> tuple[str, ...]:
        return self.after_warmup(("student", "fake_score"), step)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        if "student" not in updates:
            return {"student": Calls(1, 0), "fake_score": Calls(1, 1)}
        asked = 1 if self.guidance_scale == 1 else 2
        return {"student": Calls(1, 1), "teacher": Calls(asked, asked), "fake_score": Calls(asked + 1, asked + 1)}

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        return self._student_loss(batch, roles) if update == "student" else self._fake_score_loss(batch, roles)

    def _student_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
        batch.memo["x"] = x.detach()
        t, eps = self.times("student_t", batch), batch.noise("student_eps")
        x_t = roles.teacher.process.add_noise(x, eps, t)
        real, fake = (
            roles.denoiser(name).guided(x_t, t, batch.cond, batch.null, self.guidance_scale) for name in ("teacher", "fake_score")
        )
        return {"sid": reduce(score_identity(x, real.x0, fake.x0, alpha=self.alpha))}

    def _fake_score_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x, process = generated(batch, roles), roles.teacher.process
        t, eps = self.times("fake_t", batch), batch.noise("fake_eps")
        null = self.guidance_scale != 1 and batch.draws.choice("null") < self.null_probability
        fake = roles.denoiser("fake_score")(process.add_noise(x, eps, t), t, batch.null if null else batch.cond)
        weight = edm_weight(process.alpha(t), process.sigma(t), sigma_data=process.sigma_data)
        return {"fake_score": reduce(denoising(fake.x0, x, weight=expand(weight, x)))}
