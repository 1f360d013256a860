"""What students share that are told how far to jump: MeanFlow, shortcut models and CTM.

    p(t)  = (level of t + 1) / 1000        a place on the path, 1 at the last level and 0 at the end, even in the sampler's steps
    d     = p(t) - p(r)                    how far a call jumps; K calls of the sampler jump 1 / K each
    u     = (x_t - x0) / t                 x0: the student's at (x_t, t), told d; all in flow time, x_t = (1 - t) x0 + t eps
    x_r   = x_t - (t - r) u                the jump

The student keeps the teacher's process and prediction type; flow time is the same state at equal noise-to-signal ratio
(``diffusion.matching``). The jump is then the DDIM step of the student's x0 under any process, which stock schedulers make. Since
the K durations are one number, it can be told where a stock pipeline tells its guidance scale: s = 1 + UNIT d, an embedding that
starts at zero, so that at first every jump is the teacher's own step. That embedding has sines of 1000 (s - 1) = 4 d and slower:
a derivative of order one, where the usual 1000 d would make one of order 1000 (the pitfall of MeanFlow's derivative).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdiff.diffusion.jvp import Function
from fastdiff.diffusion.matching import SNRMatched, match_state
from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import LEVELS, DiscreteVP, NoiseProcess, RectifiedFlow, expand
from fastdiff.diffusion.solvers import trailing_times
from fastdiff.errors import UserError
from fastdiff.models.condition import with_guidance
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import Roles
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Schedule
from fastdiff.pipelines.jump import jump_schedule
from fastdiff.trainers._regression import StoredPairs
from fastdiff.trainers.method import Batch, Preparation, Prepared
from fastdiff.trainers.trajectory import Generators, Sampler

UNIT = 0.004
"""What is told of the whole path, beyond the scale 1 that says no jump at all."""
FLOW = RectifiedFlow()


class Places:
    """Places p on the path of a process and flow times t, each as a function of the other; both are 0 at the end.

    Below the first level, where no network is asked, they are proportional.
    """

    def __init__(self, process: NoiseProcess) -> None:
        self.process = process.continuous() if isinstance(process, DiscreteVP) else process
        ends = self.process.nsr(self.process.at_level(torch.tensor([0, LEVELS - 1])))
        self.low, self.high = FLOW.t_from_nsr(ends).tolist()

    def of(self, t: Tensor) -> Tensor:
        """p of flow times t [B], float64, differentiable from the first level on."""
        if t.is_meta:
            return torch.empty_like(t)
        inside = t.double().clamp(min=self.low)
        place = (self.process.level(self.process.t_from_nsr(FLOW.nsr(inside))).to(t.device) + 1) / LEVELS
        return torch.where(t < self.low, t / self.low / LEVELS, place)

    def time(self, place: Tensor) -> Tensor:
        """The flow time of places [B]."""
        if place.is_meta:
            return torch.empty_like(place)
        level = (place.double() * LEVELS - 1).clamp(0, LEVELS - 1)
        t = FLOW.t_from_nsr(self.process.nsr(self.process.at_level(level))).to(place.device)
        return torch.where(place * LEVELS < 1, place * LEVELS * self.low, t)


def told(cond: Any, duration: Tensor) -> Any:
    """A condition that says how far to jump, d [B]."""
    return with_guidance(cond, 1 + UNIT * duration)


def velocity(denoiser: Denoiser, cond: Any) -> Function:
    """``dx/dt (x_t [B, ...], t [B])`` in flow time, by a denoiser under any process."""
    matched = SNRMatched(denoiser.continuous(), FLOW)
    return lambda x_t, t: matched(x_t, t, cond).velocity


def mean_velocity(student: Denoiser, cond: Any) -> Function:
    """``u(x_t [B, ...], t [B], d [B])`` in flow time: what the student says of a jump over ``d`` of the path from there."""
    return lambda x_t, t, duration: velocity(student, told(cond, duration))(x_t, t)


def jump(x_t: Tensor, t: Tensor, r: Tensor, u: Tensor) -> Tensor:
    """``x_r = x_t - (t - r) u``, x_t itself where r = t."""
    return x_t - expand(t - r, x_t) * u


@dataclass(kw_only=True)
class JumpMethod(StoredPairs):
    """A student that is told how far each of its calls jumps, and jumps equal parts of the path."""

    sampler: ClassVar[Sampler] = "ddim"

    guidance_scale: float = 3.0
    """Guidance of the teacher, which the student then has in itself; 1 is off."""
    steps: int = 1
    """Network calls of the exported student, each over an equal part of the path."""
    lr: float = 1e-4
    """Student learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.steps <= 50:
            raise UserError(f"steps is {self.steps}: expected 1 to 50; beyond that the teacher itself is no slower.")
        if not self.lr > 0:
            raise UserError(f"lr is {self.lr}: it must be above 0.")

    def validate(self, teacher: Teacher) -> None:
        consequence = "Not told how far to jump, the student would learn the mean of all jumps."
        try:
            teacher.family.guidance_embedding()
        except NotImplementedError as error:
            raise UserError(
                f"{teacher.name}: {error} {self.name()} tells its student how far to jump in that place. {consequence}"
            ) from error
        if teacher.pipeline is not None and not isinstance(teacher.process, DiscreteVP):
            raise UserError(
                f"{teacher.name} is a {type(teacher.pipeline).__name__} under {type(teacher.process).__name__}: its stock pipeline "
                f"has no input that could tell the exported network how far to jump. {consequence}"
            )

        if teacher.process.alpha(teacher.process.at_level(torch.tensor(LEVELS - 1))) == 0 and isinstance(
            teacher.process, DiscreteVP
        ):
            raise UserError(
                f"the last time of {teacher.name} has no signal (zero-terminal SNR): no path in flow time reaches it, and the "
                "student would be called where it was not trained."
            )

    def levels(self) -> list[int]:
        return trailing_times(LEVELS, self.steps)

    def schedule(self, teacher: Teacher) -> Schedule:
        return jump_schedule(teacher, self.timesteps(teacher), self.sampler, UNIT)

    def updates(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def prepare(self, preparation: Preparation) -> None:
        super().prepare(preparation)
        self._places = Places(preparation.teacher.process)

    def prepare_blank(self, teacher: Teacher, world_size: int) -> Prepared:
        self._places = Places(teacher.process)
        return super().prepare_blank(teacher, world_size)

    def sample(self, student: Denoiser, noise: Tensor, cond: Any, generators: Generators = None) -> Tensor:
        duration = torch.full((len(noise),), 1 / self.steps, dtype=torch.float64, device=noise.device)
        return super().sample(student, noise, told(cond, duration), generators)

    def asked(self) -> int:
        """Calls of the teacher that one guided answer takes."""
        return 1 if self.guidance_scale == 1 else 2

    @torch.no_grad()
    def teacher_velocity(self, x_t: Tensor, t: Tensor, cond: Any, batch: Batch, roles: Roles) -> Tensor:
        """The guided teacher's ``dx/dt`` at flow times t."""
        teacher = roles.denoiser("teacher").continuous()
        state, time = match_state(x_t, t, FLOW, teacher.process)
        guided = teacher.guided(state, time, cond, batch.null, self.guidance_scale)
        return Prediction(x_t, t, guided.x0, FLOW).velocity


def told_student(teacher: Teacher) -> nn.Module:
    """The teacher's network with an input for how far to jump."""
    build: Callable[[nn.Module], nn.Module] = teacher.family.guidance_embedding()
    return build(teacher.family.backbone)
