"""What TCD and Hyper-SD share: jumps to random ends within a segment of the trajectory, and how their student samples.

    segments    k parts of the N times of LCM, with edges e_j = floor(j N / k), at levels N' e_j - 1 (0 at e_0), N' = 1000 / N
    t_b         the edge below t_n, strictly: an edge belongs to the segment that ends in it
    t_end       ~ U{t_b .. t_{n-1}}, a level of 0..999, one a sample
    Psi(x, u)   = a_u x0(x, t) + s_u eps(x, t)                DDIM jump from t to u: x itself at u = t
    L           = mean d( Psi(x_t, t_end), sg Psi-(x_u, t_end) ),     Psi-(x_u, u) = x_u

A student of LCM is right at the end of the path alone; this one at all ends below, so that it samples with any number of steps and
with little fresh noise: to ``(1 - eta) u`` deterministically, and with noise back to u. It does not see t_end, so that with random
ends no loss of zero can be reached but where trajectories are straight in DDIM's coordinates (CTM tells the student its end).
On a table of times sampling ends at row 0, as TCDScheduler does, and everywhere else at x0.

TCD (arXiv 2402.19159), Hyper-SD (NeurIPS 2024, arXiv 2404.13686), CTM (ICLR 2024, arXiv 2310.02279; numbers recalled).
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import LEVELS, DiscreteVP
from fastdiff.diffusion.solvers import ddim_step
from fastdiff.errors import UserError
from fastdiff.losses import reduce, squared_error
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import Roles
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Schedule
from fastdiff.trainers._latent import LatentConsistency
from fastdiff.trainers.method import Batch
from fastdiff.trainers.trajectory import Generators, Sampler, trajectory


def segment_edges(n: int, k: int) -> list[int]:
    """e_0 .. e_k of the module docstring, among the indices 0..n.

    >>> segment_edges(50, 4)
    [0, 12, 25, 37, 50]
    """
    return [j * n // k for j in range(k + 1)]


def segment_around(n: Tensor, original_steps: int, k: int) -> tuple[Tensor, Tensor]:
    """The levels [B] of the lower and the upper edge of the segment that the times of index n [B] are in."""
    edges = torch.tensor(segment_edges(original_steps, k), device=n.device)
    place = torch.searchsorted(edges, n, right=True)
    low, high = (LEVELS // original_steps * edges[place + i] - 1 for i in (-1, 0))
    return low.clamp(min=0), high


@dataclass(kw_only=True)
class TrajectoryConsistency(LatentConsistency):
    """A student whose jumps to all earlier times of a segment agree along a trajectory; it samples by TCD's steps."""

    sampler: ClassVar[Sampler] = "tcd"

    eta: float = 0.3
    """Share of each sampling step that is gone back with fresh noise (TCD's gamma): 0 is deterministic, 1 is LCM's sampler."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta}: it must be in [0, 1], or a step would end before 0 or after its own time.")

    def validate(self, teacher: Teacher) -> None:
        super().validate(teacher)
        if teacher.pipeline is not None and not isinstance(teacher.process, DiscreteVP) and 0 < self.eta < 1:
            raise UserError(
                f"eta is {self.eta}, and the scheduler that {teacher.name} is saved with makes steps without noise (eta 0) or with "
                "wholly fresh noise (eta 1) only: FlowMatchEulerDiscreteScheduler has no step between. Give eta=0 or eta=1."
            )

        kind = type(teacher.pipeline).__name__
        if teacher.pipeline is not None and isinstance(teacher.process, DiscreteVP) and not teacher.family.takes_latents:
            raise UserError(
                f"a {kind} does not run TCDScheduler with an eta of its call: the student would be sampled by other steps than it "
                "was trained for. Take lcm at one step, or pcm."
            )
        if teacher.pipeline is not None and not teacher.family.gives_noise and self.eta > 0 and self.steps > 1:
            raise UserError(
                f"eta is {self.eta}, and a {kind} hands its scheduler no generators: the noise between the {self.steps} steps "
                "would be another one at every call, whatever the seed. Give eta=0, or steps=1."
            )

    def schedule(self, teacher: Teacher) -> Schedule:
        schedule = super().schedule(teacher)
        if isinstance(teacher.process, DiscreteVP):
            return replace(schedule, eta=self.eta)
        return replace(schedule, sampler="ddim" if self.eta == 0 else "consistency")

    def segments_at(self, step: int) -> int:
        """k, the number of segments in iteration ``step``: here one."""
        del step
        return 1

    def segment(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Levels [B] of the edges below and above the batch's t_n."""
        n = batch.draws.integers("n", 0, self.original_steps)
        return segment_around(n, self.original_steps, self.segments_at(batch.draws.key[2]))

    def end(self, batch: Batch, lower: Tensor, edge: Tensor) -> Tensor:
        return batch.times("t_end", self.segment(batch)[0], lower)

    def noise_range(self, teacher: Teacher) -> dict[str, tuple[int, int]]:
        return {**super().noise_range(teacher), "t_end": (0, LEVELS - 1 - LEVELS // self.original_steps)}

    def compared(self, prediction: Prediction, end: Tensor) -> Tensor:
        """The state at the end."""
        return ddim_step(prediction, end)

    def kept(self, batch: Batch, roles: Roles) -> Tensor:
        """``mean |x0(x_t, t) - x0_previous(x_t, t)|^2`` at all times of the grid but the first of sampling: for stages that train
        something else, and would otherwise lose what the student of the stage before, frozen, could do."""
        _, x0, cond = self.draw_pairs(batch, own=True)
        n = batch.draws.integers("kept", 0, max(self.original_steps - 1, 1))
        t = batch.teacher.process.at_level(LEVELS // self.original_steps * (n + 1) - 1)
        x_t = batch.teacher.process.add_noise(x0, batch.noise("kept_eps"), t)
        prediction = roles.denoiser("student")(x_t, t, cond).x0
        with torch.no_grad():
            before = roles.denoiser("previous")(x_t, t, cond).x0
        return reduce(squared_error(prediction, before))

    def sample(self, student: Denoiser, noise: Tensor, cond: Any, generators: Generators = None) -> Tensor:
        return sample_tcd(student, noise, cond, self.levels(), self.eta, generators)


def sample_tcd(student: Denoiser, noise: Tensor, cond: Any, levels: list[int], eta: float, generators: Generators = None) -> Tensor:
    """A sample [B, ...] by TCD's steps: on a table the state at row 0, where TCDScheduler ends, and elsewhere x0."""
    last = trajectory(student, noise, cond, levels, "tcd", generators, eta=eta)[-1]
    if not isinstance(student.process, DiscreteVP):
        return last.x0
    return ddim_step(last, torch.zeros(len(noise), dtype=torch.long, device=noise.device))
