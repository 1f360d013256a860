r"""CTM: a student that jumps from any time of a trajectory to any earlier one, consistent with the teacher's steps between them.

    G(x_t, t, u) = x_t - (t - u) u_theta(x_t, t, u)                 in noise-to-signal time: (r_u / r_t) x + (1 - r_u / r_t) g
    x_s  = the guided teacher's Heun steps from x_t to s            t > s >= u: grid times
    L    = mean ( G-(G(x_t, t, u), u, 0) - sg G-(G-(x_s, s, u), u, 0) )^2 + w lambda mean ( g(x_t', t', t') - x0 )^2
    G-   <- decay G- + (1 - decay) G

Both sides of the soft consistency are compared after a jump to the end by the average G-, through whose input the gradient of the
left one comes. u = 0 throughout is consistency distillation, u = s regression on the teacher's step. g is the x0 of the student
told u; told t itself it is a denoiser, which the second term trains. lambda: ``_balance``. Flow time, told duration: ``_jumps``.
gamma-sampling jumps to sqrt(1 - gamma^2) of the next noise-to-signal ratio and adds the rest anew: 0 is DDIM, 1 ends every jump
in x0, as LCM. Trained: the student, a full copy of the teacher's network with an embedding for the duration. Frozen: the teacher.
Kim et al., Consistency Trajectory Models (ICLR 2024; arXiv 2310.02279, number recalled).
Departures: **no GAN term**, which the paper adds last and needs for its figures; the squared distance, not LPIPS; x0 are the
teacher's stored results, not data; a fixed number of teacher steps over a random length; times evenly spaced in the process's
levels, which are Karras's for EDM; lambda of the iteration before.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.diffusion.matching import match_state
from fastdiff.diffusion.process import LEVELS, expand
from fastdiff.diffusion.renoising import renoise
from fastdiff.errors import UserError
from fastdiff.losses import reduce, squared_error
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Schedule
from fastdiff.trainers._balance import Balance, add_pulls
from fastdiff.trainers._consistency import TARGET, choose
from fastdiff.trainers._jumps import FLOW, JumpMethod, Places, jump, mean_velocity, told_student
from fastdiff.trainers.method import Batch, Calls, Paper, Trial
from fastdiff.trainers.trajectory import Generators, fresh_noise

BALANCE = "balance"
_TRIAL = {"pairs": 20_000, "pair_steps": 40, "pair_guidance_scale": 1.0, "guidance_scale": 1.0, "lr": 1e-3, "decay": 0.95}


@dataclass(frozen=True)
class Triple:
    """Flow times t > s >= u [B] of a soft consistency, u = 0 at the end."""

    t: Tensor
    s: Tensor
    u: Tensor


@dataclass(kw_only=True)
class CTM(JumpMethod):
    """Student that jumps between any two times of the teacher's trajectories, and samples with as much fresh noise as is asked."""

    info: ClassVar[Paper] = Paper(
        title="Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion",
        venue="ICLR",
        year=2024,
        arxiv="2310.02279",
        sheet="few_step_diffusion.md: CTM",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields=_TRIAL, bounds={"flow_map": 0.16, "sliced_w2": 0.14, "mode_mass": 0.2, "stray": 0.165}, max_steps=2000
        ),
    }

    grid_size: int = 18
    """N: times of the soft consistency are the places i / N of the path."""
    solver_steps: int = 2
    """Heun steps that lead the teacher from t to s, which is 1 to that many places earlier."""
    decay: float = 0.999
    """Share of itself that the average keeps at each update."""
    denoising_weight: float = 1.0
    """w: weight of the denoising term beside lambda; 0 is off."""
    gamma: float = 0.0
    """Fresh noise between the calls when sampling, 0 to 1. A stock pipeline tells all calls one duration, which above 0 differ."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.solver_steps <= self.grid_size <= LEVELS:
            raise UserError(
                f"solver_steps is {self.solver_steps} with grid_size {self.grid_size}: expected 1 <= solver_steps <= grid_size "
                f"<= {LEVELS}, or s would lie beyond the end."
            )
        if not 0 <= self.decay < 1 or self.denoising_weight < 0 or not 0 <= self.gamma <= 1:
            raise UserError(
                f"decay is {self.decay}, denoising_weight {self.denoising_weight}, gamma {self.gamma}: expected a decay in [0, 1), "
                "no negative weight and a gamma in [0, 1]."
            )

    @classmethod
    def name(cls) -> str:
        return "ctm"

    def roles(self) -> dict[str, Role]:
        roles = {
            "student": Role(train="full", lr=self.lr, build=told_student),
            TARGET: Role(train="average", build=told_student),
        }
        return roles | ({BALANCE: Role(train="state", build=lambda teacher: Balance())} if self.denoising_weight else {})

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        """The denoising term's own call, and what both terms take back to the last layer for lambda."""
        student = Calls(2, 4) if self.denoising_weight else Calls(1, 1)
        return {"student": student, TARGET: Calls(3, 1), "teacher": Calls(2 * self.solver_steps * self.asked(), 0)}

    def schedule(self, teacher: Teacher) -> Schedule:
        """That of the deterministic jumps.

        Raises:
            ValueError: a pipeline would have to tell its calls different jumps.
        """
        if self.gamma > 0 and self.steps > 1 and teacher.pipeline is not None:
            raise ValueError(
                f"at gamma={self.gamma} with {self.steps} steps each call jumps another part of the path, and a stock pipeline "
                "tells all its calls the same. Give gamma=0."
            )
        return super().schedule(teacher)

    # --- the loss

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        _, x0, cond = self.draw_pairs(batch, own=True)
        at = self.triple(batch)
        x_t = FLOW.add_noise(x0, batch.noise("eps"), at.t)
        soft = self.soft_consistency(x_t, at, cond, batch, roles)
        if not self.denoising_weight:
            return {"ctm": soft}
        denoising = self.denoising(x0, cond, batch, roles)
        self._shared = batch.shared
        add_pulls(batch.shared, soft, denoising, roles, "student")
        weight: Tensor = roles.modules[BALANCE].weight  # type: ignore[assignment]
        return {"ctm": soft, "denoising": self.denoising_weight * weight * denoising}

    def triple(self, batch: Batch) -> Triple:
        """t uniform on the grid, s up to ``solver_steps`` places after it, u uniform on what is left, the end among it."""
        n = self.grid_size
        start = (batch.draws.uniform("t") * n).floor() + 1
        gap = (batch.draws.uniform("s") * start.clamp(max=self.solver_steps)).floor() + 1
        end = (batch.draws.uniform("u") * (start - gap + 1)).floor()
        return Triple(*(self._places.time(i / n) for i in (start, start - gap, end)))

    def soft_consistency(self, x_t: Tensor, at: Triple, cond: Any, batch: Batch, roles: Roles) -> Tensor:
        """The first term; its value is that of the loss, its gradient comes back through one jump of G- to the student's."""
        student, target = (self.jumps(roles.denoiser(name), cond) for name in ("student", TARGET))
        zero = torch.zeros_like(at.t)
        with torch.no_grad():
            x_s = self.teacher_step(x_t, at, cond, batch, roles)
            aim = target(target(x_s, at.s, at.u), at.u, zero)
        x_u = student(x_t, at.t, at.u)
        landed = x_u.detach().requires_grad_()
        loss = reduce(squared_error(target(landed, at.u, zero), aim))
        (pull,) = torch.autograd.grad(loss, landed)
        return loss.detach() + ((x_u - x_u.detach()) * pull).sum()

    def jumps(self, denoiser: Denoiser, cond: Any) -> Any:
        """G: ``(x [B, ...], t [B], u [B]) -> x_u``, to the bit x itself where u = t, the end included."""
        places, mean = self._places, mean_velocity(denoiser, cond)

        def run(x: Tensor, t: Tensor, u: Tensor) -> Tensor:
            within = t.clamp(min=places.low)
            return choose(t > u, jump(x, t, u, mean(x, within, places.of(within) - places.of(u))), x)

        return run

    def teacher_step(self, x_t: Tensor, at: Triple, cond: Any, batch: Batch, roles: Roles) -> Tensor:
        """The guided teacher's state at s, by Heun steps in flow time over equal places; one that ends at x0 is Euler's."""
        places = self._places
        first, last = places.of(at.t), places.of(at.s)
        x, t = x_t, at.t
        for i in range(1, self.solver_steps + 1):
            after = places.time(first + (last - first) * i / self.solver_steps)
            v = self.teacher_velocity(x, t, cond, batch, roles)
            euler = jump(x, t, after, v)
            ahead = self.teacher_velocity(euler, after.clamp(min=places.low), cond, batch, roles)
            x, t = jump(x, t, after, choose(after > 0, (v + ahead) / 2, v)), after
        return x

    def denoising(self, x0: Tensor, cond: Any, batch: Batch, roles: Roles) -> Tensor:
        """The second term without its weights: x0 of the student at places uniform on the path, told to jump nowhere."""
        p = 1 / LEVELS + (1 - 1 / LEVELS) * batch.draws.uniform("denoising_t")
        t = self._places.time(p)
        x_t = FLOW.add_noise(x0, batch.noise("denoising_eps"), t)
        u = mean_velocity(roles.denoiser("student"), cond)(x_t, t, torch.zeros_like(t))
        return reduce(squared_error(x_t - expand(t, u) * u, x0))

    def after(self, update: str, roles: Roles) -> None:
        roles.follow(TARGET, "student", self.decay)
        if self.denoising_weight:
            roles.modules[BALANCE].settle(self._shared["pulls"])  # type: ignore[operator]

    # --- sampling

    def sample(self, student: Denoiser, noise: Tensor, cond: Any, generators: Generators = None) -> Tensor:
        if self.gamma == 0:
            return super().sample(student, noise, cond, generators)
        return gamma_sample(student, noise, cond, self.levels(), self.gamma, generators)


def gamma_sample(student: Denoiser, noise: Tensor, cond: Any, levels: list[int], gamma: float, generators: Generators) -> Tensor:
    """x0 [B, ...] from unit noise by CTM's gamma-sampling at ``levels``, each call told its own jump.

        r_w = sqrt(1 - gamma^2) r_next,      x_w = the jump to w,      x_next = x_w renoised to the next time

    0 jumps to the next time itself, 1 to the end, from which the whole noise is drawn anew.
    """
    process, places, mean = student.continuous().process, Places(student.process), mean_velocity(student, cond)
    times = [process.at_level(torch.tensor(level)).to(noise.device).expand(len(noise)) for level in levels]
    x, t = match_state(process.initial_scale * noise, times[0], process, FLOW)
    for then in times[1:]:
        after = FLOW.t_from_nsr(process.nsr(then)).to(noise.device)
        w = FLOW.t_from_nsr(math.sqrt(1 - gamma**2) * FLOW.nsr(after))
        x_w = jump(x, t, w, mean(x, t, places.of(t) - places.of(w)))
        x, t = renoise(x_w, w, after, fresh_noise(noise, generators), FLOW), after
    return jump(x, t, torch.zeros_like(t), mean(x, t, places.of(t)))
