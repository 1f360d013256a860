"""Progressive distillation: each round's student makes in one DDIM step what its teacher makes in two, and is the next teacher.

    x_t' = ddim(x_t, t -> t'),  x_t'' = ddim(x_t', t' -> t'')          the round's teacher on a grid of 2 N levels, t'' < t' < t
    x~   = ( x_t'' - (s_t'' / s_t) x_t ) / ( a_t'' - (s_t'' / s_t) a_t )      the x0 whose one step from x_t ends at x_t''
    L    = w mean ( x0_student(x_t, t) - sg[x~] )^2                    w = max(SNR, 1) or SNR + 1, t one of the student's N levels

N is halved from round to round, ``start_steps`` / 2 down to ``steps``. The first round's teacher is the guided teacher, so that its
guidance is part of the student and nothing is guided afterwards; the others are the averaged student of the round before, frozen.
A round starts with a new optimiser and its learning rate falls linearly to 0 (paper: Adam, 1e-4; recalled). x_t is made of the
teacher's own stored results, where the papers take data. The guidance is one number: the first stage of Meng et al. (CVPR 2023),
whose student is told it, is not here. Salimans & Ho, ICLR 2022, arXiv 2202.00512 (number recalled).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import LEVELS, expand
from fastdiff.diffusion.solvers import ddim_step, ddim_target, trailing_times
from fastdiff.errors import UserError
from fastdiff.losses import reduce, squared_error
from fastdiff.models.roles import Role, Roles
from fastdiff.trainers._regression import StoredPairs
from fastdiff.trainers.method import Batch, Calls, Paper, Preparation, Trial

_TRIAL = {"guidance_scale": 1.0, "pair_guidance_scale": 1.0, "pairs": 20_000, "pair_steps": 32, "lr": 1e-3, "start_steps": 16}


@dataclass(kw_only=True)
class ProgressiveDistillation(StoredPairs):
    """Few-step student by halving the steps of a deterministic sampler, round after round."""

    info: ClassVar[Paper] = Paper(
        title="Progressive Distillation for Fast Sampling of Diffusion Models",
        venue="ICLR",
        year=2022,
        arxiv="2202.00512",
        sheet="few_step_diffusion.md: Progressive distillation",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(
            fields={**_TRIAL, "steps": 1, "round_steps": 700},
            bounds={"sliced_w2": 0.15, "mode_mass": 0.3, "stray": 0.2},
            max_steps=2800,
        ),
        "ring-4": Trial(
            fields={**_TRIAL, "steps": 4, "round_steps": 700},
            bounds={"sliced_w2": 0.12, "mode_mass": 0.3, "stray": 0.12},
            max_steps=1400,
            law="ring",
        ),
        "gaussian": Trial(fields={**_TRIAL, "steps": 1, "round_steps": 700}, bounds={"w2": 0.68, "flow_map": 0.17}, max_steps=2800),
    }

    guidance_scale: float = 3.0
    """Guidance of the teacher in the first round, which the student then has in itself; 1 is off."""
    start_steps: int = 16
    """Steps of the teacher in the first round: ``steps`` times a power of two."""
    steps: int = 4
    """Steps of the last round's student."""
    round_steps: int = 500
    """Iterations of a round (paper: 50,000; recalled). The run must be long enough for all of them."""
    lr: float = 1e-4
    """Learning rate at the start of each round; it falls linearly to 0, besides the engine's own schedule."""
    weighting: Literal["truncated", "snr+1"] = "truncated"
    """Weight of the squared error of x0: max(SNR, 1), or SNR + 1, which weighs the error of v evenly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        doublings = self.start_steps // max(self.steps, 1)
        if self.steps < 1 or doublings < 2 or doublings & (doublings - 1) or self.steps * doublings != self.start_steps:
            raise UserError(f"start_steps is {self.start_steps} for {self.steps} steps: expected their double, fourfold and so on.")
        if self.start_steps > LEVELS // 2:
            raise UserError(f"start_steps is {self.start_steps}: at most {LEVELS // 2}, or two levels would be one.")
        if self.round_steps < 1:
            raise UserError(f"round_steps is {self.round_steps}: it must be at least 1.")
        if self.weighting not in {"truncated", "snr+1"}:
            raise UserError(f"weighting is {self.weighting!r}: expected truncated or snr+1.")

    @classmethod
    def name(cls) -> str:
        return "progressive"

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train="full", lr=self.lr), "previous": Role(train="average")}

    def check_length(self, max_steps: int) -> None:
        rounds = len(self.counts())
        needed = rounds * self.round_steps
        if max_steps < needed:
            raise UserError(
                f"max_steps is {max_steps} and {rounds} rounds of {self.round_steps} need {needed}: the student would not be one "
                f"of {self.steps} steps. Give max_steps={needed}, or smaller round_steps."
            )

    def prepare(self, preparation: Preparation) -> None:
        needed = len(self.counts()) * self.round_steps
        if preparation.max_steps > needed:
            preparation.say(f"the rounds end after {needed} iterations; the rest has a learning rate of 0 and changes nothing.")
        super().prepare(preparation)

    def counts(self) -> list[int]:
        """Steps of the student of each round."""
        return [self.start_steps >> i for i in range(1, (self.start_steps // self.steps).bit_length())]

    def round(self, step: int) -> int:
        """The round of an iteration; the last one goes on for as long as the run does."""
        return min(step // self.round_steps, len(self.counts()) - 1)

    def restarts(self, step: int) -> tuple[str, ...]:
        return ("student",) if step > 0 and self.round(step) > self.round(step - 1) else ()

    def begin(self, step: int, roles: Roles) -> None:
        if self.restarts(step):
            roles.follow("previous", "student", 0.0)

    def levels(self) -> list[int]:
        return trailing_times(LEVELS, self.steps)

    def updates(self, step: int) -> tuple[str, ...]:
        return ("first_round",) if self.round(step) == 0 else ("later_round",)

    def trains(self, update: str) -> tuple[str, ...]:
        return ("student",)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        guided = 1 if self.guidance_scale == 1 else 2
        asked = {"teacher": Calls(2 * guided, 0)} if "first_round" in updates else {"previous": Calls(2, 0)}
        return {"student": Calls(1, 1), **asked}

    def lr_of(self, role: str, step: int) -> float:
        into = step - self.round(step) * self.round_steps
        return self.lr * max(1 - into / self.round_steps, 0.0)

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        process, count = batch.teacher.process, self.counts()[self.round(batch.draws.key[2])]
        _, x0, cond = self.draw_pairs(batch, own=True)
        grid = torch.tensor([*trailing_times(LEVELS, 2 * count), 0], device=x0.device)
        place = 2 * batch.draws.integers("place", 0, count).to(x0.device)
        t, middle, end = (process.at_level(grid[place + i]) for i in range(3))
        x_t = process.add_noise(x0, batch.noise("eps"), t)
        with torch.no_grad():
            first = self._teacher(update, x_t, t, cond, batch, roles)
            second = self._teacher(update, ddim_step(first, middle), middle, cond, batch, roles)
            target = ddim_target(x_t, t, ddim_step(second, end), end, process)
            target = torch.where(expand(place == 2 * (count - 1), x0) > 0, second.x0, target)
        student = roles.denoiser("student")(x_t, t, cond)
        snr = process.snr(t)
        weight = snr.clamp(min=1) if self.weighting == "truncated" else snr + 1
        return {"progressive": reduce(squared_error(student.x0, target), weight=expand(weight, x0))}

    def _teacher(self, update: str, x_t: Tensor, t: Tensor, cond: Any, batch: Batch, roles: Roles) -> Prediction:
        """What the round's teacher says of x_t."""
        if update == "first_round":
            return roles.denoiser("teacher").guided(x_t, t, cond, batch.null, self.guidance_scale)
        return roles.denoiser("previous")(x_t, t, cond)
