"""LCM: one x0 for all times of a guided trajectory, the scale of the guidance an input of the student.

    s ~ U[guidance_range]                                       s = w + 1 in the paper's convention
    x_u = DDIM step from x_t, teacher guided at s
    L   = mean( sqrt((f(x_t, t, s) - sg f-(x_u, u, s))^2 + c^2) - c ),      f- <- decay f- + (1 - decay) f

Times, boundary and sampler: ``_latent``. Trained: the student, a full copy of the teacher's network with a guidance embedding
(``models.guidance_embedding``); the target f- follows it after every update. A range of equal ends needs no embedding, and gets
none.
Luo et al., Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference (2023), arXiv 2310.04378.
Departures: x0 is the teacher's own stored result, not an image; learning rate and weight decay are those of diffusers' script.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdiff.errors import UserError
from fastdiff.models.condition import with_guidance
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.roles import Role, Roles
from fastdiff.models.teacher import Teacher
from fastdiff.pipelines.export import Schedule
from fastdiff.pipelines.flow import schedule_of
from fastdiff.trainers._latent import LatentConsistency
from fastdiff.trainers.method import Batch, Calls, Paper, Trial
from fastdiff.trainers.trajectory import Generators

_TRIAL = {"guidance_range": (1.0, 1.0), "steps": 1, "pairs": 20_000, "pair_steps": 40, "pair_guidance_scale": 1.0, "lr": 1e-3}


@dataclass(kw_only=True)
class LCM(LatentConsistency):
    """Few-step student that is told its guidance scale; needs prompts only and samples with fresh noise between its calls."""

    info: ClassVar[Paper] = Paper(
        title="Latent Consistency Models: Synthesizing High-Resolution Images with Few-Step Inference",
        venue="arXiv",
        year=2023,
        arxiv="2310.04378",
        sheet="few_step_diffusion.md: Consistency family (LCM)",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"flow_map": 0.15, "sliced_w2": 0.13, "stray": 0.17}, max_steps=3000),
        "gaussian": Trial(fields=_TRIAL, bounds={"flow_map": 0.08, "w2": 0.3, "axes": 0.55}, max_steps=3000),
    }

    guidance_range: tuple[float, float] = (6.0, 16.0)
    """Scales of the teacher's guidance, 1 is off; drawn uniformly and told to the student, or equal ends and nothing to tell."""
    sample_guidance_scale: float | None = None
    """The scale that the student samples at; None is the middle of the range."""
    decay: float = 0.95
    """Of the target's average: the share of itself that it keeps at each update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance_range
        if not 1 <= low <= high:
            raise UserError(f"guidance_range is {self.guidance_range}: expected 1 <= low <= high; 1 is off.")
        if self.sample_guidance_scale is not None and not low <= self.sample_guidance_scale <= high:
            raise UserError(
                f"sample_guidance_scale is {self.sample_guidance_scale}, outside guidance_range {self.guidance_range}: the student "
                "would be asked for a scale that it never saw."
            )
        if not 0 <= self.decay < 1:
            raise UserError(f"decay is {self.decay}: it must be in [0, 1); at 1 the target would stay the teacher.")

    @property
    def embeds(self) -> bool:
        """Whether the student is told its scale."""
        return self.guidance_range[0] != self.guidance_range[1]

    @property
    def sample_scale(self) -> float:
        """The scale that the student samples at."""
        return sum(self.guidance_range) / 2 if self.sample_guidance_scale is None else self.sample_guidance_scale

    def roles(self) -> dict[str, Role]:
        build = _told if self.embeds else None
        return {
            "student": Role(train="full", lr=self.lr, weight_decay=0.01, build=build),
            "target": Role(train="average", build=build),
        }

    def validate(self, teacher: Teacher) -> None:
        super().validate(teacher)
        if not self.embeds:
            return
        try:
            teacher.family.guidance_embedding()
        except NotImplementedError as error:
            raise UserError(
                f"{teacher.name}: {error} Trained at the scales {self.guidance_range} without knowing which, the student would "
                "learn their mean. Pass a guidance_range of equal ends, such as (3.0, 3.0), or (1.0, 1.0) for no guidance."
            ) from error

    def schedule(self, teacher: Teacher) -> Schedule:
        scale = self.sample_scale if self.embeds else None
        options: dict[str, Any] = {"original_steps": self.original_steps, "guidance_scale": scale}
        options["guidance_range"] = self.guidance_range if self.embeds else None
        return schedule_of(teacher, self.timesteps(teacher), self.sampler, **options)

    def calls(self, updates: tuple[str, ...]) -> dict[str, Calls]:
        guided = 1 if self.guidance_range == (1, 1) else 2
        return {"student": Calls(1, 1), "teacher": Calls(guided, 0), "target": Calls(1, 0)}

    def loss(self, update: str, batch: Batch, roles: Roles) -> dict[str, Tensor]:
        low, high = self.guidance_range
        if not self.embeds:
            return self.consistency(batch, roles, low, target="target")
        scale = low + (high - low) * batch.draws.uniform("guidance_scale")
        return self.consistency(batch, roles, scale, target="target", told=lambda cond: with_guidance(cond, scale))

    def after(self, update: str, roles: Roles) -> None:
        roles.follow("target", "student", self.decay)

    def sample(self, student: Denoiser, noise: Tensor, cond: Any, generators: Generators = None) -> Tensor:
        return super().sample(student, noise, self.told(cond, noise), generators)

    def told(self, cond: Any, noise: Tensor) -> Any:
        """The condition of samples from ``noise``, with the scale that they are made at, if the student is told one."""
        if not self.embeds:
            return cond
        return with_guidance(cond, torch.full((len(noise),), self.sample_scale, dtype=torch.float64, device=noise.device))

    def teacher_guidance(self) -> float:
        return self.sample_scale


def _told(teacher: Teacher) -> nn.Module:
    return teacher.family.guidance_embedding()(teacher.family.backbone)
