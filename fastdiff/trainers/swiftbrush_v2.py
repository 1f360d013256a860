"""SwiftBrush v2: variational score distillation with a clamped CLIP term, and two such students merged into one.

    student:     SwiftBrush's + w(step) mean max(0, 0.35 - cos( E_img(Dec(f)), E_txt(y) )),   w from 0.1 to 0
    fake score:  SwiftBrush's, LoRA of rank 64 and alpha 128
    result:      lambda A + (1 - lambda) B,  lambda = 0.5       A: a full student without the CLIP term, B: a LoRA student with it

Each run trains one student, ``student="full"`` or ``"lora"`` (rank 256, alpha 512: two thirds of the memory of a full one are its
gradients and moments); ``fastdiff.pipelines.merge_students`` merges the two exported folders. Not here: the paper's start
from SD-Turbo, its light decoder and its optional image regulariser. Its text reports FID 12.26 for a guidance of 4.5 and 9.64
for 2. Dao et al., ECCV 2024, arXiv 2408.14176.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from fastdiff.errors import UserError
from fastdiff.models.roles import Role
from fastdiff.trainers._reward import RewardedMethod
from fastdiff.trainers.method import Batch, Paper, Trial

_TRIAL = {"guidance_scale": 1.0, "lr": 2e-4, "fake_score_lr": 2e-3, "clip_weight": 0.0}
_ADAPTER = {**_TRIAL, "student": "lora", "student_rank": 64, "student_lora_alpha": 64.0, "lr": 3e-4}


@dataclass(kw_only=True)
class SwiftBrushV2(RewardedMethod):
    """SwiftBrush with a clamped CLIP term and a full or LoRA student; two students can be merged."""

    info: ClassVar[Paper] = Paper(
        title="SwiftBrush v2: Make Your One-step Diffusion Model Better Than Its Teacher",
        venue="ECCV",
        year=2024,
        arxiv="2408.14176",
        sheet="few_step_diffusion.md: SwiftBrush (SBv2)",
    )

    trials: ClassVar[Mapping[str, Trial]] = {
        "ring": Trial(fields=_TRIAL, bounds={"sliced_w2": 0.2, "mode_mass": 0.45, "stray": 0.35}, max_steps=4000),
        "gaussian": Trial(fields=_ADAPTER, bounds={"w2": 1.5, "covariance": 0.3}, max_steps=2000),
    }

    guidance_scale: float = 4.5
    """Guidance of teacher and fake score alike; 1 is off."""
    lora_alpha: float = 128.0
    """LoRA alpha of the fake score."""
    student: Literal["full", "lora"] = "full"
    """How the student trains: full, or lora, an adapter on the teacher's backbone that the export merges."""
    student_rank: int = 256
    """LoRA rank of the student when it is an adapter."""
    student_lora_alpha: float = 512.0
    """LoRA alpha of the student when it is an adapter."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student not in {"full", "lora"}:
            raise UserError(f"student is {self.student!r}: expected full or lora.")

    @classmethod
    def name(cls) -> str:
        return "swiftbrush-v2"

    def guided(self) -> bool:
        return self.guidance_scale != 1

    def scale(self, batch: Batch) -> float:
        return self.guidance_scale

    def student_role(self) -> Role:
        return Role(train=self.student, lr=self.lr, rank=self.student_rank, lora_alpha=self.student_lora_alpha)
