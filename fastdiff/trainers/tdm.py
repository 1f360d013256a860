"""TDM: a deterministic few-step student, each of its steps matched with the teacher over the times of that step alone.

    x_T = z,  x0_i = x0(x_i, t_i),  x_{i+1} = a_m x0_i + s_m eps_i             DDIM, m = t_{i+1}; the last step ends at x0 itself
    x_tau = (a_tau / a_m) x_{i+1} + beta e,   beta^2 = s_tau^2 - (a_tau / a_m)^2 s_m^2          tau ~ U[max(20, m), t_i - 10)
    student     mean pseudo_huber( x0_i - sg[x0_i + x0_real^guided(x_tau) - x0_fake(x_tau)] ) / mean_CHW|x0_i - x0_real|
    fake score  min(SNR_tau, 5) w mean( x0_fake(x_tau) - sg[x0_i] )^2
                w = exp( (mean e^2 - mean mixed^2) / 2 ),   mixed = ( (a_tau / a_m) s_m eps_i + beta e ) / s_tau

The intervals of tau do not overlap, so that one fake score serves all steps. Its target is x0_i, whose noise ``mixed`` is not
fresh; w corrects for that. Only x0_i carries gradient, from one network call; what leads to it comes from the rollout pool. Data
free: prompts alone. Luo et al., ICCV 2025, arXiv 2503.06674; losses as in the released demo (the paper's text has another Huber
constant). Departures: the demo ends a step one index above the next time (675, not 674) and the last one at time 0; it draws new
rollouts for each update, and trains all step counts of ``step_counts`` with the network told of the count, which here it is not.
Not here: tau from all of [m, T - 10), cosine restarts of the learning rate, the DPM-Solver sampler.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.process import LEVELS, ContinuousVP, DiscreteVP, NoiseProcess, expand
from fastdiff.diffusion.solvers import trailing_times
from fastdiff.errors import UserError
from fastdiff.losses import denoising, reduce, trajectory_importance, trajectory_matching
from fastdiff.losses.weights import min_snr_weight
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers.method import Batch, Calls, Method, Paper, Trial
from fastdiff.trainers.rollout import ROLLOUT, Moments, RolloutPool, pooled_updates

_TRIAL = {"guidance_scale": 1.0, "start": 1000, "lr": 5e-4, "fake_score_lr": 1e-3, "distance": "squared"}


@dataclass(kw_only=True)
class TDM(Method):
    """Few-step student by trajectory distribution matching; needs prompts only and samples deterministically."""

    info: ClassVar[Paper] = Paper(
        title="Learning Few-Step Diffusion Models by Trajectory Distribution Matching",
        venue="ICCV",
        year=2025,
        arxiv="2503.06674",
        sheet="few_step_diffusion.md: TDM",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields=_TRIAL, bounds={"sliced_w2": 0.12, "mode_mass": 0.25, "mode_spread": 0.3, "stray": 0.12}, max_steps=3000
        ),
        "gaussian": Trial(fields=_TRIAL, bounds={"w2": 0.4, "covariance": 0.15, "axes": 0.4}, max_steps=3000),
        "classes": Trial(
            fields=_TRIAL, bounds={"sliced_w2": 0.2, "mode_mass": 0.35, "mode_spread": 0.4, "stray": 0.07}, max_steps=3000
        ),
    }
    fixed_point: ClassVar[str] = "student"
    fixed_point_fields: ClassVar[Mapping[str, Any]] = {"step_counts": (1,)}

    guidance_scale: float = 4.5
    """Guidance of the teacher; 1 is off. The fake score is never guided, and neither is the student."""
    step_counts: tuple[int, ...] = (4,)
    """Network calls of the student. Of several, one is drawn for each cycle; the student is exported for the largest."""
    start: int = 900
    """Levels that the student's steps divide evenly: the first call is at level ``start - 1`` of 0..999. Below 1000 only where
    noisy samples have the same size at every level (variance-preserving processes)."""
    lr: float = 4e-6
    """Student learning rate (the paper's is a fifth of the fake score's)."""
    fake_score_lr: float = 2e-5
    """Learning rate of the fake score."""
    train: Literal["full", "lora"] = "full"
    """How student and fake score train: copies, or adapters on the teacher's backbone."""
    rank: int = 64
    """Rank of the adapters (alpha equals it)."""
    lora_targets: tuple[str, ...] = ()
    """Layers to adapt, by their names or the ends of them; none are the teacher family's own, attention."""
    fake_updates: int = 1
    """Fake-score updates to one of the student; a cycle's rollout serves them all."""
    distance: Literal["pseudo_huber", "squared"] = "pseudo_huber"
    """Of the student's loss."""
    huber_c: float = 1e-3
    """Where the pseudo-Huber distance turns from square to absolute value, in units of latents."""

    def __post_init__(self) -> None:
        counts = self.step_counts
        if not counts or len(set(counts)) != len(counts) or any(not 1 <= k <= 50 or self.start % k for k in counts):
            raise UserError(f"step_counts is {counts}: expected different numbers up to 50 that divide start={self.start}.")
        if not 0 < self.start <= 1000 or min(self.start // k for k in counts) < 32:
            raise UserError(
                f"start is {self.start} for {max(counts)} steps: at most 1000, and 32 levels a step, or tau in 20..t-11 is none."
            )
        if self.fake_updates < 1:
            raise UserError(f"fake_updates is {self.fake_updates}: it must be at least 1.")
        for name, known in (("train", ("full", "lora")), ("distance", ("pseudo_huber", "squared"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}: expected {' or '.join(known)}.")
        if not self.huber_c > 0:
            raise UserError(f"huber_c is {self.huber_c}: it must be above 0.")
        self._pools = {k: RolloutPool(trailing_times(self.start, k), self.sampler, self.fake_updates) for k in counts}

    def validate(self, teacher: Teacher) -> None:
        if self.start < LEVELS and not isinstance(teacher.process, DiscreteVP | ContinuousVP):
            raise UserError(
                f"start is {self.start} and {teacher.name} is under {type(teacher.process).__name__}: its samplers start from the "
                f"noise of the last level, which is more than level {self.start - 1} has. Give start={LEVELS}."
            )

    def roles(self) -> dict[str, Role]:
        common: dict[str, Any] = {"train": self.train, "betas": (0.0, 0.95), "rank": self.rank, "lora_alpha": float(self.rank)}
        common["lora_targets"] = self.lora_targets or None
        return {"student": Role(lr=self.lr, **common), "fake_score": Role(lr=self.fake_score_lr, **common)}

    def levels(self) -> list[int]:
        return trailing_times(self.start, max(self.step_counts))

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        return {"student_tau": (20, self.start - 12), "fake_tau": (20, self.start - 12)}

    def updates(self, step: int) -> tuple[str, ...]:
        return pooled_updates(step, self.fake_updates)

    def trains(self, update: str) -> tuple[str, ...]:
        return () if update == ROLLOUT else super().trains(update)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        guided = 1 if self.guidance_scale == 1 else 2
        student = "student" in updates
        return {
            "student": Calls(self.fake_updates * (ROLLOUT in updates) + student, int(student)),
            "teacher": Calls(guided * student, 0),
            "fake_score": Calls(1 + student, 1),
        }

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        place = batch.draws.key[2] % self.fake_updates
        cycle = batch.draws.key[2] - place
        pool = self._pool(batch, cycle)
        if update == ROLLOUT:
            pool.fill(batch, roles, cycle)
            return {}
        if update == "student":
            return self._student_loss(pool.student_inputs(batch, roles, cycle), pool.levels, batch, roles)
        return self._fake_score_loss(pool.fake_score_samples(batch, roles, cycle, place), pool.levels, batch, roles)

    def _pool(self, batch: Batch, cycle: int) -> RolloutPool:
        """That of the number of steps which all ranks drew for this cycle."""
        draw = batch.draws.ranks[0].at(cycle, 1).choice("step_count")
        return self._pools[self.step_counts[int(draw * len(self.step_counts))]]

    def _student_loss(self, moments: Moments, levels: list[int], batch: Batch, roles: Roles) -> dict[str, Tensor]:
        cond = batch.prompts.conditions(moments.prompt)
        t = batch.teacher.process.at_level(_levels(levels, moments.rung))
        x = roles.denoiser("student")(moments.x_t, t, cond).x0
        with torch.no_grad():
            x_tau, tau, _ = self._diffuse(moments, levels, "student", batch)
            real = roles.denoiser("teacher").guided(x_tau, tau, cond, batch.null, self.guidance_scale)
            fake = roles.denoiser("fake_score")(x_tau, tau, cond)
        c = self.huber_c if self.distance == "pseudo_huber" else None
        return {"tdm": reduce(trajectory_matching(x, real.x0, fake.x0, c=c))}

    def _fake_score_loss(self, moments: Moments, levels: list[int], batch: Batch, roles: Roles) -> dict[str, Tensor]:
        process = batch.teacher.process
        x_tau, tau, importance = self._diffuse(moments, levels, "fake", batch)
        fake = roles.denoiser("fake_score")(x_tau, tau, batch.prompts.conditions(moments.prompt))
        weight = min_snr_weight(process.alpha(tau), process.sigma(tau), on="sample").to(importance) * importance
        return {"fake_score": reduce(denoising(fake.x0, moments.x0, weight=expand(weight, moments.x0)))}

    def _diffuse(self, moments: Moments, levels: list[int], name: str, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """x_tau [B, ...], tau [B] within each sample's own step, and the importance weight [B]."""
        process, e = batch.teacher.process, batch.noise(f"{name}_eps")
        t = process.at_level(_levels(levels, moments.rung))
        low = _levels([*levels[1:], 0], moments.rung)
        tau = batch.times(f"{name}_tau", low.clamp(min=20), _levels(levels, moments.rung) - 11)
        a_m, s_m = _end_of_step(process, low, moments.rung == len(levels) - 1)
        a_tau, s_tau = process.alpha(tau), process.sigma(tau)
        kept = a_tau / a_m.to(a_tau)
        beta = (s_tau.square() - (kept * s_m.to(s_tau)).square()).clamp(min=0).sqrt()
        x_tau = expand(kept, e) * moments.after + expand(beta, e) * e
        eps = (moments.x_t - expand(process.alpha(t), e) * moments.x0) / expand(process.sigma(t), e)
        mixed = (expand(kept * s_m.to(kept), e) * eps + expand(beta, e) * e) / expand(s_tau, e)
        return x_tau, tau, trajectory_importance(mixed, e)


def _levels(levels: list[int], rung: Tensor) -> Tensor:
    return torch.tensor(levels, device=rung.device)[rung]


def _end_of_step(process: NoiseProcess, level: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma [B] where a step ends: at the next level, or, after the last one, at x0 itself."""
    m = process.at_level(level)
    a, s = process.alpha(m), process.sigma(m)
    last = last.to(a.device)
    return torch.where(last, 1.0, a), torch.where(last, 0.0, s)
