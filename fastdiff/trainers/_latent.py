"""What LCM and LCM-LoRA share: the times, the teacher's step, the loss, and how the student samples.

    t_n = k (n + 1) - 1, k = 1000 / N,   n ~ U{0..N-1}        levels of 0..999, of any process;   u = t_n - k, and 0 at n = 0
    x_t = a_t x0 + s_t eps                                   x0: a stored result of the teacher, so prompts alone are needed
    x_u = a_u x0_g + s_u eps_g                               teacher's DDIM step; both rebuilt from one guided prediction
    L   = mean( sqrt((f(x_t, t) - sg f-(x_u, u))^2 + c^2) - c ),    f-(x, 0) = x

f is the denoiser's x0: LCM's own c_skip = 0.25 / ((10 t)^2 + 0.25) is below 0.003 at t = 1 and 1 at t = 0, so that on its grid f is
x0 but at 0, which is no time of the student's. There the boundary holds exactly, by case. The sampler puts fresh noise between
the student's calls, at ``solvers.lcm_times``. LCM (arXiv 2310.04378) and LCM-LoRA (arXiv 2311.05556) train on images with N = 50.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.guidance import Scale
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import LEVELS, RectifiedFlow, expand
from fastdiff.diffusion.solvers import ddim_step, lcm_times
from fastdiff.errors import UserError
from fastdiff.losses import consistency, latent_consistency, reduce
from fastdiff.models.roles import Roles
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Schedule
from fastdiff.pipelines.flow import schedule_of
from fastdiff.trainers._regression import StoredPairs
from fastdiff.trainers.method import Batch
from fastdiff.trainers.trajectory import Sampler


@dataclass(frozen=True)
class Compared:
    """What a loss compares: of the student, with its graph, and of the target, without one; at which times; and the condition."""

    prediction: Tensor
    aim: Tensor
    end: Tensor
    cond: Any


@dataclass(kw_only=True)
class LatentConsistency(StoredPairs):
    """A student whose x0 is the same along each of the teacher's guided trajectories."""

    sampler: ClassVar[Sampler] = "consistency"
    bf16_tolerance: ClassVar[tuple[float, float]] = (0.05, 0.6)
    """The gradient is all but the sign of a small difference, which rounding turns over where it is near 0."""

    steps: int = 4
    """Network calls of the student."""
    original_steps: int = 50
    """Times that it is distilled at; its own are some of them."""
    distance: Literal["pseudo_huber", "squared"] = "pseudo_huber"
    """Between prediction and target, element by element."""
    huber_c: float = 1e-3
    """Where the pseudo-Huber distance turns from square to absolute value, in units of latents."""
    lr: float = 1e-4
    """Student learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps <= self.original_steps <= LEVELS:
            raise UserError(
                f"steps is {self.steps} of original_steps {self.original_steps}: need 1 <= steps <= original_steps <= {LEVELS}, "
                "or the student would be called at times that it was not trained at."
            )
        if self.distance not in {"pseudo_huber", "squared"}:
            raise UserError(f"distance is {self.distance!r}: expected pseudo_huber or squared.")
        for name in ("huber_c", "lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be above 0.")

    def levels(self) -> list[int]:
        return lcm_times(self.steps, self.original_steps, LEVELS)

    def validate(self, teacher: Teacher) -> None:
        flow = isinstance(teacher.process, RectifiedFlow) and teacher.pipeline is not None
        if flow and self.steps > 2 and self.original_steps % self.steps:
            even = self.original_steps // self.steps * self.steps
            raise UserError(
                f"original_steps is {self.original_steps} and steps {self.steps}: the times of a student of {teacher.name} would "
                f"be uneven, and no stock scheduler of a flow visits them. Give original_steps={even}."
            )

    def schedule(self, teacher: Teacher) -> Schedule:
        return schedule_of(teacher, self.timesteps(teacher), self.sampler, original_steps=self.original_steps)

    def updates(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def consistency(
        self, batch: Batch, roles: Roles, scale: Scale, *, target: str, told: Callable[[Any], Any] = lambda cond: cond
    ) -> dict[str, Tensor]:
        """The loss; ``target`` is the role of f-, and ``told`` makes of a condition what student and target are given."""

        def teach(x_t: Tensor, t: Tensor, cond: Any) -> Prediction:
            return roles.denoiser("teacher").guided(x_t, t, cond, batch.null, scale)

        return {"consistency": self.distance_of(self.pair(batch, roles, teach, target=target, told=told))}

    def pair(
        self,
        batch: Batch,
        roles: Roles,
        teach: Callable[[Tensor, Tensor, Any], Prediction],
        *,
        target: str,
        told: Callable[[Any], Any] = lambda cond: cond,
    ) -> "Compared":
        """What the student and its target say of two points of a trajectory, the second of them by a step of ``teach``."""
        _, x0, cond = self.draw_pairs(batch, own=True)
        level, lower, edge = self.neighbours(batch.draws.integers("n", 0, self.original_steps))
        t, u = (batch.teacher.process.at_level(levels) for levels in (level, lower))
        end = self.end(batch, lower, edge)
        x_t = batch.teacher.process.add_noise(x0, batch.noise("eps"), t)
        prediction = self.compared(roles.denoiser("student")(x_t, t, told(cond)), end)
        with torch.no_grad():
            x_u = ddim_step(teach(x_t, t, cond), u)
            aim = self.compared(roles.denoiser(target)(x_u, u, told(cond)), end)
            aim = torch.where(expand(u == end, aim).bool(), x_u.to(aim.dtype), aim)
        return Compared(prediction, aim, end, cond)

    def distance_of(self, pair: "Compared") -> Tensor:
        """The mean distance, a scalar."""
        if self.distance == "squared":
            return reduce(consistency(pair.prediction, pair.aim))
        return reduce(latent_consistency(pair.prediction, pair.aim, c=self.huber_c))

    def neighbours(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels t_n and u [B] of the module docstring, and the level where the boundary is."""
        skip = LEVELS // self.original_steps
        level = skip * (n + 1) - 1
        return level, (level - skip).clamp(min=0), torch.zeros_like(level)

    def end(self, batch: Batch, lower: Tensor, edge: Tensor) -> Tensor:
        """Times [B] at which both are compared, given the levels u and that of the boundary: the boundary's."""
        del lower
        return batch.teacher.process.at_level(edge)

    def compared(self, prediction: Prediction, end: Tensor) -> Tensor:
        """What is the same along a trajectory, given the times of the boundary: x0."""
        del end
        return prediction.x0
