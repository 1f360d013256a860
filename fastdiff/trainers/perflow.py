"""PeRFlow: reflow inside each of K windows of the trajectory, on pairs that the teacher makes as they are needed.

    window     from a time t_k of the student's, where x_k = a_k x0 + s_k eps, down to the next, t_{k+1}; the last one to the end
    teacher    ``window_steps`` guided DDIM steps from x_k to x_{k+1}
    line       the x0~, eps~ with  a x0~ + s eps~ = x  at both ends;      x_t = a_t x0~ + s_t eps~ in between
    L          E | u_student(x_t, t) - (eps~ - x0~) |^2,                  t one of the times of the teacher's steps

The student is straight within windows and free to turn between them: easier than ``reflow`` (K = 1, stored pairs), and no path is
followed from noise to data. With one teacher step x0~ is the teacher's own x0 at x_k. x0 are stored results of the teacher
(``StoredPairs``), where the paper takes images; so the first window starts at a_T x0 + s_T eps, as the teacher's training did, and
sampling at noise alone. The student makes ``window_calls`` DDIM steps in each window, and stock schedulers do the same.
``diffusion.straight`` says why lines of DDIM are straight lines of flow time; the window's edges are met exactly.

Where the paper draws t uniformly in its window, t here keeps a step's distance to the window's lower edge: there the next window
begins, for which the same network at the same time must say something else, and a network is smooth in time. On the ring, uniform
times left the student at the teacher's own error at those very edges, where it is called (see the method's page).
Yan et al., PeRFlow: Piecewise Rectified Flow (NeurIPS 2024, arXiv 2405.07510); recalled, as on the sheet.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import LEVELS, expand
from fastdiff.diffusion.solvers import ddim_step, ddim_target, trailing_times
from fastdiff.diffusion.straight import flow_weight
from fastdiff.errors import UserError
from fastdiff.losses import reduce, squared_error
from fastdiff.models.roles import Role, Roles
from fastdiff.trainers._regression import StoredPairs
from fastdiff.trainers.method import Batch, Calls, Paper, Trial

_TRIAL = {
    "pairs": 20_000,
    "pair_steps": 32,
    "pair_guidance_scale": 1.0,
    "guidance_scale": 1.0,
    "window_steps": 8,
    "lr": 2e-3,
}


@dataclass(kw_only=True)
class PeRFlow(StoredPairs):
    """Few-step student whose paths are straight within each of a few windows; the teacher is asked as it trains."""

    info: ClassVar[Paper] = Paper(
        title="PeRFlow: Piecewise Rectified Flow as Universal Plug-and-Play Accelerator",
        venue="NeurIPS",
        year=2024,
        arxiv="2405.07510",
        sheet="few_step_diffusion.md: KD on ODE pairs and Reflow/InstaFlow (Piecewise)",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields=_TRIAL, bounds={"flow_map": 0.09, "sliced_w2": 0.125, "mode_mass": 0.13, "stray": 0.067}, max_steps=3000
        ),
        "gaussian": Trial(fields=_TRIAL, bounds={"flow_map": 0.077, "w2": 0.44, "axes": 0.38}, max_steps=3000),
        "ring-flow": Trial(fields=_TRIAL, bounds={"flow_map": 0.086, "sliced_w2": 0.11, "stray": 0.084}, max_steps=3000),
    }

    windows: int = 4
    """K, the parts of the trajectory, of equally many levels."""
    window_steps: int = 4
    """Teacher steps that cross a window."""
    window_calls: int = 1
    """Network calls of the student in a window, when it samples."""
    guidance_scale: float = 3.0
    """Guidance of the teacher's steps, which the student then has in itself; 1 is off."""
    lr: float = 1e-4
    """Student learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("windows", "window_steps", "window_calls"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.windows * self.window_steps > LEVELS // 2:
            raise UserError(f"windows is {self.windows} and window_steps {self.window_steps}: at most {LEVELS // 2} steps in all.")
        grid = self.grid()
        for name, levels in (("windows", self.edges()), ("window_calls", self.levels())):
            if not set(levels) <= set(grid):
                raise UserError(
                    f"{name} is {getattr(self, name)}: the student is called at levels {levels} and would be trained at {grid}. "
                    f"Choose window_steps as a multiple of window_calls, and windows times it to divide {LEVELS}."
                )
        if not self.lr > 0:
            raise UserError(f"lr is {self.lr}: it must be above 0.")

    @classmethod
    def name(cls) -> str:
        return "perflow"

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train="full", lr=self.lr)}

    def updates(self, step: int) -> tuple[str, ...]:
        return ("student",)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        guided = 1 if self.guidance_scale == 1 else 2
        return {"student": Calls(1, 1), "teacher": Calls(self.window_steps * guided, 0)}

    def grid(self) -> list[int]:
        """The levels of the teacher's steps, ``window_steps`` a window, falling: those that the student is trained at."""
        return trailing_times(LEVELS, self.windows * self.window_steps)

    def edges(self) -> list[int]:
        """The levels at which windows begin, falling."""
        return trailing_times(LEVELS, self.windows)

    def levels(self) -> list[int]:
        return trailing_times(LEVELS, self.windows * self.window_calls)

    def times_of(self, window: Tensor, batch: Batch) -> list[Tensor]:
        """The times of the teacher's steps through windows 0 .. K-1 [B], and that of their ends; of the last, which ends at the
        data, the lowest."""
        grid = torch.tensor([*self.grid(), 0], device=window.device)
        first = window * self.window_steps
        return [batch.teacher.process.at_level(grid[first + i]) for i in range(self.window_steps + 1)]

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        process, (_, x0, cond) = roles.teacher.process, self.draw_pairs(batch, own=True)
        window, place = (batch.draws.integers(*draw) for draw in (("window", 0, self.windows), ("place", 0, self.window_steps)))
        times = self.times_of(window.to(x0.device), batch)
        line = self.line(process.add_noise(x0, batch.noise("eps"), times[0]), window, times, cond, batch, roles)
        t = torch.stack(times).gather(0, place.to(x0.device)[None])[0]
        student = roles.denoiser("student")(ddim_step(line, t), t, cond)
        return {"perflow": reduce(squared_error(student.x0, line.x0), weight=expand(flow_weight(process, t), x0))}

    @torch.no_grad()
    def line(self, x: Tensor, window: Tensor, times: list[Tensor], cond: Any, batch: Batch, roles: Roles) -> Prediction:
        """x0~ at the start of the windows, by the teacher's steps from their states x [B, ...] there."""
        process, teacher, state = roles.teacher.process, roles.denoiser("teacher"), x
        for t, u in zip(times[:-1], times[1:], strict=True):
            prediction = teacher.guided(state, t, cond, batch.null, self.guidance_scale)
            state = ddim_step(prediction, u)
        x0 = ddim_target(x, times[0], state, times[-1], process)
        last = expand(window == self.windows - 1, x).bool()
        return Prediction(x, times[0], torch.where(last, prediction.x0, x0), process)
