"""DMD2: distribution matching distillation with a fully trained fake score and an optional GAN term, for one step or a few.

    x  = x0(x_i, t_i, y)                   the student at one of its levels; x_0 = z, x_{i+1} = a x0(x_i) + s noise without grad
    G  = ( x0_fake(x_t) - x0_real^guided(x_t) ) / mean_CHW| x - x0_real |   x_t = a_t x + s_t eps,  t ~ U{20..980}
    student (1 of `ratio` iterations):  mean 0.5 ( x - sg[x - G] )^2 + w_G softplus(-h(x_t'))
    fake score (every iteration):       mean ( eps_fake(x_t) - eps )^2 on sg[x],  t ~ U{0..999}
                                        + w_D [ softplus(h(x_t')) + softplus(-h(real_t')) ]
                                        + w_R1 ( h(real_t') - h(real_t' + 0.1 n) )^2      n in units of the network's input

Only the teacher is guided. h reads the fake score's bottleneck at a fresh t' ~ U{0..999}; the discriminator's gradient flows
into the fake score too. The real samples of the GAN term are the teacher's stored results, so that the method stays free of
data: the paper uses real images. Both networks start from the teacher. Students of a few steps learn on their own inputs
(backward simulation) from a pool of rollouts, see ``rollout``; the paper draws one level for the whole batch, here each sample has
its own. Not here: the paper's one-step SDXL student at level 399, and a LoRA student. Yin et al., NeurIPS 2024, arXiv 2405.14867;
the penalty w_R1 is FastGen's, ``pull`` is SenseFlow's IDA (ICLR 2026, arXiv number not on the sheet), known from its abstract: its
coefficients are not.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.diffusion.prediction import input_scale
from fastdiff.diffusion.process import LEVELS, expand
from fastdiff.diffusion.solvers import trailing_times
from fastdiff.errors import UserError
from fastdiff.losses import (
    approximate_gradient_penalty,
    distribution_matching_gradient,
    pseudo_target,
    reduce,
    softplus_discriminator,
    softplus_generator,
)
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._regression import REGRESSION, PairedMethod
from fastdiff.trainers._scores import FakeScored, full_precision, generated, score_matching
from fastdiff.trainers.method import Batch, Calls, Paper, Trial, due, needs_bottleneck, one_step
from fastdiff.trainers.rollout import ROLLOUT, RolloutPool, pooled_updates
from fastdiff.trainers.trajectory import Sampler

_TRIAL = {"guidance_scale": 1.0, "lr": 1e-3, "fake_score_lr": 2e-3, "ratio": (1, 3)}


@dataclass(kw_only=True)
class DMD2(FakeScored, PairedMethod):
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
    sampler: ClassVar[Sampler] = "consistency"

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
    r1_weight: float = 0.0
    """Weight of the approximate R1 penalty on the discriminator's real samples (FastGen: 100 to 1000); 0 is off."""
    steps: int = 1
    """Network calls of the student; more than one needs a ratio of 1 to n."""
    pull: float = 0.0
    """After each student update the fake score moves by this share of the way to the student (IDA); 0 is off."""
    warm_start_steps: int = 0
    """First regress on ODE pairs for so many iterations (0: not at all)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gan_weight", "discriminator_weight", "r1_weight", "warm_start_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must not be negative; 0 turns it off.")
        if self.r1_weight > 0 and self.gan_weight == 0:
            raise UserError("r1_weight holds the discriminator back, and gan_weight 0 has none: the penalty would be ignored.")
        if not 0 <= self.pull < 1 or (self.pull > 0 and self.fake_score == "lora"):
            raise UserError(f"pull is {self.pull}: it must be in [0, 1), and above 0 fake_score must be full, as the student is.")
        if not 1 <= self.steps <= 50 or (self.steps > 1 and self.ratio[0] != 1):
            raise UserError(f"steps is {self.steps} at ratio {self.ratio}: expected 1 to 50, and above 1 a ratio of 1 to n.")
        self._pool = RolloutPool(self.levels(), self.sampler, self.ratio[1])
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
        if self.gan_weight > 0:
            needs_bottleneck(teacher)

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        everywhere = (0, LEVELS - 1)
        gan = ("gan_student_t", "gan_real_t", "gan_fake_t") if self.gan_weight > 0 else ()
        return {"student_t": (20, 980), "fake_t": everywhere} | dict.fromkeys(gan, everywhere)

    def regresses(self) -> bool:
        return self.warm_start_steps > 0 or self.gan_weight > 0

    def levels(self) -> list[int]:
        return trailing_times(LEVELS, self.steps)

    def updates(self, step: int) -> tuple[str, ...]:
        if step < self.warm_start_steps:
            return (REGRESSION,)
        step -= self.warm_start_steps
        if self.steps > 1:
            return self.after_warmup(pooled_updates(step, self.ratio[1]), step)
        return self.after_warmup(("student", "fake_score") if due(step, self.ratio) else ("fake_score",), step)

    def trains(self, update: str) -> tuple[str, ...]:
        if update == "fake_score" and self.gan_weight > 0:
            return ("fake_score", "discriminator")
        return () if update == ROLLOUT else super().trains(update)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        if REGRESSION in updates:
            return {"student": Calls(1, 1)}
        gan, guided = self.gan_weight > 0, 1 if self.guidance_scale == 1 else 2
        on_heads = (2 + (self.r1_weight > 0)) * gan
        fake = Calls(1 + on_heads, 1 + on_heads)
        student = Calls(0, 0) if self.steps > 1 else Calls(1, 0)
        teacher = Calls(0, 0)
        if ROLLOUT in updates:
            student += Calls(self.ratio[1], 0)
        if "student" in updates:
            student = student + Calls(1, 1) if self.steps > 1 else Calls(1, 1)
            teacher, fake = Calls(guided, 0), fake + Calls(1 + gan, gan)
        return {"student": student, "teacher": teacher, "fake_score": fake}

    def lr_of(self, role: str, step: int) -> float:
        return self.regression_lr if step < self.warm_start_steps else super().lr_of(role, step)

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        if update == REGRESSION:
            return self.regression(batch, roles)
        if update == ROLLOUT:
            self._pool.fill(batch, roles, self._cycle(batch)[0])
            return {}
        return self._student_loss(batch, roles) if update == "student" else self._fake_score_loss(batch, roles)

    def begin(self, step: int, roles: Roles) -> None:
        shapes = [[p.shape for p in roles.parameters(name)] for name in ("student", "fake_score")]
        if self.pull > 0 and shapes[0] != shapes[1]:
            raise UserError(
                f"pull is {self.pull}, and the student's network is not the fake score's: there is no way between them."
            )

    def after(self, update: str, roles: Roles) -> None:
        if update == "student" and self.pull > 0:
            with torch.no_grad():
                for fake, own in zip(roles.parameters("fake_score"), roles.parameters("student"), strict=True):
                    fake.lerp_(own, self.pull)

    def signals(self, terms: Mapping[str, float]) -> dict[str, float]:
        if "discriminator" not in terms or self.discriminator_weight == 0:
            return {}
        return {"discriminator_loss": terms["discriminator"] / self.discriminator_weight}

    def _student_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x, cond = self._generate(batch, roles)
        t, eps = self.times("student_t", batch), batch.noise("student_eps")
        gradient = matching_gradient(x, t, eps, cond, batch, roles, self.guidance_scale)
        gradient = self.weighted(gradient, batch, roles)
        terms = {"dmd": reduce(pseudo_target(x, gradient))}
        if self.gan_weight > 0:
            (logits,) = self._logits(x, "gan_student", cond, batch, roles)
            terms["gan"] = self.gan_weight * reduce(softplus_generator(logits))
        return terms

    def weighted(self, gradient: Tensor, batch: Batch, roles: Roles) -> Tensor:
        """The gradient G that the samples get: here as it is."""
        del batch, roles
        return gradient

    def _fake_score_loss(self, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        x, cond = self._generated(batch, roles)
        process = roles.teacher.process
        t, eps = self.times("fake_t", batch), batch.noise("fake_eps")
        fake = roles.denoiser("fake_score")(process.add_noise(x, eps, t), t, cond)
        terms = {"fake_score": reduce(score_matching(fake, x, eps))}
        if self.gan_weight > 0:
            _, real, real_cond = self.draw_pairs(batch, own=True)
            on_real = self._logits(real, "gan_real", real_cond, batch, roles, perturb=self.r1_weight > 0)
            (on_fake,) = self._logits(x, "gan_fake", cond, batch, roles)
            halves = softplus_discriminator(on_real[0], on_fake)
            terms["discriminator"] = self.discriminator_weight * (reduce(halves[0]) + reduce(halves[1]))
            if self.r1_weight > 0:
                terms["r1"] = self.r1_weight * reduce(approximate_gradient_penalty(*on_real))
        return terms

    def _generate(self, batch: Batch, roles: Roles) -> tuple[Tensor, Any]:
        """The student's sample, with its graph, and its condition."""
        if self.steps == 1:
            x = one_step(roles.denoiser("student"), batch.noise("z"), batch.cond)
            batch.memo["x"] = x.detach()
            return x, batch.cond
        moments = self._pool.student_inputs(batch, roles, self._cycle(batch)[0])
        t = batch.teacher.process.at_level(torch.tensor(self.levels(), device=moments.rung.device)[moments.rung])
        cond = batch.prompts.conditions(moments.prompt)
        return roles.denoiser("student")(moments.x_t, t, cond).x0, cond

    def _generated(self, batch: Batch, roles: Roles) -> tuple[Tensor, Any]:
        """Samples of the student as it is, without a graph."""
        if self.steps > 1:
            moments = self._pool.fake_score_samples(batch, roles, *self._cycle(batch))
            return moments.x0, batch.prompts.conditions(moments.prompt)
        return generated(batch, roles), batch.cond

    def _cycle(self, batch: Batch) -> tuple[int, int]:
        """The first iteration of the running cycle, and the running one's place in it."""
        place = (batch.draws.key[2] - self.warm_start_steps) % self.ratio[1]
        return batch.draws.key[2] - place, place

    def _logits(self, x: Tensor, draw: str, cond: Any, batch: Batch, roles: Roles, *, perturb: bool = False) -> tuple[Tensor, ...]:
        """h on the fake score's bottleneck features of x, noised to a fresh time; the decoder half does not run.

        With ``perturb`` also of the same noised x with a further 0.1 of noise on it, in the units of the network's input, both in
        full precision: bf16 would round their difference away.
        """
        t, eps, teacher = self.times(f"{draw}_t", batch), batch.noise(f"{draw}_eps"), roles.teacher
        inputs = [teacher.process.add_noise(x, eps, t)]
        if perturb:
            scale = input_scale(teacher.process, t, teacher.prediction_type)
            nudge = 0.1 * batch.noise(f"{draw}_nudge")
            inputs.append(inputs[0] + (nudge if scale is None else nudge / expand(scale, nudge)))
        with full_precision(x) if perturb else nullcontext():
            return tuple(roles.modules["discriminator"](roles.features("fake_score", x_t, t, cond)) for x_t in inputs)


@torch.no_grad()
def matching_gradient(x: Tensor, t: Tensor, eps: Tensor, cond: Any, batch: Batch, roles: Roles, guidance_scale: float) -> Tensor:
    """G of the module docstring, from the guided teacher and the fake score at ``x_t = a_t x + s_t eps``."""
    x_t = roles.teacher.process.add_noise(x, eps, t)
    real = roles.denoiser("teacher").guided(x_t, t, cond, batch.null, guidance_scale)
    fake = roles.denoiser("fake_score")(x_t, t, cond)
    return distribution_matching_gradient(x, real.x0, fake.x0)


def _head(teacher: Teacher) -> nn.Module:
    return teacher.family.head()
