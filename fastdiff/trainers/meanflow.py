r"""MeanFlow: a student that says the mean velocity of a trajectory between any two times, so that one call goes all the way.

    x_t = (1 - t) x0 + t eps         t, r: the larger and the smaller of two draws sigmoid(N(-0.4, 1)); r = t in 75 %
    v   = the guided teacher's dx/dt at x_t (distillation), or eps - x0 (data)
    u   = the student at (x_t, t), told how far r is                                   x_r = x_t - (t - r) u
    L   = S sg[(S + c)^-p],  S = |u - sg[v - (t - r) J]|^2 over a sample's elements,   J = du/dt along v with r fixed, one JVP

(t - r) u = integral of v from r to t, differentiated by t, is the identity behind L; r = t is flow matching. In distillation v is
no random variable given x_t, so that neither is the tangent. Flow time, told duration and sampler: ``_jumps``; estimators of J:
``_tangents``. Trained: the student, a full copy of the teacher's network with an embedding for the duration. Frozen: the teacher.
Geng et al., Mean Flows for One-step Generative Modeling (NeurIPS 2025, arXiv 2505.13447); p = 1, c = 1e-2 as there.
Departures: x0 are the teacher's own stored results, not data; the paper's guidance inside v, by the student itself, is for
training without a teacher and not here. ``end_share`` is this library's.

alpha-Flow (2025; a paper of its own, here as our sheet derives it, without its weights) is the same without a derivative:

    target = alpha v + (1 - alpha) u(x_t - (t - s) v, s, r),   s = alpha r + (1 - alpha) t,   alpha falling from 1

two jumps in the place of one, which at alpha -> 0 is MeanFlow and at 1/2 has the form of a shortcut model's, with v for its first
half. Its residual is alpha times MeanFlow's: with the weights taken as MeanFlow's, its gradient falls with alpha, and p and c weigh
it otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.jvp import Function
from fastdiff.diffusion.times import logit_normal
from fastdiff.errors import UserError
from fastdiff.losses import meanflow, meanflow_target, reduce
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._jumps import FLOW, JumpMethod, Places, jump, mean_velocity, told_student, velocity
from fastdiff.trainers._tangents import FORWARDS, Estimator, Seen, choose_estimator
from fastdiff.trainers.method import Batch, Calls, Paper, Preparation, Prepared, Trial

_TRIAL = {
    "pairs": 20_000,
    "pair_steps": 40,
    "pair_guidance_scale": 1.0,
    "guidance_scale": 1.0,
    "log_mean": 0.4,
    "log_std": 1.6,
    "jump_share": 0.75,
    "end_share": 0.5,
}
_ALPHA = {**_TRIAL, "lr": 1e-3, "weight_power": 0.0, "alpha_steps": 1600, "alpha_floor": 0.05}


@dataclass(kw_only=True)
class MeanFlow(JumpMethod):
    """One-step student by the mean velocity of the teacher's trajectories; no fake score, no target network."""

    info: ClassVar[Paper] = Paper(
        title="Mean Flows for One-step Generative Modeling",
        venue="NeurIPS",
        year=2025,
        arxiv="2505.13447",
        sheet="few_step_diffusion.md: Shortcut models and MeanFlow",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields=_ALPHA,
            bounds={"flow_map": 0.17, "sliced_w2": 0.15, "mode_mass": 0.23, "stray": 0.2},
            max_steps=2000,
            ema_decay=0.998,
        ),
        "ring-jvp": Trial(
            fields={**_TRIAL, "lr": 5e-4, "jvp": "one-sided"},
            bounds={"flow_map": 0.42, "sliced_w2": 0.34, "mode_mass": 0.53, "stray": 0.39},
            max_steps=2000,
            law="ring-smooth",
            ema_decay=0.998,
        ),
    }

    kind: Literal["distillation", "data"] = "distillation"
    """Whose velocity: the guided teacher's, or that from a stored result to its noise, for which no teacher is asked."""
    log_mean: float = -0.4
    """Mean of the logit of a flow time."""
    log_std: float = 1.0
    """Its deviation."""
    jump_share: float = 0.25
    """Share of the samples with r before t; the others are flow matching."""
    end_share: float = 0.0
    """Share of those that go to the end, r = 0, as the last call of a sampler does; logit-normal times do not reach it."""
    weight_power: float = 1.0
    """p of the adaptive weight; 0 is off."""
    weight_offset: float = 1e-2
    """c of the adaptive weight, beside a sum over a sample's elements."""
    jvp: Literal["auto", "forward", "central", "one-sided"] = "auto"
    """How the derivative is estimated; ``auto`` measures at the start and takes forward or one-sided."""

    alpha_steps: int = 0
    """alpha-Flow: iterations over which alpha falls from 1 to ``alpha_floor``, linearly; 0 is MeanFlow from the start."""
    alpha_floor: float = 0.0
    """Where alpha stays; from 0 on the derivative takes over."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("kind", ("distillation", "data")), ("jvp", tuple(FORWARDS))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}: expected {' or '.join(known)}.")
        for name in ("log_std", "weight_offset"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be above 0.")
        if not 0 < self.jump_share <= 1 or not 0 <= self.end_share <= 1 or self.weight_power < 0:
            raise UserError(
                f"jump_share is {self.jump_share}, end_share {self.end_share}, weight_power {self.weight_power}: expected shares, "
                "the first above 0, or the student would never learn to jump, and a power of at least 0."
            )

        if self.alpha_steps < 0 or not 0 <= self.alpha_floor < 1:
            raise UserError(
                f"alpha_steps is {self.alpha_steps}, alpha_floor {self.alpha_floor}: expected a number of iterations and a floor "
                "in [0, 1); at 1 every jump would be as straight as its start."
            )

    @classmethod
    def name(cls) -> str:
        return "meanflow"

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train="full", lr=self.lr, build=told_student)}

    def alpha_at(self, step: int) -> float:
        """alpha of an iteration; 0 is MeanFlow."""
        return max(1 - step / self.alpha_steps, self.alpha_floor) if self.alpha_steps else 0.0

    def updates(self, step: int) -> tuple[str, ...]:
        return ("alpha_flow",) if self.alpha_at(step) > 0 else ("meanflow",)

    def trains(self, update: str) -> tuple[str, ...]:
        return ("student",)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        asked = self.asked() if self.kind == "distillation" else 0
        forwards = 2 if "alpha_flow" in updates else FORWARDS[self.jvp]
        return {"student": Calls(forwards, 1), "teacher": Calls(asked, 0)}

    def teacher_guidance(self) -> float:
        return self.guidance_scale if self.kind == "distillation" else self.pair_guidance_scale

    def prepare(self, preparation: Preparation) -> None:
        super().prepare(preparation)
        derives = not self.alpha_steps or self.alpha_floor == 0
        estimator = choose_estimator(preparation, self.jvp, under_flow(self._places)) if derives else Estimator("forward")
        self._begin(estimator)

    def prepare_blank(self, teacher: Teacher, world_size: int) -> Prepared:
        found = super().prepare_blank(teacher, world_size)
        self._begin(Estimator("forward"))
        return found

    def _begin(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._range = estimator.within(self._places.low, self._places.high)

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        _, x0, cond = self.draw_pairs(batch, own=True)
        t, r = self.drawn_times(batch)
        eps = batch.noise("eps")
        x_t = FLOW.add_noise(x0, eps, t)
        v = eps - x0 if self.kind == "data" else self.teacher_velocity(x_t, t, cond, batch, roles)
        u, end = mean_velocity(roles.denoiser("student"), cond), self._places.of(r)

        def to_end(x: Tensor, s: Tensor) -> Tensor:
            return u(x, s, self._places.of(s) - end)

        if update == "alpha_flow":
            prediction, target = to_end(x_t, t), self.two_jumps(x_t, t, r, v, to_end, self.alpha_at(batch.draws.key[2]))
        else:
            prediction, _, jvp = self._estimator(to_end, (x_t, t), (v, torch.ones_like(t)))
            target = meanflow_target(v, jvp, t, r)
        return {update: reduce(meanflow(prediction, target, p=self.weight_power, c=self.weight_offset))}

    @torch.no_grad()
    def two_jumps(self, x_t: Tensor, t: Tensor, r: Tensor, v: Tensor, to_end: Function, alpha: float) -> Tensor:
        """alpha-Flow's target: v over the first share alpha of the way from t to r, and from there the student."""
        s = alpha * r + (1 - alpha) * t
        rest = to_end(jump(x_t, t, s, v), s.clamp(min=self._places.low))
        return alpha * v + (1 - alpha) * rest

    def drawn_times(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Flow times t and r <= t [B], float64; t in the range of the teacher's levels, r down to the end."""
        low, high = self._range
        one, other = (logit_normal(batch.draws.normal(n, ()).double(), self.log_mean, self.log_std) for n in ("one", "other"))
        kind = batch.draws.uniform("kind")
        t = torch.maximum(one, other).clamp(low, high)
        r = torch.where(kind < self.jump_share, torch.minimum(one, other).clamp(max=high), t)
        return t, torch.minimum(r, t).masked_fill(kind < self.jump_share * self.end_share, 0.0)


def under_flow(places: Places) -> Seen:
    """The velocity of a denoiser in flow time, along (direction, 1)."""
    return Seen(velocity, (places.low, places.high), lambda direction, t: (direction, torch.ones_like(t)))
