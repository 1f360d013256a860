r"""Shortcut models: a student whose one long jump repeats two of its own half as long, down to steps so short that they are flow.

    flow rows        u(x_t, t, 0) -> v, the guided teacher's dx/dt at x_t (distillation) or eps - x0 (data);     t uniform
    bootstrap rows   u(x_t, t, d) -> (x_t - x_r) / (t - r),
                     x_m = x_t - (t - m) u-(x_t, t, d/2),   x_r = x_m - (m - r) u-(x_m, m, d/2)
    L = mean ( u - sg[target] )^2,       1 in 8 rows is bootstrapped (drawn);       u- <- decay u- + (1 - decay) u

d = 1, 1/2, .. 2/128 of the path and p_t one of its multiples; halves of 1/128 are told d = 0. Where the path's places are flow
times (a flow teacher) the target is (u-(x_t, t, d/2) + u-(x_m, m, d/2)) / 2, the paper's; elsewhere the two halves weigh as long
as they are in flow time, which makes the two jumps one (derived). Times, told duration and sampler: ``_jumps``. The paper's time
runs from noise 0 to data 1. Trained: the student, a full copy of the teacher's network with an embedding for d; u- is its
average, in targets only. Frozen: the teacher. Frans et al., One Step Diffusion via Shortcut Models (ICLR 2025; arXiv 2410.12557,
number recalled). Recalled, not read: the uniform t, the finest halves at d = 0.
Departures: x0 are the teacher's own stored results, not data; every row is run through all networks and its target then chosen.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.process import expand
from fastdiff.errors import UserError
from fastdiff.losses import reduce, squared_error
from fastdiff.models.roles import Role, Roles
from fastdiff.trainers._consistency import TARGET, choose
from fastdiff.trainers._jumps import FLOW, JumpMethod, jump, mean_velocity, told_student
from fastdiff.trainers.method import Batch, Calls, Paper, Trial

_TRIAL = {
    "pairs": 20_000,
    "pair_steps": 40,
    "pair_guidance_scale": 1.0,
    "guidance_scale": 1.0,
    "lr": 1e-3,
    "bootstrap_share": 0.5,
    "decay": 0.99,
}


@dataclass(kw_only=True)
class Shortcut(JumpMethod):
    """Student of 1, 2, 4 .. calls alike, by the self-consistency of its own jumps; no derivative, no fake score."""

    info: ClassVar[Paper] = Paper(
        title="One Step Diffusion via Shortcut Models",
        venue="ICLR",
        year=2025,
        arxiv="2410.12557",
        sheet="few_step_diffusion.md: Shortcut models and MeanFlow",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields=_TRIAL, bounds={"flow_map": 0.17, "sliced_w2": 0.135, "mode_mass": 0.19, "stray": 0.135}, max_steps=1500
        ),
        "gaussian": Trial(fields=_TRIAL, bounds={"flow_map": 0.15, "w2": 0.56, "axes": 0.52}, max_steps=1500),
    }

    kind: Literal["distillation", "data"] = "distillation"
    """Target of the flow rows: the guided teacher's velocity, or that from a stored result to its noise, with no teacher asked."""
    bootstrap_share: float = 0.125
    """Share of the rows whose target is two jumps of the student's average."""
    finest: int = 128
    """The shortest jump is 1 / finest of the path, a power of two; it is flow itself."""
    decay: float = 0.999
    """Share of itself that the average in the targets keeps at each update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in {"distillation", "data"}:
            raise UserError(f"kind is {self.kind!r}: expected distillation or data.")
        if not 2 <= self.finest <= 512 or self.finest & (self.finest - 1):
            raise UserError(f"finest is {self.finest}: expected a power of two from 2 to 512; the teacher has 1000 levels.")
        if self.steps & (self.steps - 1) or self.steps >= self.finest:
            raise UserError(
                f"steps is {self.steps} with finest {self.finest}: expected a power of two below it; no other jump is trained."
            )
        if not 0 < self.bootstrap_share < 1 or not 0 <= self.decay < 1:
            raise UserError(
                f"bootstrap_share is {self.bootstrap_share}, decay {self.decay}: expected a share between 0 and 1, since jumps "
                "grow out of the flow, and a decay in [0, 1)."
            )

    def roles(self) -> dict[str, Role]:
        return {
            "student": Role(train="full", lr=self.lr, build=told_student),
            TARGET: Role(train="average", build=told_student),
        }

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        asked = self.asked() if self.kind == "distillation" else 0
        return {"student": Calls(1, 1), TARGET: Calls(2, 0), "teacher": Calls(asked, 0)}

    def teacher_guidance(self) -> float:
        return self.guidance_scale if self.kind == "distillation" else self.pair_guidance_scale

    def after(self, update: str, roles: Roles) -> None:
        roles.follow(TARGET, "student", self.decay)

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        _, x0, cond = self.draw_pairs(batch, own=True)
        t, duration, bootstrapped = self.drawn(batch)
        eps = batch.noise("eps")
        x_t = FLOW.add_noise(x0, eps, t)
        v = eps - x0 if self.kind == "data" else self.teacher_velocity(x_t, t, cond, batch, roles)
        target = choose(bootstrapped, self.two_halves(x_t, t, duration, cond, roles), v)
        u = mean_velocity(roles.denoiser("student"), cond)(x_t, t, duration)
        return {"shortcut": reduce(squared_error(u, target.detach()))}

    def drawn(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Flow times t [B], how far to jump from there [B], 0 in the flow rows, and which rows are bootstrapped [B]."""
        bootstrapped = batch.draws.uniform("row") < self.bootstrap_share
        halvings = batch.draws.integers("halvings", 0, self.finest.bit_length() - 1)
        count, u = 2.0 ** halvings.double(), batch.draws.uniform("t")
        duration = torch.where(bootstrapped, 1 / count, 0.0)
        on_grid = self._places.time(((u * count).floor() + 1) / count)
        low, high = self._places.low, self._places.high
        return torch.where(bootstrapped, on_grid, low + (high - low) * u), duration, bootstrapped

    @torch.no_grad()
    def two_halves(self, x_t: Tensor, t: Tensor, duration: Tensor, cond: Any, roles: Roles) -> Tensor:
        """The mean velocity of two jumps of ``duration`` / 2 each by the average; of no meaning where the duration is 0."""
        places, u = self._places, mean_velocity(roles.denoiser(TARGET), cond)
        p, half = places.of(t), duration / 2
        m, r = places.time(p - half), places.time((p - duration).clamp(min=0))
        told = torch.where(half * self.finest > 1, half, 0.0)
        x_m = jump(x_t, t, m, u(x_t, t, told))
        x_r = jump(x_m, m, r, u(x_m, m, told))
        return (x_t - x_r) / expand(torch.where(duration > 0, t - r, 1.0), x_t)
