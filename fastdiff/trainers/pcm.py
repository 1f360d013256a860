"""PCM: latent consistency within each phase of the trajectory, so that a few deterministic steps are exact.

    phases     M = ``steps`` parts of the N times of LCM, with edges e_j = floor(j N / M), at levels k e_j - 1 (0 at e_0)
    Psi(x, t)  = a_e x0(x, t) + s_e eps(x, t)                   DDIM jump to the lower edge e of t's phase
    L          = mean( sqrt((Psi(x_t, t) - sg Psi-(x_u, u))^2 + c^2) - c ),      Psi-(x, e) = x

u and x_u as in LCM (``_latent``): one step of the guided teacher. A student of LCM jumps to the data from everywhere and so must
put noise back between its calls; one of PCM ends each call at the next one's time, and no noise is drawn. For a fixed edge zero
loss can be reached. At M = N it is regression on the teacher's own steps.
Wang et al., Phased Consistency Models (NeurIPS 2024), arXiv 2405.18407; as on the sheet of Hyper-SD, read in the released code.
Departures: those of ``lcm``; a full student that is told its scale, where the paper trains a LoRA on w in [4, 5]; N = 40, so that 4
phases are of equal length and a stock scheduler visits their edges; no adversarial term.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastdiff.diffusion.prediction import Prediction
from fastdiff.diffusion.process import LEVELS
from fastdiff.diffusion.solvers import ddim_step
from fastdiff.errors import UserError
from fastdiff.models.teacher import Teacher
from fastdiff.trainers._segments import segment_around, segment_edges
from fastdiff.trainers.lcm import LCM
from fastdiff.trainers.method import Paper, Trial
from fastdiff.trainers.trajectory import Sampler

_TRIAL = {"guidance_range": (1.0, 1.0), "pairs": 20_000, "pair_steps": 40, "pair_guidance_scale": 1.0, "lr": 1e-3}


@dataclass(kw_only=True)
class PCM(LCM):
    """Few-step student that samples deterministically, each step consistent within its own phase; needs prompts only."""

    info: ClassVar[Paper] = Paper(
        title="Phased Consistency Models",
        venue="NeurIPS",
        year=2024,
        arxiv="2405.18407",
        sheet="few_step_diffusion.md: Hyper-SD (PCM relation)",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"flow_map": 0.086, "sliced_w2": 0.1, "stray": 0.076}, max_steps=2000),
        "gaussian": Trial(fields=_TRIAL, bounds={"flow_map": 0.026, "w2": 0.33, "axes": 0.15}, max_steps=2000),
    }
    sampler: ClassVar[Sampler] = "ddim"

    original_steps: int = 40
    """Times that it is distilled at; the phases divide them."""

    def validate(self, teacher: Teacher) -> None:
        super().validate(teacher)
        if teacher.pipeline is not None and self.original_steps % self.steps:
            even = [n for n in range(self.steps, LEVELS, self.steps) if LEVELS % n == 0]
            near = min(even, key=lambda n: abs(n - self.original_steps), default=self.steps)
            raise UserError(
                f"original_steps is {self.original_steps} and steps {self.steps}: the phases would be of unequal length, and no "
                f"stock scheduler visits their edges. Give original_steps={near}."
            )

    def levels(self) -> list[int]:
        skip = LEVELS // self.original_steps
        return [skip * edge - 1 for edge in reversed(self.edges()[1:])]

    def edges(self) -> list[int]:
        """e_0 .. e_M of the module docstring."""
        return segment_edges(self.original_steps, self.steps)

    def neighbours(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level, lower, _ = super().neighbours(n)
        return level, lower, segment_around(n, self.original_steps, self.steps)[0]

    def compared(self, prediction: Prediction, end: Tensor) -> Tensor:
        """The state at the edge."""
        return ddim_step(prediction, end)
