"""Reflow: the straight lines of a teacher's own pairs are the student's paths, so that few steps, or one, follow them.

    (z, x0)    stored pairs of the guided teacher, x_T = scale z;   eps = (x_T - a_T x0) / s_T,   the line x_t = a_t x0 + s_t eps
    L          E | u_student(x_t, t) - (eps - x0) |^2               flow time sigma / (alpha + sigma) of t ~ U

Lines cross and trajectories do not: the mean of u where they cross bends them less than the teacher's were, and keeps the law that
the pairs end in. ``diffusion.straight`` says why this is one loss for all processes, so that a VP student stays under its own
process and is sampled by stock DDIM, whose steps are the flow's Euler steps.

Stages of ``round_steps`` iterations. The first is on the stored pairs (2-rectified flow). Further ``rounds`` (3-rectified and so
on), and the last stage with ``distill`` (InstaFlow), are on pairs that the student of the stage before, averaged and frozen, makes
anew for each batch in ``repeat_steps`` DDIM steps; the papers store those too. In the distillation t is one of the ``steps``
times at which the student is called, and nothing else changes: for one step it is the squared distance of samples, up to a
constant. InstaFlow has LPIPS there, which needs a feature network for images; here are latents. A stage starts with a new optimiser
and, where there are several, its learning rate falls linearly to 0.
Liu et al., Flow Straight and Fast (ICLR 2023, arXiv 2209.03003); InstaFlow (ICLR 2024, arXiv 2309.06380).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import LEVELS, NoiseProcess, expand
from fastdiff.diffusion.solvers import ddim_sample, ddim_step, trailing_times
from fastdiff.diffusion.straight import flow_time, flow_weight, uniform_in_flow_time
from fastdiff.errors import UserError
from fastdiff.losses import reduce, squared_error
from fastdiff.models.roles import Role, Roles
from fastdiff.trainers._regression import StoredPairs
from fastdiff.trainers.method import Batch, Calls, Paper, Preparation, Trial

PREVIOUS = "previous"
_TRIAL = {"pairs": 20_000, "pair_steps": 32, "pair_guidance_scale": 1.0, "lr": 2e-3}


@dataclass(kw_only=True)
class Reflow(StoredPairs):
    """Straight sampling paths by regression on the lines of stored pairs; with ``distill`` a one-step student from them."""

    info: ClassVar[Paper] = Paper(
        title="Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
        venue="ICLR",
        year=2023,
        arxiv="2209.03003",
        sheet="few_step_diffusion.md: KD on ODE pairs and Reflow/InstaFlow",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields=_TRIAL, bounds={"flow_map": 0.123, "sliced_w2": 0.125, "mode_mass": 0.15, "stray": 0.11}, max_steps=4000
        ),
        "ring-flow": Trial(fields=_TRIAL, bounds={"flow_map": 0.12, "sliced_w2": 0.12, "stray": 0.135}, max_steps=4000),
        "gaussian": Trial(fields=_TRIAL, bounds={"flow_map": 0.1, "w2": 0.5, "axes": 0.5}, max_steps=4000),
        "ring-instaflow": Trial(
            fields={**_TRIAL, "distill": True, "round_steps": 2000},
            bounds={"flow_map": 0.1, "sliced_w2": 0.13, "mode_mass": 0.18, "stray": 0.075},
            max_steps=4000,
            law="ring",
        ),
        "ring-3": Trial(
            fields={**_TRIAL, "rounds": 2, "round_steps": 2000},
            bounds={"flow_map": 0.15, "sliced_w2": 0.15, "mode_mass": 0.26, "stray": 0.145},
            max_steps=4000,
            law="ring",
        ),
    }

    steps: int = 1
    """Network calls of the student when it samples."""
    rounds: int = 1
    """Times that the paths are straightened: 1 makes the 2-rectified flow."""
    distill: bool = False
    """End with a stage of InstaFlow's distillation at the student's own times."""
    round_steps: int = 500
    """Iterations of a stage, where there are several; the last one goes on for as long as the run does."""
    repeat_steps: int = 8
    """Steps in which the student of the stage before makes a pair of a later stage."""
    lr: float = 1e-4
    """Student learning rate; at the start of each stage, where there are several."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "round_steps", "repeat_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if not 1 <= self.steps <= 50:
            raise UserError(f"steps is {self.steps}: expected 1 to 50; beyond that the teacher itself is no slower.")
        if not self.lr > 0:
            raise UserError(f"lr is {self.lr}: it must be above 0.")

    @property
    def stages(self) -> int:
        """Rounds, and the distillation."""
        return self.rounds + int(self.distill)

    def stage(self, step: int) -> int:
        """The stage of an iteration, from 0."""
        return min(step // self.round_steps, self.stages - 1)

    def roles(self) -> dict[str, Role]:
        student = {"student": Role(train="full", lr=self.lr)}
        return student if self.stages == 1 else {**student, PREVIOUS: Role(train="average")}

    def check_length(self, max_steps: int) -> None:
        needed = self.stages * self.round_steps
        if self.stages > 1 and max_steps < needed:
            raise UserError(
                f"max_steps is {max_steps} and {self.stages} stages of {self.round_steps} need {needed}: the last would be cut. "
                f"Give max_steps={needed}, or smaller round_steps."
            )

    def prepare(self, preparation: Preparation) -> None:
        needed = self.stages * self.round_steps
        if self.stages > 1 and preparation.max_steps > needed:
            preparation.say(f"the stages end after {needed} iterations; the rest has a learning rate of 0 and changes nothing.")
        super().prepare(preparation)

    def restarts(self, step: int) -> tuple[str, ...]:
        return ("student",) if step > 0 and self.stage(step) > self.stage(step - 1) else ()

    def begin(self, step: int, roles: Roles) -> None:
        if self.restarts(step):
            roles.follow(PREVIOUS, "student", 0.0)

    def lr_of(self, role: str, step: int) -> float:
        into = step - self.stage(step) * self.round_steps
        return self.lr if self.stages == 1 else self.lr * max(1 - into / self.round_steps, 0.0)

    def levels(self) -> list[int]:
        return trailing_times(LEVELS, self.steps)

    def updates(self, step: int) -> tuple[str, ...]:
        stage = self.stage(step)
        if self.distill and stage == self.stages - 1:
            return ("distillation",)
        return ("first_round",) if stage == 0 else ("later_round",)

    def trains(self, update: str) -> tuple[str, ...]:
        return ("student",)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        asked = {} if "first_round" in updates else {PREVIOUS: Calls(self.repeat_steps, 0)}
        return {"student": Calls(1, 1), **asked}

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        process = roles.teacher.process
        noise, x0, cond = self.draw_pairs(batch, own=True) if update == "first_round" else self.repeated(batch, roles)
        start = process.at_level(torch.full((len(x0),), LEVELS - 1, device=x0.device))
        t = self._own_times(batch, process) if update == "distillation" else self._all_times(batch, process)
        x_t = ddim_step(Prediction(process.initial_scale * noise, start, x0, process), t)
        student = roles.denoiser("student")(x_t, t, cond)
        weight = expand(flow_weight(process, t), x0)
        return {"reflow": reduce(squared_error(student.x0, x0), weight=weight)}

    @torch.no_grad()
    def repeated(self, batch: Batch, roles: Roles) -> tuple[Tensor, Tensor, Any]:
        """Noise, result and condition of new pairs, by the student of the stage before."""
        noise, cond, previous = batch.noise("noise"), batch.cond, roles.denoiser(PREVIOUS)
        process = roles.teacher.process
        times = process.at_level(torch.tensor(trailing_times(LEVELS, self.repeat_steps), device=noise.device))
        x0 = ddim_sample(lambda x, t: previous(x, t, cond), process.initial_scale * noise, times)
        return noise, x0, cond

    def _all_times(self, batch: Batch, process: NoiseProcess) -> Tensor:
        """Uniform in the flow time, between those of the lowest and the highest level."""
        low, high = (flow_time(process, process.at_level(torch.tensor(level))) for level in (0, LEVELS - 1))
        return uniform_in_flow_time(process, batch.draws.uniform("t"), low, high)

    def _own_times(self, batch: Batch, process: NoiseProcess) -> Tensor:
        """One of the student's own, each as likely."""
        index = batch.draws.integers("t", 0, self.steps)
        return process.at_level(torch.tensor(self.levels(), device=index.device)[index])
