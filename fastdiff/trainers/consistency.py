"""Consistency models: one x0 for all times of a trajectory, by CD, CT, iCT or ECT.

    x_t = a_t x0 + s_t eps,   r < t                            rho = s / a, which is sigma in the papers' EDM
    cd    x_r: one guided teacher step from x_t (Heun, DDIM)   grid of N times, uniform; f-: average of the student
    ct    x_r = a_r x0 + s_r eps, the same eps                 N(k) of CT's curriculum; f-: average with decay exp(s0 ln mu0 / N)
    ict   the same x_r                                         N(k) doubles; interval ~ log-normal rho; f- = the student
    ect   the same x_r, and x0 itself where r = 0              ln rho_t ~ N(-1.1, 2^2), rho_r of the stage; f- = the student
    L     mean |f(x_t, t) - sg f-(x_r, r)|^2 or its absolute value              cd, ct
          mean ( sqrt(|f - sg f-|^2 + c^2) - c ) / (rho_t - rho_r)              ict, ect; a norm over each sample

Trained: the student, a full copy of the teacher's network, in the teacher's own parametrisation. ``_consistency`` says what stands
in for data and for c_skip, c_out, and how both passes have equal dropout. cd alone asks the teacher; the guidance of the others is
that of the stored results. Consistency Models (ICML 2023, arXiv 2303.01469), Improved Techniques for Training Consistency Models
(ICLR 2024, arXiv 2310.14189; recalled), Consistency Models Made Easy (ICLR 2025, arXiv 2406.14548).

With ``truncation`` they are TCM's two stages: see ``_truncation``.

Departures: no LPIPS; any process, by rho, so that on a VP table times are its rows and a finer grid than the table is the table; N
and stages run over ``curriculum_steps``; in ECT a rho_r below the process's lowest is 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.solvers import ddim_step, heun_step
from fastdiff.diffusion.times import consistency_ema, consistency_intervals, doubling_intervals, log_normal, log_normal_above
from fastdiff.errors import UserError
from fastdiff.losses import consistency, improved_consistency, reduce
from fastdiff.models.roles import Role, Roles
from fastdiff.trainers._consistency import (
    TARGET,
    Interval,
    Truncated,
    choose,
    easy_interval,
    grid_interval,
    two_passes,
    with_boundary,
)
from fastdiff.trainers._truncation import BOUNDARY, TruncatedConsistency
from fastdiff.trainers.method import Batch, Calls, Paper, Preparation, Trial

_CHOICES = {"kind": ("cd", "ct", "ict", "ect"), "solver": ("heun", "ddim"), "norm": ("squared", "absolute")}
_CURRICULA = {"ct": (2, 150), "ict": (10, 1280)}
_TRIAL = {
    "steps": 1,
    "lr": 1e-3,
    "guidance_scale": 1.0,
    "pairs": 20_000,
    "pair_steps": 40,
    "pair_guidance_scale": 1.0,
}


@dataclass(kw_only=True)
class Consistency(TruncatedConsistency):
    """Few-step student that maps every point of a trajectory to its end: from a teacher's steps (CD) or from samples alone."""

    info: ClassVar[Paper] = Paper(
        title="Consistency Models",
        venue="ICML",
        year=2023,
        arxiv="2303.01469",
        sheet="few_step_diffusion.md: Consistency family",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields=_TRIAL, bounds={"flow_map": 0.11, "sliced_w2": 0.12, "mode_mass": 0.16, "stray": 0.11}, max_steps=3000
        ),
        "gaussian": Trial(fields=_TRIAL, bounds={"flow_map": 0.05, "w2": 0.35, "axes": 0.32}, max_steps=3000),
        "ring-ict": Trial(
            fields={**_TRIAL, "kind": "ict", "curriculum_steps": 3000, "curriculum": (10, 160)},
            bounds={"sliced_w2": 0.26, "mode_mass": 0.45, "stray": 0.33},
            max_steps=3000,
            law="ring",
        ),
        "ring-ect": Trial(
            fields={**_TRIAL, "kind": "ect", "curriculum_steps": 3000},
            bounds={"sliced_w2": 0.24, "mode_mass": 0.54, "stray": 0.35},
            max_steps=3000,
            law="ring",
        ),
        "ring-tcm": Trial(
            fields={**_TRIAL, "truncation": 1.0, "truncation_start": 1500},
            bounds={"flow_map": 0.11, "sliced_w2": 0.12, "mode_mass": 0.15, "stray": 0.115},
            max_steps=3000,
            law="ring",
        ),
    }

    kind: Literal["cd", "ct", "ict", "ect"] = "cd"
    """Consistency distillation, consistency training, improved or easy consistency training."""
    guidance_scale: float = 3.0
    """cd: guidance of the teacher's step; 1 is off. Give the pairs (``pair_guidance_scale``), the others' only one, the same."""
    solver: Literal["heun", "ddim"] = "heun"
    """cd: the teacher's step; Heun asks it twice."""
    grid_size: int = 18
    """cd: N, the times of the grid."""
    curriculum: tuple[int, int] | None = None
    """ct, ict: s0 and s1, intervals at the first and the last iteration; None is CT's (2, 150) and iCT's (10, 1280)."""
    curriculum_steps: int | None = None
    """ct, ict, ect: iterations over which N grows or stages pass; None is those of the run."""
    target_decay: float = 0.95
    """cd: share of itself that the target keeps at each update (recalled). ct: mu0, the share at N = s0."""
    norm: Literal["squared", "absolute"] = "squared"
    """cd, ct: the distance, elementwise."""
    log_nsr_mean: float = -1.1
    """ict, ect: mean of ln rho."""
    log_nsr_std: float = 2.0
    """ict, ect: its deviation."""
    huber_c: float | None = None
    """ict, ect: c, in the norm of a sample; None is iCT's 0.00054 sqrt(n) and ECT's 0."""
    stages: int = 8
    """ect: stages of equal length, in each of which r is nearer to t."""
    easy_map: tuple[float, float, float] = (2.0, 8.0, 1.0)
    """ect: q, k and b of ``rho_r = rho_t (1 - q^-(stage + 1) (1 + k sigmoid(-b rho_t)))``; short runs have q = 256."""
    lr: float = 1e-4
    """Student learning rate: AdamW in cd and ct, RAdam in ict and ect."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}: expected {' or '.join(known)}.")
        first, last = self.intervals
        if self.grid_size < 2 or not 2 <= first <= last:
            raise UserError(f"grid_size is {self.grid_size}, curriculum {(first, last)}: expected N >= 2 times and 2 <= s0 <= s1.")
        for name in ("curriculum_steps", "stages"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1.")
        self._length = self.curriculum_steps or 1
        for name in ("log_nsr_std", "lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be above 0.")
        if not 0 <= self.target_decay < 1 or (self.kind == "ct" and self.target_decay == 0):
            raise UserError(
                f"target_decay is {self.target_decay}: expected a share in [0, 1), above 0 in ct; at 1 the target would stay the "
                "teacher."
            )
        q, k, _ = self.easy_map
        if not q > 1 or k < 0 or (self.huber_c or 0) < 0:
            raise UserError(f"easy_map is {self.easy_map}, huber_c {self.huber_c}: expected q > 1, k >= 0 and c >= 0.")

    @property
    def intervals(self) -> tuple[int, int]:
        """s0 and s1."""
        return self.curriculum or _CURRICULA.get(self.kind, (2, 2))

    @property
    def averages(self) -> bool:
        """Whether the target is an average of the student, and not the student itself."""
        return self.kind in {"cd", "ct"}

    def roles(self) -> dict[str, Role]:
        if not self.averages:
            return {"student": Role(train="full", lr=self.lr, optimizer="radam", dropout=self.dropout), **super().roles()}
        target = Role(train="average", dropout=self.dropout)
        return {"student": Role(train="full", lr=self.lr, dropout=self.dropout), TARGET: target, **super().roles()}

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        if not self.averages:
            return {"student": Calls(2, 1), **super().calls(updates)}
        asked = 2 if self.solver == "heun" else 1
        teacher = {"teacher": Calls(asked * (1 if self.guidance_scale == 1 else 2), 0)} if self.kind == "cd" else {}
        return {"student": Calls(1, 1), TARGET: Calls(1, 0), **teacher, **super().calls(updates)}

    def teacher_guidance(self) -> float:
        return self.guidance_scale if self.kind == "cd" else self.pair_guidance_scale

    def prepare(self, preparation: Preparation) -> None:
        super().prepare(preparation)
        self._length = self.curriculum_steps or preparation.max_steps

    # --- curricula

    def times_at(self, step: int) -> int:
        """N, the times of the grid at an iteration."""
        first, last = self.intervals
        if self.kind == "cd":
            return self.grid_size
        grow = consistency_intervals if self.kind == "ct" else doubling_intervals
        return grow(min(step, self._length), self._length, first=first, last=last)

    def decay_at(self, step: int) -> float:
        """The decay of the target's average."""
        if self.kind == "cd":
            return self.target_decay
        return consistency_ema(self.times_at(step), first=self.intervals[0], decay=self.target_decay)

    def stage_at(self, step: int) -> int:
        """ECT's stage, from 0."""
        return min(step * self.stages // self._length, self.stages - 1)

    def interval(self, batch: Batch, truncated: Truncated | None = None) -> Interval:
        """The times of a batch."""
        step, process, log_law = batch.draws.key[2], batch.teacher.process, (self.log_nsr_mean, self.log_nsr_std)
        if self.kind != "ect":
            given = log_law if self.kind == "ict" else None
            return grid_interval(process, self.times_at(step), batch.draws.uniform("t"), given, truncated)
        if truncated is None:
            rho = log_normal(batch.draws.normal("t", ()).double(), *log_law)
            return easy_interval(process, rho, self.stage_at(step), self.easy_map)
        edge = process.nsr(process.t_from_nsr(torch.tensor(truncated.rho)))
        rho = torch.where(truncated.at_edge, edge, log_normal_above(batch.draws.uniform("t"), edge, *log_law))
        return replace(easy_interval(process, rho, self.stage_at(step), self.easy_map), edge=edge)

    # --- the loss

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        self._step = batch.draws.key[2]
        truncated = self.truncated(update, batch)
        at, process = self.interval(batch, truncated), roles.teacher.process
        _, x0, cond = self.draw_pairs(batch, own=True)
        eps = batch.noise("eps")
        x_t = process.add_noise(x0, eps, at.t)
        x_r = self.teacher_step(x_t, at, cond, batch, roles) if self.kind == "cd" else process.add_noise(x0, eps, at.r)
        student, target = two_passes(roles, TARGET if self.averages else "student", (x_t, at.t), (x_r, at.r), cond)
        end = self._end(target, x0, at)
        if truncated is not None:
            with torch.no_grad():
                frozen = roles.denoiser(BOUNDARY)(x_r, at.r, cond)
            end = choose(at.rho_r < at.edge, self._end(frozen, x0, at), end)
        return {"consistency": self._distance(student.x0, end, at, self.weights(truncated))}

    def _end(self, target: Prediction, x0: Tensor, at: Interval) -> Tensor:
        """What a prediction says of the end of the path, with the boundary of its kind."""
        return choose(at.rho_r == 0, x0, target.x0) if self.kind == "ect" else with_boundary(target)

    @torch.no_grad()
    def teacher_step(self, x_t: Tensor, at: Interval, cond: Any, batch: Batch, roles: Roles) -> Tensor:
        """The guided teacher's step from x_t to the earlier time."""
        teacher = roles.denoiser("teacher")

        def denoise(x: Tensor, t: Tensor) -> Any:
            return teacher.guided(x, t, cond, batch.null, self.guidance_scale)

        first = denoise(x_t, at.t)
        return heun_step(denoise, first, at.r) if self.solver == "heun" else ddim_step(first, at.r)

    def _distance(self, prediction: Tensor, target: Tensor, at: Interval, weight: Tensor | None) -> Tensor:
        if self.averages:
            return reduce(consistency(prediction, target, norm=self.norm), weight=weight)
        c = 0.0 if self.kind == "ect" and self.huber_c is None else self.huber_c
        return reduce(improved_consistency(prediction, target, at.rho_t, at.rho_r, c=c), weight=weight)

    def after(self, update: str, roles: Roles) -> None:
        if self.averages:
            roles.follow(TARGET, "student", self.decay_at(self._step))
